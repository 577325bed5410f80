"""With `left_token`, the content row of a token is the slot of the next: one row a token, with two as the oracle."""

import random

import pytest
import torch

from a3_hf.adapters.layers import SlotLoraConfig, wrap_model
from a3_hf.models.a3_llama.generation_strategies import GroupwiseFilling
from tests.conftest import tiny_model
from tests.models.a3_llama.test_generation_drawn import in_fp64


def two_rows(self, slots):
    return self.decoder.logits_of(self.content, slots)


def rows_of_passes(model, monkeypatch) -> list[tuple[int, int]]:
    """Content and slot rows of each pass from now on."""
    rows, forward = [], type(model).forward

    def counted(self, *args, **kwargs):
        rows.append((kwargs["input_ids"].shape[1], kwargs["target_position_ids"].shape[1]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return rows


def case(draw: random.Random) -> dict:
    width, batch_size = draw.randint(4, 10), draw.choice([1, 2, 3])
    ids = torch.tensor([[draw.randrange(3, 61) for _ in range(width)] for _ in range(batch_size)])
    blank = torch.tensor([[place > 0 and draw.random() < 0.5 for place in range(width)] for _ in range(batch_size)])
    real = torch.ones_like(blank)
    if draw.random() < 0.5:
        real[0, : draw.randint(0, 2)] = False
        blank[0] &= real[0]
        blank[0, int(real[0].long().argmax())] = False
    settings = draw.choice([{}, {"do_sample": True, "top_p": 0.9}, {"order": "right_to_left"}, {"order": "random"}])
    new = draw.choice([None, 6]) if blank.any() else 6
    if new:
        settings = settings | {"max_new_tokens": new, "eos_token_id": [7, 8, 9]}
    return {
        "input_ids": ids,
        "blank_mask": blank,
        "attention_mask": real.long(),
        "seed": draw.randrange(99),
        **settings,
    }


@pytest.mark.parametrize("seed", range(30))
def test_one_row_is_two(monkeypatch, seed):
    model, draw = in_fp64(tiny_model(slot_start="left_token")), random.Random(seed)
    arguments = case(draw)
    found = model.generate_any_order(**arguments)
    monkeypatch.setattr(GroupwiseFilling, "_logits", two_rows)
    expected = model.generate_any_order(**arguments)
    assert found.num_forward_passes == expected.num_forward_passes
    for name in ("sequences", "commit_step", "log_probs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-9)


def test_the_rows_of_passes(monkeypatch):
    model = tiny_model(slot_start="left_token")
    rows = rows_of_passes(model, monkeypatch)
    ids, blank = torch.arange(3, 11)[None], torch.tensor([[0, 0, 1, 1, 0, 1, 1, 0]])
    model.generate_any_order(ids, blank)
    assert rows == [(4, 1), (1, 0), (1, 1), (1, 0)]  # the second blank does not begin after what was just written


@pytest.mark.parametrize("reason", ["query_embed", "adapter of slots", "groups", "no cache"])
def test_where_two_rows_are_needed(monkeypatch, reason):
    model = tiny_model(slot_start="query_embed" if reason == "query_embed" else "left_token")
    settings = {"groups": {"group_size": 2}, "no cache": {"use_cache": False}}.get(reason, {})
    if reason == "adapter of slots":
        config = SlotLoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        wrap_model(model, config)
    rows = rows_of_passes(model, monkeypatch)
    model.generate_any_order(torch.arange(3, 8)[None], max_new_tokens=4, eos_token_id=[], **settings)
    assert all(slots > 0 for _, slots in rows)
