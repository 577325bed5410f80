"""Any-order generation: blanks in, tokens, their order and their exact log-probabilities out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CompileConfig, LogitsProcessorList
from transformers.cache_utils import Cache

from .caching import one_cache
from .cpu_linear import fast_on_cpu
from .generation_canvas import Canvas
from .generation_config import A3GenerationConfig, resolve_config
from .generation_decoder import Decoder, NonFiniteLogitsError, SlotNoise
from .generation_observers import Observers
from .generation_processors import SlotProcessors
from .generation_runner import ForwardRunner
from .generation_strategies import fill_dynamic, fill_groupwise, fill_refine, fill_speculative, group_columns
from .modeling_outputs import BriefOutput
from .orders import PADDING_GROUP, GroupOrder


@dataclass(repr=False)
class A3GenerateOutput(BriefOutput):
    """What `generate_any_order` returns. B counts `num_return_sequences` copies of each row, side by side.

    Attributes:
        sequences: (B, S) tokens, the given ones unchanged.
        commit_step: (B, S) the step, from 0, at which a token was written; −1 where it was given, and after the end of a
            continuation.
        log_probs: (B, S) log-probability of each written token under the model (before temperature and the like), given
            what was written before it; 0 elsewhere. They are `log_likelihood(sequences, group_ids, group_ids >= 0)` where
            something was written (but for `dynamic` without a cache, whose passes belong to no one order): every token that a
            written one has seen is returned.
        group_ids: (B, S) the order of `log_probs`, as `log_likelihood` takes it: given tokens first, then what was
            written; −1 at padding and after the end.
        num_forward_passes: passes of the model, shared by all rows, but for those that check a caller's cache.
        tokens_per_forward: written tokens per row and pass, on average.
        cache, past_key_values: two words for the cache of the columns before the first blank, to be passed in with the same
            prompt again; None without a cache or with a static one.
        logits: (B, S, V) the model's logits of each written token when it was written, 0 elsewhere; with `output_logits`.
        history: (B, S) the text after each step, −1 where it is open; with `output_history`.
    """

    sequences: torch.LongTensor | None = None
    commit_step: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None
    group_ids: torch.LongTensor | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None
    cache: Cache | None = None
    logits: torch.FloatTensor | None = None
    history: tuple[torch.LongTensor, ...] | None = None

    @property
    def past_key_values(self) -> Cache | None:
        return self.cache


class A3GenerationMixin:
    """`generate_any_order` for a model whose forward takes content tokens, slots and prepared masks."""

    encoder_class = ForwardRunner  # what runs the passes

    def check_generation(self, config: A3GenerationConfig) -> None:
        """Raises a ValueError for settings that this kind of model has no meaning for; A3 takes all that a config does."""

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

        Given tokens are encoded as singletons in text order, as LLaMA was trained. A row's result does not depend on the
        other rows or on padding.

        The continuation ends at its EOS (`eos_token_id`, by default the model's own), and nothing is written after it. In an
        order that is not left to right, tokens may stand after a place already, and others have seen them; to take them back
        would make `log_probs` those of another text. Therefore an EOS is chosen only where no token stands after it: what is
        returned is what was seen. Of tokens written in one pass, which have not seen each other, those after an EOS are not
        written. (So from right to left a text ends in its last column or has no end: such an order decides the length first.)

        1. Encode the given tokens and ask the first slots, in one pass.
        2. Choose a token at each slot, and commit some or all of them.
        3. Until nothing is open: encode the tokens just committed and ask the next slots, in one pass.

        Args:
            input_ids: (B, S) tokens; those under `blank_mask` are ignored.
            blank_mask: (B, S), True where a token is to be written.
            max_new_tokens: appends this many blanks at the right, the continuation.
            generation_config: the settings; `overrides` are fields of `A3GenerationConfig` that replace its own.
            attention_mask: (B, S), 0 at padding, on whichever side.
            past_key_values, cache: two words for the cache of the first columns of `input_ids`, from an earlier output or
                from `model(...)`; left as it is. A batch of 1 serves all rows. It is compared with this model: its shape, the
                first layer's keys of every token (the text), and in every layer the states of the first and the last token
                of each row, encoded again (the weights and adapters that are on). States in between are not.
            logits_processor: processors of one's own, applied after the config's. They are called with one row per slot:
                the row's text turned so that it ends just before the slot (see `SlotProcessors`).
            logits_hook: `logits_hook(step, columns, logits)` gets the columns (B, Q) asked and their logits (B, Q, V),
                and returns those to choose from. `log_probs` remain the model's own.
            commit_hook: `commit_hook(step, sequences, committed)` sees the tokens (B, S) after each step and which of
                them it wrote (B, S).
            streamer: a streamer of transformers, for one text (see `Observers`).

        Raises:
            ValueError: shapes that don't match; no blank, a blank at padding, a row without a given token; a text longer
                than the model's context; a cache of another model, of another text or of more than the prompt; and what
                `A3GenerationConfig` refuses.
            NonFiniteLogitsError: a ValueError; the model's logits are NaN. Its `output` holds what was committed before.
        """
        cache = one_cache(past_key_values, cache, overrides)
        check_callables(logits_processor, logits_hook, commit_hook)
        config = resolve_config(generation_config, max_new_tokens, overrides, self.generation_config)
        self.check_generation(config)
        deadline = config.deadline()
        if cache is not None and (not config.use_cache or config.cache_implementation == "static"):
            raise ValueError("past_key_values needs use_cache=True and no static cache")
        canvas = Canvas.prepare(self, input_ids, blank_mask, attention_mask, config)
        config.check_vocabulary(self.config.vocab_size, has_blanks=canvas.has_blanks_inside())
        chance = SlotNoise(config, canvas)
        # A draft that is written again is no stream: `refine` shows its streamer the end alone.
        shows_drafts = config.strategy != "refine"
        observers = Observers(
            canvas,
            streamer=streamer if shows_drafts else None,
            commit_hook=commit_hook,
            output_history=bool(config.output_history),
        )
        late = Observers(canvas, streamer=None if shows_drafts else streamer)
        steps = None if config.strategy in ("dynamic", "refine") else group_columns(canvas, config, chance)

        def make_decoder(canvas, chance: SlotNoise, step: int, observers: Observers, prompt_cache=None) -> Decoder:
            runner = _make_runner(self, canvas, config, steps, prompt_cache)
            processors = SlotProcessors(config, canvas, logits_processor)
            settings = {"logits_hook": logits_hook, "deadline": deadline, "step": step}
            return Decoder(canvas, runner, config, processors, chance, observers, **settings)

        def make_again(candidate: Canvas, chance: SlotNoise, step: int) -> Decoder:
            again = Observers(candidate, commit_hook=commit_hook)
            again.history = observers.history
            return make_decoder(candidate, chance, step, again)

        decoder = make_decoder(canvas, chance, 0, observers, cache)
        extra_passes = 0

        def fill() -> None:
            nonlocal extra_passes
            if config.strategy == "groupwise":
                fill_groupwise(decoder, steps)
            elif config.strategy == "dynamic":
                fill_dynamic(decoder)
            elif config.strategy == "speculative":
                fill_speculative(decoder, steps[:, :, 0])
            else:
                extra_passes = fill_refine(decoder, make_again, self.log_likelihood)

        def output() -> A3GenerateOutput:
            return make_output(
                decoder,
                group_ids=_group_ids(canvas, config, steps, decoder.last_step),
                extra_passes=extra_passes,
                cache=decoder.runner.prompt_cache(),
            )

        result = complete(self, decoder, fill, output)
        if not shows_drafts:
            late.start()
            late.finish()
        return result


