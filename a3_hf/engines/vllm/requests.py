"""What vLLM's workers must know of a request with blanks, and how it travels: in `SamplingParams.extra_args["a3"]`.

It imports neither vLLM nor torch, so that the front end and the tests can read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

KEY = "a3"  # of `extra_args`
CRITERIA = ("confidence", "entropy", "margin", "random")


@dataclass(frozen=True)
class Sampling:
    """How the worker draws tokens where vLLM's own sampler does not (groups). The numbers of `A3GenerationConfig`; a
    temperature of 0 takes the likeliest token, and `seed` is a row's own (`generation_decoder.row_seed`); None: one of
    the request's id.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None

    def __post_init__(self):
        _check_number("temperature", self.temperature, 0, 1e6)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_counts("top_k", () if self.top_k is None else (self.top_k,), 0)
        _check_counts("seed", () if self.seed is None else (self.seed,), -(2**63), 2**63)


@dataclass(frozen=True)
class Dynamic:
    """How the worker chooses which tokens to keep (paper §1, Algorithm 2); fields of `A3GenerationConfig`."""

    criterion: str | None = None
    tokens_per_step: int | None = None
    threshold: float | None = None
    entropy_budget: float | None = None
    window: int | None = None

    def __post_init__(self):
        if self.criterion not in (None, *CRITERIA):
            raise ValueError(f"criterion={self.criterion!r}: expected one of {', '.join(CRITERIA)}")
        for name in ("tokens_per_step", "window"):
            _check_counts(name, () if getattr(self, name) is None else (getattr(self, name),), 1)
        _check_number("threshold", self.threshold, 0, 1)
        _check_number("entropy_budget", self.entropy_budget, 0, 1e9)


@dataclass(frozen=True)
class Blanks:
    """A text with blanks, and how they are filled. The prompt of its request is `prompt(given)`.

    Attributes:
        pieces: numbers of given tokens before, between and after the blanks; one more than `lengths`.
        lengths: numbers of tokens of the blanks.
        spaced: numbers of blanks, from 0, whose first token must begin with a space.
        is_text: special tokens are never written, as in `infill`.
        steps: columns that each pass writes, in order (`GroupOrder`); empty: one token after the other from the left, by
            vLLM's own sampler (`one_row_state`).
        drafts: lossless speculation: most tokens that a pass guesses; then `steps` is empty.
        forced: the tokens of all blanks, whose log-probabilities alone are wanted; as many at a time as `drafts` says.
        dynamic: the worker chooses the order; then `steps` is empty.
        sampling: of groups.

    Raises:
        ValueError: anything else.
    """

    pieces: tuple[int, ...]
    lengths: tuple[int, ...]
    spaced: tuple[int, ...] = ()
    is_text: bool = True
    steps: tuple[tuple[int, ...], ...] = ()
    drafts: int = 0
    forced: tuple[int, ...] = ()
    dynamic: Dynamic | None = None
    sampling: Sampling | None = None

    def __post_init__(self):
        _check_counts("pieces", self.pieces, 0)
        _check_counts("lengths", self.lengths, 1)
        if not self.lengths or len(self.pieces) != len(self.lengths) + 1 or not self.pieces[0]:
            raise ValueError(
                f"pieces={list(self.pieces)}, lengths={list(self.lengths)}: expected at least one blank, given tokens before "
                "it, and a number of tokens between and after blanks"
            )
        _check_counts("spaced", self.spaced, 0, len(self.lengths))
        _check_counts("drafts", (self.drafts,), 0)
        if not isinstance(self.is_text, bool):
            raise ValueError(f"is_text={self.is_text!r}: expected true or false")
        _check_counts("forced", self.forced, 0)
        if self.forced and (len(self.forced) != sum(self.lengths) or not self.drafts):
            raise ValueError(f"forced has {len(self.forced)} tokens: expected {sum(self.lengths)}, with drafts")
        if self.steps:
            for step in self.steps:
                _check_counts("steps", step, 0)
                if not step:
                    raise ValueError("steps holds an empty step: expected at least one column in each")
            if sorted(column for step in self.steps for column in step) != self.open_columns():
                raise ValueError("steps: expected each column of the blanks once")
        ways = [bool(self.steps), self.drafts > 0, self.dynamic is not None]
        if sum(ways) > 1:
            raise ValueError("steps, drafts, dynamic: expected at most one of them")
        if any(ways) != (self.sampling is not None):
            raise ValueError("sampling: expected with steps, drafts or dynamic, and only there")

    # How it travels.

    @classmethod
    def of(cls, params: Any) -> "Blanks | None":
        """Returns the blanks of vLLM's `SamplingParams` (or None); None for a plain request.

        Raises:
            ValueError: a field that is not as `Blanks` takes it.
        """
        extra = getattr(params, "extra_args", None)
        if not extra or KEY not in extra:
            return None
        given = extra[KEY]
        if not isinstance(given, Mapping):
            raise ValueError(f"extra_args[{KEY!r}] is a {type(given).__name__}: expected the fields of Blanks")
        given = dict(given)
        unknown = sorted(set(given) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"extra_args[{KEY!r}] holds {unknown[0]!r}: expected the fields of Blanks")
        try:
            for name in ("pieces", "lengths", "spaced", "forced"):
                given[name] = tuple(given.get(name, ()))
            given["steps"] = tuple(tuple(step) for step in given.get("steps", ()))
            for name, kind in (("dynamic", Dynamic), ("sampling", Sampling)):
                given[name] = None if given.get(name) is None else kind(**given[name])
            return cls(**given)
        except TypeError as error:
            raise ValueError(f"extra_args[{KEY!r}]: {error}") from error

    def extra_args(self) -> dict[str, Any]:
        """Returns `SamplingParams.extra_args`."""
        return {KEY: asdict(self)}

    # Columns: places in the text, blanks included; they are the tokens' true positions.

    def spans(self) -> list[tuple[int, int]]:
        """Returns (first column, end) of each blank."""
        starts, found = 0, []
        for piece, length in zip(self.pieces, self.lengths, strict=False):
            starts += piece
            found.append((starts, starts + length))
            starts += length
        return found

    def open_columns(self) -> list[int]:
        """Returns the columns of all blanks."""
        return [column for start, end in self.spans() for column in range(start, end)]

    def given_columns(self) -> list[int]:
        """Returns the columns of the given tokens."""
        is_open = set(self.open_columns())
        return [column for column in range(self.size) if column not in is_open]

    @property
    def size(self) -> int:
        """Tokens of the whole text."""
        return sum(self.pieces) + sum(self.lengths)

    @property
    def num_given(self) -> int:
        return sum(self.pieces)

    def width(self) -> int:
        """Rows that a step of groups may need: the last pass's tokens as content, and the next one's slots."""
        if self.dynamic is not None:
            return sum(self.lengths)
        if self.steps:
            return max(before + after for before, after in pairwise([0, *map(len, self.steps), 0]))
        return self.drafts + 1 if self.forced else 2 * self.drafts + 1


