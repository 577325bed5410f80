"""Who sees whom: the rule of the two streams, and its form for each attention implementation."""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

DENSE_IMPLEMENTATIONS = ("eager", "sdpa")
# These have no causal flag: a causal view, too, must be spelt out.
MATERIALISED_IMPLEMENTATIONS = ("eager", "flex_attention")


class View(NamedTuple):
    """What a run of rows may see of the keys.

    `mask` is a boolean tensor (B or 1, 1, rows or 1, keys), True where a row sees a key; LLaMA's own mask (additive for
    `eager`, 2D for `flash_attention_2`); a `BlockMask` for `flex_attention`; or None. Under None, `is_causal` decides
    between the plain causal triangle and everything.
    """

    mask: torch.Tensor | BlockMask | None
    is_causal: bool = False


# One view for all rows of a pass (content tokens, then query slots), or two: the content's, then the slots'.
Views = tuple[View] | tuple[View, View]


def sees(row_group: torch.Tensor, row_is_slot: torch.Tensor, key_group: torch.Tensor) -> torch.Tensor:
    """The rule (paper §1): content sees content of groups up to its own, a slot sees content of earlier groups only."""
    return torch.where(row_is_slot, key_group < row_group, key_group <= row_group)


def group_views(
    implementation: str,
    *,
    group_ids: torch.Tensor,
    target_group_ids: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    num_cached: int = 0,
    num_keys: int | None = None,
) -> Views:
    """Turns the groups of one pass into the mask that `implementation` takes.

    Args:
        implementation: `"eager"`, `"sdpa"` or `"flex_attention"`.
        group_ids: (B, C) groups of the content tokens of this pass.
        target_group_ids: (B, Q) groups of the query slots.
        key_mask: (B, num_cached + C), False where a key is padding. None: no padding.
        num_cached: keys that come from the cache, before those of this pass; every row sees them.
        num_keys: width of the keys when it is more than num_cached + C (a static cache); nobody sees the surplus.

    Returns:
        One `View` over C + Q rows.

    Raises:
        ValueError: an implementation that can't express groups (flash attention takes plain causal masks only and drops
            any other in silence, which would let a slot see its own token).
    """
    _check_can_mask(implementation)
    batch_size, content_length = group_ids.shape
    device = group_ids.device
    width = num_cached + content_length if num_keys is None else num_keys
    row_group = torch.cat([group_ids, target_group_ids], dim=1)
    row_is_slot = torch.arange(row_group.shape[1], device=device) >= content_length
    key_index = torch.arange(width, device=device)
    committed = key_index < num_cached
    key_group = group_ids.new_zeros(batch_size, width)
    key_group[:, num_cached : num_cached + content_length] = group_ids
    present = (key_index < num_cached + content_length).expand(batch_size, width)
    if key_mask is not None:
        present = present.clone()
        present[:, : key_mask.shape[1]] &= key_mask.to(torch.bool)

    if implementation == "flex_attention":

        def mask_mod(batch, head, row, key):
            rule = sees(row_group[batch, row], row_is_slot[row], key_group[batch, key])
            return present[batch, key] & (committed[key] | rule)

        mask = create_block_mask(mask_mod, batch_size, None, row_group.shape[1], width, device=device)
    else:
        rule = sees(row_group[:, :, None], row_is_slot[None, :, None], key_group[:, None, :])
        mask = (present[:, None, :] & (committed[None, None, :] | rule))[:, None]
    return (View(mask),)


def singleton_views(implementation: str, length: int, device: torch.device) -> Views:
    """Views of `length` singletons in generation order, where content row t and slot row t both see content 0..t: the
    slot at row t predicts rank t + 1. Both are plain causal, so every kernel can take them, flash attention included.
    """
    if implementation in MATERIALISED_IMPLEMENTATIONS:
        ranks = torch.arange(length, device=device)[None]
        return group_views(implementation, group_ids=ranks, target_group_ids=ranks + 1)
    return View(None, is_causal=True), View(None, is_causal=True)


