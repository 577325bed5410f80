"""Stages of a curriculum: their settings, read from plain values and checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from .order_sampling import SHAPES, RowSpec, UniformInt
from .plateaus import Plateau

STAGES = ("ar", "expand", "permute")
UNITS = ("steps", "tokens", "fraction")


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum.

    Attributes:
        name: `"ar"` (left to right, one token at a time), `"expand"` (neighbouring tokens in groups, left to right) or
            `"permute"` (groups of a random permutation).
        until: the stage's end, in the curriculum's unit from the start of the run; a `Plateau`: where its loss is flat; None:
            the end of the run.
        group_size: an integer; a pair (first, last), a size that grows by 1 over equal parts of the stage (or of `at_least`,
            if it ends at a plateau), skipping sizes if there are fewer steps; or `UniformInt`, a size drawn for each row.
        shapes: of `"permute"`: names in `a3_hf.training.order_sampling.SHAPES` and their weights, drawn for each row.
        span_length: tokens of a span in the shape `"spans"`: an integer or `UniformInt`.
        predict_last: fraction of each row's order that is scored, counted from its end; the rest is context. A number, or an
            exact fraction as text (`"1/6"`).
        rehearsal: fraction of rows drawn as in an earlier stage, each stage and each of its group sizes equally likely.
    """

    name: str
    until: int | float | Plateau | None = None
    group_size: int | tuple[int, int] | UniformInt = 1
    shapes: tuple[tuple[str, float], ...] = (("scattered", 1),)
    span_length: int | UniformInt | None = None
    predict_last: int | float | str = 1
    rehearsal: int | float = 0

    @property
    def group_sizes(self) -> range:
        """All group sizes, ascending: (1, 4) → 1, 2, 3, 4."""
        if isinstance(self.group_size, UniformInt):
            return self.group_size.values
        first, last = (self.group_size, self.group_size) if isinstance(self.group_size, int) else self.group_size
        return range(first, last + 1)

    @property
    def is_plain(self) -> bool:
        """Whether all rows of a step are of one kind."""
        fixed = not isinstance(self.group_size, UniformInt) and self.shapes == (("scattered", 1),)
        return fixed and self.predict_last == 1 and self.rehearsal == 0

    def kind(self, group_sizes: range, *, weight: float) -> RowSpec:
        """Returns the stage's kind of row at these group sizes."""
        lengths = (
            self.span_length if isinstance(self.span_length, UniformInt) else UniformInt(*[self.span_length or 1] * 2)
        )
        return RowSpec(
            weight=weight,
            group_sizes=group_sizes,
            shapes=self.shapes if self.name == "permute" else (("contiguous", 1),),
            span_lengths=lengths.values,
            predict_last=Fraction(str(self.predict_last)),
        )


def from_plain(key: str, value: Any, label: str) -> Any:
    """Converts a stage's value from YAML to the type of its field."""
    if key in ("group_size", "span_length") and isinstance(value, Mapping):
        numbers = value.get("draw")
        if set(value) != {"draw"} or not isinstance(numbers, Sequence) or len(numbers) != 2:
            raise ValueError(f"{label}: {key}={value!r}: expected {{draw: [smallest, largest]}} for a drawn number")
        return UniformInt(*numbers)
    if key == "group_size" and isinstance(value, list):
        return tuple(value)
    if key == "until" and isinstance(value, Mapping):
        known = {field.name for field in fields(Plateau)}
        if set(value) != known:
            raise ValueError(
                f"{label}: until={value!r}: expected a plateau with the keys flat, window, at_least, at_most"
            )
        return Plateau(**value)
    if key == "shapes":
        if not isinstance(value, Mapping):
            raise ValueError(f"{label}: shapes={value!r}: expected weights, for example {{scattered: 3, spans: 1}}")
        return tuple(value.items())
    return value


