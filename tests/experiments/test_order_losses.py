"""Losses under several orders against slow and obvious forms: one document, one order, one token at a time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from a3_hf import DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM
from a3_hf.evaluation.measures.batching import next_token_scores, pad_rows
from a3_hf.evaluation.measures.order_losses import measure_losses
from a3_hf.evaluation.measures.trained_run import Trained
from a3_hf.models.masked_diffusion_llama.configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from a3_hf.training.base_trainer import row_generator
from tests.conftest import tiny_config, tiny_model

DOCUMENTS = (
    "The dog ran home. Tom was happy, and so was his dog.",
    "One day, the cat sat on a mat!",
    "Tom ran.",
    "So was the dog of the happy cat. One day, Tom sat home.",
)
ARCHITECTURES = ("a3", "decoupled_rope", "masked_diffusion", "llama")
SMALL = {"num_documents": 4, "num_ordered_documents": 2, "max_length": 14, "num_samples": 4, "batch_size": 3}
SEED = 5


def trained(architecture: str, tokenizer, documents=DOCUMENTS, **changes) -> Trained:
    """A random tiny model; all four have the same LLaMA's weights."""
    changes = {"vocab_size": len(tokenizer) + 1, "num_hidden_layers": 2, **changes}
    a3 = tiny_model(**changes)
    settings = tiny_config(**changes).to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**settings))
    elif architecture == "decoupled_rope":
        model = DecoupledRopeLlamaForCausalLM(DecoupledRopeLlamaConfig(**settings))
    elif architecture == "masked_diffusion":
        model = MaskedDiffusionLlamaForCausalLM(MaskedDiffusionLlamaConfig(mask_token_id=len(tokenizer), **settings))
    else:
        model = a3
    if model is not a3:
        weights = {name: value for name, value in a3.state_dict().items() if "query_embed" not in name}
        model.load_state_dict(weights)
    recipe = SimpleNamespace(model=SimpleNamespace(architecture=architecture), data=SimpleNamespace(fim=None))
    return Trained(model.eval(), tokenizer, recipe, documents, [], [])


def measure(subject: Trained, **changes) -> dict:
    return measure_losses(subject, **{**SMALL, "seed": SEED, **changes})


def cut(tokenizer, document: str, length: int = 14) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False)][:length]


def groups(kind: str, length: int, *, document: int, group_size: int = 1, number: int = 0) -> list[int]:
    """Group ids of a row of `length` tokens, BOS first."""
    places = list(range(length - 1))
    if kind == "right to left":
        places.reverse()
    elif kind == "scattered":
        noise = torch.rand(length, generator=row_generator(SEED, document, number)).tolist()
        places.sort(key=lambda place: noise[place])
    ids = [0] * length
    for turn, place in enumerate(places):
        ids[1 + place] = 1 + turn // group_size
    return ids


def exact(subject: Trained, kind: str, *, documents: int = 4, group_size: int = 1, orders: int = 1) -> float:
    """Nats per token, a document and an order at a time."""
    nats, tokens = 0.0, 0
    for index, text in enumerate(subject.documents[:documents]):
        ids = cut(subject.tokenizer, text)
        tokens += len(ids) - 1
        for number in range(orders):
            order = groups(kind, len(ids), document=index, group_size=group_size, number=number)
            if subject.architecture == "masked_diffusion":
                nats -= masked(subject.model, ids, order) / orders
            else:
                nats -= subject.model.log_likelihood(torch.tensor([ids]), torch.tensor([order])).sum().item() / orders
    return nats / tokens


@torch.no_grad()
def masked(model, ids: list[int], order: list[int]) -> float:
    """log p of a row by masked diffusion: group by group, all that comes later under masks."""
    ids, order, total = torch.tensor(ids), torch.tensor(order), 0.0
    for group in range(1, int(order.max()) + 1):
        text = ids.masked_fill(order >= group, model.config.mask_token_id)
        for column in (order == group).nonzero().flatten().tolist():
            logits = model(input_ids=text[None], target_columns=torch.tensor([[column]])).logits[0, 0]
            total += logits.log_softmax(dim=-1)[ids[column]].item()
    return total


@torch.no_grad()
def next_token_loss(subject: Trained, documents: int = 4) -> float:
    llama = trained("llama", subject.tokenizer).model
    nats, tokens = 0.0, 0
    for text in subject.documents[:documents]:
        ids = torch.tensor([cut(subject.tokenizer, text)])
        logits = llama(ids).logits[0, :-1]
        nats += nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return nats / tokens


def test_a3_has_every_order(tokenizer):
    subject = trained("a3", tokenizer)
    result = measure(subject, orders=2)
    assert result["nll_left_to_right"] == pytest.approx(exact(subject, "left to right"), abs=1e-5)
    assert result["nll_right_to_left"] == pytest.approx(exact(subject, "right to left"), abs=1e-5)
    assert result["nll_scattered_1"] == pytest.approx(exact(subject, "scattered", orders=2), abs=1e-5)
    assert result["nll_scattered_4"] == pytest.approx(exact(subject, "scattered", orders=2, group_size=4), abs=1e-5)
    few = exact(subject, "scattered", documents=2, orders=2, group_size=4)
    assert result["nll_scattered_4_few"] == pytest.approx(few, abs=1e-5)
    lengths = [len(cut(tokenizer, text)) - 1 for text in DOCUMENTS]
    assert max(lengths) == 13 and min(lengths) == 3, "some documents are cut, some padded"
    assert (result["loss_documents"], result["loss_tokens"]) == (4, sum(lengths))
    assert (result["loss_documents_few"], result["loss_tokens_few"]) == (2, sum(lengths[:2]))


