"""Rows that join and leave between passes get the tokens that they get alone.

fp64 throughout, as in test_generation_drawn.
"""

import random

import pytest
import torch

from a3_hf import DraftHead, DraftHeadConfig, attach_draft_head
from a3_hf.models.a3_llama.generation_filling import Filling
from tests.conftest import tiny_model

CHECKED = {"strategy": "speculative", "verify": "content", "draft": "ngram"}
JOINING = {
    "groupwise": {"strategy": "groupwise"},
    "groups": {"strategy": "groupwise", "group_size": 3, "order": "random"},
    "right to left": {"strategy": "groupwise", "group_size": 2, "order": "right_to_left"},
    "dynamic": {"strategy": "dynamic", "tokens_per_step": 2},
    "threshold": {"strategy": "dynamic", "threshold": 0.2, "criterion": "margin", "window": 4},
    "penalty": {"strategy": "groupwise", "repetition_penalty": 1.3},
    "checked": CHECKED,
    "head": {**CHECKED, "draft": "ngram+head"},
    "checked chains": {**CHECKED, "repetition_penalty": 1.3},
}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
FIELDS = ("sequences", "commit_step", "log_probs", "top_token_ids")


@pytest.fixture(scope="module", params=["query_embed", "left_token"])
def any_model(request):
    model = tiny_model(slot_start=request.param)
    torch.manual_seed(3)
    head = DraftHead(DraftHeadConfig.for_base(model.config, first_layer=1, sampler_size=8, rank=2, num_candidates=20))
    attach_draft_head(model, head.double())
    return model


def drawn_request(draw: random.Random, model, settings: dict) -> dict:
    """One text with blanks inside, at its end or both, or a few copies of it; with or without padding on a side."""
    width, copies = draw.randint(3, 9), draw.choice([1, 1, 2])
    ids = torch.tensor([[draw.randrange(3, model.config.vocab_size) for _ in range(width)]])
    is_checked = settings.get("verify") == "content"
    new = draw.choice([4, 9]) if is_checked else draw.choice([None, 5])
    blank = torch.tensor([[not is_checked and 1 < place and draw.random() < 0.4 for place in range(width)]])
    if new is None and not blank.any():
        blank[0, -1] = True
    real, place = torch.ones_like(blank), draw.choice([None, 0, width - 1])
    if place is not None and not blank[0, place]:
        real[0, place] = False
    more = {} if new is None else {"max_new_tokens": new}
    if copies > 1:
        more["num_return_sequences"] = copies
    if "do_sample" not in settings:
        more.pop("num_return_sequences", None)
    eos = [] if new is None else [7, 8]
    return {
        "input_ids": ids, "blank_mask": blank if blank.any() else None, "attention_mask": real.long(),
        "seed": draw.randrange(1000), "eos_token_id": eos, "num_top_log_probs": 2, **more,
    }  # fmt: skip


def rows_of(canvas, row: int) -> dict:
    real = (canvas.given_mask | canvas.blank_mask)[row] & ~canvas.is_over(torch.arange(canvas.pad_column)[None])[row]
    return {name: getattr(canvas, name)[row, :-1][real] for name in FIELDS}


def compare(found: dict, expected: dict, settings: dict) -> None:
    # batches leave drafts, so that a token may take another step
    for name in FIELDS if settings.get("verify") is None else set(FIELDS) - {"commit_step"}:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)


def serve(model, requests: list[dict], settings: dict, draw: random.Random) -> dict:
    """Runs all requests, which arrive at different times; some leave before their end. Returns each finished row."""
    waiting, filling, owners, done = list(enumerate(requests)), None, [], {}
    with torch.no_grad(), model.generation_context():
        while waiting or filling is not None:
            arrivals = [waiting.pop(0) for _ in range(draw.choice([0, 1, 1, 3])) if waiting]
            news = [(number, model.begin_filling(**{**settings, **request})) for number, request in arrivals]
            if draw.random() < 0.5 and len(news) > 1:  # together from their first pass on
                names = [(n, copy) for n, one in news for copy in range(len(one.is_open()))]
                parts = [(names, type(news[0][1]).joined([one for _, one in news]))]
            else:
                parts = [([(n, copy) for copy in range(len(one.is_open()))], one) for n, one in news]
            for names, part in parts:
                part.step()
                filling = part if filling is None else type(part).joined([filling, part])
                owners += names
            if filling is None:
                continue
            if filling.is_open().any():
                filling.step()
            is_open = filling.is_open()
            for row, name in enumerate(owners):
                if not is_open[row]:
                    done[name] = rows_of(filling.decoder.canvas, row)
            stays = [row for row in range(len(owners)) if is_open[row] and draw.random() < 0.97]
            if len(stays) < len(owners):
                owners = [owners[row] for row in stays]
                filling.keep_rows(torch.tensor(stays, dtype=torch.long)) if stays else None
                filling = filling if stays else None
    return done


