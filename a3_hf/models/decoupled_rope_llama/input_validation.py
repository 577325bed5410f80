"""Checks of the arguments of a forward pass, which raise a ValueError."""

import torch
from torch.nn.attention.flex_attention import BlockMask

from a3_hf.models.a3_llama.attention_masks import groups_of, sees_something
from a3_hf.models.a3_llama.input_validation import check_integers, check_numbers, check_padding_mask
from a3_hf.models.a3_llama.pass_validation import check_not_blind

from .configuration_decoupled_rope_llama import SINGLETONS_ONLY


def check_one_stream(document_ids, target_document_ids, content_hidden_state: bool) -> None:
    if document_ids is not None or target_document_ids is not None:
        raise ValueError(
            "document_ids: expected None, as Decoupled RoPE can't separate documents of a row. Put each document in a row of "
            "its own."
        )
    if content_hidden_state:
        raise ValueError("content_hidden_state=True: expected False, as there is one stream. Use last_hidden_state.")


def check_mask_and_positions(inputs_embeds, attention_mask, position_ids, num_cached: int) -> None:
    batch_size, length = inputs_embeds.shape[:2]
    if isinstance(attention_mask, tuple):
        raise ValueError("attention_mask holds masks for two streams: expected a tensor, 0 at padding, or None")
    prepared = isinstance(attention_mask, dict | BlockMask) or (
        isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4
    )
    if attention_mask is not None and not prepared:
        check_padding_mask("attention_mask", attention_mask, batch_size, num_cached, length)
    if position_ids is not None:
        check_numbers("position_ids", position_ids, at_least=0)
    if position_ids is not None and tuple(position_ids.shape) not in {(batch_size, length), (1, length)}:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: expected the shape of input_ids, {(batch_size, length)}"
        )


def check_targets(inputs_embeds, position_ids, target_position_ids, target_group_ids) -> None:
    if target_group_ids is not None:
        raise ValueError("target_group_ids needs group_ids")
    if position_ids is None:
        raise ValueError("target_position_ids needs position_ids, the positions of the tokens themselves")
    check_numbers("target_position_ids", target_position_ids, at_least=0)
    shapes = {tuple(inputs_embeds.shape[:2]), (1, inputs_embeds.shape[1])}
    if tuple(target_position_ids.shape) not in shapes:
        raise ValueError(
            f"target_position_ids has shape {tuple(target_position_ids.shape)}: without group_ids, expected the shape of "
            f"input_ids, {tuple(inputs_embeds.shape[:2])}"
        )


def check_groups(content, group_ids, target_position_ids, target_group_ids) -> None:
    for name, ids in (("group_ids", group_ids), ("target_group_ids", target_group_ids)):
        if ids is not None:
            check_integers(name, ids)
    if target_position_ids is not None:
        check_numbers("target_position_ids", target_position_ids, at_least=0)
    if group_ids.shape != content.shape[:2]:
        raise ValueError(
            f"group_ids has shape {tuple(group_ids.shape)}: expected the shape of input_ids, {tuple(content.shape[:2])}"
        )
    shapes = [None if ids is None else tuple(ids.shape) for ids in (target_position_ids, target_group_ids)]
    if shapes[0] != shapes[1] or (shapes[0] is not None and (len(shapes[0]) != 2 or shapes[0][0] != len(content))):
        raise ValueError(
            f"target_position_ids has shape {shapes[0]} and target_group_ids {shapes[1]}: with group_ids, expected "
            f"({len(content)}, slots) for both"
        )


def check_singletons(groups: torch.Tensor, real: torch.Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    same = (groups[:, 1:] == groups[:, :-1]) & real[:, 1:]
    if same.any():
        row, place = same.nonzero()[0].tolist()
        raise ValueError(
            f"group_ids has several tokens in group {int(groups[row, place])} of row {row}: expected one. {SINGLETONS_ONLY}"
        )


def check_state_labels(labels, hidden_states, attention_mask, group_ids, target_group_ids) -> None:
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: with groups or targets, expected the logits' shape, "
            f"{tuple(hidden_states.shape[:2])}"
        )
    if torch.compiler.is_compiling() or group_ids is None:
        return  # in generation order, each token sees at least itself
    scored = labels != -100
    if target_group_ids is None and attention_mask is not None and (scored & (attention_mask == 0)).any():
        raise ValueError("labels holds a token at padding (attention_mask is 0): expected -100")
    targets = group_ids if target_group_ids is None else target_group_ids
    check_not_blind(scored, sees_something(*groups_of(group_ids, targets), attention_mask, num_cached=0))