def prompt_views(
    implementation: str, content_length: int, num_slots: int, key_mask: torch.Tensor | None, device: torch.device
) -> Views:
    """Views of the first decoding step: given tokens as singletons in storage order, slots that see all of them.
    `key_mask` (B, C) is False at padding, None where there is none.
    """
    if key_mask is None and implementation not in MATERIALISED_IMPLEMENTATIONS:
        return View(None, is_causal=True), View(None)
    ranks = torch.arange(content_length, device=device).expand(1 if key_mask is None else key_mask.shape[0], -1)
    slots = torch.full((ranks.shape[0], num_slots), content_length, device=device)
    return group_views(implementation, group_ids=ranks, target_group_ids=slots, key_mask=key_mask)


def open_views(implementation: str, num_rows: int, key_mask: torch.Tensor | None) -> Views:
    """Views of a decoding step: the content of this pass is one group and the slots belong to a later one, so that every
    row sees every key that is not padding. `key_mask` (B, keys) is False at padding, None where there is none.
    """
    if key_mask is None:
        return (View(None),)
    _check_can_mask(implementation)
    present = key_mask.to(torch.bool)
    if implementation == "flex_attention":
        batch_size, width = present.shape
        mask = create_block_mask(
            lambda batch, head, row, key: present[batch, key], batch_size, None, num_rows, width, device=present.device
        )
        return (View(mask),)
    return (View(present[:, None, None, :]),)


def repeat_rows(implementation: str, content_mask, rows: torch.Tensor, content_length: int, num_keys: int) -> Views:
    """Views of LLaMA's causal contract: slot j sees just what content row `rows[j]` sees, itself included, because it
    predicts the token after it.

    Args:
        content_mask: what transformers' `create_causal_mask` returned for the content rows.
        rows: (Q,) ascending content rows, each the one whose view a slot repeats.
        content_length: C, the number of content rows.
        num_keys: width of the keys; more than C with a cache.
    """
    if isinstance(content_mask, BlockMask):
        batch_size, _, _, width = content_mask.shape
        row_of = torch.cat([torch.arange(content_length, device=rows.device), rows])
        fused = create_block_mask(
            lambda batch, head, row, key: content_mask.mask_mod(batch, head, row_of[row], key),
            batch_size,
            None,
            row_of.shape[0],
            width,
            device=rows.device,
        )
        return (View(fused),)
    if content_mask is not None and content_mask.ndim == 4:
        return (View(torch.cat([content_mask, content_mask[:, :, rows]], dim=2)),)
    if content_length == 1 and rows.shape[0] == 1:
        return (View(content_mask),)
    content_view = View(content_mask, is_causal=True)
    if rows.shape[0] == content_length or implementation not in DENSE_IMPLEMENTATIONS:
        return content_view, content_view
    triangle = rows[:, None] >= torch.arange(num_keys, device=rows.device)
    return content_view, View(triangle[None, None])


def sees_something(
    group_ids: torch.Tensor, target_group_ids: torch.Tensor, key_mask: torch.Tensor | None, num_cached: int
) -> torch.Tensor:
    """(B, Q), True where a slot sees at least one content token. Shapes as in `group_views`."""
    present = torch.ones_like(group_ids, dtype=torch.bool)
    cached = torch.full_like(group_ids[:, :1], num_cached > 0, dtype=torch.bool)
    if key_mask is not None:
        present = key_mask[:, num_cached:].to(torch.bool)
        cached = key_mask[:, :num_cached].to(torch.bool).any(dim=1, keepdim=True)
    lowest = group_ids.masked_fill(~present, torch.iinfo(group_ids.dtype).max).amin(dim=1, keepdim=True)
    return cached | (lowest < target_group_ids)


def _check_can_mask(implementation: str) -> None:
    if implementation not in (*DENSE_IMPLEMENTATIONS, "flex_attention"):
        raise ValueError(
            f"attn_implementation={implementation!r} can't express groups or padding of any-order passes: it would drop the "
            "mask and let a slot see the token it is to predict. Use 'sdpa' or 'flex_attention' ('eager' works too); a plain "
            "causal kernel serves left-to-right use, model(input_ids) and model.generate, alone."
        )
