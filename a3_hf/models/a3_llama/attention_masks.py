"""Attention masks: the visibility rule of the two streams, and its form for each attention implementation."""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .caching import CACHE
from .compiling import raise_recompile_limit
from .orders import ContentTokens, QuerySlots

DENSE_IMPLEMENTATIONS = ("eager", "sdpa")
# These ignore `is_causal`: a causal mask must be an explicit tensor or BlockMask.
MATERIALISED_IMPLEMENTATIONS = ("eager", "flex_attention")


def block_mask(*args, **settings) -> BlockMask:
    # Identical to torch's `create_block_mask` except: flex attention may then be compiled for many masks.
    raise_recompile_limit()
    return create_block_mask(*args, **settings)


class AttentionMask(NamedTuple):
    """Attention mask of consecutive rows.

    Attributes:
        mask: a boolean tensor (B or 1, 1, rows or 1, keys), True where a row sees a key; LLaMA's mask (additive for `eager`,
            2D for `flash_attention_2`); a `BlockMask` for `flex_attention`; or None.
        is_causal: if `mask` is None: True for the causal triangle, False for full visibility.
    """

    mask: torch.Tensor | BlockMask | None
    is_causal: bool = False


# One mask for all rows of a pass (content tokens, then query slots), or two: content, then slots.
AttentionMasks = tuple[AttentionMask, ...]


def sees(row_group: torch.Tensor, row_is_slot: torch.Tensor, key_group: torch.Tensor) -> torch.Tensor:
    """True where a row sees a key (paper §1): content sees groups up to its own, a slot sees earlier groups only."""
    return torch.where(row_is_slot, key_group < row_group, key_group <= row_group)


def group_attention_mask(
    implementation: str,
    content: ContentTokens,
    slots: QuerySlots,
    *,
    key_mask: torch.Tensor | None = None,
    num_cached: int = 0,
    num_keys: int | None = None,
) -> AttentionMasks:
    """Builds the mask of one pass from the groups of its content (B, C) and slots (B, Q).

    Args:
        implementation: `"eager"`, `"sdpa"` or `"flex_attention"`.
        content: with `document_ids`, a row sees keys of its own document only; not with a cache.
        key_mask: (B, num_cached + C), False where a key is padding. None: no padding.
        num_cached: number of keys from the cache, which precede those of this pass; every row sees them.
        num_keys: number of keys if more than num_cached + C (a static cache); no row sees the extra ones.

    Returns:
        One `AttentionMask` over C + Q rows.

    Raises:
        ValueError: an implementation that can't express groups (flash attention silently drops any mask but a causal one,
            so a slot would see its own token).
    """
    _check_can_mask(implementation)
    group_ids, document_ids = content.group_ids, content.document_ids
    batch_size, content_length = group_ids.shape
    device = group_ids.device
    width = num_cached + content_length if num_keys is None else num_keys
    row_group = torch.cat([group_ids, slots.group_ids], dim=1)
    row_is_slot = torch.arange(row_group.shape[1], device=device) >= content_length
    key_index = torch.arange(width, device=device)
    committed = key_index < num_cached
    key_group = group_ids.new_zeros(batch_size, width)
    key_group[:, num_cached : num_cached + content_length] = group_ids
    present = (key_index < num_cached + content_length).expand(batch_size, width)
    if key_mask is not None:
        present = present.clone()
        present[:, : key_mask.shape[1]] &= key_mask.to(torch.bool)
    row_document = None if document_ids is None else torch.cat([document_ids, slots.document_ids], dim=1)

    if implementation == "flex_attention":

        def mask_mod(batch, head, row, key):
            batch = batch if batch_size > 1 else 0  # one mask for all rows of the batch
            rule = sees(row_group[batch, row], row_is_slot[row], key_group[batch, key])
            if row_document is not None:
                rule = rule & (row_document[batch, row] == document_ids[batch, key])
            return present[batch, key] & (committed[key] | rule)

        mask = block_mask(mask_mod, batch_size, None, row_group.shape[1], width, device=device)
    else:
        rule = sees(row_group[:, :, None], row_is_slot[None, :, None], key_group[:, None, :])
        if row_document is not None:
            rule = rule & (row_document[:, :, None] == document_ids[:, None, :])
        mask = (present[:, None, :] & (committed[None, None, :] | rule))[:, None]
    return (AttentionMask(mask),)


class MaskCache:
    """Caches the mask of batches whose rows all have the same groups, e.g. groups of one size in generation order."""

    def __init__(self):
        self._made_for: tuple | None = None
        self._groups = torch.empty(0)
        self._masks: AttentionMasks | None = None

    def masks(self, implementation: str, content: ContentTokens, key_mask: torch.Tensor) -> AttentionMasks | None:
        """Returns `group_attention_mask` with one slot per token, shared by all rows; None if rows differ or hold padding."""
        groups = content.group_ids[:1]
        if not ((content.group_ids == groups).all() & key_mask.all()):
            return None
        made_for = (implementation, groups.device, groups.shape[1])
        if made_for != self._made_for or not torch.equal(groups, self._groups):
            row = ContentTokens(None, content.position_ids, groups)
            masks = group_attention_mask(implementation, row, row.slots())
            self._made_for, self._groups, self._masks = made_for, groups.clone(), masks
        return self._masks


