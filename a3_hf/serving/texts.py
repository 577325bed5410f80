"""What a row has written: tokens as they are committed, the text that is certain, and where it ends."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from a3_hf.models.a3_llama.infilling_templates import (
    Template,
    decode_after,
    decode_filled,
    decode_parts,
    lent_spaces,
    texts_inside,
)

CONTEXT, MOST_CONTEXT, WINDOW = 8, 64, 16  # tokens before those that are decoded again at each step, and most of these
BYTE = re.compile("<0x[0-9A-F]{2}>")  # the name of a byte that is a token
BROKEN = "\ufffd"  # what a part of a character decodes to


@dataclass(frozen=True)
class Commit:
    """A written token.

    Attributes:
        column: in the row.
        token_id: the token.
        log_prob: under the model, in nats.
        step: the pass that wrote it, from 0.
        top: the likeliest tokens, (token id, log-probability).
    """

    column: int
    token_id: int
    log_prob: float
    step: int
    top: tuple[tuple[int, float], ...] = ()


class RunningText:
    """The text of tokens that come one by one. Joined, its parts are the text of all, in the context of the tokens before."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int]):
        self.tokenizer, self.fresh, self.shown = tokenizer, [], ""
        self.before = whole_characters(tokenizer, list(before))

    def add(self, token_id: int) -> str:
        """Returns the text that became certain: a character of several tokens comes with its last."""
        self.fresh.append(token_id)
        if is_byte(self.tokenizer, token_id):
            return ""
        text = decode_after(self.tokenizer, self.before, self.fresh)
        if text.endswith(BROKEN):
            return ""
        new, self.shown = text[len(self.shown) :], text
        if len(self.fresh) >= WINDOW:
            self.before, self.fresh, self.shown = self.fresh, [], ""
        return new

    def close(self) -> str:
        """Returns the rest: the broken end of a text whose last character is not complete."""
        return decode_after(self.tokenizer, self.before, self.fresh)[len(self.shown) :] if self.fresh else ""


