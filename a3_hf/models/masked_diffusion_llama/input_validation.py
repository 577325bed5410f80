"""Checks of the arguments of masked diffusion's forward."""

import torch

from a3_hf.models.a3_llama.input_validation import check_integers, check_numbers, check_padding_mask


def check_shapes(
    shape: tuple[int, int],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    labels: torch.Tensor | None,
    loss_weights: torch.Tensor | None,
    target_columns: torch.Tensor | None,
    document_ids: torch.Tensor | None,
) -> None:
    """Raises ValueError for arguments that don't fit tokens of `shape` (B, S), or each other."""
    if labels is not None and target_columns is not None:
        raise ValueError("labels and target_columns exclude each other: expected one of them")
    if loss_weights is not None and labels is None:
        raise ValueError("loss_weights needs labels")
    if attention_mask is not None:
        check_padding_mask("attention_mask", attention_mask, shape[0], 0, shape[1])
    if position_ids is not None:
        check_numbers("position_ids", position_ids, at_least=0)
    if document_ids is not None:
        check_integers("document_ids", document_ids)
    if target_columns is not None:
        check_numbers("target_columns", target_columns, at_least=0, at_most=shape[1] - 1)
        if target_columns.ndim != 2 or target_columns.shape[0] != shape[0]:
            raise ValueError(f"target_columns has shape {tuple(target_columns.shape)}: expected ({shape[0]}, slots)")
    for name, tensor, expected in (
        ("position_ids", position_ids, {shape, (1, shape[1])}),
        ("document_ids", document_ids, {shape}),
        ("loss_weights", loss_weights, {shape, (shape[0], 1)}),
    ):
        if tensor is not None and tuple(tensor.shape) not in expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected the shape of input_ids, {shape}")
