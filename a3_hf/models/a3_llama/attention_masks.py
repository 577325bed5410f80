"""Who sees whom: the rule of the two streams, and its form for each attention implementation."""

from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

DENSE_IMPLEMENTATIONS = ("eager", "sdpa")
# These have no causal flag: a causal view, too, must be spelt out.
MATERIALISED_IMPLEMENTATIONS = ("eager", "flex_attention")
# Into how many runs each stream of a dense mask is cut, and from how many rows on.
RUNS, ROWS_WORTH_A_CUT = 4, 256


class AttentionMask(NamedTuple):
    """What a run of rows may see of the keys.

    `mask` is a boolean tensor (B or 1, 1, rows or 1, keys), True where a row sees a key; LLaMA's own mask (additive for
    `eager`, 2D for `flash_attention_2`); a `BlockMask` for `flex_attention`; or None. Under None, `is_causal` decides
    between the plain causal triangle and everything. `of_slots` is the slots' part of a `BlockMask`, where it has been made
    beforehand. With `rows` a view is that of so many rows alone, and of the first `keys` keys.
    """

    mask: torch.Tensor | BlockMask | None
    is_causal: bool = False
    of_slots: BlockMask | None = None
    rows: int | None = None
    keys: int | None = None


# One view for all rows of a pass (content tokens, then query slots), or two: the content's, then the slots'; or more, each
# with the number of its rows, none with rows of both streams.
AttentionMasks = tuple[AttentionMask, ...]


def sees(row_group: torch.Tensor, row_is_slot: torch.Tensor, key_group: torch.Tensor) -> torch.Tensor:
    """The rule (paper §1): content sees content of groups up to its own, a slot sees content of earlier groups only."""
    return torch.where(row_is_slot, key_group < row_group, key_group <= row_group)