def groups_of(group_ids: torch.Tensor, target_group_ids: torch.Tensor) -> tuple[ContentTokens, QuerySlots]:
    """Returns content (B, C) and slots (B, Q) with these groups and placeholder positions, to build masks from."""
    return ContentTokens(None, group_ids, group_ids), QuerySlots(target_group_ids, target_group_ids)


def singleton_attention_mask(implementation: str, length: int, device: torch.device) -> AttentionMasks:
    """Returns masks of `length` singletons in generation order: content row t and slot row t both see content 0..t, and
    slot t predicts rank t + 1. Both masks are causal, so every kernel supports them, flash attention included.
    """
    if implementation in MATERIALISED_IMPLEMENTATIONS:
        ranks = torch.arange(length, device=device)[None]
        return group_attention_mask(implementation, *groups_of(ranks, ranks + 1))
    return AttentionMask(None, is_causal=True), AttentionMask(None, is_causal=True)


def prompt_attention_mask(
    implementation: str, content_length: int, num_slots: int, key_mask: torch.Tensor | None, device: torch.device
) -> AttentionMasks:
    """Returns masks of the first decoding step: given tokens are singletons in storage order, and slots see all of them.
    `key_mask` (B, C) is False at padding; None: no padding.
    """
    if key_mask is None and implementation not in MATERIALISED_IMPLEMENTATIONS:
        triangle = AttentionMask(None, is_causal=True)
        return (triangle, AttentionMask(None)) if num_slots else (triangle,)
    ranks = torch.arange(content_length, device=device).expand(1 if key_mask is None else key_mask.shape[0], -1)
    slots = torch.full((ranks.shape[0], num_slots), content_length, device=device)
    return group_attention_mask(implementation, *groups_of(ranks, slots), key_mask=key_mask)


def all_visible_mask(implementation: str, num_rows: int, key_mask: torch.Tensor | None) -> AttentionMasks:
    """Returns masks of a decoding step in which every row sees every key that is not padding: content is one group, and
    slots belong to a later one. `key_mask` (B, keys) is False at padding; None: no padding.
    """
    if key_mask is None:
        return (AttentionMask(None),)
    _check_can_mask(implementation)
    present = key_mask.to(torch.bool)
    if implementation == "flex_attention":
        batch_size, width = present.shape
        mask = block_mask(
            lambda batch, head, row, key: present[batch if batch_size > 1 else 0, key],
            batch_size,
            None,
            num_rows,
            width,
            device=present.device,
        )
        return (AttentionMask(mask),)
    return (AttentionMask(present[:, None, None, :]),)


def tree_attention_mask(
    implementation: str, ancestry: torch.Tensor, num_rows: int, num_keys: int, key_mask: torch.Tensor | None
) -> AttentionMasks:
    """Returns masks of a pass of content rows in text order, whose last ones are a tree: each row sees the keys before it and
    its own, but of the tree only what `ancestry` (B, N, N) says. `key_mask` (B, keys) is False at padding; None: no padding.
    """
    _check_can_mask(implementation)
    batch_size, num_nodes = ancestry.shape[:2]
    visible = ancestry.new_ones(num_rows, num_keys).tril(num_keys - num_rows).repeat(batch_size, 1, 1)
    visible[:, num_rows - num_nodes :, num_keys - num_nodes :] = ancestry
    if key_mask is not None:
        visible &= key_mask[:, None].bool()
    if implementation == "flex_attention":

        def mask_mod(batch, head, row, key):
            return visible[batch, row, key]

        mask = block_mask(mask_mod, batch_size, None, num_rows, num_keys, device=visible.device)
        return (AttentionMask(mask),)
    return (AttentionMask(visible[:, None]),)


def next_token_mask(
    implementation: str, content_mask, rows: torch.Tensor, content_length: int, num_keys: int
) -> AttentionMasks:
    """Returns masks of LLaMA's causal contract: slot j predicts the token after content row `rows[j]`, and sees exactly
    what that row sees, itself included.

    Args:
        content_mask: result of transformers' `create_causal_mask` for the content rows.
        rows: (Q,) ascending indices of content rows.
        content_length: C, the number of content rows.
        num_keys: number of keys; more than C with a cache.
    """
    if isinstance(content_mask, BlockMask):
        batch_size, _, _, width = content_mask.shape
        row_of = torch.cat([torch.arange(content_length, device=rows.device), rows])
        fused = block_mask(
            lambda batch, head, row, key: content_mask.mask_mod(batch, head, row_of[row], key),
            batch_size,
            None,
            row_of.shape[0],
            width,
            device=rows.device,
        )
        return (AttentionMask(fused),)
    if content_mask is not None and content_mask.ndim == 4:
        return (AttentionMask(torch.cat([content_mask, content_mask[:, :, rows]], dim=2)),)
    if content_length == 1 and rows.shape[0] == 1:
        return (AttentionMask(content_mask),)
    content_view = AttentionMask(content_mask, is_causal=True)
    if rows.shape[0] == content_length or implementation not in DENSE_IMPLEMENTATIONS:
        return content_view, content_view
    triangle = rows[:, None] >= torch.arange(num_keys, device=rows.device)
    return content_view, AttentionMask(triangle[None, None])


