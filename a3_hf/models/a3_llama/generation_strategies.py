"""The four decoding strategies: which columns a pass predicts, and which it commits."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from .generation_canvas import Canvas, columns_of, pack
from .generation_config import A3GenerationConfig
from .generation_decoder import ACCEPT, RESIDUAL, SAMPLE, Decoder, SlotNoise
from .generation_filling import Filling, SteadyFilling
from .generation_sampling import accept_drafts, choose_tokens
from .generation_trees import COMPACT_EVERY, NGRAM_TOKENS, ngram_drafts
from .orders import GroupOrder

DRAFT_TOKENS = 4
REFINE_ROUNDS, REFINE_FRACTION = 4, 0.25


class GroupwiseFilling(Filling):
    """Fills groups fixed beforehand, each given the earlier ones (Algorithm 1).

    Args:
        steps: (B, K, g) the columns of each group, from `group_columns`.
    """

    columns = ("steps", "content")

    def __init__(self, decoder: Decoder, steps: torch.Tensor):
        super().__init__(decoder)
        self.steps, self.content = steps, decoder.runner.given_columns()

    def is_open(self) -> torch.Tensor:
        left = self.decoder.mask_finished(self.steps.flatten(1))
        return (left != self.decoder.canvas.pad_column).any(dim=1)

    def step(self) -> bool:
        decoder = self.decoder
        slots, self.steps = decoder.mask_finished(self.steps[:, 0]), self.steps[:, 1:]
        if decoder.has_ended and bool((slots == decoder.canvas.pad_column).all()):
            decoder.step += 1  # a step is a group, as in batches whose other rows continue
            return self.steps.shape[1] > 0
        if decoder.out_of_time():
            decoder.fill_remaining(self.content)
            return False
        logits = self._logits(slots)
        scores = decoder.warped(decoder.processed(logits, slots))
        decoder.commit(slots, decoder.choose(scores, slots), logits, scores)
        self.content = decoder.mask_finished(slots)
        return self.steps.shape[1] > 0

    def _logits(self, slots: torch.Tensor) -> torch.Tensor:
        """Returns the model's logits (B, g, V) of the columns `slots` (B, g). Where a slot would start as the token that this
        pass encodes, that token's content row is the slot (not in the paper): one row a token in place of two.
        """
        decoder, canvas = self.decoder, self.decoder.canvas
        runner, content = decoder.runner, self.content
        if runner.passes == 0 or slots.shape[1] != 1 or content.shape[1] != 1 or not runner.slots_are_content_rows:
            return decoder.logits_of(content, slots)
        is_real = (slots != canvas.pad_column) & (content != canvas.pad_column)
        is_next = is_real & (canvas.position_ids.gather(1, content) + 1 == canvas.position_ids.gather(1, slots))
        needs_slot = (slots != canvas.pad_column) & ~is_next
        own = slots.masked_fill(is_next, canvas.pad_column) if needs_slot.any() else slots[:, :0]
        logits = decoder.logits_of(content, own, singletons=False, logits_at=torch.zeros_like(slots))
        return torch.where(is_next[..., None], logits[:, :1], logits[:, -1:])


class DynamicFilling(Filling):
    """Predicts the open blanks (in the window), commits the best, and repeats (Algorithm 2)."""

    columns = ("waiting", "content")

    def __init__(self, decoder: Decoder):
        super().__init__(decoder)
        canvas = decoder.canvas
        self.content, self.waiting = decoder.runner.given_columns(), columns_of(canvas.blank_mask, canvas.pad_column)

    def is_open(self) -> torch.Tensor:
        return (self.decoder.mask_finished(self.waiting) != self.decoder.canvas.pad_column).any(dim=1)

    def step(self) -> bool:
        decoder, canvas, config = self.decoder, self.decoder.canvas, self.decoder.config
        tokens_per_step, waiting = config.tokens_per_step or 1, self.waiting
        if not waiting.shape[1]:
            return False
        if decoder.out_of_time():
            decoder.fill_remaining(self.content)
            return False
        slots = waiting[:, : config.window]
        logits = decoder.logits_of(self.content, slots)
        scores = decoder.processed(logits, slots)
        chosen = decoder.select(scores, slots, tokens_per_step)
        scores = decoder.warped(scores)
        decoder.commit(slots.masked_fill(~chosen, canvas.pad_column), decoder.choose(scores, slots), logits, scores)
        written = decoder.mask_finished(slots.masked_fill(~chosen, canvas.pad_column))
        waiting = decoder.mask_finished(
            torch.cat([slots.masked_fill(chosen, canvas.pad_column), waiting[:, slots.shape[1] :]], 1)
        )
        if decoder.widths_known():
            num_written = min(tokens_per_step, slots.shape[1])
            num_waiting = waiting.shape[1] - num_written
        else:
            counts = torch.stack([(columns != canvas.pad_column).sum(dim=1).amax() for columns in (written, waiting)])
            num_written, num_waiting = counts.tolist()
        self.content = pack(written, written != canvas.pad_column, canvas.pad_column)[:, :num_written]
        self.waiting = pack(waiting, waiting != canvas.pad_column, canvas.pad_column)[:, :num_waiting]
        return num_waiting > 0


class SpeculativeFilling(SteadyFilling):
    """`fill_speculative`.

    Args:
        path: (B, N) each row's blanks in generation order, then the padding column.
    """

    columns = ("path",)

    def __init__(self, decoder: Decoder, path: torch.Tensor):
        super().__init__(decoder)
        self.path = path

    def passes(self) -> Iterator[None]:
        return fill_speculative(self.decoder, self.path)


class RefineFilling(SteadyFilling):
    """`fill_refine`.

    Args:
        log_likelihood: the model's, of (sequences, group_ids, attention_mask).
    """

    rewrites = True

    def __init__(self, decoder: Decoder, log_likelihood: Callable[..., torch.Tensor]):
        super().__init__(decoder)
        self.log_likelihood = log_likelihood

    def passes(self) -> Iterator[None]:
        return fill_refine(self.decoder, self.log_likelihood)


def fill_speculative(decoder: Decoder, path: torch.Tensor) -> Iterator[None]:
    """Fills blanks by ASSD (paper §3), a pass at a time, with both of its passes fused: a pass encodes the last certain token
    and up to k drafts, verifies each draft from a slot that sees the tokens before it, and drafts the next k from slots that
    see all.

    Accepted tokens follow the sequential model exactly: the drafts before the first rejected one, then its replacement or,
    if all are accepted, the first new draft, which saw everything before it. Drafts after a rejected one are kept as drafts:
    the accept rule holds for any known draft distribution. Each pass writes at least one token. Rejected drafts are evicted
    from the cache. An EOS is never a draft, only a replacement or the token after the drafts, as drafts after it would
    depend on where the text ends.

    With `verify="content"` (not in the paper) the content row of each token checks the draft after it, and the last one
    makes the first new draft.

    Args:
        path: (B, N) each row's blanks in generation order, then the padding column.
    """
    canvas, config = decoder.canvas, decoder.config
    num_drafts = config.draft_tokens or (NGRAM_TOKENS if config.draft == "ngram" else DRAFT_TOKENS)
    num_drafts = min(num_drafts, path.shape[1])
    by_ngram, greedy, by_content = config.draft == "ngram", not config.do_sample, config.verify == "content"
    batch_size, device = path.shape[0], path.device
    num_new = 1 if by_ngram else num_drafts  # slots after the drafts
    rest = path  # columns not yet certain
    pending = decoder.runner.given_columns()
    if by_content and (pending == canvas.pad_column).all(dim=1).any():
        raise ValueError(
            "past_key_values holds a row's whole prompt: verify='content' expects a cache without its last token"
        )
    drafts = rest.new_zeros(batch_size, 0)
    count = rest.new_zeros(batch_size)  # drafts of each row
    draft_scores = None
    while rest.shape[1]:
        if decoder.out_of_time():
            decoder.fill_remaining(pending)
            return
        first_pass, width = decoder.runner.passes == 0, drafts.shape[1]
        # 1. One pass: [certain | drafts] as content, [checks | new drafts] as slots.
        place = torch.arange(width, device=device)
        is_draft = place < count[:, None]
        columns = _ahead(rest, torch.zeros_like(count), width, canvas.pad_column).masked_fill(
            ~is_draft, canvas.pad_column
        )
        slots = torch.cat([columns, _ahead(rest, count, num_new, canvas.pad_column)], dim=1)
        canvas.sequences.scatter_(1, columns, drafts)
        seen = torch.cat([place, torch.full((num_new,), width, device=device)])
        groups = {"singletons": True, "slot_groups": seen + pending.shape[1]}
        own = slots  # the columns that need a slot
        if by_content:
            own = slots[:, width + 1 :]
            groups |= {
                "slot_groups": groups["slot_groups"][width + 1 :],
                "logits_at": _checks(pending, count, width, canvas),
            }
        if first_pass:
            del groups["slot_groups"]
        logits = decoder.logits_of(torch.cat([pending, columns], dim=1), own, **groups)
        draft_number = torch.full_like(canvas.sequences, width).scatter_(1, columns, place.expand_as(columns))
        known = canvas.known()[:, None] | (draft_number[:, None, :-1] < seen[:, None])
        scores = decoder.warped(decoder.processed(logits, slots, known))
        # 2. Accept drafts, and choose the certain token after them.
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
            torch.cat([columns.masked_fill(place >= stands[:, None], canvas.pad_column), certain_column], dim=1),
            torch.cat([drafts, certain[:, None]], dim=1),
            *(torch.cat([each[:, :width], each.gather(1, of_certain)], dim=1) for each in (logits, scores)),
        )
        # 4. Next drafts: the remaining old ones, then the new ones; after an EOS, none.
        rest = _ahead(rest, stands + 1, rest.shape[1] - 1, canvas.pad_column)
        if decoder.has_ended:
            rest = decoder.mask_finished(rest)
            rest = pack(rest, rest != canvas.pad_column, canvas.pad_column)
        left = (rest != canvas.pad_column).sum(dim=1)
        if by_ngram:
            next_count = left.clamp_max(num_drafts)
        else:
            next_count = torch.minimum(left, (count + num_new - stands - 1).clamp_max(num_drafts))
            next_count = next_count.masked_fill(torch.isin(certain, canvas.eos_token_ids), 0)
        kept = torch.where(certain_column[:, 0] == canvas.pad_column, 0, 1 + stands)  # content of this pass that stays
        max_kept, next_width, max_left = torch.stack([kept.amax(), next_count.amax(), left.amax()]).tolist()
        if not first_pass:
            fallen = torch.nn.functional.pad(place >= stands[:, None], (1, 0))
            decoder.runner.evict(fallen, surplus=width + 1 - max(max_kept, 1))
            if batch_size > 1 and decoder.runner.passes % COMPACT_EVERY == 0:
                decoder.runner.compact()
        if by_ngram:
            drafts, next_count = ngram_drafts(canvas, rest, next_count, next_width)
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
        if max_left:
            yield


def _checks(pending: torch.Tensor, count: torch.Tensor, num_drafts: int, canvas: Canvas) -> torch.Tensor:
    """Returns (B, 1 + num_drafts) the places, in a pass over the columns `pending` (B, C) and then drafts, of the tokens whose
    content rows check each row's `count` (B,) drafts and, at the end, predict the token after them.
    """
    place = torch.arange(pending.shape[1], device=pending.device)
    last = torch.where(pending != canvas.pad_column, place, 0).amax(dim=1, keepdim=True)
    drafts_before = torch.minimum(torch.arange(1 + num_drafts, device=pending.device), count[:, None])
    return torch.where(drafts_before == 0, last, pending.shape[1] - 1 + drafts_before)


def _ahead(rest: torch.Tensor, skip: torch.Tensor, width: int, pad_column: int) -> torch.Tensor:
    """Returns (B, width) the entries of `rest` (B, N) from index `skip` (B,), then the padding column."""
    place = skip[:, None] + torch.arange(width, device=rest.device)
    padded = torch.nn.functional.pad(rest, (0, 1), value=pad_column)
    return padded.gather(1, place.clamp_max(rest.shape[1]))


def _without_eos(scores: torch.Tensor, eos_token_ids: torch.Tensor) -> torch.Tensor:
    """Returns scores (B, n, V) to draw drafts from, with EOS excluded; uniform over other tokens if only EOS was allowed, so
    that the draft is rejected.
    """
    if not eos_token_ids.numel():
        return scores
    scores = scores.index_fill(-1, eos_token_ids, -torch.inf)
    nothing = scores.amax(dim=-1, keepdim=True) == -torch.inf
    return torch.where(nothing, torch.zeros_like(scores).index_fill(-1, eos_token_ids, -torch.inf), scores)


def fill_refine(decoder: Decoder, log_likelihood: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Runs `dynamic`, a pass at a time, then rounds that reopen the least likely tokens and fill them given all others (not in
    the paper). Rounds are compared by the exact log-likelihood of the written tokens, left to right, given all other text.
    Tokens reopened in a discarded round are not reopened again until all others have been tried.

    Args:
        log_likelihood: the model's, of (sequences, group_ids, attention_mask).
    """
    canvas, config = decoder.canvas, decoder.config
    yield from _passes(DynamicFilling(decoder))
    written = canvas.blank_mask & (canvas.commit_step[:, :-1] >= 0)
    real = canvas.given_mask | written
    groups = GroupOrder.infilling(written, attention_mask=real).group_ids
    is_eos = torch.isin(canvas.sequences[:, :-1], canvas.eos_token_ids)
    quota = (written.sum(dim=1) * (config.refine_fraction or REFINE_FRACTION)).ceil().long()
    tried = torch.zeros_like(written)
    step, chance = decoder.step, decoder.chance
    decoder.extra_passes += 1
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
            new_from=torch.full_like(canvas.new_from, canvas.pad_column),  # EOS is not written into the middle
            logits=None if canvas.logits is None else canvas.logits.clone(),
        )
        chance = chance.afresh()
        again = decoder.again(candidate, chance, step)
        yield from _passes(DynamicFilling(again))
        again.check_finite()
        decoder.extra_passes += again.runner.passes + 1
        step = again.step
        rewritten = log_likelihood(candidate.sequences[:, :-1], groups, real) * written
        kept = rewritten.sum(dim=1, keepdim=True) > log_probs.sum(dim=1, keepdim=True)
        log_probs = torch.where(kept, rewritten, log_probs)
        for name in ("sequences", "commit_step"):
            setattr(canvas, name, torch.where(kept, getattr(candidate, name), getattr(canvas, name)))
        if canvas.logits is not None:
            canvas.logits = torch.where(kept[..., None], candidate.logits, canvas.logits)
        tried = (tried | reopened) & ~kept
    canvas.log_probs[:, :-1] = log_probs
    decoder.step = step


def _passes(filling: Filling) -> Iterator[None]:
    while filling.step():
        yield
    yield


def group_columns(canvas: Canvas, config: A3GenerationConfig, chance: SlotNoise) -> torch.Tensor:
    """Returns (B, K, g) the columns of each group in order, padded with the padding column.

    Raises:
        ValueError: an `order` tensor that differs in shape from the canvas, or with groups of several tokens for strategy
            `speculative`.
    """
    blank = canvas.blank_mask
    if isinstance(config.order, torch.Tensor):
        if config.order.shape != blank.shape:
            raise ValueError(
                f"order has shape {tuple(config.order.shape)}: expected one group per token and blank, "
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
    # Number the groups of each row's blanks from 0, then the blanks inside each group.
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
        raise ValueError("order holds groups of several tokens: strategy='speculative' expects one token per group")
    steps = torch.full((blank.shape[0], num_groups * group_size + 1), canvas.pad_column, device=blank.device)
    target = torch.where(is_blank, number * group_size + inside, num_groups * group_size)
    steps.scatter_(1, target, by_group.masked_fill(~is_blank, canvas.pad_column))
    return steps[:, :-1].view(-1, num_groups, group_size)
