"""Checks of the tensors that callers hand to a model; an error names the argument, what it got and what it takes."""

from typing import Any

import torch


def check_token_ids(name: str, ids: Any, vocab_size: int, *, where: torch.Tensor | None = None) -> torch.LongTensor:
    """The ids (B, S) as int64.

    Args:
        where: (B, S), True where an id must be one of the vocabulary; None: everywhere.

    Raises:
        ValueError: no tensor of integers of two dimensions, an empty one, or an id outside the vocabulary.
    """
    check_integers(name, ids, dimensions=2)
    if not ids.numel():
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; it takes at least one row and one token")
    check_in_vocabulary(name, ids, vocab_size, where=where)
    return ids.long()


def check_in_vocabulary(name: str, ids: torch.Tensor, vocab_size: int, *, where: torch.Tensor | None = None) -> None:
    """Raises a ValueError for ids (B, S), at `where` (B, S; None: anywhere), that are not in 0 .. `vocab_size` − 1."""
    wrong = (ids < 0) | (ids >= vocab_size)
    if where is not None:
        wrong = wrong & where
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {int(ids[row, column])} at row {row}, column {column}; it takes ids of the model's vocabulary, "
            f"0 to {vocab_size - 1}"
        )


def check_integers(name: str, ids: Any, *, dimensions: int | None = None) -> None:
    """Raises a ValueError for anything but a tensor of integers, of so many dimensions."""
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}; it takes a tensor of integers")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} has dtype {ids.dtype}; it takes integers")
    if dimensions is not None and ids.ndim != dimensions:
        takes = "(batch, sequence)" if dimensions == 2 else f"{dimensions} dimensions"
        raise ValueError(f"{name} has shape {tuple(ids.shape)}; it takes {takes}")


def check_mask(name: str, mask: Any, shape: tuple[int, ...], *, of: str = "input_ids") -> torch.BoolTensor:
    """The mask as booleans; it may hold 0 and 1 in any other dtype.

    Raises:
        ValueError: no tensor, another shape than `shape`, which is that of the argument `of`, or other values.
    """
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"{name} is a {type(mask).__name__}; it takes a tensor of booleans, or of 0 and 1")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; it takes that of {of}, {tuple(shape)}")
    if mask.dtype == torch.bool:
        return mask
    as_bool = mask.to(torch.bool)
    if (as_bool.to(mask.dtype) != mask).any():
        raise ValueError(f"{name} holds values of dtype {mask.dtype} other than 0 and 1; it takes booleans, or 0 and 1")
    return as_bool
