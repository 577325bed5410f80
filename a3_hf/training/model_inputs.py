"""From a batch of rows and its orders to the arguments of the model's forward."""

from typing import Any

import torch

from a3_hf.models.a3_llama.attention_masks import MaskCache, singleton_attention_mask
from a3_hf.models.a3_llama.orders import GroupOrder, left_tokens


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
) -> dict[str, Any]:
    """The arguments of `A3LlamaForCausalLM.forward`, `labels` (−100 where nothing is scored) among them, that score
    `input_ids` (B, S) under an order. In generation order singletons need plain causal masks alone, which any attention
    kernel takes; not so where a row holds several documents (`document_ids`, (B, S)), which are kept apart. Where the
    order leaves open tokens out of the loss, there are slots for the scored ones alone (and to fill up shorter rows).
    `kept` carries masks from one batch to the next, where groups allow it. With `one_stream` they are those of
    `DecoupledRopeLlamaForCausalLM.forward`, which has a mask of its own. `slot_start` is the model's.
    """
    layout = order.lay_out(input_ids, document_ids=document_ids)
    left = None
    if slot_start == "left_token":
        left = left_tokens(
            layout.input_ids,
            layout.position_ids,
            layout.group_ids,
            layout.position_ids,
            layout.group_ids,
            key_mask=layout.attention_mask,
            document_ids=layout.document_ids,
            target_document_ids=layout.document_ids,
        )
    if order.context_mask is not None:
        scored = layout.labels != -100
        width = max(int(scored.sum(dim=1).max()), 1)
        slots = scored.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        documents = None if document_ids is None else layout.document_ids.gather(1, slots)
        return {
            **layout._asdict(),
            "target_position_ids": layout.position_ids.gather(1, slots),
            "target_group_ids": layout.group_ids.gather(1, slots),
            "target_document_ids": documents,
            **({} if left is None else {"target_input_ids": left.gather(1, slots)}),
            "labels": layout.labels.gather(1, slots),
            "use_cache": False,
        }
    if group_size == 1 and document_ids is None:
        length, device = input_ids.shape[1] - 1, input_ids.device
        return {
            "input_ids": layout.input_ids[:, :-1],
            "position_ids": layout.position_ids[:, :-1],
            "target_position_ids": layout.position_ids[:, 1:],
            "attention_mask": None if one_stream else singleton_attention_mask(implementation, length, device),
            **({} if left is None else {"target_input_ids": left[:, 1:]}),
            "labels": layout.labels[:, 1:].contiguous(),  # transformers' loss takes a view of them
            "use_cache": False,
        }
    masks = None
    if kept is not None and document_ids is None:
        groups = {"group_ids": layout.group_ids, "target_group_ids": layout.group_ids}
        masks = kept.masks(implementation, **groups, key_mask=layout.attention_mask)
    if masks is not None:
        return {
            "input_ids": layout.input_ids,
            "position_ids": layout.position_ids,
            "target_position_ids": layout.position_ids,
            "attention_mask": masks,
            **({} if left is None else {"target_input_ids": left}),
            "labels": layout.labels,
            "use_cache": False,
        }
    return {**layout._asdict(), "use_cache": False}
