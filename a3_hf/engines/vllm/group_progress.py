"""What one request in groups has written, and what its next pass does. It imports no vLLM.

The cache holds keys in the order of writing: the given tokens, then group after group, whatever their columns. So the keys
that a row sees are always the cache's first ones, in any order of generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .requests import Blanks

UNKNOWN = -1  # a token that is not known; a slot that starts as `query_embed`


@dataclass
class Pass:
    """The rows of a request in one pass: content, then slots, then rows without a task.

    Attributes:
        tokens: (R,) token ids; `UNKNOWN`: the row starts as `query_embed`.
        positions: (R,) true positions.
        keys: (R,) how many of the cache's keys each row sees.
        first_place: of the content's keys in the cache.
        content: columns of the rows whose keys are written.
        slots: columns that the rows behind them predict.
        wanted: (row, column, step) of each row whose token is to be chosen; `step` numbers its noise.
    """

    tokens: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    first_place: int
    content: list[int]
    slots: list[int]
    wanted: list[tuple[int, int, int]] = field(default_factory=list)


class Progress:
    """A request whose order is fixed (`Blanks.steps`).

    Args:
        given: the prompt.
        outputs: tokens that were reported before the request was preempted.
        num_cached: places of the prompt whose keys are there.
        from_left: slots start as the token on their left, if it is known, at its position.
    """

    def __init__(
        self, blanks: Blanks, given: Sequence[int], outputs: Sequence[int], *, num_cached: int, from_left: bool
    ):
        if len(given) != blanks.num_given:
            raise ValueError(f"the prompt has {len(given)} tokens: expected {blanks.num_given}, as pieces say")
        self.blanks, self.from_left = blanks, from_left
        self.given, self.columns = blanks.given_columns(), blanks.open_columns()
        self.spaced_columns = frozenset(blanks.spans()[number][0] for number in blanks.spaced)
        self.token_of = np.full(blanks.size, UNKNOWN, np.int64)
        self.token_of[self.given] = given
        self.written = min(num_cached, len(given))  # places of the cache that hold keys
        self.known: list[int] = []  # columns of blanks, in the order of writing
        self.todo: list[list[int]] = []  # groups of known tokens whose keys are not written
        self.reported = len(outputs)
        self.step = 0
        self.forced: dict[int, int] = {}  # tokens that are not to be chosen, by column
        self.resume(outputs)

    def resume(self, outputs: Sequence[int]) -> None:
        """Takes tokens of before a preemption; written groups are encoded as groups again."""
        for step in self.blanks.steps:
            if len(self.known) < len(outputs):
                self.learn(list(step), outputs[len(self.known) :][: len(step)])
                self.step += 1

    def learn(self, columns: list[int], tokens: Sequence[int]) -> None:
        """Takes the tokens of a group, whose keys are to be written."""
        self.token_of[columns] = tokens
        self.known += columns
        self.todo.append(columns)

    def groups(self) -> list[list[int]]:
        """Returns the groups that a pass encodes, in order."""
        return self.todo

    def ask(self, rows: int) -> list[int]:
        """Returns the columns that are predicted next, if they go into `rows` rows; none at the end."""
        step = self.blanks.steps[self.step] if self.step < len(self.blanks.steps) else ()
        return list(step) if len(step) <= rows else []

    def is_over(self) -> bool:
        """Whether all tokens are known."""
        return len(self.known) == len(self.columns)

    def next_pass(self, rows: int, *, asks: bool) -> Pass:
        """Returns a pass of `rows` rows: as many known groups as go in whole, then, if all did and with `asks`, slots."""
        content, keys, end = [], [], self.written
        if end < len(self.given):
            content = self.given[end : end + rows]
            keys = list(range(end + 1, end + len(content) + 1))
            end += len(content)
        fits = end >= len(self.given)
        for group in self.groups() if fits else []:
            fits = len(content) + len(group) <= rows
            if not fits:
                break
            content, end = content + group, end + len(group)
            keys += [end] * len(group)
        slots = self.ask(rows - len(content)) if asks and fits else []
        idle = rows - len(content) - len(slots)
        shift = int(self.from_left)
        starts = [self.token_of[column - 1] if self.from_left else UNKNOWN for column in slots]
        done = Pass(
            tokens=np.array([*self.token_of[content], *starts, *[0] * idle], np.int64),
            positions=np.array([*content, *(column - shift for column in slots), *[0] * idle], np.int64),
            keys=np.array([*keys, *[max(end, 1)] * (len(slots) + idle)], np.int64),
            first_place=self.written,
            content=content,
            slots=slots,
        )
        if asks and fits:
            done.wanted = self.wanted(done)
        return done

    def wanted(self, done: Pass) -> list[tuple[int, int, int]]:
        """Returns `Pass.wanted` of a pass that encodes all that is known."""
        first = len(done.content)
        return [(first + number, column, self.step) for number, column in enumerate(done.slots)]

    def take(self, done: Pass, tokens: Sequence[int], kept: Sequence[bool] | None = None) -> list[int]:
        """Takes the tokens of `done.wanted` and returns the columns that are to be reported, in order.

        Args:
            kept: with a dynamic order, which of them stay.
        """
        self.encoded(len(done.content))
        if done.slots:
            self.step += 1
            self.learn(done.slots, tokens)
        return self.report()

    def encoded(self, rows: int) -> None:
        """Counts rows whose keys are written now, and drops their groups from what is to be done."""
        before = max(self.written - len(self.given), 0)
        self.written += rows
        left = max(self.written - len(self.given), 0) - before
        while left > 0:
            left -= len(self.todo.pop(0))

    def report(self) -> list[int]:
        """Returns the columns that vLLM may count now: their keys are there, or nobody will see them."""
        until = len(self.known) if self.is_over() else max(self.written - len(self.given), 0)
        columns = self.known[self.reported : until]
        self.reported = max(self.reported, until)
        return columns


class SpeculativeProgress(Progress):
    """Lossless speculation from left to right (not in the paper): the content row of each token checks the draft behind it,
    and slots behind the drafts make new ones. What is written is what one token at a time would be, with the same noise.
    Drafts don't reach beyond their blank.
    """

    def resume(self, outputs: Sequence[int]) -> None:
        self.drafts: list[int] = []  # columns behind the known ones that hold guesses
        for column, token in zip(self.columns, outputs, strict=False):
            self.learn([column], [token])

    def groups(self) -> list[list[int]]:
        return [*self.todo, *([column] for column in self.drafts)]

    def _next(self) -> tuple[int, int]:
        """The first column that is not known, and the end of its blank."""
        first = self.columns[len(self.known)]
        return first, next(end for _, end in self.blanks.spans() if first < end)

    def _checks(self) -> bool:
        """Whether the last content row of a known token predicts the next one."""
        return bool(self.todo) and not self.is_over() and self.todo[-1] == [self._next()[0] - 1]

    def ask(self, rows: int) -> list[int]:
        if self.is_over():
            return []
        first, end = self._next()
        most = self.blanks.drafts
        if self._checks():
            first += len(self.drafts) + 1
        else:
            most += 1
        return list(range(first, min(first + min(most, rows), end)))

    def wanted(self, done: Pass) -> list[tuple[int, int, int]]:
        rows = []
        if self._checks():
            first, end = self._next()
            last = len(done.content) - len(self.drafts) - 1  # the row of the last known token
            rows = [(last + number, first + number) for number in range(min(len(self.drafts) + 1, end - first))]
        rows += [(len(done.content) + number, column) for number, column in enumerate(done.slots)]
        return [(row, column, self.columns.index(column)) for row, column in rows]

    def take(self, done: Pass, tokens: Sequence[int], kept: Sequence[bool] | None = None) -> list[int]:
        if not done.wanted:
            self.encoded(len(done.content))
            return self.report()
        columns = [column for _, column, _ in done.wanted]
        drafts, stands = self.drafts if self._checks() else [], 0
        while stands < len(drafts) and tokens[stands] == self.token_of[drafts[stands]]:
            stands += 1
        guesses = {column: int(self.token_of[column]) for column in drafts[stands + 1 :]}
        new = max(len(drafts), stands + 1)  # the row of the last draft guesses, too, where it does not decide
        guesses |= dict(zip(columns[new:], tokens[new:], strict=True))
        known = len(done.content) - len(drafts)  # rows of tokens that were certain
        self.token_of[drafts] = UNKNOWN
        for column, token in zip(columns[: stands + 1], tokens[: stands + 1], strict=True):
            self.learn([column], [token])
        self.encoded(known + stands)
        self.drafts = sorted(guesses)[: self.blanks.drafts] if not self.is_over() else []
        self.token_of[self.drafts] = [guesses[column] for column in self.drafts]
        return self.report()


class ForcedProgress(SpeculativeProgress):
    """Tokens that are known: a pass encodes as many as its rows hold, and says the log-probabilities of those behind them."""

    def resume(self, outputs: Sequence[int]) -> None:
        super().resume(outputs)
        self.forced = dict(zip(self.columns, self.blanks.forced, strict=True))

    def ask(self, rows: int) -> list[int]:
        return [] if self.is_over() or self._checks() else [self._next()[0]]

    def take(self, done: Pass, tokens: Sequence[int], kept: Sequence[bool] | None = None) -> list[int]:
        columns = super().take(done, [self.forced[column] for _, column, _ in done.wanted])
        if done.wanted and not self.is_over():
            first, end = self._next()
            self.drafts = list(range(first, min(first + self.blanks.drafts, end)))
            self.token_of[self.drafts] = [self.forced[column] for column in self.drafts]
        return columns


class DynamicProgress(Progress):
    """The sampler chooses which slots stay (paper §1, Algorithm 2). As nobody knows the order beforehand, all tokens are
    reported together, in the text's order, when the last is there. Until then vLLM counts the prompt alone, so that a
    preempted request begins again, with the same noise.
    """

    def resume(self, outputs: Sequence[int]) -> None:
        self.waiting = list(self.columns)

    def ask(self, rows: int) -> list[int]:
        slots = self.waiting[: self.blanks.dynamic.window]
        return slots if len(slots) <= rows else []

    def take(self, done: Pass, tokens: Sequence[int], kept: Sequence[bool] | None = None) -> list[int]:
        self.encoded(len(done.content))
        if done.slots:
            self.step += 1
            chosen = [(column, token) for column, token, stays in zip(done.slots, tokens, kept, strict=True) if stays]
            self.learn([column for column, _ in chosen], [token for _, token in chosen])
            self.waiting = [column for column in self.waiting if self.token_of[column] == UNKNOWN]
        return self.report()

    def report(self) -> list[int]:
        columns = self.columns[self.reported :] if self.is_over() else []
        self.reported += len(columns)
        return columns


def start_progress(blanks: Blanks, *args, **kwargs) -> Progress:
    """Returns the progress of a request in the way that its blanks name."""
    kind: type[Progress] = Progress
    if blanks.dynamic is not None:
        kind = DynamicProgress
    elif blanks.drafts:
        kind = ForcedProgress if blanks.forced else SpeculativeProgress
    return kind(blanks, *args, **kwargs)
