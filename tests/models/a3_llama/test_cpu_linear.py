import pytest
import torch
from torch import nn

from a3_hf.models.a3_llama.cpu_linear import fast_on_cpu, other_way_round
from tests.conftest import tiny_model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 8), (3, 5), (2, 31), (1, 64)])
def test_it_is_the_same_product(bias, shape):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 600, bias=bias), nn.Linear(600, 20))
    rows = torch.randn(*shape, 256)
    with torch.no_grad():
        expected = module(rows)
        with fast_on_cpu(module):
            assert "forward" in module[0].__dict__ and "forward" not in module[1].__dict__  # small ones are left alone
            assert (module(rows) - expected).abs().max() < 1e-4
        assert torch.equal(module(rows), expected)


@pytest.mark.parametrize("num_rows", [3, 4, 7])
def test_a_tall_weight_goes_that_way_from_four_rows_on(num_rows, monkeypatch):
    module, rows = nn.Linear(128, 1200), torch.randn(num_rows, 128)
    expected, calls = module(rows), []
    monkeypatch.setattr(
        "a3_hf.models.a3_llama.cpu_linear.other_way_round", lambda *args: calls.append(1) or other_way_round(*args)
    )
    with fast_on_cpu(module):
        assert (module(rows) - expected).abs().max() < 1e-4
    assert len(calls) == (num_rows >= 4)


def test_it_leaves_nothing_behind_and_others_alone():
    module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512).bfloat16())
    module[1].forward = own = lambda rows: rows
    with pytest.raises(RuntimeError, match="inside"), fast_on_cpu(module):
        assert module[1].forward is own and "forward" not in module[2].__dict__
        raise RuntimeError("inside")
    assert "forward" not in module[0].__dict__ and module[1].forward is own


def test_decoding_uses_it_and_stays_what_it_was(monkeypatch):
    model = tiny_model(
        dtype=torch.float32, hidden_size=256, intermediate_size=512, vocab_size=600, initializer_range=0.1
    )
    ids = torch.randint(3, 600, (2, 12), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 16, "group_size": 4, "output_logits": True}
    fast = model.generate_any_order(ids, **settings)
    assert not any("forward" in module.__dict__ for module in model.modules())
    seen = []
    monkeypatch.setattr(
        "a3_hf.models.a3_llama.cpu_linear._forward", lambda module, rows: seen.append(rows.shape) or module.weight
    )
    with pytest.raises(Exception):  # noqa: B017 (whatever comes of a wrong product)
        model.generate_any_order(ids, **settings)
    assert seen
    monkeypatch.setattr("a3_hf.models.a3_llama.generation.fast_on_cpu", lambda model: torch.no_grad())
    plain = model.generate_any_order(ids, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    assert (fast.logits - plain.logits).abs().max() < 1e-3


@pytest.mark.parametrize("strategy", ["groupwise", "dynamic", "speculative", "refine"])
def test_what_is_handed_back_can_be_trained_on(strategy):
    model = tiny_model()
    ids = torch.arange(3, 9)[None]
    seen = {"output_logits": True, "output_history": True}
    output = model.generate_any_order(ids, strategy=strategy, max_new_tokens=4, **seen)
    tensors = [output.sequences, output.commit_step, output.log_probs, output.group_ids, output.logits, *output.history]
    tensors += [states for layer in output.past_key_values.layers for states in (layer.keys, layer.values)]
    assert not any(tensor.is_inference() for tensor in tensors)
    model.train()
    labels = output.sequences.masked_fill(output.commit_step < 0, -100)
    model(input_ids=output.sequences, group_ids=output.group_ids, labels=labels).loss.backward()
    assert model.model.query_embed.weight.grad.abs().sum() > 0


def test_a_sharded_or_moved_weight_keeps_it_away():
    module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512, device="meta"))
    with fast_on_cpu(module):
        assert "forward" not in module[0].__dict__ and not torch.is_inference_mode_enabled()
