"""Infilling and rewriting of text: from templates with blanks to filled text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from .configuration_a3_llama import check_suffix_template
from .generation import A3GenerateOutput
from .generation_config import A3GenerationConfig, resolve_config
from .infilling_lengths import choose_lengths
from .infilling_templates import (
    Length,
    Template,
    begins_with_space,
    check_length,
    decode_filled,
    encode_piece,
    encode_template,
    lent_spaces,
    special_token_ids,
)
from .modeling_outputs import BriefOutput

AUTO_LENGTHS = (1, 16)
# Arguments of `generate_any_order` that are not config fields; OBSERVERS get the final text only, not length candidates.
ARGUMENTS = ("logits_processor", "logits_hook", "commit_hook", "streamer", "past_key_values", "cache", "steps")
OBSERVERS = ("streamer", "commit_hook")


@dataclass(repr=False)
class A3InfillOutput(BriefOutput):
    """Output of `infill` and `rewrite` with `return_outputs`: one entry per row of `generation`, i.e. one per text, or
    `num_return_sequences` adjacent ones.

    Attributes:
        texts: the filled texts.
        written: the text written into each blank.
        lengths: the number of tokens of each blank.
        length_scores: for each blank the score of each candidate length (see `choose_lengths`), in nats; empty if the length
            was given.
        generation: output of `generate_any_order`; rows are the texts as the model read them (see `suffix_template`),
            left-padded to the longest.
    """

    texts: list[str] | None = None
    written: list[list[str]] | None = None
    lengths: list[tuple[int, ...]] | None = None
    length_scores: list[list[dict[int, float]]] | None = None
    generation: A3GenerateOutput | None = None


class A3InfillingMixin:
    """Mixin with `infill` and `rewrite`, for a model with `generate_any_order` and `log_likelihood`."""

    def infill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str | list[str],
        *,
        auto_lengths: tuple[int, int] = AUTO_LENGTHS,
        suffix_template: str | None = None,
        generation_config: A3GenerationConfig | None = None,
        return_outputs: bool = False,
        **overrides: Any,
    ) -> str | list[str] | list[list[str]] | A3InfillOutput:
        """Fills the blanks of a text, or of several texts in one batch.

        Blanks are marked `<blank:N>` (N tokens), `<blank:MIN..MAX>` or `<blank:auto>` (the length is chosen by exact
        likelihood, see `choose_lengths`). A backslash escapes a marker (see `Template.parse`). Given text is returned
        unchanged. The last space before a marker belongs to the blank's first token, which then must begin with a space, as
        tokens inside a text do. Special tokens are never written. The text begins with BOS, once.

        Args:
            tokenizer: the model's tokenizer; a pad token is not needed.
            text: e.g. `"The dog <blank:6> home."`.
            auto_lengths: minimum and maximum number of tokens of `<blank:auto>`.
            suffix_template: words that bring the text after the last blank to the front (see `A3LlamaConfig`); `""`: it stays
                in place. None: the model's own. Lengths are chosen with the suffix in place.
            generation_config, overrides: as in `generate_any_order`, including hooks, except `max_new_tokens`. With
                `num_return_sequences`, a text's first sequence decides the lengths of all. `seed` is an integer, or a list
                with one per sequence of each text.
            return_outputs: return an `A3InfillOutput`.

        Returns:
            The text, or a list of texts if a list was given; with `num_return_sequences` above 1, each text becomes a list.

        Raises:
            ValueError: an invalid marker (see `Template.parse`), an empty range of lengths, a text that with its longest
                blanks exceeds the model's context, `max_new_tokens`, a tokenizer without BOS, an empty list, or an error of
                `generate_any_order`.
        """
        if not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text is a {type(text).__name__}: expected a string or a list of strings")
        texts = [text] if isinstance(text, str) else text
        check_length("auto_lengths", _pair("auto_lengths", auto_lengths))
        templates = [Template.parse(one).with_range(auto_lengths) for one in texts]
        if not templates:
            raise ValueError("text is an empty list: expected at least one text")
        output = self.fill_templates(
            tokenizer, templates, suffix_template=suffix_template, generation_config=generation_config, **overrides
        )
        if return_outputs:
            return output
        copies = len(output.texts) // len(templates)
        filled = [output.texts[start : start + copies] for start in range(0, len(output.texts), copies)]
        filled = [one if copies > 1 else one[0] for one in filled]
        return filled[0] if isinstance(text, str) else filled

    def rewrite(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        spans: list[tuple[int, int]],
        *,
        length: Literal["same", "auto"] | int | tuple[int, int] = "same",
        auto_lengths: tuple[int, int] = AUTO_LENGTHS,
        suffix_template: str | None = None,
        generation_config: A3GenerationConfig | None = None,
        return_outputs: bool = False,
        **overrides: Any,
    ) -> str | list[str] | A3InfillOutput:
        """Rewrites spans of a text, given all other text.

        Args:
            text: the whole text; blank markers in it are plain text.
            spans: (start, end) in characters, in any order, not overlapping.
            length: new length of each span: `"same"` (its number of tokens), `"auto"`, a number of tokens, or a range.
            auto_lengths, suffix_template, generation_config, return_outputs, overrides: as in `infill`.

        Returns:
            The text; with `num_return_sequences` above 1 a list of texts.

        Raises:
            ValueError: spans that are empty, outside the text or overlapping; an unknown `length`; or an error of `infill`.
        """
        check_length("auto_lengths", _pair("auto_lengths", auto_lengths))
        same = length == "same"
        template = Template.cut(text, spans, 1 if same else _checked_length(length))
        if same:
            template = replace(template, lengths=_tokens_of_spans(tokenizer, template, text, sorted(map(tuple, spans))))
        template = template.with_range(auto_lengths)
        output = self.fill_templates(
            tokenizer, [template], suffix_template=suffix_template, generation_config=generation_config, **overrides
        )
        if return_outputs:
            return output
        return output.texts if len(output.texts) > 1 else output.texts[0]

    def fill_templates(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: list[Template],
        *,
        suffix_template: str | None = None,
        generation_config: A3GenerationConfig | None = None,
        **overrides: Any,
    ) -> A3InfillOutput:
        """Fills templates, whose lengths are numbers or ranges, in one batch.

        Args:
            suffix_template, generation_config, overrides: as in `infill`.
        """
        templates = list(templates)
        if not templates:
            raise ValueError("templates is empty: expected at least one Template")
        fields = {name: value for name, value in overrides.items() if name not in ARGUMENTS}
        config = resolve_config(generation_config, None, fields, None)
        copies = config.num_return_sequences or 1
        suffix_template = self.checked_suffix_template(suffix_template)
        self.check_templates(tokenizer, templates, config)
        self.check_templates(tokenizer, [one.with_suffix_first(suffix_template) for one in templates], config)
        special = special_token_ids(tokenizer, self.config.vocab_size)
        overrides["suppress_tokens"] = sorted({*(config.suppress_tokens or []), *special})
        if config.seed is None and any(not isinstance(one, int) for template in templates for one in template.lengths):
            overrides["seed"] = int(
                torch.randint(2**62, ())
            )  # the chosen candidate and the final text use the same draws
        silent = {name: value for name, value in overrides.items() if name not in OBSERVERS}

        def fill_candidates(seed, candidates):
            one_each = {"num_return_sequences": 1} if copies > 1 else {}
            seeds = {} if seed is None else {"seed": [seed] * len(candidates)}
            output, blanks = self._fill(tokenizer, candidates, generation_config, {**silent, **one_each, **seeds})
            return output.sequences, blanks.to(output.sequences.device)

        length_scores = []
        for index, template in enumerate(templates):
            seed = config.seed[index * copies] if isinstance(config.seed, (list, tuple)) else None
            templates[index], scores = choose_lengths(
                self, template, partial(fill_candidates, seed), end_token_id=tokenizer.eos_token_id
            )
            length_scores.append(scores)
        arranged = [template.with_suffix_first(suffix_template) for template in templates]
        output, blanks = self._fill(tokenizer, arranged, generation_config, overrides)
        texts, written = [], []
        for row, sequence in enumerate(output.sequences.tolist()):
            numbers = blanks[row // copies]
            start = int((numbers < 0).sum())
            template, as_filled = templates[row // copies], arranged[row // copies]
            filled, fresh = decode_filled(tokenizer, template, as_filled, sequence[start:], numbers[start:].tolist())
            texts.append(filled)
            written.append(fresh)
        return A3InfillOutput(
            texts=texts,
            written=written,
            lengths=[template.lengths for template in templates for _ in range(copies)],
            length_scores=[scores for scores in length_scores for _ in range(copies)],
            generation=output,
        )

    def checked_suffix_template(self, wanted: str | None) -> str | None:
        """Returns the template that `infill(suffix_template=wanted)` uses, or None: the suffix stays in place.

        Raises:
            ValueError: words without one `{suffix}`.
        """
        if wanted is None:
            return getattr(self.config, "suffix_template", None)  # the controls have none of their own
        if wanted == "":
            return None
        check_suffix_template(wanted)
        return wanted

    def check_templates(
        self, tokenizer: PreTrainedTokenizerBase, templates: list[Template], config: A3GenerationConfig
    ) -> None:
        """Raises a ValueError for templates that `fill_templates` does not take under `config`."""
        if config.max_new_tokens is not None:
            raise ValueError(
                f"max_new_tokens={config.max_new_tokens}: expected None for a text with blanks. End it with <blank:N> or "
                "<blank:auto>, or call generate_any_order."
            )
        copies = config.num_return_sequences or 1
        if isinstance(config.seed, (list, tuple)) and len(config.seed) != len(templates) * copies:
            raise ValueError(
                f"seed holds {len(config.seed)} seeds: expected an integer, or {len(templates) * copies}, one per sequence of "
                "each text"
            )
        for template in templates:
            if not isinstance(template, Template) or None in template.lengths:
                raise ValueError(
                    f"templates holds {template!r:.200}: expected a Template whose lengths are numbers or ranges"
                )
            context = self.config.max_position_embeddings
            given, _ = encode_template(tokenizer, replace(template, lengths=(1,) * len(template.lengths)))
            most = sum(one if isinstance(one, int) else one[1] for one in template.lengths)
            total = len(given) - len(template.lengths) + most
            if total > context:
                raise ValueError(
                    f"text={str(template)!r:.60} and its blanks, {most} tokens at most, take {total} positions, "
                    f"{total - context} more than the model's context (max_position_embeddings={context})"
                )

    def _fill(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: list[Template],
        generation_config: A3GenerationConfig | None,
        overrides: dict[str, Any],
    ) -> tuple[A3GenerateOutput, torch.Tensor]:
        """Fills templates whose lengths are numbers. Returns the output, left-padded, and the number of each token's blank
        (B, S), 0 at given tokens and −1 at padding.
        """
        input_ids, blanks, is_spaced = encode_rows(tokenizer, templates)
        if is_spaced.any():
            begins = begins_with_space_mask(tokenizer, self.config.vocab_size)
            hook = SpaceFirst(is_spaced.to(self.device), begins.to(self.device), overrides.get("logits_hook"))
            overrides = {**overrides, "logits_hook": hook}
        output = self.generate_any_order(
            input_ids.to(self.device),
            (blanks > 0).to(self.device),
            generation_config=generation_config,
            attention_mask=(blanks >= 0).to(self.device),
            **overrides,
        )
        return output, blanks


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, templates: Sequence[Template]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encodes templates whose lengths are numbers as left-padded rows.

    Returns:
        (B, S) token ids, 0 at blanks and padding; (B, S) the number of each token's blank, 0 at given tokens and −1 at
        padding; (B, S + 1) True where a token must begin with a space.
    """
    encoded = [encode_template(tokenizer, template) for template in templates]
    width = max(len(ids) for ids, _ in encoded)
    input_ids = torch.zeros(len(encoded), width, dtype=torch.long)
    blanks = torch.full_like(input_ids, -1)
    is_spaced = torch.zeros(len(encoded), width + 1, dtype=torch.bool)  # including the canvas's padding column
    for row, (template, (ids, numbers)) in enumerate(zip(templates, encoded, strict=True)):
        start = width - len(ids)
        input_ids[row, start:], blanks[row, start:] = torch.tensor(ids), torch.tensor(numbers)
        for number, is_lent in enumerate(lent_spaces(tokenizer, template), start=1):
            is_spaced[row, start + numbers.index(number)] = is_lent
    return input_ids, blanks, is_spaced


