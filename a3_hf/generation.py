"""Any-order generation: fills blanks group by group, each step one fused pass over an exact cache."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process
from transformers.utils import ModelOutput

from .decoding import CRITERIA, choose_tokens, commit_scores, slots_to_commit
from .likelihood import token_log_probs
from .masks import group_views, open_views, prompt_views
from .orders import ORDERS, GroupOrder

STRATEGIES = ("groupwise", "dynamic")
# transformers' own names and processors, in the order in which `generate` applies them
WARPERS: dict[str, Callable[[float], logits_process.LogitsProcessor]] = {
    "temperature": logits_process.TemperatureLogitsWarper,
    "top_k": logits_process.TopKLogitsWarper,
    "top_p": logits_process.TopPLogitsWarper,
    "min_p": logits_process.MinPLogitsWarper,
    "typical_p": logits_process.TypicalLogitsWarper,
    "epsilon_cutoff": logits_process.EpsilonLogitsWarper,
}
OPTIONS_OF = {
    "groupwise": ("order", "group_size", "span_length"),
    "dynamic": ("criterion", "tokens_per_step", "threshold"),
}
SHARED_OPTIONS = ("strategy", "use_cache", "seed", "do_sample", "max_new_tokens", *WARPERS)
INERT_OPTIONS = ("pad_token_id", "bos_token_id", "eos_token_id", "transformers_version")


class A3GenerationConfig(GenerationConfig):
    """Settings of `generate_any_order`. Identical to `GenerationConfig` except: the fields below, and a field that
    any-order generation does not support raises instead of being ignored. Fields of `GenerationConfig` that it takes:
    `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `max_new_tokens`, `use_cache`.

    Args:
        strategy: `"groupwise"` (paper, Algorithm 1: groups fixed beforehand) or `"dynamic"` (Algorithm 2: at every step
            ask all open blanks and commit the best).
        order: groupwise. `"left_to_right"` (default), `"right_to_left"`, `"random"`, `"spans"` (needs `span_length`), or
            a tensor (B, S) of group ids, lower = earlier.
        group_size: groupwise. Tokens written per pass, 1 by default.
        span_length: groupwise with `order="spans"`.
        criterion: dynamic. `"confidence"` (default), `"entropy"`, `"margin"` or `"random"`.
        tokens_per_step: dynamic. Tokens committed per pass, 1 by default.
        threshold: dynamic, instead of `tokens_per_step`. Commit every blank whose largest probability exceeds it (and the
            best one always); in (0, 1].
        use_cache: True by default: committed groups stay in the key/value cache, exactly. False: `groupwise` encodes
            everything again each step (the same result); `dynamic` then takes the paper's variant, all filled tokens
            encoded again as one bidirectional group.
        seed: of sampling and random orders: an integer, row b drawing from (seed, b), or a list with one per row. None:
            from torch's global generator.

    Raises:
        ValueError: an unknown or unsupported field, a value out of range, or an option of another strategy.
    """

    def __init__(self, **kwargs):
        self.strategy = kwargs.pop("strategy", "groupwise")
        for option in (*OPTIONS_OF["groupwise"], *OPTIONS_OF["dynamic"], "seed"):
            setattr(self, option, kwargs.pop(option, None))
        kwargs.setdefault("use_cache", True)
        unknown = sorted(set(kwargs) - set(GenerationConfig().__dict__))
        if unknown:
            known = ", ".join((*SHARED_OPTIONS, *OPTIONS_OF["groupwise"], *OPTIONS_OF["dynamic"]))
            raise ValueError(
                f"{unknown[0]}={kwargs[unknown[0]]!r} is not an option of any-order generation; it takes {known}"
            )
        super().__init__(**kwargs)
        self.check_any_order()

    def check_any_order(self) -> None:
        """Raises a ValueError for what any-order generation would otherwise ignore."""
        _check_choice("strategy", self.strategy, STRATEGIES)
        mine, others = (OPTIONS_OF[name] for name in sorted(STRATEGIES, key=lambda name: name != self.strategy))
        for option in others:
            if getattr(self, option) is not None:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} has no meaning for strategy={self.strategy!r}, which takes "
                    f"{', '.join(mine)}"
                )
        for option, value in self.__dict__.items():
            known = option in (*SHARED_OPTIONS, *INERT_OPTIONS, *mine, *others) or option.startswith("_")
            if not known and value is not None and value is not False:
                raise ValueError(
                    f"{option}={value!r} is not supported by any-order generation, which takes "
                    f"{', '.join((*SHARED_OPTIONS, *mine))}"
                )
        for option in ("group_size", "span_length", "tokens_per_step"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{option}={value!r}; it takes a whole number of at least 1")
        if self.order is not None and not isinstance(self.order, torch.Tensor):
            _check_choice("order", self.order, ORDERS)
        if (self.span_length is not None) != (isinstance(self.order, str) and self.order == "spans"):
            raise ValueError(
                f"span_length={self.span_length} with order={self.order!r}; order='spans' needs it, others don't take it"
            )
        if isinstance(self.order, torch.Tensor) and self.group_size is not None:
            raise ValueError("group_size has no meaning where order gives the group of every token")
        if self.criterion is not None:
            _check_choice("criterion", self.criterion, CRITERIA)
        if self.threshold is not None:
            if self.tokens_per_step is not None:
                raise ValueError("tokens_per_step and threshold are two rules for what to commit; give one")
            if not 0.0 < self.threshold <= 1.0:
                raise ValueError(f"threshold={self.threshold!r}; it takes a probability in (0, 1]")


@dataclass
class A3GenerateOutput(ModelOutput):
    """What `generate_any_order` returns.

    Attributes:
        sequences: (B, S) tokens, the given ones unchanged.
        commit_step: (B, S) the step, from 0, at which a token was written; −1 where it was given.
        log_probs: (B, S) log-probability of each written token under the model (before temperature and the like) at the
            step at which it was committed; 0 elsewhere. Their sum is the exact log-likelihood of the row's blanks under
            the order in which they were filled (with `use_cache`).
        num_forward_passes: passes of the model, shared by all rows.
        tokens_per_forward: written tokens per row and pass, on average.
    """

    sequences: torch.LongTensor | None = None
    commit_step: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None
    num_forward_passes: int | None = None
    tokens_per_forward: float | None = None


class A3GenerationMixin:
    """`generate_any_order` for a model whose forward takes content tokens, slots and prepared views."""

    @torch.no_grad()
    def generate_any_order(
        self,
        input_ids: torch.LongTensor,
        blank_mask: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        generation_config: A3GenerationConfig | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        **overrides: Any,
    ) -> A3GenerateOutput:
        """Fills blanks in any order (paper §1: Algorithms 1 and 2, with an exact cache, which is not in the paper).

        Given tokens are encoded as singletons in text order, as LLaMA was trained. A row's result does not depend on the
        other rows or on padding.

        1. Encode the given tokens and ask the first slots, in one pass.
        2. Choose a token at each slot, and commit some or all of them.
        3. Until nothing is open: encode the tokens just committed, as one group, and ask the next slots, in one pass.

        Args:
            input_ids: (B, S) tokens; those under `blank_mask` are ignored.
            blank_mask: (B, S), True where a token is to be written.
            max_new_tokens: appends this many blanks at the right.
            generation_config: the settings; `overrides` are fields of `A3GenerationConfig` that replace its own.
            attention_mask: (B, S), 0 at padding, on whichever side.

        Raises:
            ValueError: shapes that don't match; no blank, a blank at padding, a row without a given token; a text longer
                than the model's context; and what `A3GenerationConfig` refuses.
        """
        config = _resolve_config(generation_config, max_new_tokens, overrides)
        canvas = Canvas.prepare(self.config, input_ids, blank_mask, attention_mask, config)
        draw = _Draws(config, canvas.blank_mask)
        fill = _fill_groupwise if config.strategy == "groupwise" else _fill_dynamic
        passes = fill(self, canvas, config, draw)
        written = int(canvas.blank_mask.sum())
        return A3GenerateOutput(
            sequences=canvas.sequences[:, :-1],
            commit_step=canvas.commit_step[:, :-1],
            log_probs=canvas.log_probs[:, :-1],
            num_forward_passes=passes,
            tokens_per_forward=written / input_ids.shape[0] / passes,
        )


@dataclass
class Canvas:
    """The text being filled. Tensors (B, S + 1): the last column is a bin, to which slots and tokens that pad ragged rows
    point, so that every step is a rectangle.
    """

    sequences: torch.Tensor
    position_ids: torch.Tensor
    commit_step: torch.Tensor
    log_probs: torch.Tensor
    given_mask: torch.Tensor  # (B, S)
    blank_mask: torch.Tensor  # (B, S)

    @classmethod
    def prepare(cls, model_config, input_ids, blank_mask, attention_mask, config) -> "Canvas":
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it takes (batch, sequence)")
        masks = {"blank_mask": blank_mask, "attention_mask": attention_mask}
        for name, mask in masks.items():
            if mask is not None and mask.shape != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(mask.shape)}; it takes that of input_ids, {tuple(input_ids.shape)}"
                )
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        blank = torch.zeros_like(real) if blank_mask is None else blank_mask.bool()
        if (blank & ~real).any():
            raise ValueError("blank_mask is True at padding, outside the row; it takes blanks at real tokens only")
        if config.max_new_tokens is not None:
            new = (0, config.max_new_tokens)
            input_ids = torch.nn.functional.pad(input_ids, new)
            real, blank = (torch.nn.functional.pad(mask, new, value=True) for mask in (real, blank))
        given = real & ~blank
        if not blank.any():
            raise ValueError("there is no blank to fill: blank_mask is True nowhere, and max_new_tokens is not given")
        if not given.any(dim=1).all():
            row = int((~given.any(dim=1)).nonzero()[0])
            raise ValueError(
                f"row {row} of input_ids has no given token, so that nothing could be seen; begin it with BOS"
            )
        longest, context = int(real.sum(dim=1).max()), model_config.max_position_embeddings
        if longest > context:
            raise ValueError(
                f"input_ids and its blanks take {longest} positions, {longest - context} more than the model's context "
                f"(max_position_embeddings={context})"
            )
        pad = torch.nn.functional.pad
        position_ids = (real.long().cumsum(dim=1) - 1).clamp_min(0)
        return cls(
            sequences=pad(input_ids.masked_fill(blank, 0), (0, 1)),
            position_ids=pad(position_ids, (0, 1)),
            commit_step=torch.full_like(pad(input_ids, (0, 1)), -1),
            log_probs=torch.zeros(pad(input_ids, (0, 1)).shape, dtype=torch.float32, device=input_ids.device),
            given_mask=given,
            blank_mask=blank,
        )

    @property
    def bin(self) -> int:
        return self.given_mask.shape[1]

    def is_ragged(self) -> bool:
        """Whether rows differ in how many tokens are given or blank, so that steps need padding."""
        return any(
            int(mask.sum(dim=1).min()) != int(mask.sum(dim=1).max()) for mask in (self.given_mask, self.blank_mask)
        )

    def commit(self, index: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor, step: int) -> None:
        """Writes `tokens` (B, n) at columns `index` (B, n), the bin swallowing padding."""
        self.sequences.scatter_(1, index, tokens)
        self.log_probs.scatter_(1, index, token_log_probs(logits, tokens))
        self.commit_step.scatter_(1, index, torch.full_like(index, step))


class _Encoder:
    """Runs the passes: encodes content columns of a canvas, once each, and asks slots."""

    def __init__(self, model, canvas: Canvas, *, use_cache: bool, one_group: bool, ragged: bool):
        self.model, self.canvas, self.one_group, self.ragged = model, canvas, one_group, ragged
        self.cache = DynamicCache(config=model.config) if use_cache else None
        self.passes = 0
        device = canvas.sequences.device
        self.encoded = torch.empty(canvas.sequences.shape[0], 0, dtype=torch.long, device=device)
        self.groups = torch.empty(0, dtype=torch.long, device=device)
        self.next_group = 0

    def ask(self, content: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Logits (B, Q, V) at the columns `slots` (B, Q), given all content so far and `content` (B, C), new: the first
        content, the given tokens, as singletons; all that is committed later as one group a pass.
        """
        implementation, first = self.model.config._attn_implementation, self.passes == 0
        device, num_new = content.device, content.shape[1]
        new_groups = (
            torch.arange(num_new, device=device) if first else torch.full((num_new,), self.next_group, device=device)
        )
        self.groups = torch.cat([self.groups, new_groups])
        self.next_group += num_new if first else 1
        self.encoded = torch.cat([self.encoded, content], dim=1)
        key_mask = self.encoded != self.canvas.bin if self.ragged else None
        if self.cache is None:
            content = self.encoded
            if self.one_group:
                views = open_views(implementation, content.shape[1] + slots.shape[1], key_mask)
            else:
                rows = content.shape[0] if self.ragged else 1
                views = group_views(
                    implementation,
                    group_ids=self.groups.expand(rows, -1),
                    target_group_ids=torch.full((rows, slots.shape[1]), self.next_group, device=device),
                    key_mask=key_mask,
                )
        elif first:
            views = prompt_views(implementation, num_new, slots.shape[1], key_mask, device)
        else:
            views = open_views(implementation, num_new + slots.shape[1], key_mask)
        self.passes += 1
        return self.model(
            input_ids=self.canvas.sequences.gather(1, content),
            position_ids=self.canvas.position_ids.gather(1, content),
            target_position_ids=self.canvas.position_ids.gather(1, slots),
            attention_mask=views,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        ).logits


class _Draws:
    """Chance: every blank of a row takes its own numbers from the row's generator, whatever the batch and padding."""

    def __init__(self, config: A3GenerationConfig, blank_mask: torch.Tensor):
        batch_size, device = blank_mask.shape[0], blank_mask.device
        seed = config.seed
        if isinstance(seed, (list, tuple)):
            if len(seed) != batch_size:
                raise ValueError(f"seed holds {len(seed)} seeds; it takes an integer or one per row, {batch_size}")
            seeds = list(seed)
        else:
            seed = int(torch.randint(2**31, ())) if seed is None else seed
            seeds = [seed * 1_000_003 + row for row in range(batch_size)]
        self.generators = [torch.Generator().manual_seed(row_seed) for row_seed in seeds]
        # Orders have their own: how much they draw depends on padding, and sampling must not.
        self.order_generators = [torch.Generator().manual_seed(~row_seed) for row_seed in seeds]
        self.counts = blank_mask.sum(dim=1).tolist()
        # column of the noise for each column of the canvas; the bin reads the first
        place = (blank_mask.long().cumsum(dim=1) - 1).clamp_min(0)
        self.place = torch.nn.functional.pad(place, (0, 1))
        self.do_sample = bool(config.do_sample)
        self.warpers = LogitsProcessorList()
        for name, warper in WARPERS.items():
            value = getattr(config, name)
            if self.do_sample and value is not None:
                self.warpers.append(warper(value))
        self.device = device

    def uniform(self, columns: torch.Tensor) -> torch.Tensor:
        """(B, n) fresh numbers in [0, 1), one for each of the canvas `columns` (B, n)."""
        noise = torch.zeros(len(self.counts), max(self.counts))
        for row, (count, generator) in enumerate(zip(self.counts, self.generators, strict=True)):
            noise[row, :count] = torch.rand(count, generator=generator)
        return noise.to(self.device).gather(1, self.place.gather(1, columns))

    def tokens(self, logits: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """(B, n) one token for each slot, from logits (B, n, V)."""
        if not self.do_sample:
            return choose_tokens(logits, None)
        scores = self.warpers(None, logits.float().flatten(0, 1)).view_as(logits)
        return choose_tokens(scores, self.uniform(columns))


def _fill_groupwise(model, canvas: Canvas, config: A3GenerationConfig, draw: _Draws) -> int:
    """Algorithm 1: the groups are fixed; predict each from those before it. Returns the number of passes."""
    steps = _group_columns(canvas, config, draw)
    encoder = _Encoder(
        model,
        canvas,
        use_cache=config.use_cache,
        one_group=False,
        ragged=canvas.is_ragged() or bool((steps[:, :-1] == canvas.bin).any()),
    )
    content = _columns(canvas.given_mask, canvas.bin)
    for step, slots in enumerate(steps.unbind(dim=1)):
        logits = encoder.ask(content, slots)
        canvas.commit(slots, draw.tokens(logits, slots), logits, step)
        content = slots
    return encoder.passes


def _fill_dynamic(model, canvas: Canvas, config: A3GenerationConfig, draw: _Draws) -> int:
    """Algorithm 2: ask every open blank, commit the best, and ask the rest again. Returns the number of passes."""
    ragged = canvas.sequences.shape[0] > 1 and (canvas.is_ragged() or config.threshold is not None)
    encoder = _Encoder(model, canvas, use_cache=config.use_cache, one_group=not config.use_cache, ragged=ragged)
    criterion = config.criterion or "confidence"
    tokens_per_step = config.tokens_per_step or 1
    content, slots, step = _columns(canvas.given_mask, canvas.bin), _columns(canvas.blank_mask, canvas.bin), 0
    while slots.shape[1]:
        logits = encoder.ask(content, slots)
        tokens = draw.tokens(logits, slots)
        scores = commit_scores(logits, criterion, draw.uniform(slots) if criterion == "random" else None)
        chosen = slots_to_commit(
            scores,
            slots != canvas.bin,
            tokens_per_step=tokens_per_step,
            confidence=None if config.threshold is None else commit_scores(logits, "confidence").exp(),
            threshold=config.threshold,
        )
        canvas.commit(slots.masked_fill(~chosen, canvas.bin), tokens, logits, step)
        if config.threshold is None:  # the widths are known, and nothing is read back from the device
            num_chosen = min(tokens_per_step, slots.shape[1])
            num_open = slots.shape[1] - num_chosen
        else:
            counts = torch.stack([chosen.sum(dim=1), ((slots != canvas.bin) & ~chosen).sum(dim=1)])
            num_chosen, num_open = counts.amax(dim=1).tolist()
        content = _pack(slots, chosen, canvas.bin)[:, :num_chosen]
        slots = _pack(slots, ~chosen & (slots != canvas.bin), canvas.bin)[:, :num_open]
        step += 1
    return encoder.passes


def _columns(mask: torch.Tensor, bin_column: int) -> torch.Tensor:
    """(B, n) the columns at which `mask` (B, S) is True, in text order, padded with the bin."""
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return _pack(columns, mask, bin_column)[:, : int(mask.sum(dim=1).max())]


def _pack(columns: torch.Tensor, keep: torch.Tensor, bin_column: int) -> torch.Tensor:
    """Moves the kept entries of each row to its front, in order; the rest become the bin."""
    first = (~keep).long().argsort(dim=1, stable=True)
    return columns.masked_fill(~keep, bin_column).gather(1, first)


def _group_columns(canvas: Canvas, config: A3GenerationConfig, draw: _Draws) -> torch.Tensor:
    """(B, K, g) the columns of each group in turn, padded with the bin."""
    blank = canvas.blank_mask
    if isinstance(config.order, torch.Tensor):
        if config.order.shape != blank.shape:
            raise ValueError(
                f"order has shape {tuple(config.order.shape)}; it takes a group for every token and blank, "
                f"{tuple(blank.shape)}"
            )
        group = config.order.to(blank.device)
    else:
        group = GroupOrder.infilling(
            blank,
            attention_mask=blank | canvas.given_mask,
            order=config.order or "left_to_right",
            group_size=config.group_size or 1,
            span_length=config.span_length,
            generator=draw.order_generators,
        ).group_ids
    # number the groups of each row's blanks from 0, then the blanks inside each
    last = torch.iinfo(group.dtype).max
    by_group = group.masked_fill(~blank, last).argsort(dim=1, stable=True)
    is_blank = blank.gather(1, by_group)
    ordered = group.gather(1, by_group)
    starts = is_blank & torch.cat([is_blank[:, :1], ordered[:, 1:] != ordered[:, :-1]], dim=1)
    number = starts.long().cumsum(dim=1) - 1
    place = torch.arange(blank.shape[1], device=blank.device).expand_as(blank)
    inside = place - torch.where(starts, place, 0).cummax(dim=1).values
    num_groups, group_size = int(number.max()) + 1, int(inside.masked_fill(~is_blank, 0).max()) + 1
    steps = torch.full((blank.shape[0], num_groups * group_size + 1), canvas.bin, device=blank.device)
    target = torch.where(is_blank, number * group_size + inside, num_groups * group_size)
    steps.scatter_(1, target, by_group.masked_fill(~is_blank, canvas.bin))
    return steps[:, :-1].view(-1, num_groups, group_size)


def _resolve_config(config, max_new_tokens, overrides) -> A3GenerationConfig:
    if config is not None and not isinstance(config, A3GenerationConfig):
        raise ValueError(f"generation_config is a {type(config).__name__}; it takes an A3GenerationConfig")
    fields = {} if config is None else {name: value for name, value in config.__dict__.items() if value is not None}
    fields = {name: value for name, value in fields.items() if not name.startswith("_")}
    fields.update(overrides)
    if max_new_tokens is not None:
        fields["max_new_tokens"] = max_new_tokens
    resolved = A3GenerationConfig(**fields)
    if resolved.max_new_tokens is not None and resolved.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={resolved.max_new_tokens!r}; it takes a whole number of at least 1")
    return resolved


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; it takes one of {', '.join(choices)}")
