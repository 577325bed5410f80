"""Turns a batch of rows and its orders into the arguments of the model's forward."""

from typing import Any

import torch

from a3_hf.models.a3_llama.attention_masks import MaskCache, singleton_attention_mask
from a3_hf.models.a3_llama.orders import ContentTokens, GroupOrder, QuerySlots, left_tokens

MANY_SCORED = 0.75  # above this fraction of scored tokens in every row, each token has a slot


def model_inputs(
    order: GroupOrder,
    input_ids: torch.Tensor,
    *,
    group_size: int,
    implementation: str,
    document_ids: torch.Tensor | None = None,
    kept: MaskCache | None = None,
    one_stream: bool = False,
    slot_start: str = "query_embed",
    scored_only: bool = False,
) -> dict[str, Any]:
    """Returns the arguments of the model's forward that score `input_ids` (B, S) under an order, in generation order; `labels`
    are −100 where nothing is scored.

    Groups of one token need only plain causal masks, which every attention kernel supports, unless rows hold several
    documents. If the order leaves open tokens out of the loss, only scored tokens have slots (and the fill of shorter rows).

    Args:
        group_size: the largest group of the order.
        implementation: the model's attention implementation.
        document_ids: (B, S); documents of a row do not see each other.
        kept: masks reused between batches, if the groups allow it.
        one_stream: the model is Decoupled RoPE's, which makes its own mask; otherwise it is A3's.
        slot_start: the model's.
        scored_only: only scored tokens have slots also where at least a quarter of the tokens is given.
    """
    layout = order.lay_out(input_ids, document_ids=document_ids)
    content, slots = layout.content, layout.content.slots()
    if slot_start == "left_token":
        left = left_tokens(content, slots, key_mask=layout.attention_mask)
        slots = slots._replace(left_token_ids=left)
    scored = layout.labels != -100
    width = max(int(scored.sum(dim=1).max()), 1)
    if order.context_mask is not None or (scored_only and width <= MANY_SCORED * input_ids.shape[1]):
        index = scored.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        labels = layout.labels.gather(1, index)
        return _forward_arguments(content, slots.at(index), layout.attention_mask, labels)
    if group_size == 1 and document_ids is None:
        length, device = input_ids.shape[1] - 1, input_ids.device
        mask = None if one_stream else singleton_attention_mask(implementation, length, device)
        content = ContentTokens(layout.input_ids[:, :-1], layout.position_ids[:, :-1])
        slots = slots.at(slice(1, None))._replace(group_ids=None)
        # contiguous: transformers' loss takes a view of them
        return _forward_arguments(content, slots, mask, layout.labels[:, 1:].contiguous())
    masks = None
    if kept is not None and document_ids is None:
        masks = kept.masks(implementation, content, layout.attention_mask)
    if masks is not None:
        content, slots = content._replace(group_ids=None), slots._replace(group_ids=None)
        return _forward_arguments(content, slots, masks, layout.labels)
    no_slots_given = QuerySlots(None)  # the model then makes one for each token
    return _forward_arguments(content, no_slots_given, layout.attention_mask, layout.labels)


def _forward_arguments(
    content: ContentTokens, slots: QuerySlots, attention_mask: Any, labels: torch.Tensor
) -> dict[str, Any]:
    arguments = {
        "input_ids": content.input_ids,
        "position_ids": content.position_ids,
        "group_ids": content.group_ids,
        "document_ids": content.document_ids,
        "target_position_ids": slots.position_ids,
        "target_group_ids": slots.group_ids,
        "target_document_ids": slots.document_ids,
        "target_input_ids": slots.left_token_ids,
        "attention_mask": attention_mask,
    }
    given = {name: value for name, value in arguments.items() if value is not None}
    return {**given, "labels": labels, "use_cache": False}
