"""Confidence at commit against correctness: by hand, and by single-token forwards."""

import itertools
from copy import deepcopy

import pytest
import torch
from torch import nn

pytest.importorskip("lm_eval")

from a3_hf.evaluation.measures.calibration import calibration_rows, draw_blanks, reliability
from a3_hf.evaluation.measures.text_windows import Window, cut_windows
from a3_hf.evaluation.reporting.plots import plot_reliability
from tests.conftest import tiny_model

TEXTS = ["Tom was happy, and so was his dog. One day, the cat sat on a mat!", "The dog ran home.", "One"]


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)


def test_reliability_by_hand():
    confidence = torch.tensor([0.0, 0.1, 0.25, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    correct = torch.tensor([False, True, True, False, True, True, False])
    rows = reliability(confidence, correct, bins=4)
    assert [row["count"] for row in rows] == [4, 1, 0, 2, 7]
    assert [row["accuracy"] for row in rows] == [0.5, 1.0, None, 0.5, pytest.approx(4 / 7)]
    assert [row["mean_confidence"] for row in rows] == [0.15, 0.5, None, 0.95, pytest.approx(3 / 7)]
    error = (4 * abs(0.15 - 0.5) + 1 * abs(0.5 - 1) + 2 * abs(0.95 - 0.5)) / 7
    assert rows[-1]["expected_calibration_error"] == pytest.approx(error)
    assert [(row["above"], row["up_to"]) for row in rows] == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1), (0, 1)]


def test_a_calibrated_writer_has_no_error():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(200_000, generator=generator, dtype=torch.float64)
    correct = torch.rand(200_000, generator=generator, dtype=torch.float64) < confidence
    assert reliability(confidence, correct, bins=10)[-1]["expected_calibration_error"] < 0.01
    assert reliability(confidence, ~correct, bins=10)[-1]["expected_calibration_error"] > 0.4


def test_blanks_have_their_shapes():
    window = Window((1, 2), tuple(range(100, 141)))
    for shape, blank_length in (("scattered", None), ("spans", 4), ("middle", None)):
        settings = {"shape": shape, "blank_length": blank_length}
        for share, count in ((0.5, 20), (1.0, 41), (0.001, 1), (0.3, 12)):
            blanks = draw_blanks(window, share=share, seed=0, **settings)
            assert len(blanks) == 43 and not any(blanks[:2]) and sum(blanks) == count
        drawn = [draw_blanks(window, share=0.5, seed=seed, **settings) for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] and (drawn[0] != drawn[2]) == (shape != "middle")
    assert draw_blanks(window, shape="middle", seed=0) == [False] * 12 + [True] * 20 + [False] * 11
    scattered = draw_blanks(window, shape="scattered", share=0.3, seed=0)
    assert sum(one and not other for one, other in itertools.pairwise(scattered)) > 4
    for seed in range(5):
        spans = draw_blanks(window, shape="spans", blank_length=4, seed=seed)[2:]
        taken = [sum(spans[start : start + 4]) for start in range(0, 41, 4)]
        whole = sum(count == 4 for count in taken)
        assert whole in (4, 5) and sum(count > 0 for count in taken) <= 6, "runs of 4, of which the last may be cut"


@torch.no_grad()
def test_it_is_the_greedy_chain_of_single_forwards(model, tokenizer):
    settings = {"share": 0.4, "seed": 3, "max_length": 12}
    model.lm_head.bias = nn.Parameter(torch.zeros(len(tokenizer), dtype=model.dtype))
    model.lm_head.bias[tokenizer.encode(" ".join(TEXTS))] = 5.0
    windows = cut_windows(tokenizer, TEXTS, 11)
    drawn = [
        token
        for window in windows
        for token, blank in zip(window.given + window.scored, draw_blanks(window, share=0.4, seed=3), strict=True)
        if blank
    ]
    model.lm_head.bias[drawn] = 20.0  # so that some are right
    rows = calibration_rows(model, tokenizer, TEXTS, settings={"order": "right_to_left"}, bins=5, **settings)
    confidence, correct = [], []
    for window in windows:
        ids = [*window.given, *window.scored]
        assert len(ids) <= 12
        blanks = draw_blanks(window, share=0.4, seed=3)
        known = [place for place, blank in enumerate(blanks) if not blank]
        text = list(ids)
        for place in reversed([place for place, blank in enumerate(blanks) if blank]):
            logits = model(
                torch.tensor([[text[i] for i in known]]),
                position_ids=torch.tensor([known]),
                group_ids=torch.arange(len(known))[None],
                target_position_ids=torch.tensor([[place]]),
                target_group_ids=torch.tensor([[len(known)]]),
            ).logits[0, 0]
            probability, token = logits.softmax(-1).max(-1)
            confidence.append(probability.item())
            correct.append(token.item() == ids[place])
            text[place] = token.item()
            known.append(place)
    expected = reliability(torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct), bins=5)
    for row, one in zip(rows, expected, strict=True):
        for name, value in one.items():
            assert row[name] == pytest.approx(value, abs=1e-5), name
    whole = rows[-1]
    assert 0 < whole["accuracy"] < 1, whole
    assert whole["tokens"] == whole["passes"] == len(confidence) and whole["windows"] == len(windows)


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 3},
        {"order": "random"},
        {"strategy": "dynamic", "criterion": "random", "tokens_per_step": 2},
        {"strategy": "dynamic", "threshold": 0.1},
        {"strategy": "speculative"},
    ],
)
def test_batches_change_nothing(model, tokenizer, settings):
    one, several = (
        calibration_rows(model, tokenizer, TEXTS, settings=settings, max_length=12, batch_size=size) for size in (1, 4)
    )
    assert one[-1]["passes"] == several[-1]["passes"]
    for row, same in zip(one, several, strict=True):
        for name in ("count", "mean_confidence", "accuracy"):
            assert row[name] == pytest.approx(same[name], abs=1e-5)


def test_the_diagram_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = reliability(torch.tensor([0.2, 0.3, 0.9]), torch.tensor([False, True, True]), bins=10)
    plot_reliability(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.5}, "share=1.5"),
        ({"shape": "round"}, "shape='round': expected one of scattered, spans, middle"),
        ({"shape": "spans"}, "blank_length=None with shape='spans'"),
        ({"shape": "spans", "blank_length": 0}, "blank_length=0 with shape='spans'"),
        ({"blank_length": 3}, "blank_length=3 with shape='scattered'"),
        ({"bins": 0}, "bins=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 129}, "max_length=129 is above the model's context"),
        ({"max_length": 2}, "max_length=2"),
        ({"settings": {"strategy": "luck"}}, "strategy='luck': expected one of"),
        ({"settings": {"strategy": "refine"}}, "refine.* writes tokens several times"),
        ({"settings": {"order": "spiral"}}, "order='spiral': expected one of left_to_right"),
        ({"settings": {"do_sample": True}}, "do_sample=True"),
        ({"settings": {"criterion": "margin"}}, "no effect with strategy='groupwise'"),
        ({"documents": []}, "documents is empty"),
        ({"documents": [""]}, "document 1 is empty"),
    ],
)
def test_bad_input_names_the_argument(model, tokenizer, changes, message):
    settings = {"documents": TEXTS, **changes}
    with pytest.raises(ValueError, match=message):
        calibration_rows(model, tokenizer, settings.pop("documents"), **settings)


def test_a_tokenizer_without_bos(model, tokenizer):
    without = deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match="tokenizer has no BOS"):
        calibration_rows(model, without, TEXTS)
