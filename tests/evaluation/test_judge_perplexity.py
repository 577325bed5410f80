"""Texts written by steps and criteria, and another model's perplexity of them."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval")

from a3_hf.evaluation.measures.judge_perplexity import judge_rows, judged_nats
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_prompt
from tests.conftest import CORPUS, tiny_config, tiny_model

TEXTS = [CORPUS[0] * 2, "Short.", CORPUS[1] * 2, CORPUS[1] + CORPUS[0], CORPUS[0] + " Tom ran." + CORPUS[0]]
SIZES = {"prompt_tokens": 6, "new_tokens": 12, "count": 3, "steps": [3, 12], "criteria": ["random", "entropy"]}


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def judge(tokenizer):
    torch.manual_seed(7)
    settings = tiny_config(vocab_size=len(tokenizer)).to_dict()
    del settings["model_type"]
    return LlamaForCausalLM(LlamaConfig(**settings)).eval().double()


@torch.no_grad()
def nats_one_by_one(judge, ids, given):
    return -sum(
        judge(torch.tensor([ids[:i]])).logits[0, -1].log_softmax(-1)[ids[i]].item() for i in range(given, len(ids))
    )


def test_judged_nats_is_the_chain_of_single_forwards(judge, tokenizer):
    starts, ends = ["The dog ran", "Tom was", "One day, the c"], [" home. Tom", " happy, and so was his dog.", "at sat"]
    nats, tokens = judged_nats(judge, tokenizer, starts, ends, batch_size=2)
    expected, count = 0.0, 0
    for start, end in zip(starts, ends, strict=True):
        whole, alone = encode_prompt(tokenizer, start + end), encode_prompt(tokenizer, start)
        given = len(alone)
        while whole[:given] != alone[:given]:
            given -= 1
        expected += nats_one_by_one(judge, whole, given)
        count += len(whole) - given
    assert nats == pytest.approx(expected, abs=1e-3) and tokens == count
    assert judged_nats(judge, tokenizer, starts, ends, batch_size=1)[0] == pytest.approx(nats, abs=1e-4)


def test_a_token_on_the_boundary_counts_as_written(judge, tokenizer):
    alone, whole = (tokenizer.encode(text, add_special_tokens=False) for text in ("The do", "The dog"))
    assert whole[: len(alone)] != alone, "the tokenizer joins them"
    assert judged_nats(judge, tokenizer, ["The do"], ["g"])[1] == 1


def test_a_judge_without_bos(judge, tokenizer):
    without = deepcopy(tokenizer)
    without.bos_token = None
    ids = tokenizer.encode("The dog ran home.", add_special_tokens=False)
    given = len(tokenizer.encode("The dog", add_special_tokens=False))
    nats, tokens = judged_nats(judge, without, ["The dog"], [" ran home."])
    assert nats == pytest.approx(nats_one_by_one(judge, ids, given), abs=1e-4) and tokens == len(ids) - given
    with pytest.raises(ValueError, match="no token of the start 'The do' is given"):
        judged_nats(judge, _joined(without), ["The do"], ["g"])


def _joined(tokenizer):
    """The tokenizer, with all text in one token where it is one word."""

    class Joined:
        bos_token_id = None

        def encode(self, text, add_special_tokens):
            return [len(text)]

    return Joined()


def test_rows(model, judge, tokenizer, monkeypatch):
    outputs = []
    generate = model.generate_any_order

    def recorded(*arguments, **settings):
        outputs.append((settings, generate(*arguments, **settings)))
        return outputs[-1][1]

    monkeypatch.setattr(model, "generate_any_order", recorded)
    rows = judge_rows(model, tokenizer, judge, tokenizer, TEXTS, batch_size=3, **SIZES)
    ways = [(row["strategy"], row["criterion"], row["steps"], row["tokens_per_step"]) for row in rows]
    assert ways == [
        ("reference", None, None, None),
        ("groupwise", None, 3, 4),
        ("dynamic", "random", 3, 4),
        ("dynamic", "entropy", 3, 4),
        ("groupwise", None, 12, 1),
        ("dynamic", "random", 12, 1),
        ("dynamic", "entropy", 12, 1),
    ]
    long_enough = [ids for ids in (encode_prompt(tokenizer, text) for text in TEXTS) if len(ids) >= 19][:3]
    assert encode_prompt(tokenizer, TEXTS[1]) not in long_enough
    references = [ids[:19] for ids in long_enough]
    written = [references, *(output.sequences.tolist() for _, output in outputs)]
    for row, sequences in zip(rows, written, strict=True):
        assert [ids[:7] for ids in sequences] == [ids[:7] for ids in references] and len(sequences[0]) == 19
        starts = [tokenizer.decode(ids[1:7]) for ids in sequences]
        ends = [decode_after(tokenizer, ids[:7], ids[7:]) for ids in sequences]
        nats, tokens = judged_nats(judge, tokenizer, starts, ends)
        assert row["judge_tokens"] == tokens and row["texts"] == 3
        assert row["judge_nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
        assert row["judge_perplexity"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-4)
        assert row["unique_tokens"] == pytest.approx(sum(len(set(ids[7:])) / 12 for ids in sequences) / 3)
    assert [row["passes"] for row in rows[1:]] == [9, 9, 9, 36, 36, 36]
    assert rows[1]["tokens_per_forward"] == 4 and rows[0]["seconds"] is None
    assert rows[3]["judge_nats_per_token"] != rows[1]["judge_nats_per_token"]
    assert outputs[1][0]["tokens_per_step"] == 4 and outputs[0][0]["group_size"] == 4


@pytest.mark.parametrize("temperature", [None, 0.8])
def test_batches_change_nothing(model, judge, tokenizer, temperature):
    """Although two of the documents are the same."""
    texts = [TEXTS[0], TEXTS[0], TEXTS[2]]
    settings = {**SIZES, "new_tokens": 6, "steps": [3], "temperature": temperature, "seed": 3}
    one, several = (
        judge_rows(model, tokenizer, judge, tokenizer, texts, batch_size=size, **settings) for size in (1, 3)
    )
    for row, same in zip(one, several, strict=True):
        assert row["judge_nats_per_token"] == pytest.approx(same["judge_nats_per_token"], abs=1e-5)
        assert row["unique_tokens"] == same["unique_tokens"] and row["passes"] == same["passes"]
    other = judge_rows(model, tokenizer, judge, tokenizer, texts, **{**settings, "seed": 4})
    chance = [row["judge_nats_per_token"] for row in other if temperature or row["criterion"] == "random"]
    assert not set(chance) & {row["judge_nats_per_token"] for row in one[1:]}


def test_special_tokens_are_never_written(model, judge, tokenizer):
    model.lm_head.bias = nn.Parameter(torch.zeros(len(tokenizer), dtype=model.dtype))
    model.lm_head.bias.data[[0, 1]] = 1e3
    ids = torch.tensor([encode_prompt(tokenizer, "The dog")])
    assert set(model.generate_any_order(ids, max_new_tokens=4).sequences[0, -4:].tolist()) <= {0, 1}
    rows = judge_rows(model, tokenizer, judge, tokenizer, TEXTS, **SIZES)
    assert all(row["judge_tokens"] > 0 for row in rows)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": [4, 5]}, "steps=5: expected a divisor of new_tokens=12"),
        ({"steps": [0]}, "steps=0: expected a divisor of"),
        ({"steps": []}, "expected at least one each"),
        ({"criteria": ["luck"]}, "criterion='luck': expected one of confidence"),
        ({"count": 5}, "count=5: only 4 of 5 documents have the 18 tokens of a prompt and its continuation"),
        ({"count": 0}, "count=0"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"prompt_tokens": 120}, "=133 is above the model's context"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_input_names_the_argument(model, judge, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        judge_rows(model, tokenizer, judge, tokenizer, TEXTS, **{**SIZES, **changes})


def test_bad_judges_and_tokenizers(model, judge, tokenizer):
    with pytest.raises(ValueError, match="expected at least one text with a token"):
        judged_nats(judge, tokenizer, ["The dog"], [""])
    with pytest.raises(ValueError, match="judge: a text has .* more than its context"):
        judged_nats(judge, tokenizer, ["The dog"], [" ran home." * 100])
    without = deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match="tokenizer has no BOS"):
        judge_rows(model, without, judge, tokenizer, TEXTS, **SIZES)
