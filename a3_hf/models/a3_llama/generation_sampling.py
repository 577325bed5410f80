"""Choices of a decoding step, as pure tensor functions: the token at each slot, and the slots to commit."""

import torch

CRITERIA = ("confidence", "entropy", "margin", "random")
HEAD_DRAFTS = ("head", "ngram+head")
DRAFTS = ("model", "ngram", *HEAD_DRAFTS)
VERIFIERS = ("slots", "content")
NGRAM_LENGTH = 3  # maximum number of left neighbours that an n-gram draft matches
NGRAM_LEAST = 2  # and the minimum: after one alone, too few drafts stand


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Casts half precision to fp32; leaves fp32 and fp64 unchanged."""
    return logits if logits.dtype == torch.float64 else logits.float()


def uniform_noise(seeds: torch.Tensor, places: torch.Tensor, step: int | torch.Tensor, purpose: int) -> torch.Tensor:
    """Returns uniform numbers in [0, 1), each a hash (splitmix64-style) of its own arguments only, so a draw depends neither
    on batch, padding nor device.

    Args:
        seeds: (B,) int64, one per row.
        places: (B, n) int64, e.g. the blank's number in its row.
        step: the decoding step; or (B, n).
        purpose: distinguishes the draws of one step.

    Returns:
        (B, n) float64.
    """
    mixed = _mix(seeds[:, None] + _mix(places + 1))
    steps = step if isinstance(step, torch.Tensor) else torch.full_like(places[:1, :1], step)
    mixed = _mix(mixed + _mix((steps * 64 + purpose + 1) * -7046029254386353131))
    return ((mixed >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    # Masks make the right shifts logical (int64 copies the sign bit); products wrap.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def choose_tokens(scores: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
    """Returns (…) one token per slot, which depends only on that slot's scores and random number.

    Args:
        scores: (…, V) logits after the processors (−inf where a token is excluded).
        uniform: (…) numbers in [0, 1) for inverse transform sampling; None: greedy.
    """
    if uniform is None:
        return scores.argmax(dim=-1)
    cumulative = at_least_float32(scores).softmax(dim=-1).cumsum(dim=-1)
    # Scaled by the rounded total, so that the draw stays below it; right=True skips tokens of probability zero.
    threshold = uniform.to(cumulative.dtype)[..., None] * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    last = (cumulative < cumulative[..., -1:]).sum(dim=-1)  # the last token of positive probability
    return torch.minimum(tokens, last)


def commit_scores(logits: torch.Tensor, criterion: str, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the commit score of each slot, (B, Q); the highest are committed first (paper §1, Algorithm 2; `margin`: §3).

    Args:
        logits: (B, Q, V), before temperature etc.
        criterion: `"confidence"` (log of the largest probability), `"entropy"` (minus the entropy, in nats), `"margin"`
            (the largest probability minus the second), or `"random"`.
        uniform: (B, Q) noise for `"random"`.
    """
    if criterion == "random":
        return uniform
    logits = at_least_float32(logits)
    if criterion == "confidence":
        return logits.amax(dim=-1) - logits.logsumexp(dim=-1)
    log_probs = logits.log_softmax(dim=-1)
    if criterion == "entropy":
        return (log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(dim=-1)
    first, second = log_probs.topk(2, dim=-1).values.exp().unbind(dim=-1)
    return first - second


def slots_to_commit(
    scores: torch.Tensor,
    is_open: torch.Tensor,
    *,
    tokens_per_step: int | None = None,
    confidence: torch.Tensor | None = None,
    threshold: float | None = None,
    entropy: torch.Tensor | None = None,
    entropy_budget: float | None = None,
) -> torch.Tensor:
    """Returns (B, Q) bool, the slots to commit by one of three rules; always the best one, if any is open.

    Args:
        scores: (B, Q) from `commit_scores`; ties go to the earlier slot.
        is_open: (B, Q), False at slots that are padding (ragged rows).
        tokens_per_step: rule 1: commit this many, best first.
        confidence, threshold: rule 2: commit slots whose largest probability, `confidence` (B, Q), exceeds `threshold`.
        entropy, entropy_budget: rule 3 (paper §3): commit slots, best first, while the sum of their `entropy` (B, Q; nats)
            stays within `entropy_budget`.
    """
    by_score = scores.masked_fill(~is_open, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = by_score.argsort(dim=-1)
    if threshold is not None:
        return ((rank == 0) | (confidence > threshold)) & is_open
    if entropy_budget is not None:
        spent = entropy.masked_fill(~is_open, torch.inf).gather(-1, by_score).cumsum(dim=-1).gather(-1, rank)
        return ((rank == 0) | (spent <= entropy_budget)) & is_open
    return (rank < tokens_per_step) & is_open


def accept_drafts(
    target: torch.Tensor,
    draft: torch.Tensor | None,
    tokens: torch.Tensor,
    is_draft: torch.Tensor,
    accept_noise: torch.Tensor | None,
    residual_noise: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Applies the accept rule of speculative sampling (paper §3, ASSD): a draft x drawn from p is accepted with probability
    min(1, q(x) / p(x)); the first rejected one is replaced by a draw from max(q − p, 0), normalised. The resulting tokens
    follow q for any p.

    Args:
        target: (B, D, V) logits q of the sequential model at each draft, given the drafts before it.
        draft: (B, D, V) logits p that the drafts were drawn from; None: p is 1 at the draft.
        tokens: (B, D) the drafts.
        is_draft: (B, D), False after a row's last draft.
        accept_noise, residual_noise: (B, D) numbers in [0, 1). None: greedy; a draft is accepted if it is the likeliest.

    Returns:
        (B,) the number of accepted drafts, and (B,) the replacement of the first rejected one (arbitrary if none is).
    """
    if accept_noise is None:
        best = target.argmax(dim=-1)
        falls = (best != tokens) & is_draft
        replacements = best
    else:
        target_probs = at_least_float32(target).softmax(dim=-1)
        if draft is None:
            draft_probs = torch.zeros_like(target_probs).scatter_(-1, tokens[..., None], 1.0)
        else:
            draft_probs = at_least_float32(draft).softmax(dim=-1)
        target_prob, draft_prob = (
            probs.gather(-1, tokens[..., None]).squeeze(-1) for probs in (target_probs, draft_probs)
        )
        falls = (accept_noise * draft_prob >= target_prob) & is_draft
        residual = (target_probs - draft_probs).clamp_min(0.0)
        # The residual is 0 where the two agree to rounding; drafts are rejected there by rounding only.
        residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, target_probs)
        replacements = choose_tokens(residual.log(), residual_noise)
    if not tokens.shape[1]:
        none = tokens.new_zeros(tokens.shape[0])
        return none, none
    stands = (~falls & is_draft).long().cumprod(dim=1).sum(dim=1)
    first_fallen = stands.clamp_max(tokens.shape[1] - 1)[:, None]
    return stands, replacements.gather(1, first_fallen).squeeze(1)


def ngram_draft(tokens: torch.Tensor, known: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drafts the token at `places` (B,): the one after the same left neighbours elsewhere in the row, preferring the longest
    match (up to `NGRAM_LENGTH`), then the last.

    Args:
        tokens: (B, S) the text by position, without padding between tokens.
        known: (B, S), True where `tokens` are known.

    Returns:
        (B,) the drafts, and (B,) how many left neighbours match; with 0 the draft is arbitrary.
    """
    length = tokens.shape[1]
    place = torch.arange(length, device=tokens.device)
    matched = torch.zeros_like(tokens)
    agrees = known & (place[None] != places[:, None])
    for distance in range(1, NGRAM_LENGTH + 1):
        here = (places - distance).clamp_min(0)[:, None]
        here_known = known.gather(1, here) & (places[:, None] >= distance)
        there = torch.roll(tokens, distance, dims=1)
        there_known = torch.roll(known, distance, dims=1) & (place >= distance)
        agrees = agrees & here_known & there_known & (there == tokens.gather(1, here))
        matched = matched + agrees
    best = (matched * length + place).argmax(dim=1, keepdim=True)
    return tokens.gather(1, best).squeeze(1), matched.gather(1, best).squeeze(1)
