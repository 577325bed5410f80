"""The curriculum: which stage (`ar`, `expand`, `permute`) and which group size belong to a training step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .orders import Generators, GroupOrder

logger = logging.get_logger(__name__)

STAGES = ("ar", "expand", "permute")
UNITS = ("steps", "tokens", "fraction")


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum.

    Attributes:
        name: `"ar"` (left to right, one token at a time), `"expand"` (neighbouring tokens in groups, left to right) or
            `"permute"` (groups of a random permutation).
        until: where the stage ends, counted from the start of the run in the curriculum's unit; None: at the end.
        group_size: a whole number, or a pair (first, last): the size grows by whole numbers, each with an equal share
            of the stage. A stage of fewer steps than sizes leaves some out.
    """

    name: str
    until: int | float | None = None
    group_size: int | tuple[int, int] = 1

    @property
    def group_sizes(self) -> range:
        """The sizes in the order in which they come: (1, 4) → 1, 2, 3, 4."""
        first, last = (self.group_size, self.group_size) if isinstance(self.group_size, int) else self.group_size
        return range(first, last + 1)


@dataclass(frozen=True)
class StageAtStep:
    """What a step trains on: the stage's name, its group size, and its index in the curriculum."""

    name: str
    group_size: int
    index: int


@dataclass(frozen=True)
class Schedule:
    """A curriculum in whole steps. `ends[i]` is the step at which stage i is over: it holds steps `ends[i - 1]` (0 for
    the first) up to but not including `ends[i]`.
    """

    stages: tuple[Stage, ...]
    ends: tuple[int, ...]

    def at(self, step: int) -> StageAtStep:
        """The stage of a step, counted from 0; a step belongs to the stage in which it begins.

        Raises:
            ValueError: a step outside the run.
        """
        if not 0 <= step < self.ends[-1]:
            raise ValueError(f"step={step} is outside the run of {self.ends[-1]} steps")
        index = next(index for index, end in enumerate(self.ends) if step < end)
        start = self.ends[index - 1] if index else 0
        sizes = self.stages[index].group_sizes
        share = (step - start) * len(sizes) // (self.ends[index] - start)
        return StageAtStep(self.stages[index].name, sizes[share], index)


@dataclass(frozen=True)
class Curriculum:
    """The stages of a run, and the unit of their ends: `"steps"`, `"tokens"` or `"fraction"` of the run.

    Raises:
        ValueError: stages that are unknown, out of order or overlapping, or values that they don't take; the message
            says which stage and what it takes.

    Example:
        >>> stages = [{"name": "ar", "until": 0.5}, {"name": "permute", "group_size": [1, 2]}]
        >>> schedule = Curriculum.from_config(stages, unit="fraction").resolve(max_steps=4)
        >>> [schedule.at(step).group_size for step in range(4)]
        [1, 1, 1, 2]
    """

    stages: tuple[Stage, ...]
    unit: str = "fraction"

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"curriculum unit={self.unit!r} is not known; it takes one of {', '.join(UNITS)}")
        if not self.stages:
            raise ValueError(f"the curriculum has no stages; it takes one or more of {', '.join(STAGES)}")
        for number, stage in enumerate(self.stages, start=1):
            _check_stage(stage, number, self.unit, is_last=number == len(self.stages))
        for number, (before, stage) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=2):
            if STAGES.index(stage.name) < STAGES.index(before.name):
                raise ValueError(
                    f"stage {number} ({stage.name!r}) comes after stage {number - 1} ({before.name!r}); stages come in "
                    f"the order {', '.join(STAGES)}"
                )
            if stage.until is not None and stage.until <= before.until:
                relation = "where" if stage.until == before.until else "before"
                raise ValueError(
                    f"stage {number} ({stage.name!r}) ends at {stage.until}, {relation} stage {number - 1} ends at "
                    f"{before.until}: stages overlap or run backwards"
                )

    @classmethod
    def from_config(cls, stages: Sequence[dict[str, Any]], *, unit: str = "fraction") -> "Curriculum":
        """Builds a curriculum from plain values, as a YAML file holds them: `{"name": …, "until": …, "group_size": …}`.

        Raises:
            ValueError: as for `Curriculum`, and keys that a stage does not take.
        """
        if isinstance(stages, str) or not isinstance(stages, Sequence):
            raise ValueError(f"curriculum stages={stages!r}; it takes a list of stages")
        known = [field.name for field in fields(Stage)]
        built = []
        for number, config in enumerate(stages, start=1):
            if not isinstance(config, dict):
                raise ValueError(f"stage {number} is {config!r}; it takes the keys {', '.join(known)}")
            unknown = [str(key) for key in config if key not in known]
            if unknown:
                raise ValueError(
                    f"stage {number} has unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(unknown)}; it "
                    f"takes {', '.join(known)}"
                )
            if "name" not in config:
                raise ValueError(f"stage {number} has no name; it takes one of {', '.join(STAGES)}")
            if isinstance(config.get("group_size"), list):
                config = {**config, "group_size": tuple(config["group_size"])}
            built.append(Stage(**config))
        return cls(tuple(built), unit)

    def resolve(self, *, max_steps: int, tokens_per_step: int | None = None) -> Schedule:
        """Turns the ends into whole steps: a step that begins before a stage's end belongs to it.

        Args:
            max_steps: update steps of the run.
            tokens_per_step: tokens of one update step over all ranks; needed for the unit `"tokens"` alone.

        Raises:
            ValueError: the last stage ends before the run, or a stage has no step in it.
        """
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps}; a curriculum takes a run of at least one step")
        if self.unit == "tokens" and (tokens_per_step is None or tokens_per_step < 1):
            raise ValueError(f"tokens_per_step={tokens_per_step}; the unit 'tokens' takes a number of at least 1")
        # Fractions of the decimal as it was written: 0.07 * 100 is 7.000000000000001, which would end one step late.
        scale = {"steps": Fraction(1), "tokens": Fraction(1, tokens_per_step or 1), "fraction": Fraction(max_steps)}
        advice = "" if self.unit == "fraction" else "; unit: fraction follows the length of the run"
        ends, start = [], 0
        for number, stage in enumerate(self.stages, start=1):
            label = f"stage {number} ({stage.name!r})"
            if start >= max_steps:
                raise ValueError(f"{label} would begin at step {start}, but the run has {max_steps} steps{advice}")
            end = max_steps if stage.until is None else math.ceil(Fraction(str(stage.until)) * scale[self.unit])
            if end <= start:
                raise ValueError(f"{label} has no step of its own: it would begin and end at step {start}")
            start = end
            ends.append(min(end, max_steps))
        if ends[-1] < max_steps:
            raise ValueError(
                f"{label}, the last, ends at step {ends[-1]}, but the run has {max_steps} steps; leave out its until"
                f"{advice}"
            )
        return Schedule(self.stages, tuple(ends))


