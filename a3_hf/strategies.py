"""The four ways to fill a canvas: which columns a pass asks, and what is committed after it."""

import math
import time
from collections import Counter
from copy import copy
from dataclasses import replace

import torch

from .canvas import Canvas, Encoder, columns_of, pack
from .decoding import accept_drafts, choose_tokens, commit_scores, ngram_draft, slots_to_commit, uniform_noise
from .generation_config import A3GenerationConfig
from .observers import Observers
from .orders import GroupOrder, seed_of
from .processors import SlotProcessors

DRAFT_TOKENS = 4
REFINE_ROUNDS, REFINE_FRACTION = 4, 0.25
COMPACT_EVERY = 16  # passes of a speculative batch between two tidyings of the cache
FINITE_CHECK_EVERY = 32  # steps, on devices where looking costs a wait
SAMPLE, CRITERION, ACCEPT, RESIDUAL = range(4)  # purposes of chance


class NonFiniteLogitsError(ValueError):
    """The model gave NaN logits. `step` is the first step at which it did, `output` what was committed before."""

    def __init__(self, step: int):
        super().__init__(
            f"the model's logits are NaN at step {step}; what was committed before is in this error's `output`. Half "
            "precision without the range for this model is the usual cause: try bfloat16 or float32"
        )
        self.step = step
        self.output = None


class Chance:
    """Every blank's own random numbers, whatever the batch and padding."""

    def __init__(self, config: A3GenerationConfig, canvas: Canvas):
        self.row_seeds = _row_seeds(config.seed, canvas)
        self.seeds = torch.tensor(self.row_seeds, dtype=torch.long, device=canvas.sequences.device)
        place = canvas.blank_mask.long().cumsum(dim=1)  # the number of a blank in its row, from 1; 0 for the bin
        self.place = torch.nn.functional.pad(place, (0, 1))

    def uniform(self, columns: torch.Tensor, step: int, purpose: int) -> torch.Tensor:
        """(B, n) numbers in [0, 1) for the canvas `columns` (B, n)."""
        return uniform_noise(self.seeds, self.place.gather(1, columns), step, purpose)

    def afresh(self) -> "Chance":
        """Other numbers for the same blanks, for another round."""
        again = copy(self)
        again.seeds = self.seeds + 1
        return again

    def order_generators(self) -> list[torch.Generator]:
        """A generator per row, for random orders."""
        return [torch.Generator().manual_seed(seed) for seed in self.row_seeds]


def _row_seeds(seed, canvas: Canvas) -> list[int]:
    """A number per row, from the seed, the row's own text and the number of equal rows before it."""
    batch_size = canvas.sequences.shape[0]
    if isinstance(seed, (list, tuple)):
        if len(seed) != batch_size:
            raise ValueError(f"seed holds {len(seed)} seeds; it takes an integer or one per row, {batch_size}")
        return [seed_of(one) for one in seed]
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    real = (canvas.given_mask | canvas.blank_mask).cpu()
    texts = canvas.sequences[:, :-1].masked_fill(canvas.blank_mask, -1).cpu()
    seen, seeds = Counter(), []
    for text, mask in zip(texts, real, strict=True):
        content = text[mask].numpy().tobytes()
        seeds.append(seed_of(seed, content, seen[content]))
        seen[content] += 1
    return seeds


