"""Choices of a decoding step: which token at each slot, and which slots to commit. Pure tensor functions."""

import torch

CRITERIA = ("confidence", "entropy", "margin", "random")


def choose_tokens(scores: torch.Tensor, uniform: torch.Tensor | None) -> torch.Tensor:
    """One token per slot.

    Args:
        scores: (…, V) logits after the processors (−inf where a token is excluded).
        uniform: (…) numbers in [0, 1) that decide the draw, by the inverse of the cumulative distribution; None: greedy.
            A slot's token depends on its own number and scores alone, never on its neighbours.
    """
    if uniform is None:
        return scores.argmax(dim=-1)
    cumulative = scores.float().softmax(dim=-1).cumsum(dim=-1)
    # scaled by the rounded total, so that the draw stays below it; right=True skips tokens of probability zero
    threshold = uniform.to(cumulative.dtype)[..., None] * cumulative[..., -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    last = (cumulative < cumulative[..., -1:]).sum(dim=-1)  # the last token of positive probability
    return torch.minimum(tokens, last)


def commit_scores(logits: torch.Tensor, criterion: str, uniform: torch.Tensor | None = None) -> torch.Tensor:
    """How much each slot deserves to be committed now, higher first (paper §1, Algorithm 2; `margin` from §3).

    Args:
        logits: (B, Q, V) of the model, before any processor.
        criterion: `"confidence"` (log of the largest probability), `"entropy"` (minus the entropy, in nats), `"margin"`
            (the largest probability minus the second), or `"random"`.
        uniform: (B, Q) noise for `"random"`.
    """
    if criterion == "random":
        return uniform
    log_probs = logits.float().log_softmax(dim=-1)
    if criterion == "confidence":
        return log_probs.amax(dim=-1)
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
) -> torch.Tensor:
    """(B, Q) bool, the slots to commit: the best `tokens_per_step`, or every one whose `confidence` (B, Q), its largest
    probability, is above `threshold`; at least the best one in either case, as long as one is open.

    Args:
        scores: (B, Q) from `commit_scores`; ties go to the earlier slot.
        is_open: (B, Q), False at slots that ask for nothing (ragged rows).
    """
    by_score = scores.masked_fill(~is_open, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = by_score.argsort(dim=-1)
    if threshold is None:
        return (rank < tokens_per_step) & is_open
    return ((rank == 0) | (confidence > threshold)) & is_open