@pytest.mark.parametrize("name", JOINING)
@pytest.mark.parametrize("sampled", ["greedy", "sampled", "mixed"])
def test_rows_come_and_go(any_model, name, sampled):
    settings = JOINING[name] | (SAMPLED if sampled == "sampled" else {})
    finished = 0
    for case in range(3):
        draw = random.Random(f"{name} {sampled} {case}")
        has_end = draw.random() < 0.6 or settings.get("verify") == "content"
        requests = [drawn_request(draw, any_model, settings) for _ in range(40)]
        requests = [one for one in requests if ("max_new_tokens" in one) == has_end][:6]
        if sampled == "mixed":  # rows of one batch may differ in how they sample, and in their order
            for request in requests:
                request |= draw.choice(
                    [{}, SAMPLED, {"do_sample": True, "min_p": 0.1}, {"do_sample": True, "top_k": 3}]
                )
                if settings["strategy"] == "groupwise":
                    request["order"] = draw.choice(["left_to_right", "right_to_left", "random"])
        alone = []
        for request in requests:
            one = any_model.begin_filling(**{**settings, **request})
            with torch.no_grad():
                one.run()
            alone.append(one.decoder.canvas)
        done = serve(any_model, requests, settings, draw)
        finished += len(done)
        for (number, copy), found in done.items():
            compare(found, rows_of(alone[number], copy), settings)
    assert finished > 8


def test_it_is_what_generate_any_order_runs(any_model):
    request = {"input_ids": torch.tensor([[1, 5, 9, 4]]), "max_new_tokens": 6, "seed": 3, "eos_token_id": [7]}
    output = any_model.generate_any_order(**request, **SAMPLED)
    filling = any_model.begin_filling(**request, **SAMPLED)
    with torch.no_grad():
        while filling.step():
            pass
    for name in ("sequences", "commit_step", "log_probs"):
        assert torch.equal(getattr(filling.decoder.canvas, name)[:, :-1] * (output.commit_step >= 0),
                           getattr(output, name) * (output.commit_step >= 0))  # fmt: skip


@pytest.mark.parametrize(
    "settings", [{"strategy": "speculative"}, {"strategy": "refine"}], ids=lambda one: one["strategy"]
)
def test_steady_strategies_pass_by_pass(any_model, settings):
    request = {"input_ids": torch.tensor([[1, 5, 0, 0, 4]]), "blank_mask": torch.tensor([[0, 0, 1, 1, 0]]), "seed": 3}
    output = any_model.generate_any_order(**request, **settings)
    filling = any_model.begin_filling(**request, **settings)
    steps = 0
    with torch.no_grad():
        while filling.step():
            steps += 1
            assert filling.is_open().all()
    assert steps and not filling.is_open().any()
    assert torch.equal(filling.decoder.canvas.sequences[:, :-1], output.sequences)
    other = {
        "input_ids": torch.tensor([[1, 9, 4, 0, 6, 0]]),
        "blank_mask": torch.tensor([[0, 0, 0, 1, 0, 1]]),
        "seed": 5,
    }
    both = [any_model.begin_filling(**one, **settings) for one in (request, other)]
    both = type(both[0]).joined(both)
    with torch.no_grad():
        both.run()
    alone = any_model.generate_any_order(**other, **settings)
    for row, expected in enumerate((output, alone)):
        width = expected.sequences.shape[1]
        assert torch.equal(both.decoder.canvas.sequences[row, :width], expected.sequences[0])
        torch.testing.assert_close(both.decoder.canvas.log_probs[row, :width], expected.log_probs[0])


def test_top_log_probs(any_model):
    ids = torch.tensor([[1, 5, 9, 4]])
    output = any_model.generate_any_order(
        ids, max_new_tokens=5, num_top_log_probs=3, output_logits=True, eos_token_id=[]
    )
    expected = output.logits[:, 4:].log_softmax(dim=-1).topk(3)
    torch.testing.assert_close(output.top_log_probs[:, 4:], expected.values)
    assert torch.equal(output.top_token_ids[:, 4:], expected.indices)
    torch.testing.assert_close(output.top_log_probs[:, 4:, 0], output.log_probs[:, 4:])
    with pytest.raises(ValueError, match="num_top_log_probs=0: expected a whole number of at least 1"):
        any_model.generate_any_order(ids, max_new_tokens=5, num_top_log_probs=0)


def test_a_cache_is_refused(any_model):
    cache = any_model(torch.tensor([[1, 5]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values"):
        any_model.begin_filling(torch.tensor([[1, 5, 9]]), max_new_tokens=2, past_key_values=cache)


def test_a_filling_says_what_it_is():
    with pytest.raises(NotImplementedError):
        Filling(None).step()
