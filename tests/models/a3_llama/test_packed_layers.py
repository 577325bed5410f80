"""Decoding passes with packed weights, against the model's own layers: values, texts, and when they step aside."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import DynamicCache

from a3_hf import A3LlamaForCausalLM
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import attach
from a3_hf.models.a3_llama import packed_layers
from a3_hf.models.a3_llama.generation_cache import preallocated_cache
from a3_hf.models.a3_llama.packed_layers import (
    LEAST_PACKED,
    MOST_ROWS,
    JoinedWeights,
    PackedLayers,
    has_packed_products,
)
from tests.conftest import tiny_model

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-6}  # LLaMA's norms compute in fp32
PROMPT = torch.tensor([[0, 0, 11, 12, 13, 14], [5, 6, 7, 8, 9, 10]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
BLANKS = torch.tensor([[0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0]], dtype=torch.bool)


def adapted(dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    model = attach(tiny_model(dtype=torch.float32, **settings), LoraArguments(r=4, rows="slots", alpha=12.0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.to(dtype).eval()


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The numbers of rows of all passes that packed layers ran."""
    rows, run = [], PackedLayers.__call__

    def counted(self, hidden_states, *args):
        rows.append(hidden_states.shape[0] * hidden_states.shape[1])
        return run(self, hidden_states, *args)

    monkeypatch.setattr(PackedLayers, "__call__", counted)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, LEAST_PACKED - 1, LEAST_PACKED, 33])
def test_joined_weights(dtype, num_rows):
    generator = torch.Generator().manual_seed(num_rows)
    weights = [nn.Parameter(torch.randn(out, 24, dtype=dtype, generator=generator)) for out in (48, 16, 5)]
    plain = torch.cat(weights).detach().clone()
    rows = torch.randn(num_rows, 24, dtype=dtype, generator=generator)
    joined = JoinedWeights(weights)
    assert torch.equal(torch.cat(weights), plain)
    assert (joined(rows) - rows @ plain.T).abs().max() < ROUNDING[dtype]
    assert (joined.packed is not None) == has_packed_products(dtype)


def test_this_torch_has_packed_products():
    """They are private: without them decoding is right, but slower. A torch built without oneDNN has none."""
    assert has_packed_products(torch.float32) == torch.backends.mkldnn.is_available()
    assert not has_packed_products(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("num_content", "num_slots"), [(2, 1), (3, 4), (0, 5), (4, 0)])
def test_values_of_a_pass(dtype, with_adapter, kv_heads, batch_size, num_content, num_slots, calls):
    """After a prompt in the cache, with a mask for each row, against the layers: slots, content, keys and values."""
    settings = {"num_key_value_heads": kv_heads, "attn_implementation": "sdpa"}
    model = adapted(dtype, **settings) if with_adapter else tiny_model(dtype=dtype, **settings)
    base = model.get_base_model() if with_adapter else model
    generator = torch.Generator().manual_seed(num_slots)
    ids = torch.randint(3, 61, (batch_size, 5 + num_content), generator=generator)
    groups = torch.randint(0, 3, (batch_size, num_content + num_slots), generator=generator)
    inputs = {
        "input_ids": ids[:, 5:],
        "group_ids": groups[:, :num_content],
        "target_position_ids": torch.arange(9, 9 + num_slots).expand(batch_size, -1),
        "target_group_ids": groups[:, num_content:],
    }
    outputs, caches = [], []
    for is_packed in (False, True):
        if is_packed:
            base.pack_weights()
        cache = DynamicCache()
        with torch.no_grad():
            base.model(ids[:, :5], target_position_ids=ids[:, :0], use_cache=True, cache=cache)
            with base.generation_context():
                out = base(**inputs, cache=cache, use_cache=True, content_hidden_state=True)
        outputs.append((out.logits, out.content_hidden_state))
        caches.append([states for layer in cache.layers for states in (layer.keys, layer.values)])
    assert calls == [batch_size * (num_content + num_slots)]
    for plain, packed in zip([*outputs[0], *caches[0]], [*outputs[1], *caches[1]], strict=True):
        assert packed.shape == plain.shape
        assert not plain.numel() or (packed - plain).abs().max() < ROUNDING[dtype]


