"""The curriculum: which stage (`ar`, `expand`, `permute`) and which group size belong to a training step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .mixtures import Drawn, RowKind, draw_rows
from .orders import Generators, GroupOrder
from .plateaus import Plateau, PlateauInSteps, fitted_fall
from .stages import STAGES, UNITS, Stage, check_stage, from_plain

logger = logging.get_logger(__name__)

# Where `TrainerState.stateful_callbacks`, and so `trainer_state.json`, keeps what an adaptive schedule has found.
RECORD = "AdaptiveSchedule"


@dataclass(frozen=True)
class StageAtStep:
    """What a step trains on: the stage's name, its group size (the largest where rows draw their own), its index in the
    curriculum, and the kinds of its rows where they differ.
    """

    name: str
    group_size: int
    index: int
    kinds: tuple[RowKind, ...] = ()

    @property
    def largest_group(self) -> int:
        """The most tokens that a group of any row can have."""
        return max((kind.group_sizes[-1] for kind in self.kinds), default=self.group_size)

    @property
    def scores_everything(self) -> bool:
        """False where a row may leave open tokens out of the loss."""
        return all(kind.scores_everything for kind in self.kinds)


@dataclass(frozen=True)
class Schedule:
    """A curriculum in whole steps. `ends[i]` is the step at which stage i is over: it holds steps `ends[i - 1]` (0 for
    the first) up to but not including `ends[i]`. A group size that grows has grown by `grown[i]`; None: by the end.
    """

    stages: tuple[Stage, ...]
    ends: tuple[int, ...]
    grown: tuple[int, ...] | None = None

    def at(self, step: int) -> StageAtStep:
        """The stage of a step, counted from 0; a step belongs to the stage in which it begins.

        Raises:
            ValueError: a step outside the run.
        """
        if not 0 <= step < self.ends[-1]:
            raise ValueError(f"step={step} is outside the run of {self.ends[-1]} steps")
        index = next(index for index, end in enumerate(self.ends) if step < end)
        start = self.ends[index - 1] if index else 0
        stage, sizes = self.stages[index], self.stages[index].group_sizes
        grown = self.ends[index] if self.grown is None else self.grown[index]
        share = min((step - start) * len(sizes) // (grown - start), len(sizes) - 1)
        size = sizes[-1] if isinstance(stage.group_size, Drawn) else sizes[share]
        if stage.is_plain:
            return StageAtStep(stage.name, size, index)
        own = stage.kind(sizes if isinstance(stage.group_size, Drawn) else range(size, size + 1), weight=1)
        kinds = [replace(own, weight=1 - stage.rehearsal)]
        if stage.rehearsal:
            weight = stage.rehearsal / index
            kinds += [earlier.kind(earlier.group_sizes, weight=weight) for earlier in self.stages[:index]]
        return StageAtStep(stage.name, size, index, tuple(kinds))


class AdaptiveSchedule:
    """A curriculum in whole steps, some stages of which end where their loss is flat: a `Schedule` that is a function of
    the losses observed so far. Stages that have not ended are shown as long as they may become.

    Args:
        stages: as in the curriculum.
        limits: for each stage the step at which it ends, or its plateau.
    """

    def __init__(self, stages: tuple[Stage, ...], limits: Sequence[int | PlateauInSteps]):
        self.stages = stages
        self.limits = tuple(limits)
        self._found: dict[int, int] = {}  # stage index → the step at which it ended
        self._losses: list[float] = []  # of the current stage at its current group size, at most a window of them
        self._schedule = self._plan()

    @property
    def ends(self) -> tuple[int, ...]:
        return self._schedule.ends

    def at(self, step: int) -> StageAtStep:
        """As `Schedule.at`; of the steps to come, only that of the next is settled."""
        return self._schedule.at(step)

    def watches(self, step: int) -> bool:
        """Whether the loss of a step, counted from 0, may decide where its stage ends."""
        index = self.at(step).index
        return isinstance(self.limits[index], PlateauInSteps) and index not in self._found

    def observe(self, step: int, loss: float) -> str | None:
        """Takes the loss of a step that has been made, counted from 0: nats per token over all ranks, the same number on
        each of them.

        Returns:
            Why the stage ends with this step, or None where it goes on.
        """
        if not self.watches(step):
            return None
        index = self.at(step).index
        plateau, start = self.limits[index], self.ends[index - 1] if index else 0
        if step == start or self.at(step) != self.at(step - 1):
            self._losses = []
        self._losses = [*self._losses, loss][-plateau.window :]
        length = step + 1 - start
        reason = None
        if length >= plateau.at_least and len(self._losses) == plateau.window:
            fall = fitted_fall(self._losses)
            if fall < plateau.flat:
                reason = f"its loss fell by {fall:.4f} over {plateau.window} steps, less than {plateau.flat}"
        if reason is None and length == plateau.at_most:
            reason = f"it has had its {plateau.at_most} steps"
        if reason is not None:
            self._found[index] = step + 1
            self._losses = []
            self._schedule = self._plan()
        return reason

    def record(self) -> dict[str, list]:
        """What has been found and observed, in plain values that JSON keeps to the last bit."""
        return {"ends": [[index, end] for index, end in self._found.items()], "losses": list(self._losses)}

    def restore(self, record: Mapping[str, list] | None, *, step: int) -> None:
        """Goes on where `record` was made, after `step` steps.

        Raises:
            ValueError: no record, though steps have been made; or one of another curriculum.
        """
        self._found, self._losses = {}, []
        self._schedule = self._plan()
        if step == 0:
            return
        if record is None:
            raise ValueError(
                f"the checkpoint of step {step} has no record of where stages ended: the run that wrote it had a fixed "
                "curriculum; go on with that one, or start anew in another output_dir"
            )
        found = dict(record["ends"])
        for index, limit in enumerate(self.limits):
            start, end = self.ends[index - 1] if index else 0, found.pop(index, None)
            is_plateau = isinstance(limit, PlateauInSteps)
            if end is None and not (is_plateau and start + limit.at_most <= step):
                continue
            if end is None or not is_plateau or not limit.at_least <= end - start <= limit.at_most or end > step:
                raise _other_curriculum(step, index, end)
            self._found[index] = end
            self._schedule = self._plan()
        for index, end in found.items():
            raise _other_curriculum(step, index, end)
        self._losses = list(record["losses"])

    def _plan(self) -> Schedule:
        ends, grown, start = [], [], 0
        for index, limit in enumerate(self.limits):
            if isinstance(limit, PlateauInSteps):
                end = self._found.get(index, start + limit.at_most)
                grown.append(start + limit.at_least)
            else:
                end = limit
                grown.append(limit)
            ends.append(end)
            start = end
        return Schedule(self.stages, tuple(ends), tuple(grown))


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
        """Builds a curriculum from plain values, as a YAML file holds them: `{"name": …, "until": …, "group_size": …}`. A
        pair is a list, `Drawn` is `{"draw": [2, 8]}`, `Plateau` is `{"flat": …, "window": …, "at_least": …, "at_most": …}`,
        and shapes are `{"scattered": 3, "spans": 1}`.

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
            label = f"stage {number} ({config['name']!r})"
            built.append(Stage(**{key: from_plain(key, value, label) for key, value in config.items()}))
        return cls(tuple(built), unit)

    def resolve(self, *, max_steps: int, tokens_per_step: int | None = None) -> Schedule | AdaptiveSchedule:
        """Turns the ends into whole steps: a step that begins before a stage's end belongs to it. Where a stage ends at a
        plateau, the stages after it must fit in even if it ends as late as it may.

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

        def in_steps(value: int | float) -> int:
            return math.ceil(Fraction(str(value)) * scale[self.unit])

        ends, limits, start = [], [], 0
        for number, stage in enumerate(self.stages, start=1):
            label = f"stage {number} ({stage.name!r})"
            if start >= max_steps:
                raise ValueError(f"{label} would begin at step {start}, but the run has {max_steps} steps{advice}")
            if isinstance(stage.until, Plateau):
                plateau = PlateauInSteps(
                    flat=stage.until.flat,
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
        if any(isinstance(limit, PlateauInSteps) for limit in limits):
            return AdaptiveSchedule(self.stages, limits)
        return Schedule(self.stages, tuple(ends))


def draw_order(
    stage: StageAtStep,
    attention_mask: torch.Tensor,
    *,
    given_mask: torch.Tensor | None = None,
    generator: Generators = None,
) -> GroupOrder:
    """Draws the orders of a batch as its stage says; `attention_mask` and `given_mask` are (B, S). Only `permute` and
    stages with several kinds of rows leave anything to chance, and so to `generator` (one per row, or one for all).
    """
    if stage.kinds:
        return draw_rows(stage.kinds, attention_mask, given_mask=given_mask, generator=generator)
    if stage.name == "permute":
        return GroupOrder.scattered(
            attention_mask, group_size=stage.group_size, given_mask=given_mask, generator=generator
        )
    return GroupOrder.contiguous(attention_mask, group_size=stage.group_size, given_mask=given_mask)


class CurriculumCallback(TrainerCallback):
    """Says when a stage or a group size begins, and asks for an evaluation at the last step of each stage (unless
    `eval_strategy` is "no"), so that the losses before and after each stage are known; one of `eval_steps` a step later is
    left out. It holds no state: what a step
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
        step, ends = state.global_step, self.schedule.ends
        if step in ends and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True
        elif step - 1 in ends and args.eval_strategy == IntervalStrategy.STEPS and args.eval_steps > 1:
            control.should_evaluate = control.should_evaluate and args.load_best_model_at_end  # it has just been done
        return control


