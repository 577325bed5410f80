import pytest
import torch
from torch import nn

from a3_hf.few_rows import fast_few_rows
from tests.conftest import tiny_model


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 8), (3, 5), (2, 31), (1, 64)])
def test_it_is_the_same_product(bias, shape):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(256, 600, bias=bias), nn.Linear(600, 20))
    rows = torch.randn(*shape, 256)
    with torch.no_grad():
        expected = module(rows)
        with fast_few_rows(module):
            assert "forward" in module[0].__dict__ and "forward" not in module[1].__dict__  # small ones are left alone
            assert (module(rows) - expected).abs().max() < 1e-5
        assert torch.equal(module(rows), expected)


def test_it_leaves_nothing_behind_and_others_alone():
    module = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 512).bfloat16())
    module[1].forward = own = lambda rows: rows
    with pytest.raises(RuntimeError, match="inside"), fast_few_rows(module):
        assert module[1].forward is own and "forward" not in module[2].__dict__
        raise RuntimeError("inside")
    assert "forward" not in module[0].__dict__ and module[1].forward is own


def test_decoding_uses_it_and_stays_what_it_was(monkeypatch):
    model = tiny_model(hidden_size=256, intermediate_size=512, vocab_size=600, initializer_range=0.1)
    ids = torch.randint(3, 600, (2, 12), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 16, "group_size": 4, "output_logits": True}
    fast = model.generate_any_order(ids, **settings)
    assert not any("forward" in module.__dict__ for module in model.modules())
    seen = []
    monkeypatch.setattr("a3_hf.few_rows._forward", lambda module, rows: seen.append(rows.shape) or module.weight)
    with pytest.raises(Exception):  # noqa: B017 (whatever comes of a wrong product)
        model.generate_any_order(ids, **settings)
    assert seen
    monkeypatch.setattr("a3_hf.generation.fast_few_rows", lambda model: torch.no_grad())
    plain = model.generate_any_order(ids, **settings)
    assert torch.equal(fast.sequences, plain.sequences)
    assert (fast.logits - plain.logits).abs().max() < 1e-4