def begins_with_space_mask(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """Returns (V,), True at tokens that begin with a space inside a text."""
    begins = torch.zeros(vocab_size, dtype=torch.bool)
    begins[[token_id for token_id in begins_with_space(tokenizer) if token_id < vocab_size]] = True
    return begins


class SpaceFirst:
    """A logits hook: after `hook`, only tokens that begin with a space are allowed where a blank takes the space before it.

    Args:
        is_spaced: (texts, S + 1), True at columns where a space must come first.
        begins: (V,), True at tokens that begin with a space.
    """

    def __init__(self, is_spaced: torch.Tensor, begins: torch.Tensor, hook: Callable | None = None):
        self.is_spaced, self.begins, self.hook = is_spaced, begins, hook

    def __call__(self, step: int, columns: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if self.hook is not None:
            logits = self.hook(step, columns, logits)
        copies = len(columns) // len(self.is_spaced)
        here = self.is_spaced.repeat_interleave(copies, dim=0).gather(1, columns)
        return logits.masked_fill(here[..., None] & ~self.begins, -torch.inf)

    def rows(self, index: torch.Tensor) -> "SpaceFirst":
        """The hook of the rows `index` (n,) of a filling, where each text has one row."""
        return SpaceFirst(self.is_spaced[index], self.begins)

    @classmethod
    def joined(cls, hooks: "Sequence[SpaceFirst]", canvas) -> "SpaceFirst":
        """One hook for the rows of several, in one canvas."""
        width = canvas.pad_column + 1  # the last column holds False
        return cls(
            torch.cat([pad(hook.is_spaced[:, :-1], (0, width + 1 - hook.is_spaced.shape[1])) for hook in hooks]),
            hooks[0].begins,
        )


def _tokens_of_spans(
    tokenizer: PreTrainedTokenizerBase, template: Template, text: str, spans: list[tuple[int, int]]
) -> tuple[int, ...]:
    """Returns the number of tokens of each span, including the space before it if `encode_template` moves it to the blank."""
    lent = lent_spaces(tokenizer, template)
    pieces = [(" " if one else "") + text[start:end] for one, (start, end) in zip(lent, spans, strict=True)]
    starts = [start == 0 or (one and start == 1) for one, (start, _) in zip(lent, spans, strict=True)]
    return tuple(
        max(len(encode_piece(tokenizer, piece, is_start=is_start)), 1)
        for piece, is_start in zip(pieces, starts, strict=True)
    )


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: expected two numbers of tokens, (min, max)")
    return tuple(value)


def _checked_length(length) -> Length:
    if length == "auto":
        return None
    if isinstance(length, tuple) and len(length) == 2:
        check_length("length", length)
        return length
    if isinstance(length, int) and not isinstance(length, bool) and length >= 1:
        return length
    raise ValueError(f"length={length!r}: expected 'same', 'auto', a number of tokens or (min, max)")