@pytest.mark.parametrize("strategy", ["groupwise", "dynamic", "speculative", "refine"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_texts_of_all_strategies(strategy, use_cache, calls):
    model = adapted(slot_start="left_token")
    base = model.get_base_model()
    settings = {"strategy": strategy, "use_cache": use_cache, "attention_mask": MASK, "eos_token_id": [], "seed": 3}
    if strategy != "speculative":
        settings |= {"do_sample": True}
    plain = base.generate_any_order(PROMPT, BLANKS, max_new_tokens=5, **settings)
    base.pack_weights()
    packed = base.generate_any_order(PROMPT, BLANKS, max_new_tokens=5, **settings)
    assert torch.equal(packed.sequences, plain.sequences)
    assert (packed.log_probs - plain.log_probs).abs().max() < ROUNDING[torch.float64]
    assert calls or not use_cache


def test_it_runs_decoding_passes_alone(calls):
    model = tiny_model(attn_implementation="sdpa")
    model.pack_weights()
    with torch.no_grad():
        model(PROMPT)
        model.log_likelihood(PROMPT, torch.arange(6).expand(2, -1))
    assert not calls
    model.generate_any_order(PROMPT, max_new_tokens=4, eos_token_id=[])
    assert calls == [4] * 3  # not the prompt's pass, whose content is causal
    calls.clear()
    with torch.enable_grad(), model.generation_context():
        model(PROMPT, group_ids=torch.arange(6).expand(2, -1)).loss  # noqa: B018
    model.train().generate_any_order(PROMPT, max_new_tokens=4, eos_token_id=[])
    wide = PROMPT[:1].expand(MOST_ROWS // 2 + 1, -1)
    model.eval().generate_any_order(wide, max_new_tokens=2, eos_token_id=[])
    assert not calls


def change_a_weight(model):
    with torch.no_grad():
        model.get_base_model().model.layers[1].self_attn.q_proj.weight.mul_(1.5)


def replace_a_weight(model):
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.down_proj.weight.data = mlp.down_proj.weight.data * 1.5


def change_an_adapter(model):
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".lora_B." in name).mul_(2.0)


def scale_the_adapters(model):
    for module in model.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            module.scaling["default"] *= 2.0


def switch_adapters_off(model):
    model.base_model.disable_adapter_layers()


def replace_a_layer(model):
    mlp = model.get_base_model().model.layers[0].mlp
    mlp.up_proj = copy.deepcopy(mlp.up_proj)
    with torch.no_grad():
        mlp.up_proj.weight.mul_(1.5)


def train_all_rows(model):
    base = model.get_base_model()
    get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))


def watch_a_layer(model):
    layer = model.get_base_model().model.layers[0].self_attn.o_proj
    layer.register_forward_hook(lambda module, args, output: output * 1.5)


def change_the_head(model):
    with torch.no_grad():
        model.get_base_model().lm_head.weight.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        change_a_weight,
        replace_a_weight,
        change_an_adapter,
        scale_the_adapters,
        switch_adapters_off,
        replace_a_layer,
        train_all_rows,
        watch_a_layer,
        change_the_head,
    ],
)
def test_after_a_change_the_layers_run(change, calls):
    """… and texts are those of a model that never packed its weights."""
    model, plain = adapted(), adapted()
    model.get_base_model().pack_weights()
    torch.manual_seed(0)
    change(model)
    torch.manual_seed(0)
    change(plain)
    results = [
        one.get_base_model().generate_any_order(PROMPT, max_new_tokens=4, eos_token_id=[]) for one in (model, plain)
    ]
    assert torch.equal(results[0].log_probs, results[1].log_probs)
    assert not calls
    base = model.get_base_model()
    if change not in (train_all_rows, replace_a_layer):
        base.pack_weights()
        again = base.generate_any_order(PROMPT, max_new_tokens=4, eos_token_id=[])
        assert calls or change is watch_a_layer
        if change is not watch_a_layer:
            assert (again.log_probs - results[1].log_probs).abs().max() < ROUNDING[torch.float64]


