#!/bin/sh
# Installs torch by the given command ("pip install" or "uv pip install", with its options): a CPU build where no NVIDIA
# GPU is present and one can be had, else the registry's own build.
set -eu
VERSION=2.13.0
if ! command -v nvidia-smi >/dev/null 2>&1; then
    "$@" "torch==$VERSION+cpu" 2>/dev/null && exit 0  # found beside PIP_FIND_LINKS
    case "$*" in uv*) "$@" --torch-backend cpu "torch==$VERSION" 2>/dev/null && exit 0 ;; esac
fi
"$@" "torch==$VERSION"