class Decoder:
    """One canvas being filled: asks the model, chooses tokens, commits them.

    Args:
        deadline: `time.perf_counter()` after which no further pass but a last one starts.
        step: the number of the first step.
    """

    def __init__(
        self,
        canvas: Canvas,
        encoder: Encoder,
        config: A3GenerationConfig,
        processors: SlotProcessors,
        chance: Chance,
        observers: Observers,
        *,
        logits_hook=None,
        deadline: float = math.inf,
        step: int = 0,
    ):
        self.canvas, self.encoder, self.config = canvas, encoder, config
        self.processors, self.chance, self.observers = processors, chance, observers
        self.logits_hook, self.deadline, self.step = logits_hook, deadline, step
        self.first_step = step
        self.has_ended = False  # an EOS ended the continuation of some row
        self.last_step: int | None = None  # the step that wrote all that was open, if time was up

    def uniform(self, columns: torch.Tensor, purpose: int) -> torch.Tensor:
        """(B, n) this step's random numbers for `columns` (B, n)."""
        return self.chance.uniform(columns, self.step - self.first_step, purpose)

    def out_of_time(self) -> bool:
        return time.perf_counter() > self.deadline

    def ask(self, content: torch.Tensor, slots: torch.Tensor, **groups) -> torch.Tensor:
        """The model's logits (B, Q, V). The content of the first pass, the given tokens, is one token a group."""
        return self.encoder.ask(content, slots, **groups or {"singletons": self.encoder.passes == 0})

    def processed(self, logits: torch.Tensor, slots: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """Logits after the hook and the processors, before the sampling ones."""
        if self.logits_hook is not None:
            logits = self.logits_hook(self.step, slots, logits)
        return self.processors.process(logits, slots, self.canvas.known()[:, None] if known is None else known)

    def widths_known(self) -> bool:
        """Whether each step takes a fixed number and no row can end early, so that nothing is read back from the device."""
        config = self.config
        return config.threshold is None and config.entropy_budget is None and not self.canvas.eos_token_ids.numel()

    def select(self, scores: torch.Tensor, slots: torch.Tensor, tokens_per_step: int | torch.Tensor) -> torch.Tensor:
        """(B, Q) bool: the slots to commit by the config's criterion, from processed logits; `tokens_per_step`, of all rows or
        (B, 1), holds where no threshold nor budget does.
        """
        threshold, entropy_budget = self.config.threshold, self.config.entropy_budget
        criterion = self.config.criterion or ("confidence" if entropy_budget is None else "entropy")
        deserts = commit_scores(scores, criterion, self.uniform(slots, CRITERION) if criterion == "random" else None)
        if self.config.criterion_temperature:
            uniform = self.uniform(slots, CRITERION).clamp_min(1e-12)
            deserts = deserts / self.config.criterion_temperature - (-uniform.log()).log()
        return slots_to_commit(
            deserts,
            slots != self.canvas.bin,
            tokens_per_step=tokens_per_step,
            confidence=None if threshold is None else commit_scores(scores, "confidence").exp(),
            threshold=threshold,
            entropy=None if entropy_budget is None else -commit_scores(scores, "entropy"),
            entropy_budget=entropy_budget,
        )

    def warped(self, scores: torch.Tensor) -> torch.Tensor:
        """Processed logits after the sampling processors, if anything is sampled."""
        return self.processors.warp(scores) if self.config.do_sample else scores

    def choose(self, scores: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """(B, Q) a token for each slot, from warped logits."""
        return choose_tokens(scores, self.uniform(slots, SAMPLE) if self.config.do_sample else None)

    def commit(self, index: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> None:
        """Writes tokens (B, n) at columns `index` (B, n); `logits` (B, n, V) are the model's own, `scores` (B, n, V) what the
        tokens were chosen from.
        """
        canvas = self.canvas
        canvas.commit(index, tokens, logits, scores, self.step)
        if logits.device.type == "cpu" or (self.step + 1) % FINITE_CHECK_EVERY == 0:
            self.check_finite()
        if canvas.eos_token_ids.numel() and not self.has_ended:
            self.has_ended = bool((canvas.end < canvas.bin - 1).any())
            self.encoder.ragged = self.encoder.ragged or self.has_ended
        self.observers.after_step(self.step)
        self.step += 1

    def check_finite(self) -> None:
        """Whether all that was written could be.

        Raises:
            NonFiniteLogitsError: the model's logits were NaN.
            ValueError: nothing was left to choose from.
        """
        failed, excluded = self.canvas.failed_step, self.canvas.excluded_step
        if int(torch.maximum(failed, excluded)) < 0:  # one look, which on a GPU is a wait
            return
        if int(failed) >= 0:
            raise NonFiniteLogitsError(int(failed))
        raise ValueError(
            f"suppress_tokens, bad_words_ids, logits_processor or logits_hook leave no token to write at step {int(excluded)} "
            "(an EOS does not count where text stands behind it); leave at least one"
        )

    def still_open(self, columns: torch.Tensor) -> torch.Tensor:
        """`columns` (B, n), the bin in place of those behind the end of a continuation."""
        if not self.has_ended:
            return columns
        return columns.masked_fill(self.canvas.is_over(columns), self.canvas.bin)

    def finish_at_once(self, content: torch.Tensor) -> None:
        """Time is up: the continuation ends with its last written token, which what was written later has seen, and what is
        open before that is written in one pass.
        """
        canvas = self.canvas
        columns = torch.arange(canvas.bin, device=canvas.end.device)
        last = torch.where(canvas.known(), columns, -1).amax(dim=1).clamp_min(canvas.new_from - 1)
        canvas.end = torch.minimum(canvas.end, last)
        slots = columns_of(canvas.blank_mask & ~canvas.known() & ~canvas.is_over(columns), canvas.bin)
        if slots.shape[1]:
            self.encoder.ragged, self.last_step = True, self.step
            logits = self.ask(content, slots)
            scores = self.warped(self.processed(logits, slots))
            self.commit(slots, self.choose(scores, slots), logits, scores)


def fill_groupwise(decoder: Decoder, steps: torch.Tensor) -> None:
    """Algorithm 1: the groups are fixed; predict each from those before it.

    Args:
        steps: (B, K, g) the columns of each group, from `group_columns`.
    """
    content = decoder.encoder.given_columns()
    for slots in steps.unbind(dim=1):
        slots = decoder.still_open(slots)
        if decoder.has_ended and bool((slots == decoder.canvas.bin).all()):
            decoder.step += 1  # as beside rows that go on: a step is a group
            continue
        if decoder.out_of_time():
            return decoder.finish_at_once(content)
        logits = decoder.ask(content, slots)
        scores = decoder.warped(decoder.processed(logits, slots))
        decoder.commit(slots, decoder.choose(scores, slots), logits, scores)
        content = decoder.still_open(slots)


def fill_dynamic(decoder: Decoder) -> None:
    """Algorithm 2: ask the open blanks (those in the window), commit the best, and ask the rest again."""
    canvas, config = decoder.canvas, decoder.config
    tokens_per_step = config.tokens_per_step or 1
    content, waiting = decoder.encoder.given_columns(), columns_of(canvas.blank_mask, canvas.bin)
    while waiting.shape[1]:
        if decoder.out_of_time():
            return decoder.finish_at_once(content)
        slots = waiting[:, : config.window]
        logits = decoder.ask(content, slots)
        scores = decoder.processed(logits, slots)
        chosen = decoder.select(scores, slots, tokens_per_step)
        scores = decoder.warped(scores)
        decoder.commit(slots.masked_fill(~chosen, canvas.bin), decoder.choose(scores, slots), logits, scores)
        written = decoder.still_open(slots.masked_fill(~chosen, canvas.bin))
        waiting = decoder.still_open(
            torch.cat([slots.masked_fill(chosen, canvas.bin), waiting[:, slots.shape[1] :]], 1)
        )
        if decoder.widths_known():
            num_written = min(tokens_per_step, slots.shape[1])
            num_waiting = waiting.shape[1] - num_written
        else:
            counts = torch.stack([(columns != canvas.bin).sum(dim=1).amax() for columns in (written, waiting)])
            num_written, num_waiting = counts.tolist()
        content = pack(written, written != canvas.bin, canvas.bin)[:, :num_written]
        waiting = pack(waiting, waiting != canvas.bin, canvas.bin)[:, :num_waiting]


def fill_speculative(decoder: Decoder, path: torch.Tensor) -> None:
    """ASSD (paper §3), both of its passes in one: a pass encodes the last certain token and up to k drafts, checks each
    draft from a slot that sees what stands before it, and drafts the next k from slots that see all of this.

    What stands after a pass follows the sequential model exactly: the drafts up to the first that falls, and then either
    its replacement or, where all stand, the first of the new ones, which saw everything before it. The drafts behind a
    fallen one are kept: the rule holds for drafts from any distribution, as long as it is known. Each pass writes at
    least one token. With a cache, what fell is taken out of it. An EOS is never a draft, for what is drafted after it would
    have to know where the text ends; it is written as a replacement or as the token after the drafts.

    Args:
        path: (B, N) each row's blanks in the order in which they are generated, then the bin.
    """
    canvas, config = decoder.canvas, decoder.config
    num_drafts = config.draft_tokens or DRAFT_TOKENS
    by_ngram, greedy = config.draft == "ngram", not config.do_sample
    batch_size, device = path.shape[0], path.device
    num_new = 1 if by_ngram else num_drafts  # slots behind the drafts
    rest = path  # what is not yet certain
    pending = decoder.encoder.given_columns()
    drafts = rest.new_zeros(batch_size, 0)
    count = rest.new_zeros(batch_size)  # drafts of each row
    draft_scores = None
    while rest.shape[1]:
        if decoder.out_of_time():
            return decoder.finish_at_once(pending)
        first_pass, width = decoder.encoder.passes == 0, drafts.shape[1]
        # 1. One pass: [certain | drafts] as content, [checks | new drafts] as slots.
        place = torch.arange(width, device=device)
        is_draft = place < count[:, None]
        columns = _ahead(rest, torch.zeros_like(count), width, canvas.bin).masked_fill(~is_draft, canvas.bin)
        slots = torch.cat([columns, _ahead(rest, count, num_new, canvas.bin)], dim=1)
        canvas.sequences.scatter_(1, columns, drafts)
        seen = torch.cat([place, torch.full((num_new,), width, device=device)])
        groups = {} if first_pass else {"singletons": True, "slot_groups": seen + pending.shape[1]}
        logits = decoder.ask(torch.cat([pending, columns], dim=1), slots, **groups)
        draft_number = torch.full_like(canvas.sequences, width).scatter_(1, columns, place.expand_as(columns))
        known = canvas.known()[:, None] | (draft_number[:, None, :-1] < seen[:, None])
        scores = decoder.warped(decoder.processed(logits, slots, known))
        # 2. Which drafts stand, and the certain token after them.
        noise = (None if greedy else decoder.uniform(columns, purpose) for purpose in (ACCEPT, RESIDUAL))
        stands, replacement = accept_drafts(scores[:, :width], draft_scores, drafts, is_draft, *noise)
        new_noise = None if greedy else decoder.uniform(slots[:, width:], SAMPLE)
        new_scores = _without_eos(scores[:, width:], canvas.eos_token_ids)
        new_tokens = choose_tokens(new_scores, new_noise)
        after_all = choose_tokens(scores[:, width], None if greedy else new_noise[:, 0])
        all_stand = stands == count
        certain = torch.where(all_stand, after_all, replacement)
        # 3. Commit them.
        certain_slot = torch.where(all_stand, width, stands)[:, None]
        certain_column = slots.gather(1, certain_slot)
        of_certain = certain_slot[..., None].expand(-1, -1, logits.shape[-1])
        decoder.commit(
            torch.cat([columns.masked_fill(place >= stands[:, None], canvas.bin), certain_column], dim=1),
            torch.cat([drafts, certain[:, None]], dim=1),
            *(torch.cat([each[:, :width], each.gather(1, of_certain)], dim=1) for each in (logits, scores)),
        )
        # 4. Go on behind them: what is left of the old drafts, then the new ones; after an EOS, from scratch.
        rest = _ahead(rest, stands + 1, rest.shape[1] - 1, canvas.bin)
        if decoder.has_ended:
            rest = decoder.still_open(rest)
            rest = pack(rest, rest != canvas.bin, canvas.bin)
        left = (rest != canvas.bin).sum(dim=1)
        if by_ngram:
            next_count = left.clamp_max(num_drafts)
        else:
            next_count = torch.minimum(left, (count + num_new - stands - 1).clamp_max(num_drafts))
            next_count = next_count.masked_fill(torch.isin(certain, canvas.eos_token_ids), 0)
        kept = torch.where(certain_column[:, 0] == canvas.bin, 0, 1 + stands)  # content of this pass that stays
        max_kept, next_width, max_left = torch.stack([kept.amax(), next_count.amax(), left.amax()]).tolist()
        if not first_pass:
            fallen = torch.nn.functional.pad(place >= stands[:, None], (1, 0))
            decoder.encoder.forget(fallen, surplus=width + 1 - max(max_kept, 1))
            if batch_size > 1 and decoder.encoder.passes % COMPACT_EVERY == 0:
                decoder.encoder.compact()
        if by_ngram:
            drafts = _ngram_drafts(canvas, rest, next_width)
        else:
            source = stands[:, None] + 1 + torch.arange(next_width, device=device)
            source = torch.where(source < count[:, None], source, source - count[:, None] + width)
            source = source.clamp_max(width + num_new - 1)
            drafts = torch.cat([drafts, new_tokens], dim=1).gather(1, source)
            if not greedy:
                both = new_scores if draft_scores is None else torch.cat([draft_scores, new_scores], dim=1)
                draft_scores = both.gather(1, source[..., None].expand(-1, -1, both.shape[-1]))
        count, pending = next_count, certain_column
        rest = rest[:, :max_left]


def _ahead(rest: torch.Tensor, skip: torch.Tensor, width: int, bin_column: int) -> torch.Tensor:
    """(B, width) the entries of `rest` (B, N) from `skip` (B,) on, then the bin."""
    place = skip[:, None] + torch.arange(width, device=rest.device)
    padded = torch.nn.functional.pad(rest, (0, 1), value=bin_column)
    return padded.gather(1, place.clamp_max(rest.shape[1]))


def _ngram_drafts(canvas: Canvas, rest: torch.Tensor, width: int) -> torch.Tensor:
    """(B, width) drafts for the next columns, each building on those before it. Where one would be an EOS, it is the first
    token that is none.
    """
    pad = torch.nn.functional.pad
    by_position = pad(canvas.by_position, (0, 1), value=canvas.bin)
    tokens = canvas.sequences.gather(1, by_position)
    known = pad(canvas.known(), (0, 1)).gather(1, by_position)
    ends = canvas.eos_token_ids
    other = next(token for token in range(len(ends) + 1) if token not in ends.tolist()) if len(ends) else 0
    drafts = []
    for column in rest[:, :width].unbind(dim=1):
        place = canvas.position_ids.gather(1, column[:, None]).masked_fill(column[:, None] == canvas.bin, canvas.bin)
        draft = ngram_draft(tokens[:, :-1], known[:, :-1], place[:, 0])
        draft = draft.masked_fill(torch.isin(draft, ends), other)
        drafts.append(draft)
        tokens.scatter_(1, place, draft[:, None])
        known.scatter_(1, place, True)
    return torch.stack(drafts, dim=1) if drafts else rest[:, :0]


def _without_eos(scores: torch.Tensor, eos_token_ids: torch.Tensor) -> torch.Tensor:
    """Scores (B, n, V) to draw drafts from: without EOS, or where nothing else is left, anything else, which then falls."""
    if not eos_token_ids.numel():
        return scores
    scores = scores.index_fill(-1, eos_token_ids, -torch.inf)
    nothing = scores.amax(dim=-1, keepdim=True) == -torch.inf
    return torch.where(nothing, torch.zeros_like(scores).index_fill(-1, eos_token_ids, -torch.inf), scores)


def fill_refine(decoder: Decoder, make_decoder, log_likelihood) -> int:
    """`dynamic`, then rounds that open the least likely tokens again and fill them in sight of all the others (not in the
    paper). The likelihood that is compared is the exact one of the written tokens, one by one from left to right, given
    all other text. Tokens opened in a round that was not kept are left alone until nothing else is left to try.

    Args:
        make_decoder: makes a `Decoder` for another canvas, with its own chance, going on at a step.
        log_likelihood: the model's, of (sequences, group_ids, attention_mask).

    Returns:
        The passes of the model beyond those of `decoder`.
    """
    canvas, config = decoder.canvas, decoder.config
    fill_dynamic(decoder)
    written = canvas.blank_mask & (canvas.commit_step[:, :-1] >= 0)
    real = canvas.given_mask | written
    groups = GroupOrder.infilling(written, attention_mask=real).group_ids
    is_eos = torch.isin(canvas.sequences[:, :-1], canvas.eos_token_ids)
    quota = (written.sum(dim=1) * (config.refine_fraction or REFINE_FRACTION)).ceil().long()
    tried = torch.zeros_like(written)
    passes, step, chance = 1, decoder.step, decoder.chance
    log_probs = log_likelihood(canvas.sequences[:, :-1], groups, real) * written
    for _ in range(config.refine_rounds or REFINE_ROUNDS):
        if decoder.out_of_time():
            break
        eligible = written & ~is_eos & ~tried
        none_left = ~eligible.any(dim=1, keepdim=True)
        tried &= ~none_left
        eligible = written & ~is_eos & ~tried
        rank = log_probs.masked_fill(~eligible, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
        reopened = eligible & (rank < quota[:, None])
        candidate = replace(
            canvas,
            sequences=canvas.sequences.masked_fill(torch.nn.functional.pad(reopened, (0, 1)), 0),
            commit_step=canvas.commit_step.masked_fill(torch.nn.functional.pad(reopened, (0, 1)), -1),
            log_probs=canvas.log_probs.clone(),
            given_mask=real & ~reopened,
            blank_mask=reopened,
            new_from=canvas.bin,  # EOS is not written into the middle
            logits=None if canvas.logits is None else canvas.logits.clone(),
        )
        chance = chance.afresh()
        again = make_decoder(candidate, chance, step)
        fill_dynamic(again)
        again.check_finite()
        passes, step = passes + again.encoder.passes + 1, again.step
        rewritten = log_likelihood(candidate.sequences[:, :-1], groups, real) * written
        risen = rewritten.sum(dim=1) > log_probs.sum(dim=1)
        kept = (torch.ones_like(risen) if config.refine_keep == "all" else risen)[:, None]
        log_probs = torch.where(kept, rewritten, log_probs)
        for name in ("sequences", "commit_step"):
            setattr(canvas, name, torch.where(kept, getattr(candidate, name), getattr(canvas, name)))
        if canvas.logits is not None:
            canvas.logits = torch.where(kept[..., None], candidate.logits, canvas.logits)
        tried = (tried | reopened) & ~kept
    canvas.log_probs[:, :-1] = log_probs
    decoder.step = step
    return passes


def group_columns(canvas: Canvas, config: A3GenerationConfig, chance: Chance) -> torch.Tensor:
    """(B, K, g) the columns of each group in turn, padded with the bin.

    Raises:
        ValueError: an `order` tensor of another shape than the canvas, or with groups of several tokens for strategy
            `speculative`.
    """
    blank = canvas.blank_mask
    if isinstance(config.order, torch.Tensor):
        if config.order.shape != blank.shape:
            raise ValueError(
                f"order has shape {tuple(config.order.shape)}; it takes a group for every token and blank, "
                f"{tuple(blank.shape)}"
            )
        group = config.order.to(blank.device)
    else:
        name = config.order or "left_to_right"
        group = GroupOrder.infilling(
            blank,
            attention_mask=blank | canvas.given_mask,
            order=name,
            group_size=config.group_size or 1,
            span_length=config.span_length,
            generator=chance.order_generators() if name in ("random", "spans") else None,
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
    if config.strategy == "speculative" and group_size > 1:
        raise ValueError("order holds groups of several tokens; strategy='speculative' takes one token a group")
    steps = torch.full((blank.shape[0], num_groups * group_size + 1), canvas.bin, device=blank.device)
    target = torch.where(is_blank, number * group_size + inside, num_groups * group_size)
    steps.scatter_(1, target, by_group.masked_fill(~is_blank, canvas.bin))
    return steps[:, :-1].view(-1, num_groups, group_size)
