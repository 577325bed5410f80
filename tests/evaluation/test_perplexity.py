"""Rolling perplexity against single-token forwards, lm-eval's own windows, and the sum over all texts."""

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval")

from a3_hf.evaluation.measures.perplexity import base_log_likelihoods, order_log_likelihoods, perplexity_rows
from a3_hf.evaluation.measures.text_windows import Window, cut_windows, scale_rope
from a3_hf.models.a3_llama.infilling_templates import encode_prompt
from a3_hf.models.a3_llama.orders import GroupOrder, seed_of
from tests.conftest import tiny_config, tiny_model

TEXTS = ["Tom was happy, and so was his dog. One day, the cat sat on a mat!", "The dog – ran home.", "One"]


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)


def tiny_base(seed=0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = tiny_config(**changes).to_dict()
    del settings["model_type"]
    return LlamaForCausalLM(LlamaConfig(**settings)).eval().double()


@torch.no_grad()
def chain(model, window: Window, turns: list[list[int]]) -> float:
    """The log-likelihood of a window's scored tokens, one forward for each: given what is given, and earlier turns."""
    ids, given = [*window.given, *window.scored], len(window.given)
    known, total = list(range(given)), 0.0
    for turn in turns:
        for place in turn:
            logits = model(
                torch.tensor([ids])[:, known],
                position_ids=torch.tensor([known]),
                group_ids=torch.tensor([_groups(known, given, turns)]),
                target_position_ids=torch.tensor([[place]]),
                target_group_ids=torch.tensor([[1000]]),
            ).logits[0, 0]
            total += logits.log_softmax(-1)[ids[place]].item()
        known = sorted([*known, *turn])
    assert len(known) == len(ids)
    return total


def _groups(known, given, turns):
    number = {place: given + turn for turn, places in enumerate(turns) for place in places}
    return [number.get(place, place) for place in known]


def turns_of(window, order, group_size, generator=None, span_length=None):
    given, length = len(window.given), len(window.given) + len(window.scored)
    places = list(range(given, length))
    if order == "left_to_right":
        return [places[i : i + group_size] for i in range(0, len(places), group_size)]
    if order == "right_to_left":
        places = places[::-1]
        return [places[i : i + group_size] for i in range(0, len(places), group_size)]
    blanks = (torch.arange(length) >= given)[None]
    settings = {"group_size": group_size, "span_length": span_length, "generator": [generator]}
    groups = GroupOrder.infilling(blanks, order=order, **settings).group_ids[0].tolist()
    return [[place for place in places if groups[place] == group] for group in range(given, max(groups) + 1)]


def test_windows_score_every_token_once(tokenizer):
    for length in (2, 3, 7, 100):
        windows = cut_windows(tokenizer, TEXTS, length)
        rest = list(windows)
        for text in TEXTS:
            bos, *ids = encode_prompt(tokenizer, text)
            seen = 0
            while seen < len(ids):
                window = rest.pop(0)
                assert list(window.scored) == ids[seen : seen + len(window.scored)]
                before = [bos, *ids][: seen + 1]
                assert list(window.given) == (before[-len(window.given) :] if seen else [bos])
                seen += len(window.scored)
                assert 1 <= len(window.scored) <= length and len(window.given) + len(window.scored) <= length + 1
                assert len(window.scored) == length or seen == len(ids), "only the last may be shorter"
            assert seen == len(ids)
        assert not rest


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("order", ["left_to_right", "right_to_left", "random", "spans"])
def test_it_is_the_chain_of_single_forwards(model, tokenizer, order, group_size):
    windows = cut_windows(tokenizer, TEXTS, 9)
    assert len(windows) > 4
    span_length = 4 if order == "spans" else None
    settings = {"order": order, "group_size": group_size, "span_length": span_length}
    totals = order_log_likelihoods(model, windows, seed=5, batch_size=3, **settings)
    assert totals.shape == (len(windows), 1)
    for index, window in enumerate(windows):
        generator = torch.Generator().manual_seed(seed_of(5, list(window.given), [], len(window.scored), 0))
        turns = turns_of(window, order, group_size, generator, span_length)
        assert totals[index, 0].item() == pytest.approx(chain(model, window, turns), abs=1e-4)


def test_probabilities_of_all_texts_sum_to_one():
    """Over several random orders too, whose mean likelihood is a likelihood."""
    model = tiny_model(vocab_size=4)
    total = 0.0
    windows = [Window((1,), text) for text in itertools.product(range(4), repeat=3)]
    for window in windows:
        totals = order_log_likelihoods(model, [window], order="random", group_size=2, num_orders=3, seed=1)
        total += math.exp(float(totals.logsumexp(1)) - math.log(3))
    assert total == pytest.approx(1, abs=1e-5)


def test_batches_change_nothing(model, tokenizer):
    windows = cut_windows(tokenizer, TEXTS, 8)
    base = tiny_base(vocab_size=len(tokenizer))
    settings = {"order": "random", "group_size": 2, "num_orders": 3, "seed": 2}
    one = order_log_likelihoods(model, windows, batch_size=1, **settings)
    assert (order_log_likelihoods(model, windows, batch_size=7, **settings) - one).abs().max() < 1e-5
    assert len(set(one.flatten().tolist())) > len(windows), "each order is another"
    fewer = order_log_likelihoods(model, windows, **{**settings, "num_orders": 2})
    assert (fewer - one[:, :2]).abs().max() < 1e-5
    assert not torch.equal(order_log_likelihoods(model, windows, **{**settings, "seed": 3}), one)
    of_base = base_log_likelihoods(base, windows, batch_size=1)
    assert (base_log_likelihoods(base, windows, batch_size=7) - of_base).abs().max() < 1e-5


def test_it_is_what_lm_eval_measures(model, tokenizer):
    """The base as lm-eval's `hf`, and the model as `a3`, under random orders too."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from a3_hf.evaluation.lm_harness.a3_lm import A3LM

    base = tiny_base(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)
    windows = cut_windows(tokenizer, TEXTS, 9)
    settings = {"tokenizer": tokenizer, "max_length": 9, "batch_size": 2, "prefix_token_id": 0}
    random = {"order": "random", "group_size": 2, "seed": 4}
    ours = order_log_likelihoods(model, windows, num_orders=3, **random)
    for theirs, total in (
        (HFLM(pretrained=base, **settings), base_log_likelihoods(base, windows).sum()),
        (A3LM(model, **settings), order_log_likelihoods(model, windows, order="left_to_right").sum()),
        (A3LM(model, num_orders=3, **random, **settings), (ours.logsumexp(dim=1) - math.log(3)).sum()),
    ):
        requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
        assert float(total) == pytest.approx(sum(theirs.loglikelihood_rolling(requests, disable_tqdm=True)), abs=1e-3)


def test_rows(model, tokenizer):
    base = tiny_base(vocab_size=len(tokenizer))
    orders = ("left_to_right", "random")
    settings = {"orders": orders, "group_sizes": (1, 2), "num_orders": 4, "max_lengths": (9, 20)}
    rows = perplexity_rows(model, tokenizer, TEXTS, base=base, **settings)
    assert [(row["max_length"], row["model"], row["order"], row["group_size"], row["num_orders"]) for row in rows] == [
        (length, *rest)
        for length in (9, 20)
        for rest in [
            ("base", "left_to_right", 1, 1),
            *(("a3", order, size, 4 if order == "random" else 1) for order in orders for size in (1, 2)),
        ]
    ]
    windows = cut_windows(tokenizer, TEXTS, 9)
    tokens = sum(len(encode_prompt(tokenizer, text)) - 1 for text in TEXTS)
    of_base, ours, random = rows[0], rows[1], rows[3]
    left = float(order_log_likelihoods(model, windows, order="left_to_right").sum())
    assert (
        ours["log_likelihood"] == pytest.approx(left) and ours["tokens"] == tokens and ours["windows"] == len(windows)
    )
    assert ours["nats_per_token"] == pytest.approx(-left / tokens)
    assert ours["perplexity"] == pytest.approx(math.exp(-left / tokens))
    num_bytes = sum(len(text.encode("utf-8")) for text in TEXTS)
    assert num_bytes > sum(map(len, TEXTS)) and ours["bits_per_byte"] == pytest.approx(-left / math.log(2) / num_bytes)
    of_base_total = float(base_log_likelihoods(base, windows).sum())
    assert of_base["log_likelihood"] == pytest.approx(of_base_total)
    assert ours["adaptation_cost"] == pytest.approx((of_base_total - left) / tokens)
    assert all(row["adaptation_cost"] is None for row in (rows[0], *rows[2:5]))
    totals = order_log_likelihoods(model, windows, order="random", num_orders=4)
    assert random["log_likelihood"] == pytest.approx(float((totals.exp().mean(1)).log().sum()))
    assert random["log_likelihood_mean_of_orders"] == pytest.approx(float(totals.sum()) / 4)
    assert random["passes"] == 4 * len(windows) and ours["passes"] == len(windows)
    for row in rows:  # Jensen
        if row["order"] == "random":
            assert row["log_likelihood"] > row["log_likelihood_mean_of_orders"]
            assert row["nats_per_token"] < row["nats_per_token_mean_of_orders"]
        else:
            assert row["log_likelihood"] == row["log_likelihood_mean_of_orders"]


def test_the_models_context_is_the_default_length(model, tokenizer):
    (row,) = perplexity_rows(model, tokenizer, TEXTS, orders=["left_to_right"])
    assert row["max_length"] == 128 and row["windows"] == 3


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16},
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
)
def test_scaling_stretches_the_context(scaling):
    config = tiny_config(max_position_embeddings=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    scale_rope(config, scaling)
    assert config.max_position_embeddings == 32 and config.rope_parameters["rope_theta"] == 500.0
    config.validate_rope()
    original = {} if scaling["rope_type"] == "linear" else {"original_max_position_embeddings": 16}
    by_hand = tiny_config(max_position_embeddings=32, rope_parameters={"rope_theta": 500.0, **original, **scaling})
    plain = tiny_config(max_position_embeddings=32, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    inverse = [
        tiny_model(**{"rope_parameters": one.rope_parameters}).model.rotary_emb.inv_freq
        for one in (config, by_hand, plain)
    ]
    assert torch.equal(inverse[0], inverse[1]) and not torch.allclose(inverse[0], inverse[2])


def test_scaling_from_another_original_length():
    config = tiny_config(max_position_embeddings=128)
    scale_rope(config, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16})
    assert config.max_position_embeddings == 64
    assert config.rope_parameters["original_max_position_embeddings"] == 16


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"factor": 2}, "rope_type=None: expected one of linear, yarn, llama3"),
        ({"rope_type": "dynamic", "factor": 2}, "rope_type='dynamic'"),
        ({"rope_type": "yarn"}, "factor=None"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor=0.5: expected a number of at least 1"),
        ({"rope_type": "llama3", "factor": 2}, "lacks 'low_freq_factor'"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 3}, "has 'beta_fast': expected rope_type, factor"),
    ],
)
def test_bad_scaling(scaling, message):
    with pytest.raises(ValueError, match=message):
        scale_rope(tiny_config(), scaling)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"orders": ["left_to_right", "spiral"]},
            "'spiral': expected .* left_to_right, right_to_left, random",
        ),
        ({"orders": []}, "orders is empty"),
        ({"group_sizes": [0]}, "group_sizes=\\[0\\]"),
        ({"num_orders": 0}, "num_orders=0"),
        ({"orders": ["right_to_left"], "num_orders": 2}, "num_orders=2 with orders=right_to_left"),
        ({"orders": ["spans"]}, "span_length=None with orders=spans"),
        ({"span_length": 3}, "span_length=3 with orders=left_to_right"),
        ({"orders": ["spans"], "span_length": 2, "group_sizes": [1, 4]}, "span_length=2 with group_sizes=\\[1, 4\\]"),
        ({"max_lengths": [9, 129]}, "max_length=129 is above the model's context .*rope_scaling"),
        ({"max_lengths": [1]}, "max_length=1"),
        ({"max_lengths": []}, "max_length is empty"),
        ({"documents": []}, "documents is empty"),
        ({"documents": ["One", ""]}, "document 2 is empty"),
    ],
)
def test_bad_input_names_the_argument(model, tokenizer, changes, message):
    settings = {"documents": TEXTS, **changes}
    with pytest.raises(ValueError, match=message):
        perplexity_rows(model, tokenizer, settings.pop("documents"), **settings)


def test_a_base_that_cannot_be_compared(model, tokenizer):
    base = tiny_base(vocab_size=len(tokenizer), max_position_embeddings=16)
    with pytest.raises(ValueError, match="max_length=128 is above the model's context"):
        perplexity_rows(model, tokenizer, TEXTS, base=base)
    with pytest.raises(ValueError, match="expected left_to_right and 1 among them, with which base is compared"):
        perplexity_rows(model, tokenizer, TEXTS, base=base, group_sizes=[2], max_lengths=[9])
    with pytest.raises(ValueError, match="base has a vocabulary of 61 tokens"):
        perplexity_rows(model, tokenizer, TEXTS, base=tiny_base())


def test_a_tokenizer_without_bos(model, tokenizer):
    from copy import deepcopy

    without = deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match="tokenizer has no BOS"):
        perplexity_rows(model, without, TEXTS)
