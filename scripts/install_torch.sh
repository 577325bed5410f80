#!/bin/sh
# Installs torch in the version of constraints.txt by the given command ("pip install" or "uv pip install", with its options): a
# CPU build where no NVIDIA GPU is present and one can be had, else the registry's own build.
set -eu
VERSION=$(sed -n 's/^torch==//p' "$(dirname "$0")/../constraints.txt")
if ! command -v nvidia-smi >/dev/null 2>&1; then
    "$@" "torch==$VERSION+cpu" 2>/dev/null && exit 0  # found beside PIP_FIND_LINKS
    case "$*" in uv*) "$@" --torch-backend cpu "torch==$VERSION" 2>/dev/null && exit 0 ;; esac
fi
"$@" "torch==$VERSION"
