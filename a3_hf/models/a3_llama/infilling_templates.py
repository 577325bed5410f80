"""Texts with blanks: parsing of markers, encoding to tokens, decoding to text."""

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

MARKER = re.compile(r"<blank:(\d{1,18}(?:\.\.\d{1,18})?|auto)>")
# A possible marker, with the backslashes before it: each pair is one backslash, a single one escapes the marker.
MARKER_START = re.compile(r"(\\*)<blank\b")
# Prefixes for tokenising a piece as it is inside a text, as tokenizers may add a space at a text's start. The first one
# whose tokens do not merge with the piece's is used, and its tokens are cut off.
ANCHORS = ("\n", "a", ".", "=")

Length = int | tuple[int, int] | None


@dataclass(frozen=True)
class Template:
    r"""A text with blanks.

    Attributes:
        pieces: the given texts before, between and after the blanks; one more than `lengths`.
        lengths: number of tokens of each blank: a number, a range (min, max), or None for a range that is set later.

    Examples:
        >>> Template.parse("The dog <blank:6> home, and <blank:2..4> it.")
        Template(pieces=('The dog ', ' home, and ', ' it.'), lengths=(6, (2, 4)))
        >>> Template.parse(r"The marker \<blank:3> makes <blank:2>.")
        Template(pieces=('The marker <blank:3> makes ', '.'), lengths=(2,))

    Raises:
        ValueError: no blank, a wrong number of pieces, a piece that is not a string, or an invalid length.
    """

    pieces: tuple[str, ...]
    lengths: tuple[Length, ...]

    def __post_init__(self):
        if not self.lengths or len(self.pieces) != len(self.lengths) + 1:
            raise ValueError(
                f"pieces has {len(self.pieces)} texts and lengths {len(self.lengths)} blanks: expected at least one blank, "
                "and a text (which may be empty) before, between and after blanks"
            )
        for piece in self.pieces:
            if not isinstance(piece, str):
                raise ValueError(f"pieces holds {piece!r}: expected strings")
        for length in self.lengths:
            check_length("lengths", length)

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Parses markers `<blank:N>`, `<blank:MIN..MAX>` and `<blank:auto>`. A backslash escapes a marker; two backslashes
        before a marker are one.

        Raises:
            ValueError: no marker, an invalid one, or one of length 0 or with an empty range.
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
                    f"text holds the blank marker {broken!r}: expected <blank:N>, N ≥ 1 tokens, <blank:MIN..MAX> or "
                    "<blank:auto>. For plain text, put a backslash before it."
                )
            lengths.append(_parse_length(marker.group(1)))
            pieces.append("")
            position = marker.end()
        pieces[-1] += text[position:]
        if not lengths:
            raise ValueError(
                f"text={text!r:.200} holds no blank marker: expected at least one <blank:N>, N tokens, <blank:MIN..MAX> or "
                "<blank:auto>"
            )
        return cls(tuple(pieces), tuple(lengths))

    def __str__(self) -> str:
        """Returns a text that `parse` turns into this template."""
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
        """Replaces each span (start, end) of a text, in characters, by a blank of this `length`.

        Raises:
            ValueError: no span, an empty span, one outside the text, or spans that overlap.
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
                    f"spans holds ({start}, {end}): expected 0 ≤ start < end ≤ {len(text)}, the text's length"
                )
            if start < position:
                raise ValueError(
                    f"spans overlap: ({start}, {end}) starts before {position}, the end of the previous span"
                )
            pieces.append(text[position:start])
            position = end
        return cls((*pieces, text[position:]), (length,) * len(spans))

    def with_suffix_first(self, suffix_template: str | None) -> "Template":
        r"""The template with the text after its last blank moved to its front, in the words of `suffix_template`; as it is
        without one, or where nothing but white space is after the last blank.

        Examples:
            >>> template = Template(("The dog ", " home."), (2,))
            >>> template.with_suffix_first("Later:{suffix}\n\n")
            Template(pieces=('Later: home.\n\nThe dog ', ''), lengths=(2,))
        """
        suffix = self.pieces[-1]
        if suffix_template is None or not suffix.strip():
            return self
        first = suffix_template.replace("{suffix}", suffix) + self.pieces[0]
        return replace(self, pieces=(first, *self.pieces[1:-1], ""))

    def with_range(self, auto_lengths: tuple[int, int]) -> "Template":
        """Returns the template with lengths of None replaced by `auto_lengths`."""
        check_range("auto_lengths", *auto_lengths)
        return replace(self, lengths=tuple(auto_lengths if one is None else one for one in self.lengths))


def check_range(name: str, least: int, most: int) -> None:
    """Raises a ValueError for a range of lengths that is empty or starts below 1."""
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in (least, most))
    if not whole or not 1 <= least <= most:
        raise ValueError(f"{name} has the range {least}..{most}: expected 1 ≤ min ≤ max tokens")


def check_length(name: str, length: Length) -> None:
    """Raises a ValueError for an invalid length of a blank."""
    if isinstance(length, (tuple, list)) and len(length) == 2:
        check_range(name, *length)
    elif length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ValueError(f"{name} holds {length!r}: expected a number of tokens, at least 1, or (min, max)")


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
    """Returns token ids, BOS first and 0 at blanks, and for each id the number of its blank, from 1 (0: given).

    All lengths must be numbers. A space that belongs to a blank's first token (see `lent_spaces`) is not encoded.
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
    """Returns for each blank whether the space before it belongs to its first token, as in tokens inside a text.

    False if the text before the first blank is a single space (some tokenizers drop a text's leading space), or if no token
    of the vocabulary is a space followed by other characters.
    """
    if not any(piece.endswith(" ") for piece in template.pieces[:-1]):
        return [False] * len(template.lengths)
    joins = _joins_spaces(tokenizer, len(tokenizer))
    return [
        joins and piece.endswith(" ") and (number > 0 or piece != " ")
        for number, piece in enumerate(template.pieces[:-1])
    ]


