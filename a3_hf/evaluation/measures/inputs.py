"""Inputs of measurements: documents of a text file, a stretched configuration, the base and the judge to compare with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from a3_hf.adapters.checkpoint_info import CheckpointInfo, check_is_there
from a3_hf.data.documents import split_text

from .text_windows import scale_rope


def read_text(name: str, path: Path) -> str:
    """The content of a UTF-8 file; `name` is the argument that errors name.

    Raises:
        ValueError: a file that can't be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={str(path)!r} can't be read: {error}") from error


def read_documents(path: Path, *, separator: str | None = None, documents: int | None = None) -> list[str]:
    """The documents of a text file, stripped of white space; empty ones are dropped.

    Args:
        separator: the text between documents; None: the file is one document.
        documents: number of documents from the start; negative: from the end; None: all.

    Raises:
        ValueError: a file that can't be read, is not UTF-8 or has no text; a separator that is empty or not in it.
    """
    if documents == 0:
        raise ValueError("documents=0: expected at least 1, or a negative number for the last ones")
    content = read_text("text", path)
    if separator is not None and (not separator or separator not in content):
        raise ValueError(f"separator={separator!r} is not in {str(path)!r}: expected the text between documents")
    found = split_text(content, separator)
    found = found[:documents] if documents is None or documents > 0 else found[documents:]
    if not found:
        raise ValueError(f"text={str(path)!r} contains no text")
    return found


def stretched_config(checkpoint: CheckpointInfo, rope_scaling: Mapping[str, Any]) -> LlamaConfig:
    """The configuration of a model, or of an adapter's base, with its context stretched (see `scale_rope`).

    Raises:
        ValueError: no model there, or an invalid `rope_scaling`.
    """
    config = checkpoint.model_config()
    scale_rope(config, rope_scaling)
    return config


def load_base(path: str, rope_scaling: Mapping[str, Any] | None = None) -> LlamaForCausalLM:
    """The LLaMA at `path`, in evaluation mode, with its context stretched by `rope_scaling`.

    Raises:
        ValueError: no LLaMA that can be loaded, or an invalid `rope_scaling`.
    """
    check_is_there(path, name="base")
    try:
        config = CheckpointInfo.read(path).model_config("llama")
    except (OSError, ValueError) as error:
        raise ValueError(f"base={path!r}: {error}") from error
    if rope_scaling is not None:
        scale_rope(config, rope_scaling)
    return LlamaForCausalLM.from_pretrained(path, config=config).eval()


def load_judge(path: str):
    """The causal model at `path`, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: no causal model that can be loaded.
    """
    check_is_there(path, name="judge")
    try:
        return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"judge={path!r} can't be loaded: {error}") from error
