"""Schedule: the stage and the group size of each training step, fixed in advance or adapted to the loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from .order_sampling import RowSpec, UniformInt
from .plateaus import Plateau, fitted_fall
from .stages import Stage

# Key of an adaptive schedule's record in `TrainerState.stateful_callbacks`, and so in `trainer_state.json`.
RECORD = "AdaptiveSchedule"


@dataclass(frozen=True)
class StageAtStep:
    """The stage of one step: its name, group size (the largest one if rows draw their own), index in the curriculum, and the
    kinds of its rows if they differ.
    """

    name: str
    group_size: int
    index: int
    kinds: tuple[RowSpec, ...] = ()

    @property
    def largest_group(self) -> int:
        """The largest group size of any row."""
        return max((kind.group_sizes[-1] for kind in self.kinds), default=self.group_size)

    @property
    def scores_everything(self) -> bool:
        """Whether every open token of every row is in the loss."""
        return all(kind.scores_everything for kind in self.kinds)


@dataclass(frozen=True)
class Schedule:
    """A curriculum in whole steps: stage i has steps `ends[i - 1]` (0 for the first) to `ends[i]` − 1. A growing group size
    has its largest value from `grown[i]` on; None: it grows until the end.
    """

    stages: tuple[Stage, ...]
    ends: tuple[int, ...]
    grown: tuple[int, ...] | None = None

    def at(self, step: int) -> StageAtStep:
        """Returns the stage of a step, counted from 0.

        Raises:
            ValueError: a step outside the run.
        """
        if not 0 <= step < self.ends[-1]:
            raise ValueError(f"step={step} is outside the run of {self.ends[-1]} steps")
        index = next(index for index, end in enumerate(self.ends) if step < end)
        start = self.ends[index - 1] if index else 0
        stage, sizes = self.stages[index], self.stages[index].group_sizes
        grown = self.ends[index] if self.grown is None else self.grown[index]
        place = min((step - start) * len(sizes) // (grown - start), len(sizes) - 1)
        size = sizes[-1] if isinstance(stage.group_size, UniformInt) else sizes[place]
        if stage.is_plain:
            return StageAtStep(stage.name, size, index)
        own = stage.kind(sizes if isinstance(stage.group_size, UniformInt) else range(size, size + 1), weight=1)
        kinds = [replace(own, weight=1 - stage.rehearsal)]
        if stage.rehearsal:
            weight = stage.rehearsal / index
            kinds += [earlier.kind(earlier.group_sizes, weight=weight) for earlier in self.stages[:index]]
        return StageAtStep(stage.name, size, index, tuple(kinds))


class AdaptiveSchedule:
    """A `Schedule` that depends on the losses observed so far: some stages end where their loss is flat. Stages that have not
    ended have their longest possible length.

    Args:
        stages: those of the curriculum.
        limits: for each stage the step at which it ends, or its plateau with lengths in steps.
    """

    def __init__(self, stages: tuple[Stage, ...], limits: Sequence[int | Plateau]):
        self.stages = stages
        self.limits = tuple(limits)
        self._found: dict[int, int] = {}  # stage index → the step at which it ended
        self._losses: list[float] = []  # of the current stage at its current group size, at most a window of them
        self._schedule = self._plan()

    @property
    def ends(self) -> tuple[int, ...]:
        return self._schedule.ends

    def at(self, step: int) -> StageAtStep:
        """Returns the stage of a step, counted from 0. Stages of steps after the next may still change."""
        return self._schedule.at(step)

    def watches(self, step: int) -> bool:
        """Returns whether the loss of a step, counted from 0, may end its stage."""
        index = self.at(step).index
        return isinstance(self.limits[index], Plateau) and index not in self._found

    def observe(self, step: int, loss: float) -> str | None:
        """Takes the loss of a finished step, counted from 0, in nats per token: the same number on all ranks.

        Returns:
            Why the stage ends with this step; None if it continues.
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
            reason = f"it reached at_most, {plateau.at_most} steps"
        if reason is not None:
            self._found[index] = step + 1
            self._losses = []
            self._schedule = self._plan()
        return reason

    def record(self) -> dict[str, list]:
        """Returns the state as plain values, which JSON stores exactly."""
        return {"ends": [[index, end] for index, end in self._found.items()], "losses": list(self._losses)}

    def restore(self, record: Mapping[str, list] | None, *, step: int) -> None:
        """Restores the state recorded after `step` steps.

        Raises:
            ValueError: no record although steps were made, or a record of another curriculum.
        """
        self._found, self._losses = {}, []
        self._schedule = self._plan()
        if step == 0:
            return
        if record is None:
            raise ValueError(
                f"the checkpoint of step {step} has no record of where stages ended: the run that wrote it had a fixed "
                "curriculum. Resume with that one, or start a new run in another output_dir"
            )
        found = dict(record["ends"])
        for index, limit in enumerate(self.limits):
            start, end = self.ends[index - 1] if index else 0, found.pop(index, None)
            is_plateau = isinstance(limit, Plateau)
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
            if isinstance(limit, Plateau):
                end = self._found.get(index, start + limit.at_most)
                grown.append(start + limit.at_least)
            else:
                end = limit
                grown.append(limit)
            ends.append(end)
            start = end
        return Schedule(self.stages, tuple(ends), tuple(grown))


def _other_curriculum(step: int, index: int, end: int | None) -> ValueError:
    return ValueError(
        f"the checkpoint of step {step} has stage {index + 1} ending at step {end}, which does not fit this curriculum. "
        "Resume with the curriculum of the run that wrote it, or start a new run in another output_dir"
    )
