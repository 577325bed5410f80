"""Adapters of query slots, added in place, against the plain form: slices, casts and a copy of all rows."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import SlotLinear, attach
from tests.conftest import tiny_model

ROUNDING = 1e-12  # of float64
ROWS = [(5, 0), (0, 3), (5, 3), (1, 1)]  # of content, of slots
GROUPS = torch.tensor([[0, 2, 1, 1, 3, 2, 4, 4, 3], [0, 1, 1, 2, 2, 3, 3, 4, 4]])
IDS = torch.randint(3, 61, GROUPS.shape, generator=torch.Generator().manual_seed(5))
LABELS = IDS.masked_fill(GROUPS == 0, -100)


def plain_forward(layer: SlotLinear, x: torch.Tensor) -> torch.Tensor:
    """The oracle: content and slot rows are computed apart and joined, in peft's order of operations."""
    result = layer.base_layer(x)
    if layer.slot_rows.number == 0 or layer.disable_adapters:
        return result
    content, adapted = result[:, : -layer.slot_rows.number], result[:, -layer.slot_rows.number :]
    for name in layer.active_adapters:
        down, up = layer.lora_A[name], layer.lora_B[name]
        slots = x[:, -layer.slot_rows.number :].to(down.weight.dtype)
        adapted = adapted + (up(down(layer.lora_dropout[name](slots))) * layer.scaling[name]).to(result.dtype)
    return torch.cat([content, adapted], dim=1)


def randomise(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "query_embed" in name:
                parameter.normal_(std=0.1, generator=generator)


def adapted(dtype: torch.dtype = torch.float64, **settings):
    """A tiny model with random adapters, in one dtype."""
    model = attach(tiny_model(dtype=torch.float32), LoraArguments(r=4, rows="slots", alpha=12.0, **settings))
    randomise(model)
    return model.to(dtype).eval()


def layer_of(model: nn.Module, num_slots: int) -> SlotLinear:
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))
    assert isinstance(layer, SlotLinear)
    layer.slot_rows.number = num_slots
    return layer


def inputs(layer: SlotLinear, batch_size: int, num_rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(batch_size, num_rows, layer.in_features, dtype=torch.float64, generator=generator)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, group_ids=GROUPS).logits


def assert_equals_plain(layer: SlotLinear, x: torch.Tensor) -> None:
    before = x.clone()
    with torch.no_grad():
        assert (layer(x) - plain_forward(layer, x)).abs().max() < ROUNDING
    assert torch.equal(x, before)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("num_content", "num_slots"), ROWS)
def test_values_of_a_layer(num_content, num_slots, batch_size):
    layer = layer_of(adapted(), num_slots)
    x = inputs(layer, batch_size, num_content + num_slots)
    assert_equals_plain(layer, x)
    with torch.no_grad():
        changed = (layer(x) != layer.base_layer(x)).any(dim=2)
    assert not changed[:, :num_content].any() and changed[:, num_content:].all()


@pytest.mark.parametrize(("num_content", "num_slots"), ROWS)
def test_a_narrow_base_is_adapted_in_fp32_and_rounded_once(num_content, num_slots):
    layer = layer_of(adapted(torch.float32), num_slots)
    layer.base_layer.bfloat16()
    x = inputs(layer, 2, num_content + num_slots).bfloat16()
    with torch.no_grad():
        result, plain, base = layer(x), plain_forward(layer, x), layer.base_layer(x)
        slots = x[:, num_content:].float()
        change = layer.lora_B["default"](layer.lora_A["default"](slots)) * layer.scaling["default"]
    assert result.dtype == torch.bfloat16
    assert torch.equal(result[:, :num_content], base[:, :num_content])
    exact = base[:, num_content:].float() + change
    assert torch.allclose(result[:, num_content:].float(), exact, rtol=2**-8, atol=1e-6)
    assert torch.allclose(result, plain, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("needs_input_gradient", [False, True])
@pytest.mark.parametrize(("num_content", "num_slots"), ROWS[1:])
def test_gradients_of_a_layer(num_content, num_slots, needs_input_gradient):
    grads = []
    for forward in (SlotLinear.forward, plain_forward):
        layer = layer_of(adapted().train(), num_slots)
        x = inputs(layer, 2, num_content + num_slots).requires_grad_(needs_input_gradient)
        forward(layer, x).sin().sum().backward()
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        grads.append([tensor.grad for tensor in weights + [x] * needs_input_gradient])
    for fast, plain in zip(*grads, strict=True):
        assert plain.abs().sum() > 0 and (fast - plain).abs().max() < ROUNDING


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_loss_and_gradients_of_a_model(checkpointing, monkeypatch):
    outcomes = []
    for forward in (SlotLinear.forward, plain_forward):
        monkeypatch.setattr(SlotLinear, "forward", forward)
        model = adapted(dropout=0.5).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        torch.manual_seed(0)
        loss = model(IDS, group_ids=GROUPS, labels=LABELS).loss
        loss.backward()
        outcomes.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(outcomes[0]) == 1 + 3 * 5 * 2 + 1
    for fast, plain in zip(*outcomes, strict=True):
        assert plain.abs().sum() > 0 and (fast - plain).abs().max() < 1e-10


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_decoding_and_weights_that_change_between_two_of_them(batch_size, group_size, monkeypatch):
    model = adapted()
    settings = {"group_size": group_size, "max_new_tokens": 6, "eos_token_id": [], "output_logits": True}

    def outputs():
        decoded = []
        for seed in (1, 2):
            randomise(model, seed)
            decoded.append(model.generate_any_order(IDS[:batch_size], **settings))
        model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.mul_(3)
        decoded.append(model.generate_any_order(IDS[:batch_size], **settings))
        with model.disable_adapter():
            decoded.append(model.generate_any_order(IDS[:batch_size], **settings))
        return decoded

    fast = outputs()
    monkeypatch.setattr(SlotLinear, "forward", plain_forward)
    for one, other in zip(fast, outputs(), strict=True):
        assert torch.equal(one.sequences, other.sequences)
        assert (one.logits - other.logits).abs().max() < 1e-10
    assert all((one.logits - other.logits).abs().max() > 1e-3 for one, other in pairwise(fast))


def test_several_adapters():
    model = adapted()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    randomise(model, seed=2)
    model.double()
    layer = layer_of(model, 3)
    x = inputs(layer, 2, 5)
    outputs = []
    for active in (["default"], ["second"], ["default", "second"], []):
        layer._active_adapter = active
        assert_equals_plain(layer, x)
        with torch.no_grad():
            outputs.append(layer(x))
        assert all(not torch.equal(outputs[-1], other) for other in outputs[:-1])


def test_copies_have_slots_of_their_own():
    model = adapted()
    expected = logits(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), expected)
        randomise(again, seed=2)
        assert not torch.equal(logits(again), expected) and torch.equal(logits(model), expected)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_one_graph_to_torch_compile(training):
    layer = layer_of(adapted(), 3).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for num_rows in (5, 3):
        x = inputs(layer, 2, num_rows).requires_grad_()
        assert (compiled(x) - plain_forward(layer, x)).abs().max() < ROUNDING
