"""Loading weights: from a plain LLaMA's checkpoint as well, and never from half of one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from .model_card import USE, WITHOUT_PACKAGE, build_card, write_card


class WholeCheckpointMixin:
    """`from_pretrained` for a model whose weights are a LLaMA's and perhaps a few more."""

    # Old LLaMA checkpoints carry the rotary buffers, which are computed now.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]
    own_weights: ClassVar[tuple[str, ...]] = ()  # those that a LLaMA has not, which may be missing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """Identical to `PreTrainedModel.from_pretrained` except: a plain LLaMA checkpoint loads as well as one of the model's
        own, and only a complete one does.

        Raises:
            ValueError: the checkpoint is of another model type, or lacks a weight that a LLaMA has, or has one that the model
                does not, or one of another shape.
        """
        try:
            with _without_report():
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: its weights are cut off or no safetensors: {error}"
            ) from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            wrong = sorted(str(key) for key in info[kind] if kind != "missing_keys" or not cls._is_own(key))
            if wrong:
                beside = f" beside {', '.join(cls.own_weights)}" if cls.own_weights and kind == "missing_keys" else ""
                raise ValueError(
                    f"pretrained_model_name_or_path={str(pretrained_model_name_or_path)!r}: {len(wrong)} "
                    f"{kind.replace('_', ' ')}{beside}: {', '.join(wrong[:5])}{', …' if wrong[5:] else ''}; it "
                    f"takes a complete checkpoint of a LLaMA or of the type {cls.config_class.model_type}"
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | PathLike, is_main_process: bool = True, **kwargs) -> None:
        """Identical to `PreTrainedModel.save_pretrained` except: a folder without a README.md gets a model card."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            use = USE + (WITHOUT_PACKAGE if self._auto_class else "")
            card = build_card(Path(save_directory).resolve().name, use=use, tags=[self.config.model_type])
            write_card(card, save_directory, replace=False)

    @classmethod
    def _is_own(cls, key: str) -> bool:
        return any(name in key for name in cls.own_weights)


def start_query_embed(embed_tokens: nn.Embedding, query_embed: nn.Embedding) -> None:
    """Sets `query_embed` (1, D) to the mean token embedding, scaled to the root mean square of the token embeddings (not
    specified in the paper). On the meta device it is left as initialised.
    """
    weights = [embed_tokens.weight, query_embed.weight]
    if is_deepspeed_zero3_enabled():  # each rank has a part of each weight
        # No import statement: those of a checkpoint's code must be met wherever it is loaded.
        whole = import_module("deepspeed").zero.GatheredParameters(weights, modifier_rank=0)
    else:
        whole = nullcontext()
    with torch.no_grad(), whole:
        tokens, query = weights
        if tokens.is_meta or tokens.numel() == 0:
            return
        mean = tokens.float().mean(dim=0)
        scale = tokens.float().pow(2).mean().sqrt() / mean.pow(2).mean().sqrt().clamp_min(1e-12)
        query.copy_(mean * scale)


@contextmanager
def _without_report() -> Iterator[None]:
    """Leaves out the library's table of missing weights: what may not be missing raises, and the rest is no fault."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