def draw_order(
    stage: StageAtStep,
    attention_mask: torch.Tensor,
    *,
    given_mask: torch.Tensor | None = None,
    generator: Generators = None,
) -> GroupOrder:
    """Draws the orders of a batch as its stage says; `attention_mask` and `given_mask` are (B, S). Only `permute`
    leaves anything to chance, and so to `generator` (one per row, or one for all).
    """
    if stage.name == "permute":
        return GroupOrder.scattered(
            attention_mask, group_size=stage.group_size, given_mask=given_mask, generator=generator
        )
    return GroupOrder.contiguous(attention_mask, group_size=stage.group_size, given_mask=given_mask)


class CurriculumCallback(TrainerCallback):
    """Says when a stage or a group size begins, and asks for an evaluation at the last step of each stage (unless
    `eval_strategy` is "no"), so that the losses before and after each stage are known. It holds no state: what a step
    trains on follows from the step alone, and so it does after a resume.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        step = state.global_step
        stage = self.schedule.at(step)
        if state.is_world_process_zero and (step == 0 or stage != self.schedule.at(step - 1)):
            start = self.schedule.ends[stage.index - 1] if stage.index else 0
            event = "begins" if step == start else "goes on"
            message = f"step {step}: stage {stage.name} {event}, group size {stage.group_size}"
            logger.info(message)
            tqdm.write(message)
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        if state.global_step in self.schedule.ends and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True
        return control


def _check_stage(stage: Stage, number: int, unit: str, *, is_last: bool) -> None:
    if stage.name not in STAGES:
        raise ValueError(f"stage {number} is called {stage.name!r}; it takes one of {', '.join(STAGES)}")
    label = f"stage {number} ({stage.name!r})"

    if stage.until is None:
        if not is_last:
            raise ValueError(f"{label} has no until; only the last stage may do without")
    elif isinstance(stage.until, bool) or not isinstance(stage.until, int | float) or not math.isfinite(stage.until):
        raise ValueError(f"{label} has until={stage.until!r}; it takes a number")
    elif unit == "fraction" and not 0 < stage.until <= 1:
        raise ValueError(f"{label} ends at {stage.until}; a fraction of the run is above 0 and at most 1")
    elif unit != "fraction" and (stage.until <= 0 or stage.until != int(stage.until)):
        raise ValueError(f"{label} ends at {stage.until}; {unit} are whole numbers of at least 1")

    pair = stage.group_size if isinstance(stage.group_size, tuple) else (stage.group_size, stage.group_size)
    if len(pair) != 2 or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in pair):
        raise ValueError(
            f"{label} has group_size={stage.group_size!r}; it takes a whole number of at least 1, or a pair (first, "
            "last)"
        )
    if pair[0] > pair[1]:
        raise ValueError(f"{label} has group_size={stage.group_size!r}; a pair (first, last) grows")
    if stage.name == "ar" and pair != (1, 1):
        raise ValueError(
            f"{label} has group_size={stage.group_size!r}; ar is one token at a time (group_size 1), expand takes more"
        )