class AdaptiveCallback(CurriculumCallback):
    """Identical to `CurriculumCallback` except: it tells an adaptive schedule the loss of each step, and keeps what the
    schedule has found in the trainer's state. Every checkpoint carries that, and a resumed run goes on from it.

    Args:
        schedule: the trainer's own.
        step_loss: gives the loss of the step that has just been made, in nats per token, the same on every rank.
    """

    def __init__(self, schedule: AdaptiveSchedule, step_loss: Callable[[], float]):
        super().__init__(schedule)
        self.step_loss = step_loss

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.schedule.restore(state.stateful_callbacks.get(RECORD), step=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        step = state.global_step - 1
        if self.schedule.watches(step):
            reason = self.schedule.observe(step, self.step_loss())
            if reason is not None and state.is_world_process_zero:
                message = f"step {step + 1}: stage {self.schedule.at(step).name} ends: {reason}"
                logger.info(message)
                tqdm.write(message)
        state.stateful_callbacks[RECORD] = self.schedule.record()
        return super().on_step_end(args, state, control, **kwargs)


def _other_curriculum(step: int, index: int, end: int | None) -> ValueError:
    return ValueError(
        f"the checkpoint of step {step} has stage {index + 1} ending at step {end}, which this curriculum can't do; go on "
        "with the curriculum of the run that wrote it, or start anew in another output_dir"
    )


def _check_plateau(plateau: PlateauInSteps, stage: Stage, label: str) -> None:
    if plateau.window < 2:
        raise ValueError(f"{label} has a window of {plateau.window} step; a line takes 2 steps or more")
    num_sizes = 1 if isinstance(stage.group_size, Drawn) else len(stage.group_sizes)
    last_size_begins = math.ceil(Fraction(plateau.at_least * (num_sizes - 1), num_sizes))
    if plateau.at_most <= max(plateau.at_least, last_size_begins + plateau.window):
        raise ValueError(
            f"{label} may take {plateau.at_most} steps and takes {plateau.at_least} at least; with a window of "
            f"{plateau.window} at its last group size, which begins after {last_size_begins}, it could hardly end at a "
            "plateau: raise at_most, or give until as a number"
        )
