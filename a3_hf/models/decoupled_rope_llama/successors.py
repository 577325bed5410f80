"""Successors: the position that each token's query predicts (second paper)."""

import torch

from .configuration_decoupled_rope_llama import SINGLETONS_ONLY


def successors_of(
    positions: torch.Tensor,
    real: torch.Tensor,
    target_position_ids: torch.Tensor | None = None,
    num_before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns (B, C) the position of each token's successor. The last token's is that of the slots after it, or else, as in
    LLaMA, the next position.

    Args:
        positions: (B, C) positions of rows in generation order.
        real: (B, C) bool, False at padding.
        target_position_ids: (B, Q) positions of slots, each with `num_before` (B, Q) tokens before it.

    Raises:
        ValueError: a slot whose position is not that of the successor of the token before it.
    """
    count = real.sum(dim=1, keepdim=True)
    place = torch.arange(positions.shape[1], device=positions.device)
    successors = torch.where(place < count - 1, positions.roll(-1, dims=1), positions + 1)
    if target_position_ids is None:
        return successors
    is_behind = num_before == count
    farthest = target_position_ids.masked_fill(~is_behind, -1).amax(dim=1, keepdim=True)
    successors = torch.where((place == count - 1) & is_behind.any(dim=1, keepdim=True), farthest, successors)
    if torch.compiler.is_compiling():
        return successors
    asked = successors.gather(1, (num_before - 1).clamp_min(0))
    amiss = (num_before > 0) & (asked != target_position_ids)
    if amiss.any():
        row, slot = amiss.nonzero()[0].tolist()
        raise ValueError(
            f"target_position_ids holds {int(target_position_ids[row, slot])} at row {row}, slot {slot}: expected "
            f"{int(asked[row, slot])}, which the token before it predicts. {SINGLETONS_ONLY}"
        )
    return successors
