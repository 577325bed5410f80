"""Choice of blank lengths, by the exact likelihood of the whole text."""

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
    """Replaces length ranges of a template by numbers, blank by blank from the left (not specified in the paper).

    A candidate of length n is the filled text up to the next blank of unknown length. Its score is the exact log-likelihood
    of the filled tokens and the text after them, left to right, given the text before the blank. Sums are compared, not
    means: the candidates share all other text. If the blank ends the text, `end_token_id` is appended and scored too.

    Args:
        fill: fills templates whose lengths are numbers, in one batch; returns left-padded tokens (B, S) and the number of
            each token's blank (B, S), 0 at given text and −1 at padding.

    Returns:
        The template with numbers as lengths, and for each blank the score of each candidate, in nats (empty if the length
        was given).
    """
    lengths, scores = list(template.lengths), [{} for _ in template.lengths]
    for number, span in enumerate(template.lengths):
        if isinstance(span, int):
            continue
        unknown = [later for later in range(number + 1, len(lengths)) if not isinstance(lengths[later], int)]
        until = unknown[0] if unknown else len(lengths)
        # The space before the next unknown blank belongs to that blank.
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
    """Returns the log-likelihood (nats) of each left-padded row (B, S) from blank `number` to the end, given the text before
    it, left to right; `end_token_id`, unless None, is appended to each row.
    """
    if end_token_id is not None:
        tokens, blanks = pad(tokens, (0, 1), value=end_token_id), pad(blanks, (0, 1))
    real = blanks >= 0
    group_ids = (real.long().cumsum(dim=1) - 1).masked_fill(~real, PADDING_GROUP)
    scored = (blanks == number).long().cumsum(dim=1) > 0
    log_probs = model.log_likelihood(tokens, group_ids, real.long(), scored_mask=scored)
    return log_probs.double().sum(dim=1).tolist()
