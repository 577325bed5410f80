"""Checks of one pass: its content tokens, its query slots and their labels."""

import torch
from torch.nn.attention.flex_attention import BlockMask

from .attention_masks import sees_something
from .input_validation import check_integers, check_numbers, check_padding_mask
from .orders import ContentTokens, QuerySlots


def check_pass(
    content: ContentTokens, slots: QuerySlots, inputs_embeds: torch.Tensor, attention_mask, num_cached: int, config
) -> None:
    """Checks that the arguments of a forward match each other and the model's config.

    Raises:
        ValueError: a wrong type, shape or value, or a missing argument; the message uses the forward's argument names.
    """
    _check_shapes(content, slots, inputs_embeds, attention_mask, num_cached)
    if content.document_ids is not None or slots.document_ids is not None:
        check_documents(content, slots, attention_mask, num_cached)
    if config.slot_start == "left_token" or slots.left_token_ids is not None:
        _check_left_tokens(content, slots, attention_mask, num_cached, config)


def _check_shapes(content: ContentTokens, slots: QuerySlots, inputs_embeds, attention_mask, num_cached: int) -> None:
    batch_size, content_length = shape = tuple(inputs_embeds.shape[:2])
    prepared = isinstance(attention_mask, tuple | dict | BlockMask) or (
        isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and content.group_ids is None
    )
    if attention_mask is not None and not prepared:
        check_padding_mask("attention_mask", attention_mask, batch_size, num_cached, content_length)
    for name, ids in (("position_ids", content.position_ids), ("target_position_ids", slots.position_ids)):
        if ids is not None:
            check_numbers(name, ids, at_least=0)
    for name, ids, fitting in (
        ("position_ids", content.position_ids, {shape, (1, content_length)}),
        ("group_ids", content.group_ids, {shape}),
    ):
        if ids is None:
            continue
        check_integers(name, ids)
        if tuple(ids.shape) not in fitting:
            raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected the shape of input_ids, {shape}")
    if slots.group_ids is not None:
        check_integers("target_group_ids", slots.group_ids)
        _check_like_positions("target_group_ids", slots.group_ids, slots)
    if slots.position_ids is None:
        return
    if slots.position_ids.ndim != 2 or slots.position_ids.shape[0] != batch_size:
        raise ValueError(
            f"target_position_ids has shape {tuple(slots.position_ids.shape)}: expected ({batch_size}, slots)"
        )
    if slots.position_ids.shape[1] and slots.group_ids is None and not isinstance(attention_mask, tuple):
        raise ValueError(
            f"target_position_ids needs target_group_ids of the same shape, {tuple(slots.position_ids.shape)}, which decide "
            "what each slot sees"
        )


def _check_like_positions(name: str, ids: torch.Tensor, slots: QuerySlots) -> None:
    expected = None if slots.position_ids is None else tuple(slots.position_ids.shape)
    if tuple(ids.shape) != expected:
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected the shape of target_position_ids, {expected}")


def _check_left_tokens(content: ContentTokens, slots: QuerySlots, attention_mask, num_cached: int, config) -> None:
    if config.slot_start != "left_token":
        raise ValueError(f"target_input_ids has no effect with slot_start={config.slot_start!r}. Leave it out.")
    if slots.left_token_ids is not None:
        check_numbers("target_input_ids", slots.left_token_ids, at_least=-1, at_most=config.vocab_size - 1)
        _check_like_positions("target_input_ids", slots.left_token_ids, slots)
        return
    has_slots = content.group_ids is not None if slots.position_ids is None else slots.position_ids.shape[1] > 0
    if not has_slots:
        return  # LLaMA's causal contract, or content only
    for name, is_there in (
        ("a cache", num_cached > 0),
        ("prepared masks", isinstance(attention_mask, tuple)),
        ("inputs_embeds", content.input_ids is None),
    ):
        if is_there:
            raise ValueError(
                f"slot_start='left_token' with {name} needs target_input_ids, the tokens to the left of slots"
            )


def check_documents(content: ContentTokens, slots: QuerySlots, attention_mask, num_cached: int) -> None:
    """Checks that masks can separate the documents of a row.

    Raises:
        ValueError: they can't, or their ids have other types or shapes than content and slots.
    """
    if content.document_ids is None:
        raise ValueError("target_document_ids needs document_ids (of the content tokens)")
    if isinstance(attention_mask, tuple) or content.group_ids is None or num_cached:
        raise ValueError(
            "document_ids: expected group_ids, no cache and no prepared masks, as only group masks separate documents"
        )
    for name, ids in (("document_ids", content.document_ids), ("target_document_ids", slots.document_ids)):
        if ids is not None:
            check_integers(name, ids)
    if content.document_ids.shape != content.group_ids.shape:
        raise ValueError(
            f"document_ids has shape {tuple(content.document_ids.shape)}: expected the shape of input_ids, "
            f"{tuple(content.group_ids.shape)}"
        )
    expected = None if slots.position_ids is None else tuple(slots.position_ids.shape)
    got = None if slots.document_ids is None else tuple(slots.document_ids.shape)
    if got != expected:
        raise ValueError(
            f"target_document_ids has shape {got}: with document_ids, expected the shape of target_position_ids, {expected}"
        )


def check_slot_labels(
    labels: torch.Tensor,
    content: ContentTokens,
    slots: QuerySlots,
    shape: tuple[int, int],
    attention_mask,
    num_cached: int,
) -> None:
    """Checks that each label (B, Q; −100: none) belongs to a slot that sees at least one token.

    Args:
        slots: if `position_ids` is None, one slot per token.
        shape: (B, C) of the content.

    Raises:
        ValueError: labels that differ in shape from the slots, a label at padding, or a label whose slot sees no token.
    """
    slots_are_tokens = slots.position_ids is None
    expected = shape if slots_are_tokens else (shape[0], slots.position_ids.shape[1])
    if tuple(labels.shape) != expected:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: with groups, expected the slots' shape, {expected}")
    if isinstance(attention_mask, tuple) or torch.compiler.is_compiling():
        return  # the caller of prepared masks is responsible
    if content.document_ids is not None:
        check_documents(content, slots, attention_mask, num_cached)
    if content.group_ids is None:
        group_ids = torch.arange(shape[1], device=labels.device).expand(shape)
        content = content._replace(group_ids=group_ids)
    scored = labels != -100
    if slots_are_tokens:
        slots = content.slots()
        if attention_mask is not None and (scored & (attention_mask[:, num_cached:] == 0)).any():
            raise ValueError("labels holds a token at padding (attention_mask is 0): expected -100")
    if expected[1]:
        check_not_blind(scored, sees_something(content, slots, attention_mask, num_cached))


def check_not_blind(scored: torch.Tensor, sees: torch.Tensor) -> None:
    """Raises a ValueError if a scored slot sees no token; `scored` and `sees` are (B, Q) bool."""
    blind = scored & ~sees
    if blind.any():
        row, slot = blind.nonzero()[0].tolist()
        raise ValueError(
            f"labels holds a token at row {row}, slot {slot}, which sees no token: no earlier group. Use -100, or put a given "
            "token (BOS) into an earlier group."
        )
