"""The cache that grows in place against the library's."""

import torch
from transformers import DynamicCache

from a3_hf.models.a3_llama.generation_cache import first_tokens, preallocated_cache

ROOM = 32


def test_it_holds_what_a_dynamic_cache_holds():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = preallocated_cache(2, ROOM), DynamicCache()
    for step, length in enumerate((5, 1, ROOM, 3, 2 * ROOM, 1)):
        if step in (2, 4):
            for cache in (ours, theirs):
                cache.crop(-2)
        for layer in range(2):
            states = torch.randn(2, 2, 3, length, 4, generator=generator)
            got, expected = ours.update(*states, layer), theirs.update(*states, layer)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_step_is_written_in_place():
    cache = preallocated_cache(1, ROOM)
    for _ in range(10):
        cache.update(*torch.zeros(2, 1, 1, 1, 4), 0)
    address = cache.layers[0].keys.data_ptr()
    for _ in range(ROOM - 10):
        cache.update(*torch.zeros(2, 1, 1, 1, 4), 0)
    assert cache.layers[0].keys.data_ptr() == address


def test_states_put_in_from_outside_are_kept():
    cache = preallocated_cache(1, ROOM)
    cache.update(*torch.zeros(2, 1, 1, 6, 4), 0)
    layer = cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, 3:].clone() + 1, layer.values[:, :, 3:].clone() + 2
    keys, values = cache.update(*torch.zeros(2, 1, 1, 1, 4), 0)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 0] and values[0, 0, :, 0].tolist() == [2, 2, 2, 0]


def test_the_first_tokens_are_a_copy():
    cache = preallocated_cache(1, ROOM)
    cache.update(*torch.zeros(2, 1, 1, 6, 4), 0)
    kept = first_tokens(cache, 4)
    cache.layers[0].keys += 1
    assert kept.get_seq_length() == 4 and (kept.layers[0].keys == 0).all()
