import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.layers import attach
from a3_hf.training import throughput
from a3_hf.training.throughput import AdapterWeights, Meter, peak_flops, peak_memory_mib, training_flops
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


@pytest.mark.parametrize("rows", ["all", "slots"])
@pytest.mark.parametrize("num_slots", [24, 8])
def test_flops_beside_adapters_are_those_that_are_counted(rows, num_slots):
    model = attach(tiny_model(attn_implementation="eager", slot_start="left_token"), LoraArguments(r=2, rows=rows))
    ids, places = torch.randint(3, 61, (2, 24)), torch.arange(24).expand(2, -1)
    slots = {"target_position_ids": places[:, -num_slots:], "target_group_ids": places[:, -num_slots:]}
    with FlopCounterMode(display=False) as counted:
        model.train()(ids, use_cache=False, group_ids=places, **slots).logits.square().sum().backward()
    found = counted.get_total_flops() / ids.numel()
    adapters = AdapterWeights.of(model)
    assert found == pytest.approx(
        training_flops(model.config, length=24, slots=num_slots / 24, adapters=adapters), rel=0.01
    )


# tiny_config: 3 layers, 32 wide, 48 inside, 4 heads of 8 (2 for keys), 61 words. Products of a row in a layer: 6656 with
# weights (2·32² + 3·32·48), 1024 for its key and value (2·32·16), 1536 with 24 keys (2·32·24); in the head 1952 (32·61).
# Adapters of rank 2 have 736 weights in a layer (q and o 2·64 each, the others 2·80), and 192 for keys and values (2·48 each).
ALL_ROWS, SLOTS = AdapterWeights(3 * 928, 3 * 736), AdapterWeights(0, 3 * 736)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 6 * (3 * (2 * 6656 + 1024 + 2 * 1536) + 1952)),
        ({"slots": 0}, 6 * (3 * (6656 + 1024 + 1536) + 1952)),
        ({"slots": 0.5}, 6 * (3 * (1.5 * 6656 + 1024 + 1.5 * 1536) + 0.5 * 1952)),
        ({"adapters": ALL_ROWS}, 4 * (3 * (2 * 6656 + 1024) + 1952) + 6 * (3 * 2 * 1536 + 3 * 928 + 3 * 736)),
        ({"adapters": SLOTS}, 2 * 3 * (6656 + 1024 + 1536) + 4 * 3 * (6656 + 1536) + 4 * 1952 + 6 * 3 * 736),
        ({"adapters": SLOTS, "slots": 0.5}, 55296 + (98304 + 7808 + 13248) / 2),
        ({"adapters": SLOTS, "recomputed": True}, 55296 + 6 * 3 * (6656 + 1536) + 6 * 1952 + 8 * 3 * 736),
        ({"recomputed": True}, 8 * (3 * (2 * 6656 + 1024 + 2 * 1536) + 1952)),
    ],
)
def test_flops_by_hand(settings, expected):
    assert training_flops(tiny_config(), length=24, **settings) == expected


def test_adapters_are_counted_by_the_rows_that_pass_them():
    assert AdapterWeights.of(tiny_model()) == (0, 0)
    assert AdapterWeights.of(attach(tiny_model(), LoraArguments(r=2))) == ALL_ROWS
    assert AdapterWeights.of(attach(tiny_model(), LoraArguments(r=2, rows="slots"))) == SLOTS


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
