"""Texts with blanks in: their markers, their tokens, and the way back to text."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"<blank:(\d{1,18}(?:\.\.\d{1,18})?|auto)>")
# What may be a marker, with the backslashes before it: two stand for one, and one more makes plain text of it.
MARKER_START = re.compile(r"(\\*)<blank\b")
# Tokenised before a piece of text and then cut off, so that the piece is tokenised as it is inside a text: tokenizers
# that put a space before the first word would otherwise change its first token. The first that stays apart is used.
ANCHORS = ("\n", "a", ".", "=")

Length = int | tuple[int, int] | None


@dataclass(frozen=True)
class Template:
    r"""A text with blanks. `pieces` are the given texts around the blanks (one more than `lengths`), `lengths` the tokens
    of each blank: a number, a range (least, most), or None for a range that is set later.

    Examples:
        >>> Template.parse("The dog <blank:6> home, and <blank:2..4> it.")
        Template(pieces=('The dog ', ' home, and ', ' it.'), lengths=(6, (2, 4)))
        >>> Template.parse(r"The marker \<blank:3> makes <blank:2>.")
        Template(pieces=('The marker <blank:3> makes ', '.'), lengths=(2,))

    Raises:
        ValueError: no blank, another number of pieces, a piece that is no string, a length that is none.
    """

    pieces: tuple[str, ...]
    lengths: tuple[Length, ...]

    def __post_init__(self):
        if not self.lengths or len(self.pieces) != len(self.lengths) + 1:
            raise ValueError(
                f"pieces has {len(self.pieces)} texts and lengths {len(self.lengths)} blanks; a template takes at least one "
                "blank, and a text (which may be empty) before, between and after them"
            )
        for piece in self.pieces:
            if not isinstance(piece, str):
                raise ValueError(f"pieces holds {piece!r}: expected strings")
        for length in self.lengths:
            check_length("lengths", length)

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Reads markers `<blank:N>`, `<blank:MIN..MAX>` and `<blank:auto>`. A backslash before a marker makes plain text of
        it; before a marker, two backslashes stand for one.

        Raises:
            ValueError: no marker; one of length 0 or with an empty range; one that can't be read.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}, {text!r:.60}: expected a string")
        pieces, lengths, position = [""], [], 0
        for start in MARKER_START.finditer(text):
            slashes = len(start.group(1))
            pieces[-1] += text[position : start.start()] + "\\" * (slashes // 2)
            position = start.end(1)
            if slashes % 2:
                continue
            marker = MARKER.match(text, position)
            if marker is None:
                broken = re.match(r"<blank\b[^>]{,40}>?", text[position:]).group()
                raise ValueError(
                    f"text holds the blank marker {broken!r}; a marker reads <blank:N>, N ≥ 1 tokens, <blank:MIN..MAX> or "
                    "<blank:auto>, and a backslash before it makes plain text of it"
                )
            lengths.append(_parse_length(marker.group(1)))
            pieces.append("")
            position = marker.end()
        pieces[-1] += text[position:]
        if not lengths:
            raise ValueError(
                f"text={text!r:.200} holds no blank marker; mark what to write as <blank:N>, N tokens, <blank:MIN..MAX> or "
                "<blank:auto>"
            )
        return cls(tuple(pieces), tuple(lengths))

    def __str__(self) -> str:
        """The text of which `parse` makes this template."""
        text = ""
        for piece, length in zip(self.pieces, (*self.lengths, 0), strict=True):
            text += MARKER_START.sub(lambda start: 2 * start[1] + "\\" + start[0].removeprefix(start[1]), piece)
            if length == 0:
                return text
            text += "\\" * (len(piece) - len(piece.rstrip("\\")))
            size = "auto" if length is None else length if isinstance(length, int) else f"{length[0]}..{length[1]}"
            text += f"<blank:{size}>"
        return text

    @classmethod
    def cut(cls, text: str, spans: list[tuple[int, int]], length: Length) -> "Template":
        """A text with the characters from `start` to `end` of each span taken out, every blank of this `length`.

        Raises:
            ValueError: no span; one outside the text or of no character; spans that overlap.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}, {text!r:.60}: expected a string")
        if not isinstance(spans, (list, tuple)) or not spans:
            empty = "spans is empty" if isinstance(spans, (list, tuple)) else f"spans={spans!r}"
            raise ValueError(f"{empty}: expected at least one (start, end), in characters")
        for span in spans:
            if not isinstance(span, (list, tuple)) or [type(end) for end in span] != [int, int]:
                raise ValueError(f"spans holds {span!r}: expected (start, end), two whole numbers of characters")
        pieces, position = [], 0
        for start, end in sorted(map(tuple, spans)):
            if not 0 <= start < end <= len(text):
                raise ValueError(
                    f"spans holds ({start}, {end}): expected characters with 0 ≤ start < end ≤ {len(text)}, the text's length"
                )
            if start < position:
                raise ValueError(
                    f"spans overlap: ({start}, {end}) starts before {position}, where the one before it ends"
                )
            pieces.append(text[position:start])
            position = end
        return cls((*pieces, text[position:]), (length,) * len(spans))

    def with_range(self, auto_lengths: tuple[int, int]) -> "Template":
        """The template with `auto_lengths` in place of None."""
        check_range("auto_lengths", *auto_lengths)
        return replace(self, lengths=tuple(auto_lengths if one is None else one for one in self.lengths))


