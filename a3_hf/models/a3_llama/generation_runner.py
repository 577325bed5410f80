"""Forward passes over the text being filled, with their key/value cache."""

import math
from collections.abc import Sequence
from copy import copy

import torch
from torch.nn.functional import pad
from transformers import StaticCache
from transformers.cache_utils import Cache

from .attention_masks import (
    all_visible_mask,
    group_attention_mask,
    groups_of,
    prompt_attention_mask,
    tree_attention_mask,
)
from .compiling import raise_recompile_limit
from .generation_cache import first_tokens, joined_cache, preallocated_cache
from .generation_canvas import Canvas, columns_of
from .packed_layers import slot_factors
from .rope import apply_rotary

PRODUCTS_PER_LAYER = 7  # matrix products of a decoder layer, each with a rounding error


class ForwardRunner:
    """Runs forward passes: encodes content columns of a canvas, each once, and predicts slots.

    Args:
        ragged: some columns are the padding column, so keys need a mask.
        one_group: without a cache, encode all known tokens as one bidirectional group (the paper's dynamic variant).
        static_width: the number of keys of a static cache; None: the cache grows.
        prompt_cache: cache of the canvas's first columns, from an earlier pass; not modified.
    """

    def __init__(
        self,
        model,
        canvas: Canvas,
        *,
        use_cache: bool,
        one_group: bool = False,
        ragged: bool = False,
        static_width: int | None = None,
        prompt_cache: Cache | None = None,
        compile_config=None,
    ):
        self.model, self.canvas, self.one_group, self.ragged = model, canvas, one_group, ragged
        self.implementation = model.config._attn_implementation
        self.width = static_width
        self.passes = 0
        self.call = model
        self.compiled_call = None
        device = canvas.sequences.device
        self.encoded = torch.empty(canvas.sequences.shape[0], 0, dtype=torch.long, device=device)
        self.groups = torch.empty(0, dtype=torch.long, device=device)
        self.next_group = 0
        self.kept_layer: int | None = None  # of whose input passes keep the content rows, as `kept_states` (B, C, D)
        self.kept_states: torch.Tensor | None = None
        self.last_content = 0  # columns of the last pass
        # The slot after a token is that token's content row: the same start, position, keys and weights.
        self.slots_are_content_rows = (
            type(self) is ForwardRunner
            and model.config.slot_start == "left_token"
            and use_cache
            and static_width is None
            and not any(slot_factors(module) for module in model.modules())
        )
        self.lead = int(canvas.blank_mask.any(dim=0).long().argmax())  # the columns before the first blank of any row
        if not use_cache:
            self.cache = None
        elif static_width is not None:
            self.cache = StaticCache(config=model.config, max_cache_len=static_width)
            if compile_config is not None:
                raise_recompile_limit()
                self.compiled_call = model.get_compiled_call(compile_config)
        else:
            self.cache = preallocated_cache(model.config.num_hidden_layers, first_room=canvas.pad_column + 1)
            if prompt_cache is not None and prompt_cache.get_seq_length() > 0:
                self._take(prompt_cache)

    def given_columns(self) -> torch.Tensor:
        """Returns (B, n) the given columns not yet encoded: those before any row's first blank in place (so a cache aligns
        with `input_ids`), then the others without gaps.
        """
        lead, taken = self.lead, self.encoded.shape[1]
        columns = torch.arange(lead, device=self.encoded.device).expand(self.encoded.shape[0], -1)
        first = columns.masked_fill(~self.canvas.given_mask[:, :lead], self.canvas.pad_column)
        rest = self.canvas.given_mask.clone()
        rest[:, :lead] = False
        return torch.cat([first[:, taken:], columns_of(rest, self.canvas.pad_column)], dim=1)

    def forward(
        self,
        content: torch.Tensor,
        slots: torch.Tensor,
        *,
        singletons: bool = False,
        slot_groups: torch.Tensor | None = None,
        logits_at: torch.Tensor | None = None,
        tree: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Encodes the new columns `content` (B, C) and returns logits (B, Q, V) of the columns `slots` (B, Q), given all
        content so far.

        Args:
            singletons: each new column is a group, in the order given; otherwise all are one group.
            slot_groups: (Q,) with `singletons`: slot q sees the first `slot_groups[q]` columns of `content`. None: all.
            logits_at: (B, n) places in `content`, whose next-token logits come before those of the slots, (B, n + Q, V).
            tree: with `singletons` and no slots: (B, N) the tokens of the last N columns of `content`, and (B, N, N) which of
                these columns each of them sees.
        """
        num_new, num_slots, device = content.shape[1], slots.shape[1], content.device
        num_cached = self.encoded.shape[1]
        self.last_content = num_new
        left = {}
        if self.model.config.slot_start == "left_token":
            left["target_input_ids"] = self._left_tokens(content, slots, slot_groups)
        new_groups = torch.arange(num_new, device=device) if singletons else content.new_zeros(num_new)
        self.groups = torch.cat([self.groups, self.next_group + new_groups])
        first_group = self.next_group
        self.next_group += num_new if singletons else 1
        self.encoded = torch.cat([self.encoded, content], dim=1)
        key_mask = self.key_mask()
        if slot_groups is None:
            slot_groups = torch.full((num_slots,), num_new if singletons else 1, device=device)
        rows = content.shape[0] if self.ragged else 1
        at = {}
        if logits_at is not None:
            in_pass = logits_at if self.cache is not None else logits_at + num_cached  # without a cache, all is encoded
            at["content_logits_at"] = (torch.arange(len(content), device=device)[:, None].expand_as(in_pass), in_pass)
        if self.cache is None:
            content, num_cached = self.encoded, 0
        has_tree = tree is not None and tree[0].shape[1] > 0
        input_ids = self.canvas.sequences.gather(1, content)
        if has_tree:
            input_ids[:, -tree[0].shape[1] :] = tree[0]
            masks = tree_attention_mask(self.implementation, tree[1], content.shape[1], self.encoded.shape[1], key_mask)
        elif self.cache is None:
            if self.one_group:
                masks = all_visible_mask(self.implementation, content.shape[1] + num_slots, key_mask)
            else:
                masks = group_attention_mask(
                    self.implementation,
                    *groups_of(self.groups.expand(rows, -1), (first_group + slot_groups).expand(rows, -1)),
                    key_mask=key_mask,
                )
        elif singletons and num_cached == 0 and self.width is None and self.passes == 0:
            masks = prompt_attention_mask(self.implementation, num_new, num_slots, key_mask, device)
        elif singletons and num_new:
            masks = group_attention_mask(
                self.implementation,
                *groups_of(new_groups.expand(rows, -1), slot_groups.expand(rows, -1)),
                key_mask=key_mask,
                num_cached=num_cached,
                num_keys=self.width,
            )
        else:
            if self.width is not None:
                present = torch.arange(self.width, device=device) < self.encoded.shape[1]
                present = present.expand(rows, -1)
                if key_mask is not None:
                    present = present & pad(key_mask, (0, self.width - key_mask.shape[1]))
                key_mask = present
            masks = all_visible_mask(self.implementation, num_new + num_slots, key_mask)
        call = self.call if self.compiled_call is None or self.passes == 0 else self.compiled_call
        self.passes += 1
        if self.kept_layer is not None:
            at["kept_layer"] = self.kept_layer
        output = call(
            input_ids=input_ids,
            position_ids=self.canvas.position_ids.gather(1, content),
            target_position_ids=self.canvas.position_ids.gather(1, slots),
            attention_mask=masks,
            cache=self.cache,
            use_cache=self.cache is not None,
            **left,
            **at,
        )
        if self.kept_layer is not None:
            self.kept_states = output.kept_hidden_state
        if logits_at is None:
            return output.logits
        return torch.cat([output.content_logits, output.logits], dim=1) if num_slots else output.content_logits

    def _left_tokens(
        self, content: torch.Tensor, slots: torch.Tensor, slot_groups: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns (B, Q) the token to the left of each slot if the slot sees it, else −1."""
        num_new, last = content.shape[1], torch.iinfo(content.dtype).max
        # Index of each column in `content`; −1 if an earlier pass encoded it, `last` if none has.
        needed = torch.full_like(self.canvas.sequences, last)
        needed.scatter_(1, content, torch.arange(num_new, device=content.device).expand_as(content))
        needed.scatter_(1, self.encoded, -1)
        left = self.canvas.columns_at(self.canvas.position_ids.gather(1, slots) - 1)
        limit = num_new if slot_groups is None else slot_groups
        is_visible = (needed.gather(1, left) < limit) & (left != self.canvas.pad_column)
        return self.canvas.sequences.gather(1, left).masked_fill(~is_visible, -1)

    def evict(self, fallen: torch.Tensor, surplus: int) -> None:
        """Removes rejected drafts, `fallen` (B, C), from the last pass's content. Its last `surplus` columns, rejected in
        every row, are cropped; the others are masked.
        """
        num_new = fallen.shape[1]
        self.encoded[:, -num_new:] = self.encoded[:, -num_new:].masked_fill(fallen, self.canvas.pad_column)
        if surplus:
            self.encoded, self.groups = self.encoded[:, :-surplus], self.groups[:-surplus]
            if self.cache is not None:
                self.cache.crop(-surplus)

    def keep(self, places: torch.Tensor) -> None:
        """Of the last pass's content, keeps the columns at `places` (B, n), in this order; −1: padding."""
        num_new, num_kept = self.last_content, int((places >= 0).any(dim=0).sum())
        places = places[:, :num_kept]
        start = self.encoded.shape[1] - num_new
        new = self.encoded[:, start:].gather(1, places.clamp_min(0)).masked_fill(places < 0, self.canvas.pad_column)
        self.encoded = torch.cat([self.encoded[:, :start], new], dim=1)
        self.groups = self.groups[: start + num_kept]
        if self.cache is None:
            return
        if not (places == torch.arange(num_kept, device=places.device)).all():
            index = places.clamp_min(0)[:, None, :, None]
            for layer in self.cache.layers:
                for states in (layer.keys, layer.values):
                    moved = states[:, :, start:].take_along_dim(index, dim=2)
                    states[:, :, start : start + num_kept] = moved
        if num_kept < num_new:
            self.cache.crop(num_kept - num_new)

    def again(self, canvas: Canvas) -> "ForwardRunner":
        """Returns a runner of the same settings for another canvas, from its first pass on; with a cache that grows."""
        return type(self)(
            self.model,
            canvas,
            use_cache=self.cache is not None,
            one_group=self.one_group,
            ragged=self.ragged or canvas.is_ragged(),
        )

    def rows(self, index: torch.Tensor, canvas: Canvas) -> "ForwardRunner":
        """Returns a runner of the rows `index` (n,), whose `canvas` is given, with what they need of the cache."""
        part = copy(self)
        part.canvas, part.lead, part.kept_states = canvas, 0, None
        part.encoded = self.encoded[index]
        if self.cache is not None:
            part.cache = joined_cache([self.cache], index)
        part.compact()
        return part

    @classmethod
    def joined(cls, runners: "Sequence[ForwardRunner]", canvas: Canvas) -> "ForwardRunner":
        """Returns a runner of the rows of several, whose `canvas` is given; they have caches that grow."""
        whole = copy(runners[0])
        whole.canvas, whole.ragged, whole.lead, whole.kept_states = canvas, True, 0, None
        width, most = canvas.pad_column, max(runner.encoded.shape[1] for runner in runners)
        parts = [runner.encoded.masked_fill(runner.encoded == runner.canvas.pad_column, width) for runner in runners]
        whole.encoded = torch.cat([pad(part, (0, most - part.shape[1]), value=width) for part in parts])
        whole.groups = torch.arange(most, device=whole.encoded.device)
        whole.next_group, whole.passes = most, max(runner.passes for runner in runners)
        if whole.passes:
            whole.cache = joined_cache([runner.cache for runner in runners])
        else:
            whole.lead = int(canvas.blank_mask.any(dim=0).long().argmax())
            whole.cache = preallocated_cache(len(runners[0].cache.layers), first_room=width + 1)
        return whole

    def key_mask(self) -> torch.Tensor | None:
        """Returns (B, cached), False where no row sees a cached key; None: all are seen."""
        return self.encoded != self.canvas.pad_column if self.ragged else None

    def compact(self) -> None:
        """Removes evicted keys and values from the cache, so that they don't accumulate in a batch."""
        keep = self.encoded != self.canvas.pad_column
        keep[:, : self.lead] = True
        width = int(keep.sum(dim=1).max())
        if self.cache is None or width == keep.shape[1]:
            return
        index = (~keep).long().argsort(dim=1, stable=True)[:, :width]
        self.encoded = self.encoded.masked_fill(~keep, self.canvas.pad_column).gather(1, index)
        self.groups = self.groups[:width]
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                states = getattr(layer, name)
                where = index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                setattr(layer, name, states.gather(2, where))

    def prompt_cache(self) -> Cache | None:
        """Returns the cache of the columns before the first blank, or None."""
        if self.cache is None or self.width is not None or self.lead == 0:
            return None
        return first_tokens(self.cache, self.lead)

    def _take(self, cache: Cache) -> None:
        """Copies a cache of the canvas's first columns, after checking it."""
        canvas, config, length = self.canvas, self.model.config, cache.get_seq_length()
        batch_size, lead = canvas.sequences.shape[0], self.lead
        if length > lead:
            raise ValueError(
                f"past_key_values holds {length} tokens: expected at most {lead}, the columns of input_ids before the first "
                "blank"
            )
        heads, dim = config.num_key_value_heads, getattr(config, "head_dim", None)
        dim = dim or config.hidden_size // config.num_attention_heads
        shapes = {tuple(layer.keys.shape) for layer in cache.layers}
        fitting = {(rows, heads, length, dim) for rows in {1, batch_size}}
        if len(cache.layers) != config.num_hidden_layers or len(shapes) != 1 or not shapes <= fitting:
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers of shape {sorted(shapes)}: expected "
                f"{config.num_hidden_layers} of {(batch_size, heads, length, dim)} (or a batch of 1)"
            )
        columns = torch.arange(length, device=canvas.sequences.device).expand(batch_size, -1)
        self.encoded = columns.masked_fill(~canvas.given_mask[:, :length], canvas.pad_column)
        self.groups = torch.arange(length, device=columns.device)
        self.next_group = length
        expected = _first_layer_keys(self.model.model, canvas.sequences[:, :length], canvas.position_ids[:, :length])
        keys = cache.layers[0].keys
        different = ((keys - expected).abs() > _cache_tolerance(keys.dtype, 0) * expected.abs().amax()).any(dim=3)
        different = different.any(dim=1) & (self.encoded != canvas.pad_column)
        if different.any():
            row, column = different.nonzero()[0].tolist()
            raise ValueError(
                f"past_key_values does not match input_ids at row {row}, column {column} (another text, other positions or "
                "another model)"
            )
        self._check_states(cache)
        for index, layer in enumerate(cache.layers):
            states = (tensor.expand(batch_size, -1, -1, -1) for tensor in (layer.keys, layer.values))
            self.cache.update(*states, index)

    def _check_states(self, cache: Cache) -> None:
        """Encodes the first and last token of each row again, and compares their keys and values in every layer. The first
        sees only itself, the last sees the whole cache; together they depend on all weights that a cache depends on.

        Raises:
            ValueError: they differ.
        """
        length, given = cache.get_seq_length(), self.encoded != self.canvas.pad_column
        place = torch.arange(length, device=given.device)
        rows, batch_size = given.any(dim=1), given.shape[0]
        first, last = given.long().argmax(dim=1), torch.where(given, place, 0).amax(dim=1)
        alone = torch.zeros_like(given)
        for columns, before in ((first, alone), (last, given & (place != last[:, None]))):
            again = first_tokens(cache, length)
            for layer in again.layers:
                layer.keys, layer.values = (
                    states.expand(batch_size, -1, -1, -1) for states in (layer.keys, layer.values)
                )
            self._encode_again(columns[:, None], again, pad(before, (0, 1), value=True))
            for index, (new, old) in enumerate(zip(again.layers, cache.layers, strict=True)):
                for name in ("keys", "values"):
                    states = getattr(old, name).expand(batch_size, -1, -1, -1)
                    where = columns[:, None, None, None].expand(-1, states.shape[1], 1, states.shape[3])
                    error = _relative_error(getattr(new, name)[:, :, -1:], states.gather(2, where))
                    wrong = rows & ~(error <= _cache_tolerance(states.dtype, index))
                    if wrong.any():
                        row = int(wrong.nonzero()[0])
                        raise ValueError(
                            f"past_key_values does not match this model: the {name} of layer {index} at row {row}, column "
                            f"{int(columns[row])}, differ (other weights or active adapters, or a prompt not encoded from "
                            "left to right). Compute it again."
                        )

    def _encode_again(self, columns: torch.Tensor, cache: Cache, key_mask: torch.Tensor) -> None:
        """Encodes `columns` (B, 1) and appends their states to `cache`; they see the keys in `key_mask` (B, cached + 1)."""
        position_ids = self.canvas.position_ids.gather(1, columns)
        self.model.model(
            input_ids=self.canvas.sequences.gather(1, columns),
            position_ids=position_ids,
            target_position_ids=position_ids[:, :0],
            attention_mask=all_visible_mask(self.implementation, 1, key_mask),
            cache=cache,
            use_cache=True,
        )


def _first_layer_keys(body, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Returns (B, H, C, D / H) the first layer's keys of content (B, C), which depend only on ids and positions."""
    layer, embeds = body.layers[0], body.embed_tokens(input_ids)
    cos, sin = body.rotary_emb(embeds, position_ids=position_ids)
    keys = layer.self_attn.k_proj(layer.input_layernorm(embeds))
    return apply_rotary(keys.unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2), cos, sin)


def _cache_tolerance(dtype: torch.dtype, layer: int) -> float:
    """Returns the relative error allowed between a layer's states of the same tokens in another batch shape: rounding errors
    add up as the square root of their number. At least 1e-3, far above fp32's.
    """
    return max(1e-3, 4 * torch.finfo(dtype).eps * math.sqrt(PRODUCTS_PER_LAYER * (layer + 1)))


def _relative_error(states: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Returns (B,) the distance of states (B, H, 1, D / H) from expected ones, as a fraction of the latter's norm."""
    states, expected = states.float().flatten(1), expected.float().flatten(1)
    return (states - expected).norm(dim=1) / expected.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
