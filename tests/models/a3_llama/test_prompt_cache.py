"""Caches that a caller brings: those of this model and text serve; of other weights, adapters or texts none does."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from a3_hf.models.a3_llama.attention_masks import group_attention_mask, groups_of
from a3_hf.models.auto import ARCHITECTURES
from tests.conftest import tiny_config, tiny_model

NEW = {"max_new_tokens": 3, "eos_token_id": []}
REFUSED = "past_key_values does not match this model"


def prompt(rows: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(0))


def made(kind: str, **changes):
    if kind != "decoupled_rope":
        return tiny_model(slot_start=kind, **changes)
    settings = {name: value for name, value in tiny_config(**changes).to_dict().items() if name != "model_type"}
    torch.manual_seed(42)
    return ARCHITECTURES[kind].model(ARCHITECTURES[kind].config(**settings)).eval()


KINDS = ["query_embed", "left_token", "decoupled_rope"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("modules", [["down_proj"], ["v_proj", "o_proj"], ["gate_proj"], ["q_proj"]], ids=str)
def test_an_adapter_that_was_off_is_seen(kind, modules):
    """Issue: the keys of layer 0 are the same with the adapter on and off."""
    adapter = LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    model = get_peft_model(made(kind), adapter).eval()
    with model.disable_adapter():
        off = model.generate_any_order(prompt(), **NEW).past_key_values
    with pytest.raises(ValueError, match=REFUSED):
        model.generate_any_order(prompt(), past_key_values=off, **NEW)
    fresh = model.generate_any_order(prompt(), **NEW)
    again = model.generate_any_order(prompt(), past_key_values=fresh.past_key_values, **NEW)
    assert torch.equal(fresh.sequences, again.sequences)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_model_whose_later_layers_differ_is_seen(kind, layer):
    model, other = made(kind), made(kind)
    weights = other.model.layers[layer]
    weight = (
        weights.mlp.up_proj.weight if layer < 2 else weights.self_attn.v_proj.weight
    )  # the last MLP leaves nothing behind
    with torch.no_grad():
        weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    cache = other.generate_any_order(prompt(), **NEW).past_key_values
    with pytest.raises(ValueError, match=REFUSED):
        model.generate_any_order(prompt(), past_key_values=cache, **NEW)


def test_a_prompt_that_saw_itself_from_both_sides_is_seen():
    model, ids = tiny_model(slot_start="query_embed"), prompt()
    together = torch.zeros_like(ids)
    views = group_attention_mask("sdpa", *groups_of(together, together[:, :0]))
    cache = model.model(ids, attention_mask=views, target_position_ids=ids[:, :0], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=REFUSED):
        model.generate_any_order(ids, past_key_values=cache, **NEW)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_own_cache_serves_in_any_precision_and_padding(kind, dtype):
    """Deep enough for rounding to add up, padded on both sides, alone and beside others."""
    model = made(kind, num_hidden_layers=12, initializer_range=0.1).to(dtype)
    ids, real = prompt(3, 40), torch.ones(3, 40).long()
    real[0, :7], real[1, 35:], real[2, 1:] = 0, 0, 0
    fresh = model.generate_any_order(ids, attention_mask=real, **NEW)
    again = model.generate_any_order(ids, attention_mask=real, past_key_values=fresh.past_key_values, **NEW)
    assert (fresh.log_probs - again.log_probs).abs().max() < {torch.float32: 1e-4}.get(dtype, 1.0)
    cache = model(ids[:1], use_cache=True).past_key_values  # one prompt for all, encoded in another batch shape
    model.generate_any_order(ids[:1].expand(4, -1), past_key_values=cache, **NEW)


@pytest.mark.parametrize("cache", [(), [1], {"keys": 1}, "cache"], ids=str)
def test_what_is_no_cache_is_refused(cache):
    with pytest.raises(ValueError, match="past_key_values is a "):
        tiny_model(slot_start="left_token").generate_any_order(prompt(), past_key_values=cache, **NEW)
