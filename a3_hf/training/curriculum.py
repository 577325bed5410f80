"""Curriculum: the stages (`ar`, `expand`, `permute`) of a run, and the orders drawn in them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import torch
from transformers.utils import logging

from a3_hf.models.a3_llama.orders import Generators, GroupOrder
from a3_hf.settings import check_keys

from .order_sampling import UniformInt, draw_rows
from .plateaus import Plateau
from .schedule import AdaptiveSchedule, Schedule, StageAtStep
from .stages import STAGES, UNITS, Stage, check_stage, from_plain

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, and the unit of their ends: `"steps"`, `"tokens"` or `"fraction"` of the run.

    Raises:
        ValueError: stages that are unknown, out of order or overlapping, or invalid values; the message names the stage.

    Examples:
        >>> stages = [{"name": "ar", "until": 0.5}, {"name": "permute", "group_size": [1, 2]}]
        >>> schedule = Curriculum.from_config(stages, unit="fraction").resolve(max_steps=4)
        >>> [schedule.at(step).group_size for step in range(4)]
        [1, 1, 1, 2]
    """

    stages: tuple[Stage, ...]
    unit: str = "fraction"

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"curriculum unit={self.unit!r}: expected one of {', '.join(UNITS)}")
        if not self.stages:
            raise ValueError(f"the curriculum has no stages: expected one or more of {', '.join(STAGES)}")
        for number, stage in enumerate(self.stages, start=1):
            check_stage(stage, number, self.unit, is_last=number == len(self.stages))
        for number, (before, stage) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=2):
            if STAGES.index(stage.name) < STAGES.index(before.name):
                raise ValueError(
                    f"stage {number} ({stage.name!r}) comes after stage {number - 1} ({before.name!r}); stages come in "
                    f"the order {', '.join(STAGES)}"
                )
            fixed = isinstance(stage.until, int | float) and isinstance(before.until, int | float)
            if fixed and stage.until <= before.until:
                relation = "where" if stage.until == before.until else "before"
                raise ValueError(
                    f"stage {number} ({stage.name!r}) ends at {stage.until}, {relation} stage {number - 1} ends at "
                    f"{before.until}: stages overlap or run backwards"
                )

    @classmethod
    def from_config(cls, stages: Sequence[dict[str, Any]], *, unit: str = "fraction") -> "Curriculum":
        """Builds a curriculum from the plain values of a YAML file: `{"name": …, "until": …, "group_size": …}`. A
        pair is a list, `UniformInt` is `{"draw": [2, 8]}`, `Plateau` is `{"flat": …, "window": …, "at_least": …,
        "at_most": …}`, and shapes are `{"scattered": 3, "spans": 1}`.

        Raises:
            ValueError: the errors of `Curriculum`, and unknown keys of a stage.
        """
        if isinstance(stages, str) or not isinstance(stages, Sequence):
            raise ValueError(f"curriculum stages={stages!r}: expected a list of stages")
        known = [field.name for field in fields(Stage)]
        built = []
        for number, config in enumerate(stages, start=1):
            if not isinstance(config, dict):
                raise ValueError(f"stage {number} is {config!r}: expected the keys {', '.join(known)}")
            check_keys(f"stage {number}", config, known)
            if "name" not in config:
                raise ValueError(f"stage {number} has no name: expected one of {', '.join(STAGES)}")
            label = f"stage {number} ({config['name']!r})"
            built.append(Stage(**{key: from_plain(key, value, label) for key, value in config.items()}))
        return cls(tuple(built), unit)

    def resolve(self, *, max_steps: int, tokens_per_step: int | None = None) -> Schedule | AdaptiveSchedule:
        """Turns the ends into whole steps: a step that begins before a stage's end belongs to it. Stages after a plateau must
        fit even if it is reached as late as possible.

        Args:
            max_steps: update steps of the run.
            tokens_per_step: tokens of one update step over all ranks; needed only for the unit `"tokens"`.

        Raises:
            ValueError: the last stage ends before the run, or a stage has no step in it.
        """
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps}: expected at least 1")
        if self.unit == "tokens" and (tokens_per_step is None or tokens_per_step < 1):
            raise ValueError(f"tokens_per_step={tokens_per_step}: expected at least 1 with the unit 'tokens'")
        # Exact fractions of the written decimals: 0.07 * 100 is 7.000000000000001 and would end one step late.
        scale = {"steps": Fraction(1), "tokens": Fraction(1, tokens_per_step or 1), "fraction": Fraction(max_steps)}
        advice = "" if self.unit == "fraction" else "; unit: fraction follows the length of the run"

        def in_steps(value: int | float) -> int:
            return math.ceil(Fraction(str(value)) * scale[self.unit])

        ends, limits, start = [], [], 0
        for number, stage in enumerate(self.stages, start=1):
            label = f"stage {number} ({stage.name!r})"
            if start >= max_steps:
                raise ValueError(f"{label} would begin at step {start}, but the run has {max_steps} steps{advice}")
            if isinstance(stage.until, Plateau):
                plateau = replace(
                    stage.until,
                    window=in_steps(stage.until.window),
                    at_least=in_steps(stage.until.at_least),
                    at_most=in_steps(stage.until.at_most),
                )
                _check_plateau(plateau, stage, label)
                limits.append(plateau)
                end = start + plateau.at_most
            else:
                end = max_steps if stage.until is None else in_steps(stage.until)
                limits.append(min(end, max_steps))
            if end <= start:
                raise ValueError(f"{label} has no step of its own: it would begin and end at step {start}")
            start = end
            ends.append(min(end, max_steps))
        if ends[-1] < max_steps:
            raise ValueError(
                f"{label}, the last, ends at step {ends[-1]}, but the run has {max_steps} steps; leave out its until"
                f"{advice}"
            )
        if any(isinstance(limit, Plateau) for limit in limits):
            return AdaptiveSchedule(self.stages, limits)
        return Schedule(self.stages, tuple(ends))


def draw_order(
    stage: StageAtStep,
    attention_mask: torch.Tensor,
    *,
    given_mask: torch.Tensor | None = None,
    generator: Generators = None,
) -> GroupOrder:
    """Draws the orders of a batch in a stage; `attention_mask` and `given_mask` are (B, S). `generator` (one per row, or one
    for all) is used by `permute` and by stages with several kinds of rows.
    """
    if stage.kinds:
        return draw_rows(stage.kinds, attention_mask, given_mask=given_mask, generator=generator)
    if stage.name == "permute":
        return GroupOrder.scattered(
            attention_mask, group_size=stage.group_size, given_mask=given_mask, generator=generator
        )
    return GroupOrder.contiguous(attention_mask, group_size=stage.group_size, given_mask=given_mask)


def _check_plateau(plateau: Plateau, stage: Stage, label: str) -> None:
    if plateau.window < 2:
        raise ValueError(f"{label}: window={plateau.window} step: expected 2 or more, to fit a line")
    num_sizes = 1 if isinstance(stage.group_size, UniformInt) else len(stage.group_sizes)
    last_size_begins = math.ceil(Fraction(plateau.at_least * (num_sizes - 1), num_sizes))
    if plateau.at_most <= max(plateau.at_least, last_size_begins + plateau.window):
        raise ValueError(
            f"{label}: at_most={plateau.at_most} steps is too short to end at a plateau: at_least is {plateau.at_least}, and "
            f"a window of {plateau.window} steps must fit after the last group size begins, "
            f"{last_size_begins} steps into the stage. Raise at_most, or give until as a number"
        )
