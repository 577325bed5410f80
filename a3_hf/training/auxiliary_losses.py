"""Auxiliary losses: next tokens on the content stream, and distillation from it to the query stream."""

from typing import NamedTuple

import torch
from torch import nn

from a3_hf.models.a3_llama.orders import GroupOrder


class Pairs(NamedTuple):
    """Places where both streams predict the same token, each (N,), N ≥ 0.

    `rows`: rows of the batch; `content`: columns of content tokens that have seen exactly the tokens up to themselves, so that
    their states predict the next token as LLaMA's do; `slots`: columns of that next token's slots.
    """

    rows: torch.Tensor
    content: torch.Tensor
    slots: torch.Tensor


def next_token_pairs(order: GroupOrder, labels: torch.Tensor, document_ids: torch.Tensor | None = None) -> Pairs:
    """Returns the scored tokens of rows in left-to-right order, one token at a time, with the content tokens before them.

    In other orders a content token sees its own group or text after itself, so its state does not predict the next token;
    such rows are omitted.

    Args:
        order: the orders of a batch (B, S), in text order.
        labels: (B, Q) in generation order, from `model_inputs`: a slot for every token (Q = S), for all but the first
            (Q = S − 1), or for the scored ones only, first to last.
        document_ids: (B, S), in text order; a row counts as left to right if each of its documents is.
    """
    group, real = order.group_ids, order.attention_mask
    neighbours = real[:, 1:] & real[:, :-1]
    if document_ids is not None:
        neighbours = neighbours & (document_ids[:, 1:] == document_ids[:, :-1])
    ascends = ((group[:, 1:] > group[:, :-1]) | ~neighbours).all(dim=1)
    length = group.shape[1]
    # With singleton groups, a token's column is its group's number.
    tokens_of_groups = torch.zeros_like(group).scatter_add(1, group.clamp_min(0), real.to(group.dtype))
    is_left_to_right = ascends & (tokens_of_groups <= 1).all(dim=1)
    scored = order.scored_mask[:, 1:] & neighbours & is_left_to_right[:, None]
    rows, before = scored.nonzero(as_tuple=True)
    content, place = group[rows, before], group[rows, before + 1]
    if order.context_mask is not None:
        # Only scored tokens have slots: each at its rank among them.
        first_scored = group.masked_fill(~order.scored_mask, length).amin(dim=1)
        slots = place - first_scored[rows]
    else:
        slots = place - (length - labels.shape[1])
    return Pairs(rows, content, slots)


def content_loss(content_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the summed next-token loss of the content stream, from logits (N, V) and labels (N,)."""
    return nn.functional.cross_entropy(content_logits.float(), labels, reduction="sum")


def distillation_loss(query_logits: torch.Tensor, content_logits: torch.Tensor) -> torch.Tensor:
    """Returns Σ KL(content ‖ query) over N tokens, from logits (N, V); the content stream, the teacher, gets no gradient."""
    teacher = content_logits.detach().float().log_softmax(dim=-1)
    student = query_logits.float().log_softmax(dim=-1)
    return nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
