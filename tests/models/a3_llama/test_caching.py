"""The cache under the installed word, and four futures of transformers in which it is lost: each must be an error."""

import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from a3_hf import (
    A3LlamaForCausalLM,
    DecoupledRopeLlamaConfig,
    DecoupledRopeLlamaForCausalLM,
    MaskedDiffusionLlamaConfig,
    MaskedDiffusionLlamaForCausalLM,
)
from a3_hf.models.a3_llama.caching import CACHE, OTHER_WORD, take_cache
from tests.conftest import tiny_config

IDS = torch.tensor([[1, 5, 6, 7]])


@pytest.fixture(params=["a3", "decoupled_rope"])
def model(request):
    if request.param == "a3":
        return A3LlamaForCausalLM(tiny_config()).eval()
    settings = tiny_config().to_dict()
    for name in ("model_type", "slot_start", "architectures"):
        settings.pop(name, None)
    return DecoupledRopeLlamaForCausalLM(DecoupledRopeLlamaConfig(**settings)).eval()


def test_two_words_at_once_are_an_error(model):
    cache = DynamicCache(config=model.config)
    for body in (model, model.model):
        with pytest.raises(ValueError, match="past_key_values and cache are the same argument"):
            body(IDS, cache=cache, past_key_values=cache)


def test_a_cache_under_a_third_word_is_an_error(model):
    for body in (model, model.model):
        with pytest.raises(ValueError, match=r"kv_store is a DynamicCache.*past_key_values or cache.*transformers \d"):
            body(IDS, kv_store=DynamicCache(config=model.config))


def test_masked_diffusion_takes_no_cache_under_any_word():
    settings = tiny_config().to_dict()
    for name in ("model_type", "slot_start", "architectures"):
        settings.pop(name, None)
    model = MaskedDiffusionLlamaForCausalLM(MaskedDiffusionLlamaConfig(**settings)).eval()
    for word in ("cache", "past_key_values", "kv_store"):
        with pytest.raises(ValueError, match="cache"):
            model(IDS, **{word: DynamicCache(config=model.config)})


def test_attention_without_a_cache_argument_is_an_error():
    with pytest.raises(RuntimeError, match=f"passes attention no argument '{CACHE}'"):
        take_cache({"position_ids": None})
    with pytest.raises(ValueError, match=f"{OTHER_WORD} is a DynamicCache"):
        take_cache({CACHE: None, OTHER_WORD: DynamicCache()})


# The futures.


def test_another_word_in_the_signatures_of_layers_is_an_error_at_import():
    code = """
from transformers.models.llama import modeling_llama

def forward(self, hidden_states, attention_mask=None, position_ids=None, kv_store=None, use_cache=False,
            position_embeddings=None, **kwargs):
    raise AssertionError

modeling_llama.{}.forward = forward
import a3_hf
"""
    for layer in ("LlamaDecoderLayer", "LlamaAttention"):
        done = subprocess.run([sys.executable, "-c", code.replace("{}", layer)], capture_output=True, text=True)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 1 and last.startswith("ImportError: transformers ")
        assert f"{layer}.forward" in last and "kv_store" in last


def test_a_layer_that_hands_the_cache_on_under_another_word_is_an_error(model, monkeypatch):
    def forward(self, hidden_states, **kwargs):
        store = kwargs.pop(CACHE, None)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), kv_store=store, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=r"transformers \d"):
        model(IDS, use_cache=True)


def test_a_layer_that_drops_the_cache_is_an_error(model, monkeypatch):
    original = modeling_llama.LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        return original(self, hidden_states, **{**kwargs, CACHE: None})

    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"layer 0 of the cache holds 0 tokens.*transformers \d"):
        model(IDS, use_cache=True)


def test_a_generate_that_hands_the_cache_over_under_another_word_is_an_error(model, monkeypatch):
    original = type(model).prepare_inputs_for_generation

    def prepare(self, *args, **kwargs):
        inputs = original(self, *args, **kwargs)
        inputs["kv_store"] = inputs.pop(CACHE)
        return inputs

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", prepare)
    with pytest.raises(ValueError, match=r"kv_store is a DynamicCache.*transformers \d"):
        model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_llama_that_keeps_keywords_from_attention_is_an_error(monkeypatch):
    """Decoupled RoPE's rotations travel through `LlamaModel.forward`'s keywords."""
    settings = tiny_config().to_dict()
    for name in ("model_type", "slot_start", "architectures"):
        settings.pop(name, None)
    model = DecoupledRopeLlamaForCausalLM(DecoupledRopeLlamaConfig(**settings)).eval()
    original = modeling_llama.LlamaModel.forward

    def forward(self, *args, rotations=None, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(RuntimeError, match="rotations are lost"):
        model(IDS, group_ids=torch.tensor([[0, 2, 1, 3]]))
