"""Checks that a model and its losses can be trained on the stages of a curriculum."""

import math
from collections.abc import Sequence

import torch

from a3_hf.models.a3_llama.attention_masks import group_attention_mask, groups_of
from a3_hf.models.decoupled_rope_llama.configuration_decoupled_rope_llama import SINGLETONS_ONLY

from .stages import Stage


def check_stages(
    stages: Sequence[Stage],
    *,
    one_stream: bool,
    implementation: str,
    is_evaluated: bool,
    chunked_loss: bool = False,
    content_loss_weight: float = 0.0,
    distillation_weight: float = 0.0,
) -> None:
    """Checks the stages of a curriculum before training, not hours later when a stage begins.

    Args:
        one_stream: the model is Decoupled RoPE's.
        implementation: the model's attention implementation.
        is_evaluated: whether training has evaluations, whose orders have groups.

    Raises:
        ValueError: one stream and groups of several tokens or a loss between two streams; a weight below 0 or infinite; a
            weight without a stage of left-to-right single tokens; distillation with the chunked loss; an attention
            implementation that can't mask groups.
    """
    weights = {"content_loss_weight": content_loss_weight, "distillation_weight": distillation_weight}
    if one_stream:
        for number, stage in enumerate(stages, start=1):
            if stage.group_sizes[-1] > 1:
                raise ValueError(
                    f"stage {number} ({stage.name!r}): group_size={stage.group_size!r}: expected 1. {SINGLETONS_ONLY}"
                )
        for name, weight in weights.items():
            if weight:
                raise ValueError(
                    f"{name}={weight}: expected 0, because this loss needs two streams and Decoupled RoPE has one"
                )
        return
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}={weight!r}: expected a number of at least 0")
        if weight and not any(stage.name != "permute" and stage.group_sizes[0] == 1 for stage in stages):
            raise ValueError(
                f"{name}={weight} has no effect without rows of single tokens from left to right. Add a stage ar, or expand "
                "with group_size 1"
            )
    if distillation_weight and chunked_loss:
        raise ValueError(
            f"distillation_weight={distillation_weight} with loss='chunked', which has no logits to distil. Set loss='plain'"
        )
    if is_evaluated or any(stage.group_sizes[-1] > 1 or stage.predict_last != 1 for stage in stages):
        group = torch.zeros(1, 1, dtype=torch.long)
        group_attention_mask(implementation, *groups_of(group, group))