def whole_characters(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[int]:
    """Returns the last tokens, at least `CONTEXT` of them, from the beginning of a character on; at most `MOST_CONTEXT`."""
    count = CONTEXT
    while count <= min(MOST_CONTEXT, len(token_ids)):
        if BROKEN not in tokenizer.decode(token_ids[-count:]):
            return token_ids[-count:]
        count *= 2
    return token_ids[-CONTEXT:] if len(token_ids) > MOST_CONTEXT else token_ids


def is_byte(tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether a token is one byte, which may yet turn out to be part of a character, or broken."""
    return BYTE.fullmatch(tokenizer.convert_ids_to_tokens(token_id) or "") is not None


class Stops:
    """Finds the first stop sequence in a text that grows, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.text, self.found = list(stops), "", None

    def add(self, text: str) -> None:
        """Appends to the text, and cuts it before the stop sequence that is complete first; after one, nothing is appended."""
        if self.found is not None:
            return
        start = max(0, len(self.text) - max(map(len, self.stops), default=0))
        self.text += text
        places = [(place, stop) for stop in self.stops if (place := self.text.find(stop, start)) >= 0]
        if places:
            place, self.found = min(places, key=lambda one: (one[0] + len(one[1]), one[0]))
            self.text = self.text[:place]

    def certain(self) -> str:
        """The text that no stop sequence can take back."""
        if self.found is not None:
            return self.text
        most = len(self.text)
        held = (
            n for stop in self.stops for n in range(min(len(stop) - 1, most), 0, -1) if self.text.endswith(stop[:n])
        )
        return self.text[: len(self.text) - max(held, default=0)]


@dataclass
class Row:
    """One text that is being written. Subclasses take commits and say which text is certain."""

    tokenizer: PreTrainedTokenizerBase
    commits: list[Commit] = field(default_factory=list)
    is_done: bool = False  # no more of it is wanted
    is_closed: bool = False  # it is finished
    finish_reason: str = "length"

    def take(self, commits: Sequence[Commit]) -> None:
        """Takes the tokens that a pass wrote."""
        self.commits.extend(commits)

    def num_written(self) -> int:
        """The number of tokens written, those of which no text is certain too."""
        return len(self.commits)

    def close(self, token_ids: list[int]) -> None:
        """Takes the finished row (S,)."""
        self.is_done = self.is_closed = True

    def text(self) -> str:
        """The certain part of the answer; after `close`, all of it."""
        raise NotImplementedError


class ContinuedRow(Row):
    """A continuation.

    Args:
        prompt: (P,) token ids.
        ends: token ids that end a text.
        stops: sequences that end it, and are not part of it.
    """

    def __init__(self, tokenizer, prompt: list[int], *, ends: frozenset[int], stops: Sequence[str]):
        super().__init__(tokenizer)
        self.prompt, self.ends, self._late = prompt, ends, {}
        self.running, self.stops = RunningText(tokenizer, prompt), Stops(stops)
        self.next = len(prompt)  # the first column that is not part of the text yet

    def take(self, commits: Sequence[Commit]) -> None:
        self._late |= {one.column: one for one in commits}
        while self.next in self._late and not self.is_done:
            one = self._late.pop(self.next)
            self.next += 1
            self.commits.append(one)
            self.stops.add(self.running.add(one.token_id))
            if one.token_id in self.ends or self.stops.found is not None:
                self.is_done, self.finish_reason = True, "stop"

    def num_written(self) -> int:
        return len(self.commits) + len(self._late)

    def close(self, token_ids: list[int]) -> None:
        super().close(token_ids)
        self.stops.add(self.running.close())
        if self.stops.found is not None:
            self.finish_reason = "stop"

    def text(self) -> str:
        return self.stops.text if self.is_closed else self.stops.certain()


class FilledRow(Row):
    """A text with blanks.

    Args:
        template: the text as it was given; its lengths are numbers.
        arranged: as the model reads it (`with_suffix_first`).
        token_ids, blanks: (S,) of `encode_template(arranged)`.
        stops: sequences that end a text's only blank, and are not part of it.
        whole: the answer is the whole text; False: that of the first blank.
    """

    def __init__(
        self,
        tokenizer,
        template: Template,
        arranged: Template,
        token_ids: list[int],
        blanks: list[int],
        *,
        stops: Sequence[str],
        whole: bool,
    ):
        super().__init__(tokenizer)
        self.template, self.arranged, self.token_ids, self.blanks = template, arranged, list(token_ids), blanks
        self.starts = [blanks.index(number) for number in range(1, len(template.lengths) + 1)]
        self.lent, self.whole = lent_spaces(tokenizer, arranged), whole
        self.stops, self._known = Stops(stops), set()
        self.written: list[str] | None = None  # each blank's text, when all is known
        self._answer: str | None = None
        self._sure, self._at = template.pieces[0] if whole else "", 0  # the text before blank number _at
        self._before: dict[int, list[int]] = {}

    def place(self, column: int) -> tuple[int, int]:
        """The number of a column's blank, from 0, and its place in it."""
        number = self.blanks[column] - 1
        return number, column - self.starts[number]

    def take(self, commits: Sequence[Commit]) -> None:
        super().take(commits)
        for one in commits:
            self.token_ids[one.column] = one.token_id
            self._known.add(one.column)
        if self.stops.stops and not self.whole:
            self.stops = Stops(self.stops.stops)
            self.stops.add(self._written(0))
            if self.stops.found is not None:  # later tokens of the blank are cut off, whatever they are
                self.is_done, self.finish_reason = True, "stop"

    def close(self, token_ids: list[int]) -> None:
        was_stopped = self.is_done
        super().close(token_ids)
        if was_stopped:
            self.written = [self.stops.text]
            self._answer = self.stops.text
            return
        self.token_ids = token_ids[: len(self.blanks)]
        text, self.written = decode_filled(self.tokenizer, self.template, self.arranged, self.token_ids, self.blanks)
        if not self.whole:
            self.stops = Stops(self.stops.stops)
            self.stops.add(self.written[0])
            if self.stops.found is not None:
                self.finish_reason, self.written = "stop", [self.stops.text]
        self._answer = text if self.whole else self.stops.text

    def text(self) -> str:
        if self._answer is not None:
            return self._answer
        if not self.whole:
            pending = Stops(self.stops.stops)
            pending.add(self._written(0))
            return pending.certain()
        while self._at < len(self.template.lengths):
            number, text = self._at, self._written(self._at)
            is_whole = all(self.starts[number] + place in self._known for place in range(self.template.lengths[number]))
            if not is_whole or self._shares_character(number):
                return self._sure + text
            self._sure += text + self.template.pieces[number + 1]
            self._at += 1
        return self._sure

    def _shares_character(self, number: int) -> bool:
        """Whether another blank follows a blank at once, so that their tokens may share a character."""
        return number + 1 < len(self.template.lengths) and not self.template.pieces[number + 1]

    def pieces(self) -> list[list[str]]:
        """The text of each token of each blank, after `close`; joined, they are the blank's."""
        parts = []
        for start, length, is_lent in zip(self.starts, self.template.lengths, self.lent, strict=True):
            texts = decode_parts(self.tokenizer, self.token_ids, start, (1,) * length)
            parts.append([texts[0].removeprefix(" ") if is_lent else texts[0], *texts[1:]])
        return parts

    def _written(self, number: int) -> str:
        """The text of a blank's first tokens without a gap, as far as it is certain."""
        start, length, count = self.starts[number], self.template.lengths[number], 0
        while count < length and start + count in self._known:
            count += 1
        is_final = count == length and not self._shares_character(number)
        while not is_final and count and is_byte(self.tokenizer, self.token_ids[start + count - 1]):
            count -= 1
        if not count:
            return ""
        if number not in self._before:
            self._before[number] = whole_characters(self.tokenizer, self.token_ids[:start])
        text = decode_after(self.tokenizer, self._before[number], self.token_ids[start : start + count])
        text = text.removeprefix(" ") if self.lent[number] else text
        return "" if text.endswith(BROKEN) and not is_final else text


@lru_cache(maxsize=4)
def token_names(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """The text of each token inside a text."""
    return dict(texts_inside(tokenizer, size))
