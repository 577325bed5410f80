"""lm-eval's model `a3` on the controls, Decoupled RoPE and masked diffusion: their own likelihoods, bounds and texts."""

import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.instance import Instance
from transformers import AutoTokenizer

from a3_hf.adapters.checkpoints import load_model
from a3_hf.evaluation.lm_harness.a3_lm import A3LM
from a3_hf.evaluation.tasks.requests import Blank
from a3_hf.models.a3_llama.orders import GroupOrder

PAIRS = [
    ("w1 w2 w3", " w4 w5"),
    ("w9", " w8 w7 w6 w5 w4"),
    ("w3 w3 w3", " w10"),
    ("w1 w2", " w3 w4", {"suffix": " w5 w6"}),
]


def asking(arguments: list[tuple], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=("toy", number, 1)) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def controls(source, tmp_path_factory) -> dict[str, str]:
    """Folders of both, from the same LLaMA."""
    tokenizer, folders = AutoTokenizer.from_pretrained(source), {}
    for name in ("decoupled_rope", "masked_diffusion"):
        folder = tmp_path_factory.mktemp(name)
        model = load_model(str(source), architecture=name)
        if name == "masked_diffusion":
            model.set_mask_token(tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = str(folder)
    return folders


@pytest.mark.parametrize("name", ["decoupled_rope", "masked_diffusion"])
@pytest.mark.parametrize("order", ["left_to_right", "right_to_left"])
def test_a_likelihood_is_the_models_own(controls, name, order):
    lm = A3LM(controls[name], device="cpu", batch_size=2, order=order)
    assert lm.model.config.model_type == f"{name}_llama"
    answers = lm.loglikelihood(asking(PAIRS), disable_tqdm=True)
    for (context, continuation, *more), answer in zip(PAIRS, answers, strict=True):
        before, ids = lm._encode_pair(context, continuation)
        suffix = lm.tokenizer.encode(more[0]["suffix"], add_special_tokens=False) if more else []
        row = torch.tensor([[*before, *ids, *suffix]])
        blank = torch.zeros_like(row, dtype=torch.bool)
        blank[:, len(before) : len(before) + len(ids)] = True
        groups = GroupOrder.infilling(blank, order=order).group_ids
        expected = lm.model.log_likelihood(row, groups, scored_mask=blank).sum().item()
        assert answer[0] == pytest.approx(expected, abs=1e-3)
    passes = lm.get_model_info()["speed"]["toy"]["passes"]
    assert passes == (len(PAIRS) if name == "decoupled_rope" else 2 + 5 + 1 + 2)


def test_the_bound_takes_its_samples_and_is_the_models_own(controls):
    lm = A3LM(controls["masked_diffusion"], device="cpu", batch_size=4, num_samples=16, seed=3)
    answers = lm.loglikelihood(asking(PAIRS[:3]), disable_tqdm=True)
    for (context, continuation), answer in zip(PAIRS[:3], answers, strict=True):
        before, ids = lm._encode_pair(context, continuation)
        row = torch.tensor([[*before, *ids]])
        given = torch.arange(row.shape[1])[None] < len(before)
        expected = lm.model.log_likelihood_bound(row, given_mask=given, num_samples=16, seed=3)
        assert answer[0] == pytest.approx(expected.item(), abs=1e-3) and answer[1] is False
    assert lm.get_model_info()["speed"]["toy"]["passes"] == 3 * 16
    assert lm.settings()["num_samples"] == 16


@pytest.mark.parametrize("name", ["decoupled_rope", "masked_diffusion"])
def test_texts_are_the_models_own(controls, name):
    lm = A3LM(controls[name], device="cpu", batch_size=2, block_length=4)
    blank = Blank(suffix=" w5 w6", length_of=" w3 w4").in_kwargs()
    kwargs = {"until": [], "max_gen_toks": 6, "do_sample": False}
    written, filled = (
        lm.generate_until(asking([request], "generate_until"), disable_tqdm=True)[0]
        for request in (("w1 w2", kwargs), ("w1 w2", {**kwargs, **blank}))
    )
    assert 1 <= len(written.split()) <= 6
    expected = lm.model.infill(lm.tokenizer, "w1 w2 <blank:2> w5 w6", suppress_tokens=[lm.tokenizer.eos_token_id])
    assert filled == expected.removeprefix("w1 w2").removesuffix(" w5 w6")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("decoupled_rope", {"group_size": 2}, "expected group_size=1, decoding='groupwise'"),
        ("decoupled_rope", {"decoding": "dynamic"}, "decoding='groupwise'"),
        ("decoupled_rope", {"num_samples": 8}, "likelihoods are exact; leave it out"),
        ("masked_diffusion", {"decoding": "groupwise"}, "expected 'dynamic' with masked diffusion"),
        ("masked_diffusion", {"num_samples": 2, "order": "random"}, "Leave the others out"),
        ("masked_diffusion", {"num_samples": 0}, "num_samples=0: expected at least 1"),
        (
            "masked_diffusion",
            {"num_samples": 2, "order": "random", "num_orders": 2},
            "is over all orders of single tokens",
        ),
    ],
)
def test_what_an_architecture_does_not_take_is_refused(controls, name, settings, message):
    with pytest.raises(ValueError, match=message):
        A3LM(controls[name], device="cpu", **settings)


def test_a_llama_that_is_loaded_already_is_no_a3_model(source):
    with pytest.raises(ValueError, match="pretrained is a model of type 'llama'.*a3_ar"):
        A3LM(load_model(str(source), architecture="llama"), tokenizer=AutoTokenizer.from_pretrained(source))
