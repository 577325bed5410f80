"""Checks that a model and its losses can be trained on the stages of a curriculum."""

import math
from collections.abc import Sequence

from a3_hf.models.decoupled_rope_llama.configuration_decoupled_rope_llama import (
    SINGLETONS_ONLY,
)

from .stages import Stage


def check_one_stream(
    stages: Sequence[Stage], *, content_loss_weight: float = 0.0, distillation_weight: float = 0.0
) -> None:
    """Whether a model of one stream, Decoupled RoPE, can be trained so.

    Raises:
        ValueError: a stage with groups of several tokens, or a loss between two streams.
    """
    for number, stage in enumerate(stages, start=1):
        if stage.group_sizes[-1] > 1:
            raise ValueError(
                f"stage {number} ({stage.name!r}) has group_size={stage.group_size!r}; it takes 1. {SINGLETONS_ONLY}"
            )
    weights = {"content_loss_weight": content_loss_weight, "distillation_weight": distillation_weight}
    for name, weight in weights.items():
        if weight:
            raise ValueError(f"{name}={weight}: it is a loss of two streams, and Decoupled RoPE has one; it takes 0")


def check_two_streams(
    stages: Sequence[Stage], *, chunked_loss: bool, content_loss_weight: float, distillation_weight: float
) -> None:
    """Whether the losses between the two streams have rows to be measured on.

    Raises:
        ValueError: a weight below 0 or without an end; no stage has rows that are left to right, one token at a time;
            distillation where no logits are held.
    """
    weights = {"content_loss_weight": content_loss_weight, "distillation_weight": distillation_weight}
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}={weight!r}; it takes a number of at least 0")
        if weight and not any(stage.name != "permute" and stage.group_sizes[0] == 1 for stage in stages):
            raise ValueError(
                f"{name}={weight}, but no row is left to right, one token at a time: the curriculum has no stage ar, nor "
                "expand with group_size 1"
            )
    if distillation_weight and chunked_loss:
        raise ValueError(
            f"distillation_weight={distillation_weight} with loss='chunked', which holds no logits to teach; use loss='plain'"
        )