def test_copies_and_saved_models_have_no_packed_layers(tmp_path):
    model = tiny_model()
    model.pack_weights()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.model.packed_layers is None
        assert torch.equal(other(PROMPT).logits, model(PROMPT).logits)
    model.save_pretrained(tmp_path)
    loaded = A3LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.equal(loaded(PROMPT).logits, model(PROMPT).logits)


def test_a_packed_adapter_is_saved_and_trained_as_before(tmp_path):
    model = adapted()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.get_base_model().pack_weights()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved and all(
        torch.equal(weight, before[name.replace(".weight", ".default.weight")])
        for name, weight in saved.items()
        if "lora_" in name
    )
    optimiser = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    model.train()
    labels = torch.tensor([[-100] * 3 + [5] * 3, [-100] + [5] * 5])
    model(PROMPT, group_ids=torch.arange(6).expand(2, -1), attention_mask=MASK, labels=labels).loss.backward()
    optimiser.step()
    after = model.state_dict()
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed and all("lora_" in name or "query_embed" in name for name in changed)


def test_without_torchs_operators_products_are_plain(monkeypatch):
    monkeypatch.setattr(packed_layers, "has_packed_products", lambda dtype: False)
    model = tiny_model(dtype=torch.float32)
    model.pack_weights()
    assert model.model.packed_layers.head.packed is None
    packed = model.generate_any_order(PROMPT, max_new_tokens=6, eos_token_id=[], group_size=3)
    plain = tiny_model(dtype=torch.float32).generate_any_order(PROMPT, max_new_tokens=6, eos_token_id=[], group_size=3)
    assert (packed.log_probs - plain.log_probs).abs().max() < ROUNDING[torch.float32]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model(dtype=torch.bfloat16), "bfloat16 on cpu"),
        (lambda: tiny_model(attn_implementation="eager"), "attn_implementation='eager'"),
        (lambda: tiny_model(attention_bias=True), "an nn.Linear without bias"),
        (
            lambda: get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"])).base_model.model,
            "q_proj is a Linear: packed weights expect an nn.Linear",
        ),
        (lambda: adapted().get_base_model().bfloat16(), "bfloat16"),
        (lambda: mixed(), "one of them for all layers and adapters"),
    ],
)
def test_what_cannot_be_packed(make, message):
    with pytest.raises(ValueError, match=message):
        make().pack_weights()


def mixed():
    model = adapted()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return model.get_base_model()


def test_what_a_packed_pass_leaves_can_be_changed_and_learnt_from(calls):
    """Its layers run in torch's inference mode, whose tensors could not."""
    model = tiny_model(attn_implementation="sdpa")
    model.pack_weights()

    def forbid(step, columns, logits):
        logits[..., 3] = -torch.inf
        return logits

    settings = {"max_new_tokens": 100, "eos_token_id": [], "logits_hook": forbid, "group_size": 2}
    output = model.generate_any_order(PROMPT[:1], output_logits=True, **settings)
    assert calls and 3 not in output.sequences[0, PROMPT.shape[1] :]
    for tensor in (output.log_probs, output.logits, *(layer.keys for layer in output.cache.layers)):
        tensor.add_(0.0)
    loss = model.train()(PROMPT[:1], past_key_values=output.cache, labels=PROMPT[:1]).loss
    loss.backward()
    assert model.lm_head.weight.grad.any()


def test_wide_passes_write_where_packed_ones_made_room(calls):
    model = tiny_model(attn_implementation="sdpa")
    cache = preallocated_cache(model.config.num_hidden_layers, first_room=200)
    model.pack_weights()
    with torch.no_grad(), model.generation_context():
        for width in (2, 9, 2, MOST_ROWS + 1, 3):
            ids = torch.randint(3, 60, (1, width))
            groups = {"group_ids": torch.zeros_like(ids), "target_group_ids": ids[:, :0]}
            model(ids, target_position_ids=ids[:, :0], cache=cache, **groups)
    assert len(calls) == 4 and cache.get_seq_length() == 2 + 9 + 2 + MOST_ROWS + 1 + 3
