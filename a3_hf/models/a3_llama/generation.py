"""Any-order generation: fills blanks, and returns tokens, their order and their exact log-probabilities."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, LogitsProcessorList
from transformers.cache_utils import Cache

from .caching import one_cache, refuse_other_words
from .generation_canvas import Canvas
from .generation_config import A3GenerationConfig, resolve_config
from .generation_decoder import Decoder, NonFiniteLogitsError, RowsHook, SlotNoise
from .generation_filling import Filling
from .generation_observers import Observers
from .generation_processors import SlotProcessors
from .generation_runner import ForwardRunner
from .generation_sampling import HEAD_DRAFTS
from .generation_strategies import (
    DynamicFilling,
    GroupwiseFilling,
    RefineFilling,
    SpeculativeFilling,
    group_columns,
)
from .generation_trees import CheckedFilling
from .modeling_outputs import BriefOutput
from .orders import PADDING_GROUP, GroupOrder


@dataclass(repr=False)
class A3GenerateOutput(BriefOutput):
    """Output of `generate_any_order`. B counts `num_return_sequences` adjacent copies of each row.

    Attributes:
        sequences: (B, S) tokens, including the given ones.
        commit_step: (B, S) the step, from 0, at which a token was written; −1 at given tokens, padding and after the end of
            a continuation.
        log_probs: (B, S) log-probability of each written token under the model (before temperature etc.), given what was
            written before it; 0 elsewhere. At written tokens, equal to `log_likelihood(sequences, group_ids, group_ids >=
            0)`, except for `dynamic` without a cache, whose passes match no single order.
        group_ids: (B, S) the order of `log_probs`, in `log_likelihood`'s format: given tokens first, then written ones; −1
            at padding and after the end.
        num_forward_passes: passes of the model, shared by all rows, without those that check a caller's cache.
        tokens_per_forward: written tokens per row and pass, on average.
        cache, past_key_values: two names for the cache of the columns before the first blank, reusable with the same
            prompt; None without a cache or with a static one.
        logits: (B, S, V) the model's logits when each token was written, 0 elsewhere; with `output_logits`.
        top_log_probs, top_token_ids: (B, S, n) the n highest log-probabilities when each token was written, and whose they
            are; 0 elsewhere; with `num_top_log_probs`.
        history: one (B, S) per step: the text after it, −1 at open blanks; with `output_history`.
    """

    sequences: torch.LongTensor | None = None
    commit_step: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None
    group_ids: torch.LongTensor | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None
    cache: Cache | None = None
    logits: torch.FloatTensor | None = None
    top_log_probs: torch.FloatTensor | None = None
    top_token_ids: torch.LongTensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


class A3GenerationMixin:
    """Mixin with `generate_any_order`, for a model whose forward takes content tokens, slots and prepared masks."""

    encoder_class = ForwardRunner  # runs the forward passes
    drafter = None  # set by `attach_draft_head`

    def check_generation(self, config: A3GenerationConfig) -> None:
        """Raises a ValueError for settings that this model does not support; A3 supports all."""

    def generation_context(self) -> AbstractContextManager:
        """The context of all forward passes of a generation."""
        return nullcontext()

    @torch.no_grad()
    def generate_any_order(
        self,
        input_ids: torch.LongTensor,
        blank_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        generation_config: A3GenerationConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        logits_processor: LogitsProcessorList | None = None,
        logits_hook: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        commit_hook: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
        streamer=None,
        **overrides: Any,
    ) -> A3GenerateOutput:
        """Fills blanks in any order (paper §1: Algorithms 1 and 2; §3: ASSD; the exact cache is not in the paper).

        Given tokens are encoded as singletons in text order, as in LLaMA's training. A row's result does not depend on the
        other rows or on padding.

        The continuation ends at its EOS (`eos_token_id`, by default the model's), and nothing is written after it. An EOS is
        only allowed where no token stands after it yet: removing tokens that others have seen would make `log_probs` wrong.
        (So from right to left, an EOS can only stand in the last column.) If one pass writes an EOS and later columns, the
        later ones are dropped: no token has seen them.

        1. Encode the given tokens and predict the first slots, in one pass.
        2. Choose a token at each slot, and commit some or all of them.
        3. Until nothing is open: encode the tokens just committed and predict the next slots, in one pass.

        Args:
            input_ids: (B, S) tokens; those under `blank_mask` are ignored.
            blank_mask: (B, S), True where a token is to be written.
            max_new_tokens: number of blanks appended on the right (the continuation).
            generation_config: the settings; `overrides` are fields of `A3GenerationConfig` that replace its own.
            attention_mask: (B, S), 0 at padding, on either side.
            past_key_values, cache: two names for a cache of the first columns of `input_ids`, from an earlier output or
                `model(...)`; not modified. A batch of 1 serves all rows. Checked against this model: shapes, the first
                layer's keys of every token (text), and all layers' states of each row's first and last token (weights and
                active adapters), which are encoded again. Other states are not checked.
            logits_processor: extra processors, applied after the config's. They are called with one row per slot: the
                row's text rotated so that it ends just before the slot (see `SlotProcessors`).
            logits_hook: `logits_hook(step, columns, logits)` gets the predicted columns (B, Q) and their logits (B, Q, V),
                and returns the logits to choose from. `log_probs` remain the model's.
            commit_hook: `commit_hook(step, sequences, committed)` gets the tokens (B, S) after each step, and a mask (B, S)
                of those that it wrote.
            streamer: a transformers streamer, for one text (see `Observers`).

        Raises:
            ValueError: shapes that don't match; no blank, a blank at padding, a row without a given token; a text longer
                than the model's context; a cache of another model or text, or of more than the prompt; settings that
                `A3GenerationConfig` rejects.
            NonFiniteLogitsError: a ValueError; the model's logits are NaN. Its `output` holds the tokens committed before.
        """
        cache = one_cache(past_key_values, cache, overrides)
        check_callables(logits_processor, logits_hook, commit_hook)
        config = resolve_config(generation_config, max_new_tokens, overrides, self.generation_config)
        filling, steps = self._begin(
            config,
            input_ids,
            blank_mask,
            attention_mask,
            cache=cache,
            logits_processor=logits_processor,
            logits_hook=logits_hook,
            commit_hook=commit_hook,
            streamer=streamer,
        )
        decoder = filling.decoder

        def output() -> A3GenerateOutput:
            return make_output(
                decoder,
                group_ids=_group_ids(decoder.canvas, config, steps, decoder.last_step),
                cache=decoder.runner.prompt_cache(),
            )

        # `refine` rewrites tokens, so its streamer gets the final text only.
        late = Observers(decoder.canvas, streamer=streamer if config.strategy == "refine" else None)
        with self.generation_context():
            result = complete(self, decoder, filling.run, output)
        late.start()
        late.finish()
        return result

    @torch.no_grad()
    def begin_filling(
        self,
        input_ids: torch.LongTensor,
        blank_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        generation_config: A3GenerationConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        logits_hook: RowsHook | None = None,
        **overrides: Any,
    ) -> Filling:
        """Begins what `generate_any_order` runs, with the same results, to be run pass by pass.

        Call `step` until it returns False, without gradients and in `generation_context()`. Between two passes rows may leave
        (`Filling.keep_rows`), and, unless the strategy is `speculative` with drafts from slots or `refine`, fillings of the
        same settings may be joined (`Filling.joined`). Tokens are in `filling.decoder.canvas`.

        Args:
            logits_hook: as in `generate_any_order`, of an object that follows the rows.
            overrides: others as in `generate_any_order`.

        Raises:
            ValueError: as `generate_any_order`.
        """
        refuse_other_words(overrides)
        config = resolve_config(generation_config, max_new_tokens, overrides, self.generation_config)
        return self._begin(config, input_ids, blank_mask, attention_mask, logits_hook=logits_hook)[0]

    def _begin(
        self,
        config: A3GenerationConfig,
        input_ids: torch.Tensor,
        blank_mask: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        *,
        cache: Cache | None = None,
        logits_processor: LogitsProcessorList | None = None,
        logits_hook: Callable | None = None,
        commit_hook: Callable | None = None,
        streamer=None,
    ) -> tuple[Filling, torch.Tensor | None]:
        """Returns a filling, and (B, K, g) the columns of its groups, where these are fixed beforehand."""
        self.check_generation(config)
        deadline = config.deadline()
        if cache is not None and (not config.use_cache or config.cache_implementation == "static"):
            raise ValueError("past_key_values: expected use_cache=True and no static cache")
        canvas = Canvas.prepare(self, input_ids, blank_mask, attention_mask, config)
        drafter = self._drafter_for(config, canvas, cache)
        config.check_vocabulary(self.config.vocab_size, has_blanks=canvas.has_blanks_inside())
        if config.verify == "content" and canvas.has_text_after_blanks():
            raise ValueError(
                "verify='content': expected no given text after a blank, which the content stream has not seen. Put it in "
                "front (infill's suffix_template, with blanks of a given length), or use verify='slots'"
            )
        chance = SlotNoise(config, canvas)
        observers = Observers(
            canvas,
            streamer=None if config.strategy == "refine" else streamer,
            commit_hook=commit_hook,
            output_history=bool(config.output_history),
        )
        steps = None if config.strategy in ("dynamic", "refine") else group_columns(canvas, config, chance)

        decoder = Decoder(
            canvas,
            _make_runner(self, canvas, config, steps, cache),
            config,
            SlotProcessors(config, canvas, logits_processor),
            chance,
            observers,
            logits_hook=logits_hook,
            deadline=deadline,
        )
        if config.strategy == "groupwise":
            return GroupwiseFilling(decoder, steps), steps
        if config.strategy == "dynamic":
            return DynamicFilling(decoder), steps
        if config.strategy == "refine":
            return RefineFilling(decoder, self.log_likelihood), steps
        path = steps[:, :, 0]
        if config.verify == "content" and config.draft not in (None, "model"):
            return CheckedFilling(decoder, path, drafter), steps
        return SpeculativeFilling(decoder, path), steps

    def _drafter_for(self, config: A3GenerationConfig, canvas: Canvas, cache: Cache | None):
        """Returns what makes drafts with a head, if `config` asks for one. Where a model has a head and nothing says what
        drafts and what checks, it is the head and the content stream, if these can serve the call.
        """
        if config.strategy != "speculative":
            return None
        is_asked = config.draft is not None or config.verify is not None
        left_to_right = config.order is None or (isinstance(config.order, str) and config.order == "left_to_right")
        can_serve = left_to_right and config.use_cache and cache is None and not canvas.has_text_after_blanks()
        if self.drafter is not None and can_serve and not is_asked:
            config.draft, config.verify = "ngram+head", "content"
        if config.draft_width is not None and config.draft not in HEAD_DRAFTS:
            raise ValueError(
                f"draft_width={config.draft_width} has no effect with draft={config.draft!r}: expected a head's"
            )
        if config.draft not in HEAD_DRAFTS:
            return None
        if self.drafter is None:
            raise ValueError(f"draft={config.draft!r}: the model has no draft head; attach_draft_head attaches one")
        return self.drafter.ready()


def check_callables(logits_processor, logits_hook, commit_hook) -> None:
    """Raises a ValueError for hooks that are not callable, or processors that are not a list of callables."""
    for name, hook in (("logits_hook", logits_hook), ("commit_hook", commit_hook)):
        if hook is not None and not callable(hook):
            raise ValueError(f"{name} is a {type(hook).__name__}: expected a function")
    if logits_processor is not None and not (
        isinstance(logits_processor, list) and all(callable(one) for one in logits_processor)
    ):
        raise ValueError(
            f"logits_processor={logits_processor!r}: expected a LogitsProcessorList, or a list of processors"
        )


def complete(
    model, decoder: Decoder, fill: Callable[[], None], output: Callable[[], A3GenerateOutput]
) -> A3GenerateOutput:
    """Runs `fill`, then returns `output()`.

    Raises:
        NonFiniteLogitsError: the logits are NaN; its `output` holds the tokens committed before.
    """
    canvas = decoder.canvas
    decoder.observers.start()
    try:
        fill()
        decoder.check_finite()
    except NonFiniteLogitsError as error:
        canvas.rollback(error.step)
        error.output = output()
        raise
    canvas.close(decoder.config.filler(model.config))
    result = output()
    decoder.observers.finish()
    return result


def make_output(decoder: Decoder, *, group_ids: torch.Tensor, cache: Cache | None = None) -> A3GenerateOutput:
    """Returns the output for the decoder's canvas; `group_ids` (B, S) is the order of its log-probabilities."""
    canvas, history = decoder.canvas, decoder.observers.history
    passes = decoder.runner.passes + decoder.extra_passes
    written = canvas.commit_step[:, :-1] >= 0
    return A3GenerateOutput(
        sequences=canvas.sequences[:, :-1],
        commit_step=canvas.commit_step[:, :-1],
        log_probs=canvas.log_probs[:, :-1],
        group_ids=group_ids,
        num_forward_passes=passes,
        tokens_per_forward=int(written.sum()) / written.shape[0] / max(passes, 1),
        cache=cache,
        logits=None if canvas.logits is None else canvas.logits[:, :-1],
        top_log_probs=None if canvas.top_log_probs is None else canvas.top_log_probs[:, :-1],
        top_token_ids=None if canvas.top_token_ids is None else canvas.top_token_ids[:, :-1],
        history=None if history is None else tuple(text.clone() for text in history),
    )


