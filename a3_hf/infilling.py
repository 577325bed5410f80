"""Infilling of text: templates with blanks in, text out."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .generation import A3GenerateOutput, A3GenerationConfig

BLANK = re.compile(r"<blank:(\d+)>")
BLANK_START = re.compile(r"<blank\b[^>]*>?")
# Tokenised before a piece of text and then cut off, so that the piece is tokenised as it is inside a text: tokenizers
# that put a space before the first word would otherwise change its first token. The first that stays apart is used.
ANCHORS = ("\n", "a", ".", "=")


@dataclass(frozen=True)
class Template:
    """A text with blanks. `pieces` are the given texts around the blanks (one more than `lengths`), `lengths` the tokens
    of each blank.

    Example:
        >>> Template.parse("The dog <blank:6> home.")
        Template(pieces=('The dog ', ' home.'), lengths=(6,))
    """

    pieces: tuple[str, ...]
    lengths: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Template":
        """Reads `<blank:N>` markers.

        Raises:
            ValueError: no marker; one of length 0; one that is not closed or has no length.
        """
        parts = BLANK.split(text)
        pieces, lengths = tuple(parts[::2]), tuple(int(length) for length in parts[1::2])
        for piece in pieces:
            broken = BLANK_START.search(piece)
            if broken:
                raise ValueError(
                    f"text holds the blank marker {broken.group()!r}; a marker reads <blank:N>, N ≥ 1 tokens"
                )
        if not lengths:
            raise ValueError(f"text={text!r} holds no blank marker; mark what to write as <blank:N>, N tokens")
        if 0 in lengths:
            raise ValueError("text holds a blank marker of length 0, <blank:0>; it takes at least one token")
        return cls(pieces, lengths)


class A3InfillingMixin:
    """`infill` for a model with `generate_any_order`."""

    def infill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | list[str],
        *,
        generation_config: A3GenerationConfig | None = None,
        return_outputs: bool = False,
        **overrides: Any,
    ) -> str | list[str] | tuple[list[str], A3GenerateOutput]:
        """Fills the blanks of a text, or of several texts in one batch.

        A blank reads `<blank:N>`: N tokens are written there. Given text comes back character by character. A space
        before a marker belongs to the first word of the blank, as in the tokens of a running text.

        Args:
            tokenizer: of the model; it needs no pad token.
            text: e.g. `"The dog <blank:6> home."`.
            generation_config, overrides: as in `generate_any_order`.
            return_outputs: also return the `A3GenerateOutput`; its rows are left-padded to the longest text.

        Returns:
            The text, or a list of texts if a list was given; with `return_outputs` (list of texts, output).

        Raises:
            ValueError: a marker that can't be read (see `Template.parse`), a tokenizer without BOS, an empty list, and
                what `generate_any_order` refuses.
        """
        templates = [Template.parse(one) for one in ([text] if isinstance(text, str) else text)]
        if not templates:
            raise ValueError("text is an empty list; it takes at least one text")
        encoded = [encode_template(tokenizer, template) for template in templates]
        width = max(len(ids) for ids, _ in encoded)
        shape = (len(encoded), width)
        input_ids, blank_mask, attention_mask = torch.zeros(shape, dtype=torch.long), *torch.zeros(2, *shape).bool()
        for row, (ids, blanks) in enumerate(encoded):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            blank_mask[row, width - len(ids) :] = torch.tensor(blanks) > 0
            attention_mask[row, width - len(ids) :] = True
        output = self.generate_any_order(
            input_ids.to(self.device),
            blank_mask.to(self.device),
            generation_config=generation_config,
            attention_mask=attention_mask.to(self.device),
            **overrides,
        )
        texts = [
            decode_template(tokenizer, template, sequence[width - len(ids) :], blanks)
            for template, (ids, blanks), sequence in zip(templates, encoded, output.sequences.tolist(), strict=True)
        ]
        if return_outputs:
            return texts, output
        return texts[0] if isinstance(text, str) else texts


def encode_template(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[list[int], list[int]]:
    """Token ids, BOS first and 0 at blanks, and for each the number of its blank, from 1 (0: given)."""
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
) -> str:
    """The text: given pieces as they were, blanks as decoded after all that comes before them."""
    text = template.pieces[0]
    for number, following in enumerate(template.pieces[1:], start=1):
        start = blanks.index(number)
        end = start + template.lengths[number - 1]
        before = tokenizer.decode(token_ids[:start], skip_special_tokens=True)
        written = tokenizer.decode(token_ids[:end], skip_special_tokens=True)[len(before) :]
        if text.endswith(" ") or start == 1:
            written = written.removeprefix(" ")
        text += written + following
    return text
