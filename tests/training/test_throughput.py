import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from a3_hf.training import throughput
from a3_hf.training.throughput import Meter, peak_flops, peak_memory_mib, training_flops
from tests.conftest import tiny_config, tiny_model


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "head_dim": 16, "vocab_size": 100}])
def test_flops_are_those_that_are_counted(slots, changes):
    # eager attention multiplies every row with every key, as the formula does
    model = tiny_model(attn_implementation="eager", **changes) if slots else None
    model = model or LlamaForCausalLM(tiny_config(attn_implementation="eager", **changes))
    ids = torch.randint(3, 61, (2, 24))
    groups = {"group_ids": torch.arange(24).expand(2, -1)} if slots else {}
    with FlopCounterMode(display=False) as counted:
        model.train()(ids, use_cache=False, **groups).logits.square().sum().backward()
    # nothing flows back from the first layer's norm to the embeddings through a product: exact but for RoPE's table
    found = counted.get_total_flops() / ids.numel()
    assert found == pytest.approx(training_flops(model.config, length=24, slots=slots), rel=0.01)


def test_the_meter_counts_while_its_clock_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    meter = Meter()
    assert meter.read() is None
    for seconds, tokens in ((2.0, 30), (3.0, 20)):
        meter.start()
        meter.start()
        meter.add(torch.tensor(tokens))
        now[0] += seconds
        meter.pause()
        now[0] += 100.0  # an evaluation
    assert meter.read() == pytest.approx(10.0)
    meter.start()
    meter.add(torch.tensor(8))
    now[0] += 4.0
    assert meter.read() == pytest.approx(2.0)


def test_what_is_not_known_is_not_stated():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
    assert 10 < peak_memory_mib(torch.device("cpu")) < 10**6