def check_range(name: str, least: int, most: int) -> None:
    """Raises a ValueError for a range of lengths that is empty or begins below 1."""
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (least, most))
    if not whole or not 1 <= least <= most:
        raise ValueError(f"{name} has the range {least}..{most}: expected 1 ≤ least ≤ most tokens")


def check_length(name: str, length: Length) -> None:
    """Raises a ValueError for what is no length of a blank."""
    if isinstance(length, (tuple, list)) and len(length) == 2:
        check_range(name, *length)
    elif length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ValueError(f"{name} holds {length!r}: expected a number of tokens, at least 1, or (least, most)")


def _parse_length(marker: str) -> Length:
    if marker == "auto":
        return None
    if ".." in marker:
        least, most = (int(bound) for bound in marker.split(".."))
        check_range(f"the blank marker <blank:{marker}>", least, most)
        return least, most
    if int(marker) == 0:
        raise ValueError("text holds a blank marker of length 0, <blank:0>: expected at least one token")
    return int(marker)


def encode_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[list[int], list[int]]:
    """Token ids, BOS first and 0 at blanks, and for each the number of its blank, from 1 (0: given). All lengths are
    numbers. A space that a blank's first token brings along (see `lent_spaces`) has no token of its own.
    """
    given = list(template.pieces)
    for number, is_lent in enumerate(lent_spaces(tokenizer, template)):
        given[number] = given[number].removesuffix(" ") if is_lent else given[number]
    ids = encode_prompt(tokenizer, given[0])
    blanks = [0] * len(ids)
    for number, (length, piece) in enumerate(zip(template.lengths, given[1:], strict=True), start=1):
        piece_ids = encode_piece(tokenizer, piece, is_start=False)
        ids += [0] * length + piece_ids
        blanks += [number] * length + [0] * len(piece_ids)
    return ids, blanks


