"""Loading of weights from the model's own or a plain LLaMA's checkpoint; incomplete checkpoints raise."""

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
    """Mixin with `from_pretrained` and `save_pretrained`, for a model with a LLaMA's weights and possibly a few more."""

    # Old LLaMA checkpoints hold the rotary buffers, which are now computed.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]
    own_weights: ClassVar[tuple[str, ...]] = ()  # names of weights that a LLaMA lacks; they may be missing

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """Identical to `PreTrainedModel.from_pretrained` except: a plain LLaMA checkpoint loads too, and an incomplete
        checkpoint raises.

        Raises:
            ValueError: another model type; missing, unexpected or mismatched weights (missing `own_weights` are allowed); a
                damaged file.
        """
        try:
            with _without_report():
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
                )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: weights are truncated or not safetensors: {error}"
            ) from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            wrong = sorted(str(key) for key in info[kind] if kind != "missing_keys" or not cls._is_own(key))
            if wrong:
                beside = f" beside {', '.join(cls.own_weights)}" if cls.own_weights and kind == "missing_keys" else ""
                raise ValueError(
                    f"pretrained_model_name_or_path={str(pretrained_model_name_or_path)!r}: {len(wrong)} "
                    f"{kind.replace('_', ' ')}{beside}: {', '.join(wrong[:5])}{', …' if wrong[5:] else ''}: "
                    f"expected a complete checkpoint of type llama or {cls.config_class.model_type}"
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: str | PathLike, is_main_process: bool = True, **kwargs) -> None:
        """Identical to `PreTrainedModel.save_pretrained` except: it adds a model card if the folder has no README.md."""
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
    specified in the paper). Does nothing on the meta device.
    """
    weights = [embed_tokens.weight, query_embed.weight]
    if is_deepspeed_zero3_enabled():  # each rank has a part of each weight
        # Not an import statement, as transformers requires all imports of a checkpoint's code to be installed.
        whole = import_module("deepspeed").zero.GatheredParameters(weights, modifier_rank=0)
    else:
        whole = nullcontext()
    with torch.no_grad(), whole:
        tokens, query = weights
        if tokens.is_meta or tokens.numel() == 0:
            return
        query.copy_(query_embed_start(tokens))


def query_embed_start(tokens: torch.Tensor) -> torch.Tensor:
    """Returns (D,) where `query_embed` starts, given the token embeddings (V, D); see `start_query_embed`."""
    mean = tokens.float().mean(dim=0)
    scale = tokens.float().pow(2).mean().sqrt() / mean.pow(2).mean().sqrt().clamp_min(1e-12)
    return mean * scale


@contextmanager
def _without_report() -> Iterator[None]:
    """Suppresses the library's report of missing weights, as wrong ones raise and the others are expected."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
