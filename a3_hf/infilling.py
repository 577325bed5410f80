"""Infilling and rewriting of text: templates with blanks in, text out."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from .generation import A3GenerateOutput
from .generation_config import A3GenerationConfig
from .lengths import choose_lengths
from .outputs import BriefOutput
from .templates import Length, Template, check_range, decode_template, encode_piece, encode_template

AUTO_LENGTHS = (1, 16)


@dataclass(repr=False)
class A3InfillOutput(BriefOutput):
    """What `infill` and `rewrite` return with `return_outputs`, one entry per text.

    Attributes:
        texts: the texts, filled.
        written: what was written into each blank.
        lengths: the tokens of each blank.
        length_scores: for each blank the score of each candidate length (see `lengths.choose_lengths`), in nats per
            token; empty where the length was given.
        generation: the passes' output; its rows are left-padded to the longest text.
    """

    texts: list[str] | None = None
    written: list[list[str]] | None = None
    lengths: list[tuple[int, ...]] | None = None
    length_scores: list[list[dict[int, float]]] | None = None
    generation: A3GenerateOutput | None = None


class A3InfillingMixin:
    """`infill` and `rewrite` for a model with `generate_any_order` and `log_likelihood`."""

    def infill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | list[str],
        *,
        auto_lengths: tuple[int, int] = AUTO_LENGTHS,
        generation_config: A3GenerationConfig | None = None,
        return_outputs: bool = False,
        **overrides: Any,
    ) -> str | list[str] | A3InfillOutput:
        """Fills the blanks of a text, or of several texts in one batch.

        A blank reads `<blank:N>` (N tokens are written there), `<blank:MIN..MAX>` or `<blank:auto>` (the length is chosen
        by exact likelihood, see `lengths.choose_lengths`). Given text comes back character by character. A space before a
        marker belongs to the first word of the blank, as in the tokens of a running text.

        Args:
            tokenizer: of the model; it needs no pad token.
            text: e.g. `"The dog <blank:6> home."`.
            auto_lengths: the least and the most tokens of `<blank:auto>`.
            generation_config, overrides: as in `generate_any_order`, hooks included.
            return_outputs: return an `A3InfillOutput`.

        Returns:
            The text, or a list of texts if a list was given.

        Raises:
            ValueError: a marker that can't be read (see `Template.parse`), an empty range of lengths, a tokenizer without
                BOS, an empty list, and what `generate_any_order` refuses.
        """
        templates = [
            Template.parse(one).with_range(auto_lengths) for one in ([text] if isinstance(text, str) else text)
        ]
        if not templates:
            raise ValueError("text is an empty list; it takes at least one text")
        output = self.fill_templates(tokenizer, templates, generation_config=generation_config, **overrides)
        if return_outputs:
            return output
        return output.texts[0] if isinstance(text, str) else output.texts

    def rewrite(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        spans: list[tuple[int, int]],
        *,
        length: Literal["same", "auto"] | int | tuple[int, int] = "same",
        auto_lengths: tuple[int, int] = AUTO_LENGTHS,
        generation_config: A3GenerationConfig | None = None,
        return_outputs: bool = False,
        **overrides: Any,
    ) -> str | A3InfillOutput:
        """Writes spans of a text anew, in sight of all the rest.

        Args:
            text: the whole text.
            spans: (start, end) in characters, in any order, not overlapping.
            length: of each span: `"same"` (as many tokens as it has), `"auto"`, a number of tokens, or a range.
            auto_lengths, generation_config, return_outputs, overrides: as in `infill`.

        Raises:
            ValueError: spans that are empty, outside the text or overlapping; an unknown `length`; and as in `infill`.
        """
        if length == "same":
            lengths = [_tokens_of_span(tokenizer, text, *span) for span in spans]
        else:
            lengths = [_checked_length(length)] * len(spans)
        template = Template.cut(text, spans, lengths).with_range(auto_lengths)
        output = self.fill_templates(tokenizer, [template], generation_config=generation_config, **overrides)
        return output if return_outputs else output.texts[0]

    def fill_templates(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: list[Template],
        *,
        generation_config: A3GenerationConfig | None = None,
        **overrides: Any,
    ) -> A3InfillOutput:
        """Fills texts with blanks, all lengths of which are numbers or ranges, in one batch.

        Args:
            generation_config, overrides: as in `generate_any_order`, hooks included.
        """
        templates = list(templates)
        silent = {name: value for name, value in overrides.items() if name not in ("streamer", "commit_hook")}

        def fill_candidates(ids, blanks):
            return self._fill_encoded(ids, blanks, generation_config, silent).sequences

        length_scores = []
        for index, template in enumerate(templates):
            templates[index], scores = choose_lengths(self, tokenizer, template, fill_candidates)
            length_scores.append(scores)
        encoded = [encode_template(tokenizer, template) for template in templates]
        output = self._fill_encoded(*zip(*encoded, strict=True), generation_config, overrides)
        texts, written = [], []
        for template, (ids, blanks), sequence in zip(templates, encoded, output.sequences.tolist(), strict=True):
            filled, fresh = decode_template(tokenizer, template, sequence[len(sequence) - len(ids) :], blanks)
            texts.append(filled)
            written.append(fresh)
        return A3InfillOutput(
            texts=texts,
            written=written,
            lengths=[template.lengths for template in templates],
            length_scores=length_scores,
            generation=output,
        )

    def _fill_encoded(self, ids, blanks, generation_config, overrides) -> A3GenerateOutput:
        width = max(len(row) for row in ids)
        shape = (len(ids), width)
        input_ids, blank_mask, attention_mask = torch.zeros(shape, dtype=torch.long), *torch.zeros(2, *shape).bool()
        for row, (row_ids, row_blanks) in enumerate(zip(ids, blanks, strict=True)):
            input_ids[row, width - len(row_ids) :] = torch.tensor(row_ids)
            blank_mask[row, width - len(row_ids) :] = torch.tensor(row_blanks) > 0
            attention_mask[row, width - len(row_ids) :] = True
        return self.generate_any_order(
            input_ids.to(self.device),
            blank_mask.to(self.device),
            generation_config=generation_config,
            attention_mask=attention_mask.to(self.device),
            **overrides,
        )


def _tokens_of_span(tokenizer, text: str, start: int, end: int) -> int:
    """The tokens of a span, with the spaces before it, as `encode_template` leaves them to the blank."""
    before = text[:start].rstrip(" ")
    return max(len(encode_piece(tokenizer, text[len(before) : end], is_start=not before)), 1)


def _checked_length(length) -> Length:
    if length == "auto":
        return None
    if isinstance(length, tuple) and len(length) == 2:
        check_range("length", *length)
        return length
    if isinstance(length, int) and not isinstance(length, bool) and length >= 1:
        return length
    raise ValueError(f"length={length!r}; it takes 'same', 'auto', a number of tokens or (least, most)")