def pass_masks(
    config: PreTrainedConfig,
    content: ContentTokens,
    slots: QuerySlots,
    rows: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    key_mask: torch.Tensor | None,
    cache: Cache | None,
) -> tuple[AttentionMasks, ContentTokens, QuerySlots]:
    """Returns the masks of a pass, and its content (B, C) and slots (B, Q) with missing groups filled in.

    Args:
        rows: (Q,) with LLaMA's causal contract: indices of content rows, each followed by a slot for the next token.
        key_mask: (B, cached + C), 0 at padding, or another mask that transformers' `create_causal_mask` accepts.
    """
    batch_size, content_length = inputs_embeds.shape[:2]
    num_keys, num_cached, implementation = content_length, 0, config._attn_implementation
    if cache is not None:  # a static cache is wider than what it holds
        num_keys, _ = cache.get_mask_sizes(content_length, 0)
        num_cached = cache.get_seq_length()
    if content.group_ids is None and (rows is not None or slots.position_ids.shape[1] == 0):
        mask = create_causal_mask(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=key_mask,
            position_ids=content.position_ids,
            **{CACHE: cache},
        )
        if rows is None:
            return (AttentionMask(mask, is_causal=content_length > 1),), content, slots
        return next_token_mask(implementation, mask, rows, content_length, num_keys), content, slots
    if content.group_ids is None:
        left_to_right = torch.arange(content_length, device=inputs_embeds.device).expand(batch_size, -1)
        content = content._replace(group_ids=left_to_right)
    if slots.group_ids is None:  # no slots
        slots = slots._replace(group_ids=content.group_ids[:, :0])
    masks = group_attention_mask(
        implementation, content, slots, key_mask=key_mask, num_cached=num_cached, num_keys=num_keys
    )
    return masks, content, slots


def slots_attention_mask(masks: AttentionMasks, content_length: int) -> AttentionMasks:
    """Returns the slots' part of the masks of a whole pass."""
    mask, is_causal = masks[-1]
    if len(masks) == 2 or mask is None:
        return (AttentionMask(mask, is_causal),)
    if isinstance(mask, BlockMask):
        batch_size, _, num_rows, width = mask.shape
        mask = block_mask(
            lambda batch, head, row, key: masks[-1].mask.mask_mod(batch, head, row + content_length, key),
            batch_size,
            None,
            num_rows - content_length,
            width,
            device=mask.kv_indices.device,
        )
        return (AttentionMask(mask),)
    return (AttentionMask(mask if mask.shape[2] == 1 else mask[:, :, content_length:]),)


def content_attention_mask(masks: AttentionMasks, content_length: int) -> AttentionMasks:
    """What the content alone may see, of the masks of a whole pass."""
    mask, is_causal = masks[0]
    if isinstance(mask, BlockMask):
        batch_size, _, _, width = mask.shape
        mask = block_mask(mask.mask_mod, batch_size, None, content_length, width, device=mask.kv_indices.device)
    elif len(masks) == 1 and mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, :content_length]
    return (AttentionMask(mask, is_causal),)


def sees_something(
    content: ContentTokens, slots: QuerySlots, key_mask: torch.Tensor | None, num_cached: int
) -> torch.Tensor:
    """Returns (B, Q), True where a slot sees at least one content token. Arguments as in `group_attention_mask`."""
    group_ids = content.group_ids
    if content.document_ids is not None:
        masks = group_attention_mask("sdpa", content, slots, key_mask=key_mask)
        return masks[0].mask[:, 0, group_ids.shape[1] :].any(dim=-1)
    present = torch.ones_like(group_ids, dtype=torch.bool)
    cached = torch.full_like(group_ids[:, :1], num_cached > 0, dtype=torch.bool)
    if key_mask is not None:
        present = key_mask[:, num_cached:].to(torch.bool)
        cached = key_mask[:, :num_cached].to(torch.bool).any(dim=1, keepdim=True)
    lowest = group_ids.masked_fill(~present, torch.iinfo(group_ids.dtype).max).amin(dim=1, keepdim=True)
    return cached | (lowest < slots.group_ids)


def _check_can_mask(implementation: str) -> None:
    if implementation not in (*DENSE_IMPLEMENTATIONS, "flex_attention"):
        raise ValueError(
            f"attn_implementation={implementation!r} can't express groups or padding of any-order passes: it would drop the "
            "mask, and a slot would see the token that it predicts. Use 'sdpa', 'flex_attention' or 'eager'. Causal-only "
            "kernels support model(input_ids) and model.generate only."
        )