def check_callables(logits_processor, logits_hook, commit_hook) -> None:
    """Raises a ValueError for a hook that can't be called, or processors that are no list of such."""
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
    """Runs `fill` to its end and returns what `output` makes of the canvas then.

    Raises:
        NonFiniteLogitsError: with the output of what was committed before the logits were NaN.
    """
    canvas = decoder.canvas
    decoder.observers.start()
    try:
        with fast_on_cpu(model):
            fill()
        canvas.materialize()
        decoder.check_finite()
    except NonFiniteLogitsError as error:
        canvas.materialize()
        canvas.rollback(error.step)
        error.output = output()
        raise
    canvas.close(decoder.config.filler(model.config))
    result = output()
    decoder.observers.finish()
    return result


def make_output(
    decoder: Decoder, *, group_ids: torch.Tensor, extra_passes: int = 0, cache: Cache | None = None
) -> A3GenerateOutput:
    """What is on the decoder's canvas, with the order `group_ids` (B, S) of its log-probabilities."""
    canvas, history = decoder.canvas, decoder.observers.history
    passes = decoder.runner.passes + extra_passes
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
    else:  # rows go on at their own pace
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
    """(B, S) the order of the log-probabilities: given tokens one by one, then what was written. `last_step` is the one that
    wrote all that was open at once.
    """
    written, given = canvas.commit_step[:, :-1] >= 0, canvas.given_mask
    if config.strategy == "refine":
        return GroupOrder.infilling(written, attention_mask=written | given).group_ids
    groups = canvas.commit_step[:, :-1]
    if config.strategy == "speculative":  # tokens of one pass are one after the other
        rank = torch.zeros_like(canvas.sequences)
        path = steps[:, :, 0]
        groups = rank.scatter_(1, path, torch.arange(path.shape[1], device=path.device).expand_as(path))[:, :-1]
        if last_step is not None:
            groups = groups.masked_fill(canvas.commit_step[:, :-1] == last_step, path.shape[1])
    groups = torch.where(given, given.long().cumsum(dim=1) - 1, groups + given.sum(dim=1, keepdim=True))
    return groups.masked_fill(~(written | given), PADDING_GROUP)
