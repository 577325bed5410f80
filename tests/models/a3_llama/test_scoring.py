"""Scores of a text against the plain likelihood."""

import pytest
import torch
from typer.testing import CliRunner

from a3_hf.cli import app
from a3_hf.models.a3_llama.infilling_templates import encode_prompt
from tests.conftest import tiny_model

TEXT = "Tom was happy, and so was his dog."


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)


def test_left_to_right_is_the_causal_contract(model, tokenizer):
    scored = model.score(tokenizer, TEXT)
    ids = torch.tensor([encode_prompt(tokenizer, TEXT)])
    with torch.no_grad():
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert torch.equal(scored.token_ids, ids[0])
    assert (scored.log_probs[0, 1:] - log_probs).abs().max() < 1e-5 and scored.log_probs[0, 0] == 0
    assert scored.totals[0] == pytest.approx(log_probs.sum().item(), abs=1e-4)
    assert (scored.spread == 0).all() and torch.equal(scored.mean, scored.log_probs[0])


def test_several_random_orders(model, tokenizer):
    scored = model.score(tokenizer, TEXT, order="random", group_size=2, num_orders=5, seed=3)
    assert len(scored.group_ids.unique(dim=0)) == 5
    for row in range(5):
        again = model.log_likelihood(scored.token_ids[None], scored.group_ids[row : row + 1])[0]
        assert (again - scored.log_probs[row]).abs().max() < 1e-5
    assert torch.allclose(scored.mean, scored.log_probs.mean(0))
    expected = ((scored.log_probs - scored.mean) ** 2).mean(0).sqrt()
    assert torch.allclose(scored.spread, expected, atol=1e-6) and scored.spread[1:].max() > 0
    fewer = model.score(tokenizer, TEXT, order="random", group_size=2, num_orders=2, seed=3)
    assert torch.equal(fewer.group_ids, scored.group_ids[:2])


@pytest.mark.parametrize(
    "text, settings, message",
    [
        ("", {}, "text is empty"),
        (TEXT * 20, {}, "more than the model's context"),
        (TEXT, {"order": "spiral"}, "order='spiral': expected one of"),
        (TEXT, {"num_orders": 0}, "num_orders=0"),
        (TEXT, {"num_orders": 3}, "num_orders=3 with order='left_to_right'"),
        (TEXT, {"group_size": 0}, "group_size=0"),
    ],
)
def test_bad_input_names_the_argument(model, tokenizer, text, settings, message):
    with pytest.raises(ValueError, match=message):
        model.score(tokenizer, text, **settings)


def test_nan_is_no_score(model, tokenizer, tmp_path):
    """Before: "log-likelihood nan nats", rc 0."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="log-probabilities are NaN"):
        model.score(tokenizer, "The dog")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["score", str(tmp_path), "The dog"])
    assert done.exit_code == 2 and "log-probabilities are NaN" in done.stderr and "nats" not in done.stdout
