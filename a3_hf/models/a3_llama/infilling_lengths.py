"""How long a blank is: candidates compared by the exact likelihood of the whole text."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.functional import pad

from .infilling_templates import Template
from .orders import PADDING_GROUP

CANDIDATES_PER_BATCH = 16


def choose_lengths(
    model,
    template: Template,
    fill: Callable[[list[Template]], tuple[torch.Tensor, torch.Tensor]],
    *,
    end_token_id: int | None,
) -> tuple[Template, list[dict[int, float]]]:
    """Sets the ranges of a template to numbers, blank by blank from the left (not specified in the paper).

    A candidate of length n is the text up to the next blank of unknown length, filled. Its score is the exact
    log-likelihood of what was filled in and of all that stands after it, in text order, given the text before the blank:
    the same text with other lengths differs in nothing else, so that the candidates' sums are compared, not their means.
    Where the blank ends the text, so does `end_token_id`, and is scored with it.

    Args:
        fill: fills templates whose lengths are numbers, in one batch; returns the tokens (B, S) and the number of each
            token's blank (B, S), 0 at given text and −1 at padding, which is on the left.

    Returns:
        The template with numbers for lengths, and for each blank the score of each candidate, in nats (empty where the
        length was given).
    """
    lengths, scores = list(template.lengths), [{} for _ in template.lengths]
    for number, span in enumerate(template.lengths):
        if isinstance(span, int):
            continue
        unknown = [later for later in range(number + 1, len(lengths)) if not isinstance(lengths[later], int)]
        until = unknown[0] if unknown else len(lengths)
        # the space before the next unknown blank belongs to what is written there
        after = template.pieces[until].removesuffix(" ") if unknown else template.pieces[until]
        ends = until == len(lengths) and not after and number == until - 1
        known = lengths[:until]
        candidates = [
            Template((*template.pieces[:until], after), (*known[:number], length, *known[number + 1 :]))
            for length in range(span[0], span[1] + 1)
        ]
        for start in range(0, len(candidates), CANDIDATES_PER_BATCH):
            batch = candidates[start : start + CANDIDATES_PER_BATCH]
            values = score_candidates(model, *fill(batch), number + 1, end_token_id=end_token_id if ends else None)
            scores[number].update({one.lengths[number]: value for one, value in zip(batch, values, strict=True)})
        lengths[number] = max(scores[number], key=scores[number].get)
    return replace(template, lengths=tuple(lengths)), scores


def score_candidates(
    model, tokens: torch.Tensor, blanks: torch.Tensor, number: int, *, end_token_id: int | None
) -> list[float]:
    """Log-likelihood (nats) of each filled row (B, S; left-padded) from blank `number` on, given the text before it, from
    left to right; with `end_token_id` after it, if there is one.
    """
    if end_token_id is not None:
        tokens, blanks = pad(tokens, (0, 1), value=end_token_id), pad(blanks, (0, 1))
    real = blanks >= 0
    group_ids = (real.long().cumsum(dim=1) - 1).masked_fill(~real, PADDING_GROUP)
    scored = (blanks == number).long().cumsum(dim=1) > 0
    log_probs = model.log_likelihood(tokens, group_ids, real.long(), scored_mask=scored)
    return log_probs.double().sum(dim=1).tolist()