def begins_with_space(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of tokens that, inside a text, begin with a space."""
    texts = texts_inside(tokenizer, len(tokenizer))
    return [token_id for token_id, text in texts if text.startswith(" ")]


def special_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Returns the ids below `vocab_size` that are not text: special tokens, and ids unknown to the tokenizer."""
    added = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    unknown = set(range(vocab_size)) - set(tokenizer.get_vocab().values())
    return sorted(one for one in {*tokenizer.all_special_ids, *added, *unknown} if one < vocab_size)


@lru_cache(maxsize=4)
def texts_inside(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[tuple[int, str], ...]:
    """Returns the ids of all `size` tokens, and the text of each inside a text; none, if no token is a word."""
    # `size` of the tokenizer is part of the cache key, so that tokens added later are included.
    vocabulary = sorted(tokenizer.get_vocab().values())
    alone = _decode_each(tokenizer, [[token_id] for token_id in vocabulary])
    before = next((ids for ids, text in zip(vocabulary, alone, strict=True) if text.isalnum()), None)
    if before is None:
        return ()
    after = _decode_each(tokenizer, [[before, token_id] for token_id in vocabulary])
    start = len(_decode_each(tokenizer, [[before]])[0])
    return tuple((token_id, text[start:]) for token_id, text in zip(vocabulary, after, strict=True))


def _joins_spaces(tokenizer: PreTrainedTokenizerBase, size: int) -> bool:
    return any(text.startswith(" ") and text.strip() for _, text in texts_inside(tokenizer, size))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns token ids of a text with exactly one BOS at its start, even if the tokenizer adds none or the text already has
    it (as from chat templates).
    """
    if tokenizer.bos_token_id is None:
        raise ValueError("tokenizer has no BOS token. Set tokenizer.bos_token to the token that begins a text.")
    ids = encode_piece(tokenizer, text, is_start=True)
    return ids if ids[:1] == [tokenizer.bos_token_id] else [tokenizer.bos_token_id, *ids]


def encode_piece(tokenizer: PreTrainedTokenizerBase, piece: str, *, is_start: bool) -> list[int]:
    """Returns token ids of a piece of text, without BOS, as inside a longer text (`is_start`: as at a text's start)."""
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
    """Returns the filled text, with given pieces unchanged, and the text of each blank (without a given space before it).
    Blanks are decoded in the context of the tokens before them.
    """
    text, written = template.pieces[0], []
    lent = lent_spaces(tokenizer, template)
    while len(written) < len(template.lengths):
        first = len(written)
        # Adjacent blanks are decoded together, as their tokens may share a character.
        last = next((n for n in range(first + 1, len(lent)) if template.pieces[n]), len(lent))
        start = blanks.index(first + 1)
        fresh = decode_parts(tokenizer, token_ids, start, template.lengths[first:last])
        if lent[first]:
            fresh[0] = fresh[0].removeprefix(" ")
        written += fresh
        text += "".join(fresh) + template.pieces[last]
    return text, written


def decode_filled(
    tokenizer: PreTrainedTokenizerBase, template: Template, arranged: Template, token_ids: list[int], blanks: list[int]
) -> tuple[str, list[str]]:
    """Returns `decode_template` of a row filled as `arranged` (see `with_suffix_first`), in the order of `template`."""
    text, written = decode_template(tokenizer, arranged, token_ids, blanks)
    if arranged != template:
        in_front = len(arranged.pieces[0]) - len(template.pieces[0])
        text = text[in_front:] + template.pieces[-1]
    return text, written


def decode_parts(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], start: int, lengths: tuple[int, ...]
) -> list[str]:
    """Returns the text of tokens from `start`, split into parts of `lengths` tokens; a character belongs to the part in which
    it ends.
    """
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
    """Returns the text of tokens in the context of the tokens `before`, as tokenizers may add or drop a leading space."""
    start, whole, alone = _decode_each(tokenizer, [before, [*before, *token_ids], token_ids])
    # An incomplete character may change the text before it.
    return whole[len(start) :] if whole.startswith(start) else alone


def _decode_each(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