@dataclass(frozen=True)
class Row:
    """A row of the model at one place of a request, as vLLM's scheduler counts places.

    Attributes:
        position: the token's true position, for RoPE.
        is_slot: its keys are not written, and no other row sees them.
    """

    position: int
    is_slot: bool = False


class OneRowScript:
    """The rows of a request whose blanks are written from left to right, one token a step: a token's row is the slot of the
    next one (see `one_row_state`). A slot of its own is needed only where the token on the left has not seen all that is
    known: before the first blank, where text stands behind it, and before later blanks behind given text.

    Attributes:
        rows: of each place.
        num_prompt: places of the prompt.
        forced: for each output token the number of the given token, from 0, that it must be: the start of the next slot; None
            for tokens of blanks.
        columns: for each output token its column; None where it is forced.
    """

    def __init__(self, blanks: Blanks):
        given = blanks.given_columns()
        number_of = {column: number for number, column in enumerate(given)}
        self.rows = [Row(column) for column in given]
        self.forced: list[int | None] = []
        self.columns: list[int | None] = []
        self.starts: list[int | None] = []
        self.repeats: list[int] = []  # given tokens that the prompt ends with once more
        last_row = given[-1]
        for number, (start, end) in enumerate(blanks.spans()):
            if last_row != start - 1:
                self.rows.append(Row(start - 1, is_slot=True))
                if number == 0:
                    self.repeats.append(number_of[start - 1])
                else:
                    self.forced.append(number_of[start - 1])
                    self.columns.append(None)
                    self.starts.append(None)
            for column in range(start, end):
                self.rows.append(Row(column))
                self.forced.append(None)
                self.columns.append(column)
                self.starts.append(number if column == start else None)
            last_row = end - 1
        self.num_prompt = len(given) + len(self.repeats)

    def prompt(self, given: Sequence[int]) -> list[int]:
        """Returns the prompt of the `given` tokens."""
        return [*given, *(given[number] for number in self.repeats)]

    @property
    def num_outputs(self) -> int:
        return len(self.forced)


def _check_counts(name: str, values: Sequence[Any], least: int, end: int | None = None) -> None:
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (end is not None and value >= end):
            top = "" if end is None else f", at most {end - 1}"
            raise ValueError(f"{name} holds {value!r}: expected whole numbers of at least {least}{top}")


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and least <= value <= most):
        raise ValueError(f"{name}={value!r}: expected a number of {least:g} to {most:g}")
