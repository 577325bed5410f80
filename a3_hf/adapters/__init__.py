"""LoRA adapters for A3, on all rows or on query slots only: settings, layers, loading, merging."""

from .checkpoints import load_model, load_tokenizer, merge

__all__ = ["load_model", "load_tokenizer", "merge"]
