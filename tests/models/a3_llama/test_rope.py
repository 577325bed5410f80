"""Kinds of RoPE: no token is turned by another angle because of what else is in the pass."""

import pytest
import torch

from a3_hf import A3LlamaForCausalLM
from a3_hf.models.auto import ARCHITECTURES
from tests.conftest import ROPES, tiny_config
from tests.models.a3_llama.test_generation_drawn import in_fp64

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
KINDS = ["a3", "decoupled_rope", "masked_diffusion"]
LENGTH = 24


def made(kind: str, rope: dict, **changes):
    settings = tiny_config(
        rope_parameters=rope, max_position_embeddings=LENGTH, num_hidden_layers=2, **changes
    ).to_dict()
    settings.pop("model_type")
    settings.pop("slot_start", None)
    own = {"a3": {"slot_start": "left_token"}, "masked_diffusion": {"mask_token_id": 60}}.get(kind, {})
    architecture = ARCHITECTURES[kind]
    torch.manual_seed(1)
    return architecture.model(architecture.config(**{**settings, **own}))


@pytest.mark.parametrize("kind", KINDS)
def test_longrope_is_refused(kind):
    with pytest.raises(ValueError, match="rope_type='longrope'"):
        made(kind, LONGROPE)


def test_longrope_is_refused_in_a_checkpoint(tmp_path):
    model = made("a3", ROPES["default"])
    model.config.rope_parameters = dict(LONGROPE)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rope_type='longrope'"):
        A3LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_is_refused_where_it_would_scale(kind):
    model, ids = made(kind, ROPES["dynamic"]), torch.arange(3, 3 + LENGTH + 2)[None]
    with pytest.raises(ValueError, match=f"position_ids reach {LENGTH + 1} with rope_type='dynamic'"):
        model.log_likelihood(ids, torch.arange(ids.shape[1])[None])
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        model(ids)
    model.log_likelihood(ids[:, :LENGTH], torch.arange(LENGTH)[None])


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_context_cached_is_uncached_and_the_same_beside_others(kind, rope):
    """To the last position of the context, where a rope that looks at the length of a pass would change."""
    model = in_fp64(made(kind, ROPES[rope]))
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[1, :8] = 0
    settings = {"max_new_tokens": LENGTH - 12, "eos_token_id": [], "attention_mask": real}
    output = model.generate_any_order(ids, **settings)
    if kind != "masked_diffusion":
        uncached = model.generate_any_order(ids, use_cache=False, **settings)
        assert (uncached.log_probs - output.log_probs).abs().max() < 1e-9
    alone = model.generate_any_order(ids[1:, 8:], max_new_tokens=LENGTH - 12, eos_token_id=[])
    assert (alone.log_probs[0] - output.log_probs[1, 8:]).abs().max() < 1e-9
    scored = model.log_likelihood(output.sequences, output.group_ids, output.group_ids >= 0)
    assert (scored - output.log_probs)[output.commit_step >= 0].abs().max() < 1e-9