def _make_runner(model, canvas: Canvas, config: A3GenerationConfig, steps, prompt_cache) -> ForwardRunner:
    is_batch = canvas.sequences.shape[0] > 1
    ragged = canvas.is_ragged() or bool(canvas.eos_token_ids.numel())
    static_width = compile_config = None
    if config.strategy == "groupwise":
        ragged = ragged or bool((steps[:, :-1] == canvas.pad_column).any())
        if config.cache_implementation == "static":
            static_width = canvas.pad_column + steps.shape[1] * steps.shape[2]
            wants = config.compile_config is not None or canvas.sequences.device.type == "cuda"
            if wants and not config.disable_compile:
                compile_config = config.compile_config or CompileConfig()
    else:  # rows may commit different numbers of tokens per step
        paced = config.threshold is None and config.entropy_budget is None and config.strategy != "speculative"
        ragged = ragged or (is_batch and not paced)
    return model.encoder_class(
        model,
        canvas,
        use_cache=config.use_cache,
        one_group=not config.use_cache and config.strategy in ("dynamic", "refine"),
        ragged=ragged,
        static_width=static_width,
        prompt_cache=prompt_cache,
        compile_config=compile_config,
    )


def _group_ids(canvas: Canvas, config: A3GenerationConfig, steps, last_step: int | None) -> torch.Tensor:
    """Returns (B, S) the order of the log-probabilities: given tokens one by one, then written ones. `last_step` is the step
    that wrote all remaining blanks at once (`max_time`); None: none did.
    """
    written, given = canvas.commit_step[:, :-1] >= 0, canvas.given_mask
    if config.strategy == "refine":
        return GroupOrder.infilling(written, attention_mask=written | given).group_ids
    groups = canvas.commit_step[:, :-1]
    if config.strategy == "speculative":  # each token is a group of its own, also within one pass
        rank = torch.zeros_like(canvas.sequences)
        path = steps[:, :, 0]
        groups = rank.scatter_(1, path, torch.arange(path.shape[1], device=path.device).expand_as(path))[:, :-1]
        if last_step is not None:
            groups = groups.masked_fill(canvas.commit_step[:, :-1] == last_step, path.shape[1])
    groups = torch.where(given, given.long().cumsum(dim=1) - 1, groups + given.sum(dim=1, keepdim=True))
    return groups.masked_fill(~(written | given), PADDING_GROUP)
