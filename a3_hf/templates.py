"""Texts with blanks in: their markers, their tokens, and the way back to text."""

import re
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

BLANK = re.compile(r"<blank:(\d+(?:\.\.\d+)?|auto)>")
BLANK_START = re.compile(r"<blank\b[^>]*>?")
# Tokenised before a piece of text and then cut off, so that the piece is tokenised as it is inside a text: tokenizers
# that put a space before the first word would otherwise change its first token. The first that stays apart is used.
ANCHORS = ("\n", "a", ".", "=")

Length = int | tuple[int, int] | None


@dataclass(frozen=True)
class Template:
    """A text with blanks. `pieces` are the given texts around the blanks (one more than `lengths`), `lengths` the tokens
    of each blank: a number, a range (least, most), or None for a range that is set later.

    Example:
        >>> Template.parse("The dog <blank:6> home, and <blank:2..4> it.")
        Template(pieces=('The dog ', ' home, and ', ' it.'), lengths=(6, (2, 4)))
    """

    pieces: tuple[str, ...]
    lengths: tuple[Length, ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Reads markers `<blank:N>`, `<blank:MIN..MAX>` and `<blank:auto>`.

        Raises:
            ValueError: no marker; one of length 0 or with an empty range; one that can't be read.
        """
        parts = BLANK.split(text)
        pieces = tuple(parts[::2])
        for piece in pieces:
            broken = BLANK_START.search(piece)
            if broken:
                raise ValueError(
                    f"text holds the blank marker {broken.group()!r}; a marker reads <blank:N>, N ≥ 1 tokens, "
                    "<blank:MIN..MAX> or <blank:auto>"
                )
        if len(pieces) == 1:
            raise ValueError(f"text={text!r} holds no blank marker; mark what to write as <blank:N>, N tokens")
        return cls(pieces, tuple(_parse_length(length) for length in parts[1::2]))

    @classmethod
    def cut(cls, text: str, spans: list[tuple[int, int]], lengths: list[Length]) -> "Template":
        """A text with the characters from `start` to `end` of each span taken out.

        Raises:
            ValueError: no span; one outside the text or of no character; spans that overlap.
        """
        if not spans:
            raise ValueError("spans is empty; it takes at least one (start, end), in characters")
        pieces, position = [], 0
        for start, end in sorted(spans):
            if not 0 <= start < end <= len(text):
                raise ValueError(
                    f"spans holds ({start}, {end}); it takes characters with 0 ≤ start < end ≤ {len(text)}, the text's length"
                )
            if start < position:
                raise ValueError(
                    f"spans overlap: ({start}, {end}) starts before {position}, where the one before it ends"
                )
            pieces.append(text[position:start])
            position = end
        in_order = sorted(range(len(spans)), key=lambda index: spans[index])
        return cls((*pieces, text[position:]), tuple(lengths[index] for index in in_order))

    def with_range(self, auto_lengths: tuple[int, int]) -> "Template":
        """The template with `auto_lengths` in place of None."""
        least, most = auto_lengths
        if None in self.lengths:
            check_range("auto_lengths", least, most)
        return replace(self, lengths=tuple(auto_lengths if one is None else one for one in self.lengths))


def check_range(name: str, least: int, most: int) -> None:
    """Raises a ValueError for a range of lengths that is empty or begins below 1."""
    if not 1 <= least <= most:
        raise ValueError(f"{name} has the range {least}..{most}; it takes 1 ≤ least ≤ most tokens")


def _parse_length(marker: str) -> Length:
    if marker == "auto":
        return None
    if ".." in marker:
        least, most = (int(bound) for bound in marker.split(".."))
        check_range(f"the blank marker <blank:{marker}>", least, most)
        return least, most
    if int(marker) == 0:
        raise ValueError("text holds a blank marker of length 0, <blank:0>; it takes at least one token")
    return int(marker)


def encode_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[list[int], list[int]]:
    """Token ids, BOS first and 0 at blanks, and for each the number of its blank, from 1 (0: given). All lengths are
    numbers.
    """
    ids, blanks = encode_prompt(tokenizer, ""), [0]
    for number, piece in enumerate(template.pieces):
        before_blank = number < len(template.lengths)
        piece_ids = encode_piece(tokenizer, piece.rstrip(" ") if before_blank else piece, is_start=number == 0)
        ids += piece_ids
        blanks += [0] * len(piece_ids)
        if before_blank:
            ids += [0] * template.lengths[number]
            blanks += [number + 1] * template.lengths[number]
    return ids, blanks


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that begins with BOS, whatever the tokenizer adds by itself."""
    if tokenizer.bos_token_id is None:
        raise ValueError("tokenizer has no BOS token; set tokenizer.bos_token to the token that begins a text")
    return [tokenizer.bos_token_id, *encode_piece(tokenizer, text, is_start=True)]


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
    """The text, given pieces as they were and blanks as decoded after all that comes before them; and what was written
    into each blank.
    """
    text, written = template.pieces[0], []
    for number, following in enumerate(template.pieces[1:], start=1):
        start = blanks.index(number)
        fresh = decode_after(tokenizer, token_ids[:start], token_ids[start : start + template.lengths[number - 1]])
        if text.endswith(" ") or start == 1:
            fresh = fresh.removeprefix(" ")
        written.append(fresh)
        text += fresh + following
    return text, written


def decode_after(tokenizer: PreTrainedTokenizerBase, before: list[int], token_ids: list[int]) -> str:
    """The text of tokens as it reads after the tokens `before`: a tokenizer may put or drop a space at the start."""
    start = tokenizer.decode(before, skip_special_tokens=True)
    return tokenizer.decode([*before, *token_ids], skip_special_tokens=True)[len(start) :]
