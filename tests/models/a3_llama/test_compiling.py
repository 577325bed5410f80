"""More graphs than torch's compiler makes by itself, and one data type for attention kernels."""

import pytest
import torch
from torch._dynamo import config
from transformers import CompileConfig

from a3_hf import GroupOrder
from a3_hf.models.a3_llama import attention
from a3_hf.models.a3_llama.attention_masks import all_visible_mask, group_attention_mask, groups_of
from a3_hf.models.a3_llama.compiling import raise_recompile_limit
from tests.conftest import tiny_model
from tests.models.a3_llama.test_modeling import random_ids, text_order
from tests.models.a3_llama.test_orders import generators


@pytest.fixture
def limit_of_8():
    with config.patch(recompile_limit=8):
        yield


@pytest.mark.parametrize(("before", "after"), [(8, 64), (64, 64), (100, 100)])
def test_the_limit_is_raised_and_never_lowered(before, after):
    with config.patch(recompile_limit=before):
        raise_recompile_limit()
        assert config.recompile_limit == after


def test_an_older_name_of_the_limit(monkeypatch):
    class Older:
        cache_size_limit = 8

    monkeypatch.setattr(torch._dynamo, "config", Older)
    raise_recompile_limit()
    assert Older.cache_size_limit == 64 and not hasattr(Older, "recompile_limit")


def test_masks_of_flex_attention_raise_it_and_others_do_not(limit_of_8):
    groups, key_mask = torch.arange(6)[None], torch.ones(1, 6, dtype=torch.bool)
    group_attention_mask("sdpa", *groups_of(groups, groups))
    all_visible_mask("sdpa", 6, key_mask)
    assert config.recompile_limit == 8
    group_attention_mask("flex_attention", *groups_of(groups, groups))
    assert config.recompile_limit == 64
    config.recompile_limit = 8
    all_visible_mask("flex_attention", 6, key_mask)
    assert config.recompile_limit == 64


def test_compiled_decoding_raises_it(monkeypatch, limit_of_8):
    model, ids = tiny_model(), random_ids()[:, :8]
    monkeypatch.setattr(model, "get_compiled_call", lambda settings: model.__call__)
    settings = {"max_new_tokens": 3, "cache_implementation": "static"}
    model.generate_any_order(ids, **settings, disable_compile=True)
    assert config.recompile_limit == 8
    model.generate_any_order(ids, **settings, compile_config=CompileConfig(mode="default"))
    assert config.recompile_limit == 64


def test_many_graphs_are_compiled_where_8_were_the_end(limit_of_8):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend, dynamic=False)
    for width in range(1, 13):
        double(torch.ones(width))
    assert len(graphs) == 8
    raise_recompile_limit()
    torch._dynamo.reset()
    graphs.clear()
    for width in range(1, 13):
        double(torch.ones(width))
    torch._dynamo.reset()
    assert len(graphs) == 12


@pytest.mark.parametrize("autocast", [True, False])
def test_attention_gets_one_data_type(monkeypatch, autocast):
    seen = []

    def kernel(module, query, key, value, mask, **settings):
        seen.append((query.dtype, key.dtype, value.dtype))
        return sdpa(module, query, key, value, mask, **settings)

    sdpa = attention.ALL_ATTENTION_FUNCTIONS["sdpa"]
    model, ids = tiny_model(dtype=torch.float32), random_ids()
    order = GroupOrder.scattered(torch.ones_like(ids), group_size=4, generator=generators(2))
    exact = text_order(model, order, ids).log_softmax(-1)
    monkeypatch.setattr(attention.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *names: kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = text_order(model, order, ids)
    expected = torch.bfloat16 if autocast else torch.float32
    assert set(seen) == {(expected,) * 3} and len(seen) >= model.config.num_hidden_layers
    rough = logits.float().log_softmax(-1)
    error = ((exact - rough)[order.scored_mask].norm() / exact[order.scored_mask].norm()).item()
    assert error < 0.05 and (error > 0) == autocast