def test_next_tokens_are_those_of_the_llama_inside(tokenizer):
    llama, a3 = trained("llama", tokenizer), trained("a3", tokenizer)
    expected = next_token_loss(llama)
    with torch.no_grad():
        a3.model.model.query_embed.weight.normal_()
    of_llama, of_a3 = measure(llama), measure(a3)
    assert of_llama["nll_next_token"] == of_llama["nll_left_to_right"] == pytest.approx(expected, abs=1e-5)
    assert of_a3["nll_next_token"] == pytest.approx(expected, abs=1e-5)
    assert of_a3["nll_left_to_right"] != pytest.approx(expected, abs=1e-2), "its slots say something else"
    assert of_llama["nll_next_token_few"] == pytest.approx(next_token_loss(llama, documents=2), abs=1e-5)
    assert not [
        name for name in of_llama if "scattered" in name or "right_to_left" in name.replace("left_to_right", "")
    ]


def test_decoupled_rope_has_singletons_alone_and_is_llama_from_left_to_right(tokenizer):
    subject = trained("decoupled_rope", tokenizer)
    result = measure(subject)
    assert result["nll_left_to_right"] == pytest.approx(next_token_loss(subject), abs=1e-5)
    assert result["nll_right_to_left"] == pytest.approx(exact(subject, "right to left"), abs=1e-5)
    assert result["nll_scattered_1"] == pytest.approx(exact(subject, "scattered"), abs=1e-5)
    assert "nll_scattered_4" not in result and "nll_next_token" not in result


def test_masked_diffusion_scores_orders_on_the_few_documents(tokenizer):
    subject = trained("masked_diffusion", tokenizer)
    result = measure(subject)
    for name, kind, group_size in (
        ("nll_left_to_right_few", "left to right", 1),
        ("nll_right_to_left_few", "right to left", 1),
        ("nll_scattered_4_few", "scattered", 4),
    ):
        assert result[name] == pytest.approx(exact(subject, kind, documents=2, group_size=group_size), abs=1e-5)
        assert name.removesuffix("_few") not in result, "not of all documents, so not under that name"
    assert "nll_next_token" not in result
    everywhere = measure(subject, num_ordered_documents=4)
    assert everywhere["nll_left_to_right"] == everywhere["nll_left_to_right_few"]


def test_the_bound_estimates_the_mean_over_orders(tokenizer):
    subject = trained("masked_diffusion", tokenizer, documents=("The dog ran home.", "the cat"))
    settings = {"num_documents": 2, "max_length": 5}
    rows = [cut(tokenizer, text, 5) for text in subject.documents]
    assert sorted(map(len, rows)) == [3, 5]
    exact_bound = subject.model.exact_bound(*pad_rows(rows)).sum().item()
    expected = -exact_bound / sum(len(row) - 1 for row in rows)
    assert measure(subject, num_samples=2000, **settings)["nll_scattered_1"] == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_batch_changes_nothing(architecture, tokenizer):
    subject = trained(architecture, tokenizer)
    together, alone = measure(subject, batch_size=4), measure(subject, batch_size=1)
    assert together == pytest.approx(alone, abs=1e-5)
    assert measure(subject, batch_size=4) == together
    other = measure(subject, seed=6)
    changed = {name for name in other if other[name] != pytest.approx(together[name], abs=1e-5)}
    assert all("scattered" in name for name in changed) and bool(changed) == (architecture != "llama")


@pytest.mark.parametrize("architecture", ["llama", "a3"])
def test_next_token_scores_are_of_the_scored_tokens_alone(architecture, tokenizer):
    ids, mask = pad_rows([[1, 5, 7, 9], [1, 6]])
    model = trained(architecture, tokenizer).model
    scored = torch.tensor([[False, True, True, True], [False, True, False, False]])
    log_probs, greedy = next_token_scores(model, ids, mask, scored)
    assert (log_probs[~scored] == 0).all() and (log_probs[scored] < 0).all() and greedy[~scored].all()
    some = scored & torch.tensor([False, False, True, False])
    fewer, _ = next_token_scores(model, ids, mask, some)
    torch.testing.assert_close(fewer, log_probs * some)
    likeliest = [max(range(model.config.vocab_size), key=lambda one: score_of(model, ids, mask, one))]
    assert greedy[1, 1] == (likeliest == [6])


def score_of(model, ids, mask, token: int) -> float:
    """Log-probability of a token in the place of the second row's last."""
    ids = ids.clone()
    ids[1, 1] = token
    return next_token_scores(model, ids, mask, ids == token)[0][1, 1].item() if token != 1 else -100.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_documents": 0}, "num_documents=0"),
        ({"num_documents": 5}, "num_documents=5: expected at most the 4"),
        ({"num_ordered_documents": 5}, "num_ordered_documents=5"),
        ({"group_size": 1}, "group_size=1"),
        ({"orders": 0}, "orders=0"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 129}, "max_length=129"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        measure(trained("a3", tokenizer), **changes)


def test_an_empty_document_is_refused(tokenizer):
    with pytest.raises(ValueError, match="held-out document 1 is empty"):
        measure(trained("a3", tokenizer, documents=("Tom ran.", "", "x", "y")))