def group_attention_mask(
    implementation: str,
    *,
    group_ids: torch.Tensor,
    target_group_ids: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    num_cached: int = 0,
    num_keys: int | None = None,
    document_ids: torch.Tensor | None = None,
    target_document_ids: torch.Tensor | None = None,
) -> AttentionMasks:
    """Turns the groups of one pass into the mask that `implementation` takes.

    Args:
        implementation: `"eager"`, `"sdpa"` or `"flex_attention"`.
        group_ids: (B, C) groups of the content tokens of this pass.
        target_group_ids: (B, Q) groups of the query slots.
        key_mask: (B, num_cached + C), False where a key is padding. None: no padding.
        num_cached: keys that come from the cache, before those of this pass; every row sees them.
        num_keys: width of the keys when it is more than num_cached + C (a static cache); nobody sees the surplus.
        document_ids: (B, C) and
        target_document_ids: (B, Q), to keep documents of one row apart: a row sees keys of its own document only. Without a
            cache alone. None: a row is one text.

    Returns:
        One `AttentionMask` over C + Q rows.

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
    row_document = None if document_ids is None else torch.cat([document_ids, target_document_ids], dim=1)

    if implementation == "flex_attention":

        def mask_mod(batch, head, row, key):
            batch = batch if batch_size > 1 else 0  # one mask for all rows of the batch
            rule = sees(row_group[batch, row], row_is_slot[row], key_group[batch, key])
            if row_document is not None:
                rule = rule & (row_document[batch, row] == document_ids[batch, key])
            return present[batch, key] & (committed[key] | rule)

        mask = create_block_mask(mask_mod, batch_size, None, row_group.shape[1], width, device=device)
    else:
        rule = sees(row_group[:, :, None], row_is_slot[None, :, None], key_group[:, None, :])
        if row_document is not None:
            rule = rule & (row_document[:, :, None] == document_ids[:, None, :])
        mask = (present[:, None, :] & (committed[None, None, :] | rule))[:, None]
    return (AttentionMask(mask),)


class MaskCache:
    """The masks of batches in which every row has the same groups, as equal groups in generation order have: made once, and
    again when the groups change.
    """

    def __init__(self):
        self._made_for: tuple | None = None
        self._group_ids = self._target_group_ids = torch.empty(0)
        self._masks: AttentionMasks | None = None

    def masks(
        self,
        implementation: str,
        *,
        group_ids: torch.Tensor,
        target_group_ids: torch.Tensor,
        key_mask: torch.Tensor,
    ) -> AttentionMasks | None:
        """As `group_attention_mask`, one mask for all rows; None where rows differ or hold padding."""
        row, target_row = group_ids[:1], target_group_ids[:1]
        made_for = (implementation, group_ids.device, group_ids.shape[1], target_group_ids.shape[1])
        same_for_all = (group_ids == row).all() & (target_group_ids == target_row).all() & key_mask.all()
        if not same_for_all:
            return None
        is_kept = made_for == self._made_for and torch.equal(row, self._group_ids)
        if not (is_kept and torch.equal(target_row, self._target_group_ids)):
            masks = group_attention_mask(implementation, group_ids=row, target_group_ids=target_row)
            if implementation == "flex_attention":
                masks = (masks[0]._replace(of_slots=slots_attention_mask(masks, row.shape[1])[0].mask),)
            elif implementation == "sdpa" and row.shape[1] >= ROWS_WORTH_A_CUT:
                masks = in_runs(masks[0].mask, row.shape[1])
            self._made_for, self._group_ids, self._target_group_ids = made_for, row.clone(), target_row.clone()
            self._masks = masks
        return self._masks


def in_runs(mask: torch.Tensor, content_length: int) -> AttentionMasks:
    """Cuts a mask (1, 1, C + Q, keys) of rows in generation order into runs of rows, each with the keys up to the last that
    one of its rows sees: a kernel that takes any mask multiplies with the others all the same, and of four runs' keys three
    eighths are left out.
    """
    masks = []
    for rows in mask.split((content_length, mask.shape[2] - content_length), dim=2):
        for run in rows.chunk(RUNS, dim=2):
            seen = run.flatten(0, 2).any(dim=0).nonzero()
            keys = int(seen.max()) + 1 if len(seen) else 1
            masks.append(AttentionMask(run[..., :keys].contiguous(), rows=run.shape[2], keys=keys))
    return tuple(masks)


def singleton_attention_mask(implementation: str, length: int, device: torch.device) -> AttentionMasks:
    """AttentionMasks of `length` singletons in generation order, where content row t and slot row t both see content 0..t: the
    slot at row t predicts rank t + 1. Both are plain causal, so every kernel can take them, flash attention included.
    """
    if implementation in MATERIALISED_IMPLEMENTATIONS:
        ranks = torch.arange(length, device=device)[None]
        return group_attention_mask(implementation, group_ids=ranks, target_group_ids=ranks + 1)
    return AttentionMask(None, is_causal=True), AttentionMask(None, is_causal=True)


def prompt_attention_mask(
    implementation: str, content_length: int, num_slots: int, key_mask: torch.Tensor | None, device: torch.device
) -> AttentionMasks:
    """AttentionMasks of the first decoding step: given tokens as singletons in storage order, slots that see all of them.
    `key_mask` (B, C) is False at padding, None where there is none.
    """
    if key_mask is None and implementation not in MATERIALISED_IMPLEMENTATIONS:
        return AttentionMask(None, is_causal=True), AttentionMask(None)
    ranks = torch.arange(content_length, device=device).expand(1 if key_mask is None else key_mask.shape[0], -1)
    slots = torch.full((ranks.shape[0], num_slots), content_length, device=device)
    return group_attention_mask(implementation, group_ids=ranks, target_group_ids=slots, key_mask=key_mask)


def all_visible_mask(implementation: str, num_rows: int, key_mask: torch.Tensor | None) -> AttentionMasks:
    """Masks of a decoding step: the content of this pass is one group and the slots belong to a later one, so that every row
    sees every key that is not padding. `key_mask` (B, keys) is False at padding, None where there is none.
    """
    if key_mask is None:
        return (AttentionMask(None),)
    _check_can_mask(implementation)
    present = key_mask.to(torch.bool)
    if implementation == "flex_attention":
        batch_size, width = present.shape
        mask = create_block_mask(
            lambda batch, head, row, key: present[batch if batch_size > 1 else 0, key],
            batch_size,
            None,
            num_rows,
            width,
            device=present.device,
        )
        return (AttentionMask(mask),)
    return (AttentionMask(present[:, None, None, :]),)


def next_token_mask(
    implementation: str, content_mask, rows: torch.Tensor, content_length: int, num_keys: int
) -> AttentionMasks:
    """AttentionMasks of LLaMA's causal contract: slot j sees just what content row `rows[j]` sees, itself included, because it
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


def slots_attention_mask(masks: AttentionMasks, content_length: int) -> AttentionMasks:
    """What the slots alone may see, of the masks of a whole pass."""
    if masks[0].rows is not None:
        rows_before = [sum(view.rows for view in masks[:index]) for index in range(len(masks))]
        return tuple(view for view, before in zip(masks, rows_before, strict=True) if before >= content_length)
    mask, is_causal, of_slots = masks[-1][:3]
    if of_slots is not None:
        return (AttentionMask(of_slots),)
    if len(masks) == 2 or mask is None:
        return (AttentionMask(mask, is_causal),)
    if isinstance(mask, BlockMask):
        batch_size, _, num_rows, width = mask.shape
        mask = create_block_mask(
            lambda batch, head, row, key: masks[-1].mask.mask_mod(batch, head, row + content_length, key),
            batch_size,
            None,
            num_rows - content_length,
            width,
            device=mask.kv_indices.device,
        )
        return (AttentionMask(mask),)
    return (AttentionMask(mask if mask.shape[2] == 1 else mask[:, :, content_length:]),)


def sees_something(
    group_ids: torch.Tensor,
    target_group_ids: torch.Tensor,
    key_mask: torch.Tensor | None,
    num_cached: int,
    *,
    document_ids: torch.Tensor | None = None,
    target_document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, Q), True where a slot sees at least one content token. Shapes as in `group_attention_mask`."""
    if document_ids is not None:
        masks = group_attention_mask(
            "sdpa",
            group_ids=group_ids,
            target_group_ids=target_group_ids,
            key_mask=key_mask,
            document_ids=document_ids,
            target_document_ids=target_document_ids,
        )
        return masks[0].mask[:, 0, group_ids.shape[1] :].any(dim=-1)
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