def check_stage(stage: Stage, number: int, unit: str, *, is_last: bool) -> None:
    """Raises ValueError for invalid values of a stage; its `number`, from 1, is in the message."""
    if stage.name not in STAGES:
        raise ValueError(f"stage {number}: name={stage.name!r}: expected one of {', '.join(STAGES)}")
    label = f"stage {number} ({stage.name!r})"

    if stage.until is None:
        if not is_last:
            raise ValueError(f"{label} has no until: expected one in every stage but the last")
    elif isinstance(stage.until, Plateau):
        if is_last:
            raise ValueError(
                f"{label}: until={stage.until}: the last stage can't end at a plateau; it ends with the run. Leave it out"
            )
        if not _is_number(stage.until.flat) or stage.until.flat <= 0:
            raise ValueError(f"{label}: flat={stage.until.flat!r}: expected a number of nats above 0")
        plateau = stage.until
        lengths = {"window": plateau.window, "at_least": plateau.at_least, "at_most": plateau.at_most}
        for name, length in lengths.items():
            if not _is_number(length):
                raise ValueError(f"{label}: {name}={length!r}: expected a number")
            _check_length(length, f"{label}: {name}={length}", unit)
    elif not _is_number(stage.until):
        raise ValueError(f"{label}: until={stage.until!r}: expected a number")
    else:
        _check_length(stage.until, f"{label} ends at {stage.until}", unit)

    if isinstance(stage.group_size, UniformInt):
        pair = _check_drawn(stage.group_size, "group_size", label)
    else:
        pair = stage.group_size if isinstance(stage.group_size, tuple) else (stage.group_size, stage.group_size)
    if len(pair) != 2 or not all(_is_size(size) for size in pair):
        raise ValueError(
            f"{label}: group_size={stage.group_size!r}: expected a whole number of at least 1, a pair (first, "
            "last), or {draw: [smallest, largest]}"
        )
    if pair[0] > pair[1]:
        raise ValueError(f"{label}: group_size={stage.group_size!r}: expected a pair (first, last) that grows")
    if stage.name == "ar" and pair != (1, 1):
        raise ValueError(
            f"{label}: group_size={stage.group_size!r}: expected 1, because ar is one token at a time; use expand for more"
        )
    _check_rows(stage, number, label)


def _check_rows(stage: Stage, number: int, label: str) -> None:
    for shape, weight in stage.shapes:
        if shape not in SHAPES:
            raise ValueError(f"{label}: shape {shape!r}: expected {', '.join(SHAPES)}")
        if not _is_number(weight) or weight <= 0:
            raise ValueError(f"{label}: weight {weight!r} of {shape}: expected a number above 0")
    if not stage.shapes:
        raise ValueError(f"{label} has no shapes: expected one or more of {', '.join(SHAPES)}")
    if stage.name != "permute" and stage.shapes != (("scattered", 1),):
        raise ValueError(
            f"{label} has shapes, which only permute has; {stage.name} is neighbours from left to right. Leave them out"
        )

    has_spans = any(shape == "spans" for shape, _ in stage.shapes)
    if has_spans != (stage.span_length is not None):
        raise ValueError(
            f"{label}: span_length={stage.span_length}: expected a length with the shape spans, and none without it"
        )
    if isinstance(stage.span_length, UniformInt):
        _check_drawn(stage.span_length, "span_length", label)
    elif stage.span_length is not None and not _is_size(stage.span_length):
        raise ValueError(
            f"{label}: span_length={stage.span_length!r}: expected a whole number of at least 1, or {{draw: "
            "[smallest, largest]}"
        )

    try:
        share = None if isinstance(stage.predict_last, bool) else Fraction(str(stage.predict_last))
    except (ValueError, ZeroDivisionError):
        share = None
    if share is None or not 0 < share <= 1:
        raise ValueError(
            f"{label}: predict_last={stage.predict_last!r}: expected a fraction above 0 and at most 1, such as 0.25 or 1/6"
        )
    if not _is_number(stage.rehearsal) or not 0 <= stage.rehearsal < 1:
        raise ValueError(f"{label}: rehearsal={stage.rehearsal!r}: expected a fraction of at least 0 and below 1")
    if stage.rehearsal and number == 1:
        raise ValueError(
            f"{label}: rehearsal={stage.rehearsal}: expected 0 in the first stage, which has no earlier one to rehearse"
        )


def _check_drawn(drawn: UniformInt, key: str, label: str) -> tuple[int, int]:
    if not _is_size(drawn.smallest) or not _is_size(drawn.largest) or drawn.smallest > drawn.largest:
        raise ValueError(
            f"{label}: {key}={{draw: [{drawn.smallest!r}, {drawn.largest!r}]}}: expected two whole numbers of at least "
            "1, the smaller first"
        )
    return drawn.smallest, drawn.largest


def _check_length(length: int | float, found: str, unit: str) -> None:
    if unit == "fraction" and not 0 < length <= 1:
        raise ValueError(f"{found}: expected a fraction of the run, above 0 and at most 1")
    if unit != "fraction" and (length <= 0 or length != int(length)):
        raise ValueError(f"{found}: expected a whole number of {unit}, at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
