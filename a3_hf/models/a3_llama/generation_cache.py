"""A key/value cache with preallocated memory: appending tokens does not copy the earlier ones."""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


class PreallocatedLayer(DynamicLayer):
    """Identical to `DynamicLayer` except: `keys` and `values` are views of preallocated tensors (`first_room` tokens, doubled
    when full), instead of being concatenated at every step.
    """

    def __init__(self, first_room: int):
        super().__init__()
        self.first_room = first_room
        self.room = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if not self._has_room(total, key_states.shape[0]):
            capacity = max(self.first_room, 2 * total if self.room is not None else total)
            old = (self.keys, self.values)
            with torch.inference_mode(False):  # other passes write here, too
                self.room = tuple(
                    torch.empty(*states.shape[:2], capacity, states.shape[3], dtype=states.dtype, device=states.device)
                    for states in (key_states, value_states)
                )
            if length:
                for room, states in zip(self.room, old, strict=True):
                    room[:, :, :length] = states
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, length:total] = states
        self.keys, self.values = (room[:, :, :total] for room in self.room)
        return self.keys, self.values

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes keys and values (B, H, S, d) all that the layer holds."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.room = (keys, values)

    def _has_room(self, total: int, batch_size: int) -> bool:
        """True if `keys` still start at the preallocated tensor's start, and it has room for `total` tokens."""
        if self.room is None or self.room[0].shape[2] < total or self.room[0].shape[0] != batch_size:
            return False
        return self.keys.numel() == 0 or self.keys.data_ptr() == self.room[0].data_ptr()


def preallocated_cache(num_layers: int, first_room: int) -> Cache:
    """Returns an empty cache of `PreallocatedLayer`s, with room for `first_room` tokens."""
    return Cache(layers=[PreallocatedLayer(first_room) for _ in range(num_layers)])


def joined_cache(caches: Sequence[Cache], rows: torch.Tensor | None = None) -> Cache:
    """Returns one cache with the rows of several, those of shorter ones followed by zeros.

    Args:
        rows: (n,) the rows to take, of all. None: all.
    """
    length = max(cache.get_seq_length() for cache in caches)
    whole = preallocated_cache(len(caches[0].layers), first_room=0)
    for index, layer in enumerate(whole.layers):
        parts = [cache.layers[index] for cache in caches]
        states = [
            torch.cat([pad(each, (0, 0, 0, length - each.shape[2])) for each in of_all])
            for of_all in ([part.keys for part in parts], [part.values for part in parts])
        ]
        layer.take(*(each if rows is None else each[rows] for each in states))
    return whole


def first_tokens(cache: Cache, length: int) -> DynamicCache:
    """Returns a new cache with the first `length` tokens."""
    kept = DynamicCache()
    for index, layer in enumerate(cache.layers):
        kept.update(layer.keys[:, :, :length], layer.values[:, :, :length], index)
    return kept
