"""Orders drawn row by row, if rows of a step differ (rehearsal, sizes, shapes, partial prediction)."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from a3_hf.models.a3_llama.orders import Generators, GroupOrder

SHAPES = ("scattered", "spans", "infilling")


@dataclass(frozen=True)
class UniformInt:
    """An integer drawn uniformly from `smallest` to `largest` inclusive for each row. In a recipe: `{draw: [2, 8]}`."""

    smallest: int
    largest: int

    @property
    def values(self) -> range:
        return range(self.smallest, self.largest + 1)


@dataclass(frozen=True)
class RowSpec:
    """A kind of row and its distribution.

    Attributes:
        weight: its probability, relative to the weights of the other kinds.
        group_sizes: tokens of a group, each size equally likely.
        shapes: shapes with their weights, from `SHAPES` or `"contiguous"` (neighbours, left to right).
        span_lengths: tokens of a span in the shape `"spans"`, each length equally likely.
        predict_last: fraction of the order that is scored, counted from its end.
    """

    weight: float
    group_sizes: range
    shapes: tuple[tuple[str, float], ...] = (("contiguous", 1.0),)
    span_lengths: range = range(1, 2)
    predict_last: Fraction = Fraction(1)

    @property
    def scores_everything(self) -> bool:
        """Whether every open token of a row is in the loss."""
        return self.predict_last == 1 and all(shape != "infilling" for shape, _ in self.shapes)


def draw_rows(
    kinds: Sequence[RowSpec],
    attention_mask: torch.Tensor,
    *,
    given_mask: torch.Tensor | None = None,
    generator: Generators = None,
) -> GroupOrder:
    """Draws the order of each row of a batch: its kind, size, shape and span length, then the permutation; `attention_mask`
    and `given_mask` are (B, S). With a generator per row, a row's order is independent of the other rows.

    Shapes (the paper has `scattered` only):

    - `scattered`: a random permutation, cut into groups.
    - `spans`: runs of neighbouring open tokens in random order, each left to right in groups.
    - `infilling`: one blank with uniformly drawn ends; the text outside is given, as in decoding, and not scored; the blank
      is predicted left to right in groups.
    """
    orders = []
    for row in range(len(attention_mask)):
        source = generator[row] if isinstance(generator, Sequence) else generator
        mask = attention_mask[row : row + 1]
        given = None if given_mask is None else given_mask[row : row + 1]
        orders.append(_draw_row(kinds, mask, given, source))
    is_partial = any(order.context_mask is not None for order in orders)
    return GroupOrder(
        group_ids=torch.cat([order.group_ids for order in orders]),
        attention_mask=torch.cat([order.attention_mask for order in orders]),
        given_mask=torch.cat([order.given_mask for order in orders]),
        context_mask=torch.cat([_context(order) for order in orders]) if is_partial else None,
    )


def _draw_row(
    kinds: Sequence[RowSpec], mask: torch.Tensor, given: torch.Tensor | None, source: torch.Generator | None
) -> GroupOrder:
    # Always six numbers, so that later draws don't depend on the choices made here.
    device = "cpu" if source is None else source.device
    chances = torch.rand(6, generator=source, device=device, dtype=torch.float64).tolist()
    kind = _weighted([(kind, kind.weight) for kind in kinds], chances[0])
    group_size = _nth(kind.group_sizes, chances[1])
    shape = _weighted(kind.shapes, chances[2])
    if shape == "contiguous":
        order = GroupOrder.contiguous(mask, group_size=group_size, given_mask=given)
    elif shape == "scattered":
        order = GroupOrder.scattered(mask, group_size=group_size, given_mask=given, generator=_list(source))
    elif shape == "spans":
        order = GroupOrder.spans(
            mask,
            span_length=_nth(kind.span_lengths, chances[3]),
            group_size=group_size,
            given_mask=given,
            generator=_list(source),
        )
    else:
        is_open = GroupOrder.left_to_right(mask, given_mask=given).scored_mask
        place, length = is_open.long().cumsum(1) - 1, int(is_open.sum())
        first, last = sorted(int(chance * length) for chance in chances[4:])
        blank = is_open & (place >= first) & (place <= last)
        order = GroupOrder.infilling(blank, attention_mask=mask, group_size=group_size)
    return order if kind.predict_last == 1 else order.scoring_last(kind.predict_last)


def _list(source: torch.Generator | None) -> list[torch.Generator] | None:
    return None if source is None else [source]


def _context(order: GroupOrder) -> torch.Tensor:
    return torch.zeros_like(order.attention_mask) if order.context_mask is None else order.context_mask


def _nth(numbers: range, chance: float) -> int:
    return numbers[int(chance * len(numbers))]


def _weighted(choices: Sequence[tuple[Any, float]], chance: float) -> Any:
    """Returns the choice at the fraction `chance`, in [0, 1), of the summed weights."""
    left = chance * sum(weight for _, weight in choices)
    for choice, weight in choices:
        left -= weight
        if left < 0:
            return choice
    return choices[-1][0]  # rounding
