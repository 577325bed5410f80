"""LoRA adapters on all rows or on the query slots alone: settings, layers, loading, merging."""

from .checkpoints import load_model, load_tokenizer, merge

__all__ = ["load_model", "load_tokenizer", "merge"]
