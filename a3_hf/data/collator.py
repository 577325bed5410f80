"""Collator: stacks rows into padded batches and checks them."""

from collections.abc import Mapping, Sequence

import torch

IGNORED_LABEL = -100


class RowCollator:
    """Stacks rows into a batch of (B, S) LongTensors `input_ids`, `attention_mask` and `labels`, and `document_ids` where
    the rows have them; shorter rows are padded at the right.

    Args:
        pad_token_id: token id at padding; models ignore it.

    Raises:
        ValueError: no rows; columns of different lengths; a label at padding; a scored token without a given token before it,
            which would see nothing if its slot came first in an order.

    Example:
        >>> RowCollator()([
        ...     {"input_ids": [1, 7, 8], "attention_mask": [1, 1, 1], "labels": [-100, 7, 8]},
        ...     {"input_ids": [1, 9], "attention_mask": [1, 1], "labels": [-100, 9]},
        ... ])["labels"]
        tensor([[-100,    7,    8],
                [-100,    9, -100]])
    """

    def __init__(self, *, pad_token_id: int = 0):
        self.fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL, "document_ids": 0}

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        if not rows:
            raise ValueError("rows is empty: expected at least one row")
        names = [name for name in self.fill if name != "document_ids" or any(name in row for row in rows)]
        for index, row in enumerate(rows):
            if any(name not in row for name in names):
                raise ValueError(f"row {index} lacks {', '.join(name for name in names if name not in row)}")
            lengths = {name: len(row[name]) for name in names}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"row {index}: expected columns of equal length, got {lengths}")
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor(
                [[*row[name], *[self.fill[name]] * (width - len(row[name]))] for row in rows], dtype=torch.long
            )
            for name in names
        }
        real, scored = batch["attention_mask"] != 0, batch["labels"] != IGNORED_LABEL
        _raise_at((scored & ~real).any(dim=1), "has a label at padding")
        given_before = (real & ~scored).cumsum(dim=1) > 0
        _raise_at(
            (scored & ~given_before).any(dim=1),
            "has a scored token without a given token before it, so its prediction may see nothing. Set the label of the "
            "row's first token (BOS) to -100",
        )
        return batch


def _raise_at(wrong: torch.Tensor, what: str):
    if wrong.any():
        raise ValueError(f"row {wrong.nonzero()[0].item()} {what}")
