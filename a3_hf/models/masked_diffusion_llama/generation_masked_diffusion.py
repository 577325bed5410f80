"""Generation by masked diffusion: each step runs a pass over the whole row and commits the best blanks."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import LogitsProcessorList

from a3_hf.models.a3_llama.generation import A3GenerateOutput, check_callables, complete, make_output
from a3_hf.models.a3_llama.generation_canvas import Canvas, columns_of, pack
from a3_hf.models.a3_llama.generation_config import A3GenerationConfig, resolve_config
from a3_hf.models.a3_llama.generation_decoder import Decoder, SlotNoise
from a3_hf.models.a3_llama.generation_observers import Observers
from a3_hf.models.a3_llama.generation_processors import SlotProcessors
from a3_hf.models.a3_llama.infilling import A3InfillOutput
from a3_hf.models.a3_llama.orders import PADDING_GROUP

from .corruption import check_mask_token, check_text, required_mask_token

COMMIT_RULES = ("tokens_per_step", "threshold", "entropy_budget", "window")


class UnmaskingMixin:
    """Mixin with `generate_any_order`, for a model whose forward takes rows with mask tokens and the columns to predict."""

    @torch.no_grad()
    def generate_any_order(
        self,
        input_ids: torch.LongTensor,
        blank_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        generation_config: A3GenerationConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        steps: int | None = None,
        logits_processor: LogitsProcessorList | None = None,
        logits_hook: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        commit_hook: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        streamer=None,
        **overrides: Any,
    ) -> A3GenerateOutput:
        """Fills blanks in the order that the model chooses (paper §3). Each pass sees all known tokens, and mask tokens at
        open blanks; the mask token is never written. A row's result does not depend on the other rows or on padding.

        1. Predict the open blanks, in one pass over the whole row.
        2. Choose a token at each, and commit the best.
        3. Repeat until no blank is open. Committed tokens are not revised.

        Args:
            input_ids: (B, S) tokens, the first of each row given; those under `blank_mask` are ignored.
            blank_mask: (B, S), True where a token is to be written.
            max_new_tokens: number of blanks appended on the right (the continuation). It ends at its first EOS, as A3's;
                unwritten columns after that, seen as mask tokens, become `pad_token_id`, with commit step −1.
            generation_config: settings of strategy `"dynamic"`, see `A3GenerationConfig`; `overrides` are fields that
                replace its own: `criterion` (`"confidence"`, `"entropy"`, `"margin"`, `"random"`), `tokens_per_step`
                (1 by default), `threshold`, `entropy_budget`, `window`, `do_sample`, `temperature`, `top_k`, `top_p`,
                `seed`, …
            attention_mask: (B, S), 0 at padding, on either side.
            steps: instead of `tokens_per_step`: number of passes that fill each row, with equal numbers of tokens per pass
                (one more in the first passes if they don't divide); one token per pass if a row has fewer blanks.
            logits_processor, logits_hook, commit_hook, streamer: as in `A3GenerationMixin.generate_any_order`.

        Returns:
            As A3's, except `group_ids`: 0 at given tokens, the step (from 1) at written ones, the row's last step + 1 at
            blanks never written, and −1 at padding. `log_probs` equals `log_likelihood(sequences, group_ids, group_ids >=
            0, scored_mask=commit_step >= 0)`.

        Raises:
            ValueError: no mask token, or one in the given text; a row that starts with a blank; another strategy; or an
                error of A3's `generate_any_order`.
            NonFiniteLogitsError: a ValueError; the model's logits are NaN. Its `output` holds the tokens committed before.
        """
        mask_token_id = required_mask_token(self.config)
        check_callables(logits_processor, logits_hook, commit_hook)
        config = _resolve(generation_config, max_new_tokens, steps, overrides, self.generation_config)
        canvas = Canvas.prepare(self, input_ids, blank_mask, attention_mask, config)
        config.check_vocabulary(self.config.vocab_size, has_blanks=canvas.has_blanks_inside(), never=(mask_token_id,))
        copies = config.num_return_sequences or 1
        rows = (canvas.sequences[:, :-1], canvas.given_mask, canvas.blank_mask)
        text, given, blank = (
            each[::copies] for each in rows
        )  # without copies, so that messages show the caller's rows
        check_text(text, given, mask_token_id)
        starts_blank = (blank & ((given | blank).long().cumsum(dim=1) == 1)).any(dim=1)
        if starts_blank.any():
            raise ValueError(
                f"input_ids: row {int(starts_blank.nonzero()[0])} starts with a blank, which nothing predicts. Begin it with "
                "a given token (BOS)."
            )
        canvas.sequences.masked_fill_(pad(canvas.blank_mask, (0, 1)), mask_token_id)
        observers = Observers(
            canvas, streamer=streamer, commit_hook=commit_hook, output_history=bool(config.output_history)
        )
        decoder = Decoder(
            canvas,
            WholeRows(self, canvas),
            config,
            SlotProcessors(config, canvas, logits_processor),
            SlotNoise(config, canvas),
            observers,
            logits_hook=logits_hook,
            deadline=config.deadline(),
        )
        return complete(self, decoder, lambda: fill_masked(decoder, steps), lambda: _output(decoder))

    def fill_templates(self, tokenizer, templates, **settings: Any) -> A3InfillOutput:
        """Fills templates as `A3InfillingMixin.fill_templates`. Choosing a length costs one row of a pass per token of each
        candidate, as candidates are compared by their exact left-to-right likelihood.

        Raises:
            ValueError: a mask token that is a text token of the tokenizer.
        """
        check_mask_token(tokenizer, self.config.mask_token_id, vocab_size=self.config.vocab_size)
        if settings.get("generation_config") is None:
            settings = {"strategy": "dynamic", **settings}
        return super().fill_templates(tokenizer, templates, **settings)


class WholeRows:
    """Runs passes over whole rows of a canvas, in place of `ForwardRunner`; there is no cache."""

    def __init__(self, model, canvas: Canvas):
        self.model, self.canvas = model, canvas
        real = canvas.given_mask | canvas.blank_mask
        self.padding = ~real
        self.attention_mask = None if real.all() else real
        self.ragged = True
        self.passes = 0

    def forward(self, content: torch.Tensor, slots: torch.Tensor, *, singletons: bool = False) -> torch.Tensor:
        """Returns logits (B, Q, V) of the columns `slots` (B, Q), given the canvas; `content` and `singletons` are ignored."""
        self.passes += 1
        return self.model(
            input_ids=self.canvas.sequences[:, :-1].masked_fill(self.padding, 0),
            attention_mask=self.attention_mask,
            target_columns=slots.clamp_max(self.canvas.pad_column - 1),
        ).logits


def fill_masked(decoder: Decoder, steps: int | None) -> None:
    """Predicts the open blanks (in the window), commits the best, and repeats."""
    canvas, config = decoder.canvas, decoder.config
    num_blanks = canvas.blank_mask.sum(dim=1, keepdim=True)
    all_blanks = num_blanks.flatten().tolist()
    left, waiting = all_blanks, columns_of(canvas.blank_mask, canvas.pad_column)
    nothing = waiting[:, :0]

    def quota(blanks):
        if steps is None:
            return config.tokens_per_step or 1
        return blanks // steps + (decoder.step < blanks % steps)

    while waiting.shape[1]:
        if decoder.out_of_time():
            return decoder.fill_remaining(nothing)
        slots = waiting[:, : config.window]
        logits = decoder.logits_of(nothing, slots)
        scores = decoder.processed(logits, slots)
        chosen = decoder.select(scores, slots, quota(num_blanks))
        scores = decoder.warped(scores)
        left = [max(still - quota(blanks), 0) for still, blanks in zip(left, all_blanks, strict=True)]
        decoder.commit(slots.masked_fill(~chosen, canvas.pad_column), decoder.choose(scores, slots), logits, scores)
        waiting = torch.cat([slots.masked_fill(chosen, canvas.pad_column), waiting[:, slots.shape[1] :]], dim=1)
        waiting = decoder.mask_finished(waiting)
        width = max(left) if decoder.widths_known() else int((waiting != canvas.pad_column).sum(dim=1).max())
        waiting = pack(waiting, waiting != canvas.pad_column, canvas.pad_column)[:, :width]


def _resolve(generation_config, max_new_tokens, steps, overrides: dict[str, Any], models_own) -> A3GenerationConfig:
    if overrides.get("use_cache"):
        raise ValueError("use_cache=True: expected False, as masked diffusion is bidirectional and can't cache")
    if generation_config is None:
        overrides = {"strategy": "dynamic", **overrides}
    config = resolve_config(generation_config, max_new_tokens, overrides, models_own)
    if config.strategy != "dynamic":
        raise ValueError(
            f"strategy={config.strategy!r}: masked diffusion expects 'dynamic', as the model chooses the order step by step"
        )
    if steps is not None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"steps={steps!r}: expected a whole number of at least 1")
        rules = [rule for rule in COMMIT_RULES if getattr(config, rule) is not None]
        if rules:
            raise ValueError(
                f"steps={steps} and {rules[0]}={getattr(config, rules[0])} exclude each other: expected one of them"
            )
        config.check_single_bad_words("no steps")
    return config


def _output(decoder: Decoder) -> A3GenerateOutput:
    canvas = decoder.canvas
    steps = canvas.commit_step[:, :-1]
    never = canvas.blank_mask & (steps < 0)
    groups = torch.where(never, steps.amax(dim=1, keepdim=True) + 2, steps + 1)
    groups = groups.masked_fill(~(canvas.blank_mask | canvas.given_mask), PADDING_GROUP)
    return make_output(decoder, group_ids=groups)
