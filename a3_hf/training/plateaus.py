"""Plateaus: when the loss of a stage has stopped improving."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plateau:
    """The end of a stage that ends where its loss is flat (the paper names an adaptive schedule as future work; this one
    is not specified in it). A recipe writes it `until: {flat: 0.02, window: 0.05, at_least: 0.05, at_most: 0.3}`.

    A line is fitted to the losses of the last `window`; the stage is over when that line falls by less than `flat`.
    Noise of standard deviation σ in the losses of n steps gives the fall a standard deviation of about σ √(12 / n).

    Attributes:
        flat: nats per token.
        window, at_least, at_most: lengths in the curriculum's unit, the last two counted from the stage's own start.
    """

    flat: float
    window: int | float
    at_least: int | float
    at_most: int | float


@dataclass(frozen=True)
class PlateauInSteps:
    """A `Plateau` with its lengths in whole steps."""

    flat: float
    window: int
    at_least: int
    at_most: int


def fitted_fall(losses: Sequence[float]) -> float:
    """How far the least-squares line through equally spaced `losses` (two or more) falls from the first to the last."""
    centre = (len(losses) - 1) / 2
    slope = math.fsum((index - centre) * loss for index, loss in enumerate(losses)) / math.fsum(
        (index - centre) ** 2 for index in range(len(losses))
    )
    return -slope * (len(losses) - 1)