def lent_spaces(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[bool]:
    """For each blank, whether the last space before it belongs to its first token, as in the tokens of a running text.

    A text of one space alone lends none, for some tokenizers drop the space at the start of a text; and none is lent where
    no token holds a space and something after it.
    """
    if not any(piece.endswith(" ") for piece in template.pieces[:-1]):
        return [False] * len(template.lengths)
    joins = _joins_spaces(tokenizer, len(tokenizer))
    return [
        joins and piece.endswith(" ") and (number > 0 or piece != " ")
        for number, piece in enumerate(template.pieces[:-1])
    ]


def begins_with_space(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids whose text, after other text, begins with a space."""
    texts = _texts_inside(tokenizer, len(tokenizer))
    return [token_id for token_id, text in texts if text.startswith(" ")]


def special_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """The ids below `vocab_size` that are no text: special tokens, and ids for which the tokenizer has no token."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = set(range(vocab_size)) - set(tokenizer.get_vocab().values())
    return sorted(one for one in {*tokenizer.all_special_ids, *added, *unknown} if one < vocab_size)


@lru_cache(maxsize=4)
def _texts_inside(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[tuple[int, str], ...]:
    # `size`, the tokenizer's, so that tokens which are added later are seen
    vocabulary = sorted(tokenizer.get_vocab().values())
    alone = _decode_each(tokenizer, [[token_id] for token_id in vocabulary])
    before = next((ids for ids, text in zip(vocabulary, alone, strict=True) if text.isalnum()), None)
    if before is None:
        return ()
    after = _decode_each(tokenizer, [[before, token_id] for token_id in vocabulary])
    start = len(_decode_each(tokenizer, [[before]])[0])
    return tuple((token_id, text[start:]) for token_id, text in zip(vocabulary, after, strict=True))


def _joins_spaces(tokenizer: PreTrainedTokenizerBase, size: int) -> bool:
    return any(text.startswith(" ") and text.strip() for _, text in _texts_inside(tokenizer, size))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that begins with BOS, once, whatever the tokenizer adds by itself and whether or not the text has
    it already (as those of chat templates do).
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("tokenizer has no BOS token; set tokenizer.bos_token to the token that begins a text")
    ids = encode_piece(tokenizer, text, is_start=True)
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def encode_piece(tokenizer: PreTrainedTokenizerBase, piece: str, *, is_start: bool) -> list[int]:
    """Token ids of a piece of text as they are inside a running text (`is_start`: at its start), without BOS."""
    if not piece:
        return []
    encode = tokenizer.encode
    if not is_start:
        for anchor in ANCHORS:
            head = encode(anchor, add_special_tokens=False)
            both = encode(anchor + piece, add_special_tokens=False)
            if head and both[: len(head)] == head and len(both) > len(head):
                return both[len(head) :]
    return encode(piece, add_special_tokens=False)


def decode_template(
    tokenizer: PreTrainedTokenizerBase, template: Template, token_ids: list[int], blanks: list[int]
) -> tuple[str, list[str]]:
    """The text, given pieces as they were and blanks as the tokenizer decodes them after all that comes before them; and
    what was written into each blank (without the space before it where that is given).
    """
    text, written = template.pieces[0], []
    lent = lent_spaces(tokenizer, template)
    while len(written) < len(template.lengths):
        first = len(written)
        # blanks side by side are one text, for a character may be split between them
        last = next((n for n in range(first + 1, len(lent)) if template.pieces[n]), len(lent))
        start = blanks.index(first + 1)
        fresh = decode_parts(tokenizer, token_ids, start, template.lengths[first:last])
        if lent[first]:
            fresh[0] = fresh[0].removeprefix(" ")
        written += fresh
        text += "".join(fresh) + template.pieces[last]
    return text, written


def decode_parts(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], start: int, lengths: tuple[int, ...]
) -> list[str]:
    """The text of tokens from `start` on, in parts of so many tokens each: a character belongs to the part that ends it."""
    before, ends = token_ids[:start], [start]
    for length in lengths:
        ends.append(ends[-1] + length)
    whole = decode_after(tokenizer, before, token_ids[start : ends[-1]])
    cuts = [0]
    for end in ends[1:-1]:
        so_far = decode_after(tokenizer, before, token_ids[start:end])
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(so_far, whole, strict=False))
        cuts.append(max(cuts[-1], sum(1 for _ in alike)))
    return [whole[cut:end] for cut, end in zip(cuts, [*cuts[1:], len(whole)], strict=True)]


def decode_after(tokenizer: PreTrainedTokenizerBase, before: list[int], token_ids: list[int]) -> str:
    """The text of tokens as it reads after the tokens `before`: a tokenizer may put or drop a space at the start."""
    start, whole, alone = _decode_each(tokenizer, [before, [*before, *token_ids], token_ids])
    # bytes that are no character may turn those before them into none
    return whole[len(start) :] if whole.startswith(start) else alone


def _decode_each(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
