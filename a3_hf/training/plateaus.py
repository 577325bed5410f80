"""Plateaus: detect that the loss of a stage has stopped improving."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plateau:
    """End of a stage when its loss is flat (not in the paper, which names an adaptive schedule as future work). In a recipe:
    `until: {flat: 0.02, window: 0.05, at_least: 0.05, at_most: 0.3}`.

    The stage ends when the line fitted to the losses of the last `window` falls by less than `flat`. Noise of standard
    deviation σ in the losses of n steps gives the fall a standard deviation of about σ √(12 / n).

    Attributes:
        flat: nats per token.
        window: length in the curriculum's unit; in steps, once the curriculum is resolved.
        at_least, at_most: bounds of the stage's own length, in the same unit.
    """

    flat: float
    window: int | float
    at_least: int | float
    at_most: int | float


def fitted_fall(losses: Sequence[float]) -> float:
    """Returns the fall of the least-squares line through equally spaced `losses` (two or more), from first to last."""
    centre = (len(losses) - 1) / 2
    slope = math.fsum((index - centre) * loss for index, loss in enumerate(losses)) / math.fsum(
        (index - centre) ** 2 for index in range(len(losses))
    )
    return -slope * (len(losses) - 1)
