"""How long a blank is: candidates compared by exact likelihood."""

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from .orders import PADDING_GROUP
from .templates import Template, encode_template

CANDIDATES_PER_BATCH = 16


def choose_lengths(
    model,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    fill: Callable[[list[list[int]], list[list[int]]], torch.Tensor],
) -> tuple[Template, list[dict[int, float]]]:
    """Sets the ranges of a template to numbers, blank by blank from the left (not specified in the paper).

    A candidate of length n is the text up to the next blank of unknown length, filled. Its score is the exact
    log-likelihood, given the text before the blank, of the text after it at that distance and then of what was filled in,
    per token.

    Args:
        fill: fills a padded batch of (ids, blanks) from `encode_template`; returns the tokens (B, S), left-padded.

    Returns:
        The template with numbers for lengths, and for each blank the score of each candidate, in nats per token (empty
        where the length was given).
    """
    lengths, scores = list(template.lengths), [{} for _ in template.lengths]
    for number, span in enumerate(template.lengths):
        if isinstance(span, int):
            continue
        unknown = [later for later in range(number + 1, len(lengths)) if not isinstance(lengths[later], int)]
        until = unknown[0] if unknown else len(lengths)
        candidates = list(range(span[0], span[1] + 1))
        # text before the next unknown blank touches it: its last space belongs to what is written there
        pieces = template.pieces[: until + 1]
        pieces = (*pieces[:-1], pieces[-1].rstrip(" ") if unknown else pieces[-1])
        known = tuple(lengths[:until])
        encoded = [
            encode_template(
                tokenizer, replace(template, pieces=pieces, lengths=(*known[:number], length, *known[number + 1 :]))
            )
            for length in candidates
        ]
        for start in range(0, len(encoded), CANDIDATES_PER_BATCH):
            batch = encoded[start : start + CANDIDATES_PER_BATCH]
            tokens = fill([ids for ids, _ in batch], [blanks for _, blanks in batch])
            values = score_candidates(model, tokens, [blanks for _, blanks in batch], number + 1)
            scores[number].update(zip(candidates[start:], values, strict=False))
        lengths[number] = max(scores[number], key=scores[number].get)
    return replace(template, lengths=tuple(lengths)), scores


def score_candidates(model, tokens: torch.Tensor, blanks: list[list[int]], number: int) -> list[float]:
    """Mean log-probability per token of each filled row (B, S; left-padded), given the text before blank `number`."""
    width = tokens.shape[1]
    group_ids, scored = torch.full(tokens.shape, PADDING_GROUP), torch.zeros(tokens.shape, dtype=torch.bool)
    for row, row_blanks in enumerate(blanks):
        is_blank = torch.tensor(row_blanks) > 0
        is_before = (torch.arange(len(row_blanks)) < row_blanks.index(number)) & ~is_blank
        # given text in its order, BOS first, then what was written
        order = torch.cat([(~is_blank).nonzero(), is_blank.nonzero()]).flatten()
        group_ids[row, width - len(row_blanks) + order] = torch.arange(len(order))
        scored[row, width - len(row_blanks) :] = ~is_before
    attention_mask = (group_ids != PADDING_GROUP).long()
    log_probs = model.log_likelihood(tokens, group_ids.to(tokens.device), attention_mask.to(tokens.device)).cpu()
    return ((log_probs * scored).sum(dim=1) / scored.sum(dim=1)).tolist()
