"""The lm-eval models `a3` and `a3_ar` against the model's own methods, single-token forwards, and lm-eval's `hf`."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from a3_hf import A3LlamaForCausalLM
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoints import load_model
from a3_hf.adapters.layers import attach
from a3_hf.evaluation.lm_harness.a3_lm import A3LM
from a3_hf.evaluation.lm_harness.batched_lm import Scored, cut_at
from a3_hf.evaluation.lm_harness.causal_lm import CausalLM
from a3_hf.evaluation.measures.batching import next_token_scores
from a3_hf.evaluation.tasks.requests import Blank, LogLikelihood, take_blank
from a3_hf.models.a3_llama.infilling_templates import Template
from a3_hf.models.a3_llama.orders import GroupOrder
from tests.conftest import tiny_model

PAIRS = [
    ("w1 w2 w3", " w4 w5"),
    ("w9", " w8 w7 w6 w5 w4"),
    ("w3 w3 w3 w3 w3 w3 w3", " w10"),
    ("", "w11 w12"),
    ("w1 w2 w3", " w4"),
    ("w1 w2 w3", " w4 w5 w6"),
]


def asking(arguments: list[tuple], task: str = "toy", kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=(task, number, 1)) for number, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def a3(source) -> A3LM:
    return A3LM(str(source), device="cpu", batch_size=4)


def like(source, **settings) -> A3LM:
    return A3LM(str(source), device="cpu", **settings)


@pytest.fixture(scope="module")
def hf(source) -> HFLM:
    return HFLM(str(source), device="cpu", batch_size=3)


def chain(lm: A3LM, context: list[int], ids: list[int], suffix: list[int]) -> tuple[float, bool]:
    """Single-token forwards: a slot for the next token alone, in sight of all that stands before it and of the suffix."""
    total, greedy = 0.0, True
    behind = range(len(context) + len(ids), len(context) + len(ids) + len(suffix))
    for number, token in enumerate(ids):
        known = [*context, *suffix, *ids[:number]]
        places = [*range(len(context)), *behind, *range(len(context), len(context) + number)]
        with torch.no_grad():
            logits = lm.model(
                torch.tensor([known]),
                position_ids=torch.tensor([places]),
                group_ids=torch.arange(len(known))[None],
                target_position_ids=torch.tensor([[len(context) + number]]),
                target_group_ids=torch.tensor([[len(known)]]),
            ).logits[0, 0]
        total += logits.double().log_softmax(-1)[token].item()
        greedy = greedy and logits.argmax().item() == token
    return total, greedy


def test_a_likelihood_is_the_chain_of_single_token_forwards_and_the_models_own(a3):
    for (context, continuation), answer in zip(PAIRS, a3.loglikelihood(asking(PAIRS), disable_tqdm=True), strict=True):
        if context:
            before, ids = a3._encode_pair(context, continuation)
        else:
            before, ids = [a3.prefix_token_id], a3.tok_encode(continuation)
        value, greedy = chain(a3, before, ids, [])
        assert answer[0] == pytest.approx(value, abs=1e-3) and answer[1] == greedy and answer.num_tokens == len(ids)
        row = torch.tensor([[*before, *ids]])
        own = a3.model.log_likelihood(row, torch.arange(row.shape[1])[None])[0, len(before) :].sum().item()
        assert answer[0] == pytest.approx(own, abs=1e-3)


def test_text_behind_the_continuation_is_given(a3):
    (answer,) = a3.loglikelihood(asking([("w1 w2", " w3 w4", {"suffix": " w5 w6 w7"})]), disable_tqdm=True)
    encode = a3.tokenizer.encode
    value, _ = chain(a3, [1, *encode("w1 w2")], encode("w3 w4"), encode("w5 w6 w7"))
    (without,) = a3.loglikelihood(asking([("w1 w2", " w3 w4")]), disable_tqdm=True)
    assert answer[0] == pytest.approx(value, abs=1e-3) and abs(answer[0] - without[0]) > 1e-2


@pytest.mark.parametrize("settings", [{}, {"order": "random", "num_orders": 3}, {"order": "right_to_left"}])
def test_batches_change_nothing(source, settings):
    answers = []
    for batch_size in (1, 4, 32):
        lm = like(source, batch_size=batch_size, **settings)
        answers.append([one[0] for one in lm.loglikelihood(asking(PAIRS), disable_tqdm=True)])
    assert torch.allclose(torch.tensor(answers), torch.tensor(answers[:1]), atol=1e-3)


def test_orders_are_averaged_as_probabilities(source):
    """log-mean-exp over the same orders that one by one are drawn; never below the mean of their logarithms (Jensen)."""
    lm = like(source, order="random", num_orders=4, group_size=2, batch_size=2)
    answers = lm.loglikelihood(asking(PAIRS), disable_tqdm=True)
    from a3_hf.models.a3_llama.orders import seed_of

    context, ids = lm._encode_pair(*PAIRS[1])
    row = torch.tensor([[*context, *ids]])
    open_mask = torch.arange(row.shape[1])[None] >= len(context)
    totals = []
    for copy in range(4):
        generator = torch.Generator().manual_seed(seed_of(0, context, [], len(ids), copy))
        order = GroupOrder.infilling(open_mask, order="random", group_size=2, generator=generator)
        totals.append(lm.model.log_likelihood(row, order.group_ids)[open_mask].double().sum())
    totals = torch.stack(totals)
    assert answers[1][0] == pytest.approx((totals.logsumexp(0) - math.log(4)).item(), abs=1e-3)
    assert answers[1][0] >= totals.mean().item() and totals.std() > 1e-3


def test_under_orders_that_are_drawn_the_probabilities_of_all_continuations_sum_to_one(source):
    lm = A3LM(tiny_model(vocab_size=5), tokenizer=AutoTokenizer.from_pretrained(source), order="random", num_orders=2)
    rows = [Scored([1, 3], list(ids), [4]) for ids in itertools.product(range(5), repeat=3)]
    total = sum(math.exp(value) for value, _, _ in lm.score_batch(rows))
    assert total == pytest.approx(1.0, abs=1e-4)


def test_without_a_suffix_the_baseline_answers_as_hf_does(source, hf):
    long = ("w1 " * 140 + "w2", " w3 w4 w5")  # longer than the context, 128: both cut it alike
    ar = CausalLM(str(source), device="cpu", batch_size=2, add_bos_token=False)
    pairs = [*PAIRS, long]
    for one, other in zip(ar.loglikelihood(asking(pairs)), hf.loglikelihood(asking(pairs)), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]
    texts = asking([("w1 w2", {"until": ["w7"], "max_gen_toks": 12}), ("w5", {"until": [], "max_gen_toks": 5})])
    assert ar.generate_until(texts) == hf.generate_until(texts)
    rolling = asking([(" ".join(f"w{i % 50}" for i in range(300)),)], kind="loglikelihood_rolling")
    assert ar.loglikelihood_rolling(rolling) == pytest.approx(hf.loglikelihood_rolling(rolling), abs=1e-3)


def test_every_text_begins_with_bos_whether_the_tokenizer_adds_it_or_not(source, hf):
    """This tokenizer adds none, as SmolLM2's; `hf` is given it in words, `score` and training begin with it."""
    assert hf.tok_encode("w1 w2") == hf.tokenizer.encode("w1 w2", add_special_tokens=False)
    expected = [answer[0] for answer in hf.loglikelihood(asking([("<s> " + one, two) for one, two in PAIRS]))]
    kwargs = {"until": ["w7"], "max_gen_toks": 12}
    said = hf.generate_until(asking([("<s> w1 w2", kwargs)]))
    tokenizer = AutoTokenizer.from_pretrained(source)
    left = A3LlamaForCausalLM.from_pretrained(source, slot_start="left_token")  # left to right it is the LLaMA
    for make, model in ((A3LM, left), (CausalLM, LlamaForCausalLM.from_pretrained(source))):
        lm = make(model, tokenizer=tokenizer, device="cpu", batch_size=4)
        for bos in ("", "<s> "):
            asked = asking([(bos + one, two) for one, two in PAIRS])
            assert [one[0] for one in lm.loglikelihood(asked, disable_tqdm=True)] == pytest.approx(expected, abs=1e-4)
            assert lm.generate_until(asking([(bos + "w1 w2", kwargs)]), disable_tqdm=True) == said
        without = make(model, tokenizer=tokenizer, device="cpu", batch_size=4, add_bos_token=False)
        plain = [one[0] for one in hf.loglikelihood(asking(PAIRS))]
        assert [one[0] for one in without.loglikelihood(asking(PAIRS))] == pytest.approx(plain, abs=1e-4)
        assert lm.identity != without.identity
    a3 = like(source)
    (answer,) = a3.loglikelihood(asking([("w1 w2", " w3 w4")]), disable_tqdm=True)
    scored = a3.model.score(a3.tokenizer, "w1 w2 w3 w4")
    assert answer[0] == pytest.approx(scored.log_probs[0, -2:].sum().item(), abs=1e-5)


def test_a_continuation_of_white_space_is_scored(tokenizer):
    """As `hf` scores it; this tokenizer has tokens of white space."""
    from tests.conftest import tiny_model

    settings = {"tokenizer": tokenizer, "device": "cpu", "batch_size": 2}
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, slot_start="left_token")
    pairs = [("The dog", " "), ("The dog", "\n"), ("The dog ", "\n\n"), ("", " "), ("", "\n\n"), ("The dog", " \t ")]
    bos = [("<s>" + one if one else one, two) for one, two in pairs]
    expected = [answer[0] for answer in HFLM(model, **settings).loglikelihood(asking(bos))]
    a3 = A3LM(model, **settings).loglikelihood(asking(pairs), disable_tqdm=True)
    assert [one[0] for one in a3] == pytest.approx(expected, abs=1e-4) and all(one.num_tokens >= 1 for one in a3)
    suffix = A3LM(model, **settings).loglikelihood(asking([("The dog", " ", {"suffix": " "})]), disable_tqdm=True)
    assert suffix[0].num_tokens == 1 and suffix[0][0] < 0
    rolled = A3LM(model, **settings).loglikelihood_rolling(asking([(" \n",)], kind="loglikelihood_rolling"))
    hf = HFLM(model, **settings).loglikelihood_rolling(asking([(" \n",)], kind="loglikelihood_rolling"))
    assert rolled == pytest.approx(hf, abs=1e-4)
    with pytest.raises(ValueError, match="no token of its own: it is empty"):
        A3LM(model, **settings).loglikelihood(asking([("The dog", "")]), disable_tqdm=True)


STOPS = {
    "a special token": (["</s>", "<|im_end|>"], "2 + 2 = 4<|im_end|>\n<|im_start|>user\n"),
    "words behind it": (["user"], "2 + 2 = 4<|im_end|>\n<|im_start|>user\n"),
    "words and a special token": ([" = 4<|im_end|>"], "2 + 2 = 4<|im_end|>\nand"),
    "plain": (["\n"], " = 4\n<|im_end|>"),
    "none": (["xyz"], " = 4<|im_end|> 5"),
    "two": (["<|im_start|>", "<|im_end|>"], " = 4<|im_end|>\n<|im_start|>"),
}


@pytest.mark.parametrize("case", STOPS)
@pytest.mark.parametrize("block_length", [1, 5, 32])
def test_a_stop_sequence_may_be_a_special_token(case, block_length, monkeypatch):
    """Ends where `hf` does, whose answer is the text before the stop, without special tokens."""
    from tests.models.a3_llama.test_infilling_templates import kind

    tokenizer, (until, answer) = kind("byte_level"), STOPS[case]
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, slot_start="left_token")
    ids = tokenizer.encode(answer, add_special_tokens=False)
    start = len(tokenizer.encode("<s>2 + 2", add_special_tokens=False))
    forward = model.lm_head.forward
    settings = {"tokenizer": tokenizer, "device": "cpu", "batch_size": 1}

    def prompted(lm):
        return lm.generate_until(asking([("<s>2 + 2", {"until": until, "max_gen_toks": len(ids)})]), disable_tqdm=True)[
            0
        ]

    written = []

    def scripted(hidden):  # one row is asked at a time: the next of the answer
        logits = forward(hidden)
        if not hidden.numel():  # a pass without slots
            return logits
        logits[..., ids[min(len(written), len(ids) - 1)]] += 1000.0
        written.append(1)
        return logits

    monkeypatch.setattr(model.lm_head, "forward", scripted)
    answers = []
    for lm in (
        HFLM(model, **settings),
        A3LM(model, block_length=block_length, **settings),
        CausalLM(model, **settings),
    ):
        written.clear()
        answers.append(prompted(lm))
        assert len(written) <= len(ids)
    assert start and answers[0] == answers[1] == answers[2]
    if case == "a special token":
        assert answers[0] == "2 + 2 = 4"


def test_long_contexts_are_cut_as_hf_cuts_them_and_said_once(source, caplog, monkeypatch):
    from a3_hf.evaluation.lm_harness import batched_lm as batched

    said = []
    monkeypatch.setattr(batched.logger, "warning", said.append)
    a3 = like(source, batch_size=2)
    long, short = " ".join(f"w{i % 50}" for i in range(300)), " ".join(f"w{i % 50}" for i in range(300 - 127, 300))
    pairs = [(long, " w3 w4"), (long, " w3 w4"), (short, " w3 w4")]
    answers = a3.loglikelihood(asking(pairs, task="long"), disable_tqdm=True)
    # 127 tokens of context and 2 to score: what HFLM keeps
    assert [answer[0] for answer in answers] == pytest.approx([answers[2][0]] * 3, abs=1e-3)
    assert len(said) == 1 and "2 of 3 requests" in said[0] and a3.get_model_info()["truncated"] == {"long": 2}
    with pytest.raises(ValueError, match="has 300 tokens: expected at most 128"):
        a3.loglikelihood(asking([("w1", " " + long)]), disable_tqdm=True)


def test_rolling_scores_every_token_once(source):
    a3 = like(source, batch_size=2, max_length=16)
    text = " ".join(f"w{i % 50}" for i in range(40))
    (total,) = a3.loglikelihood_rolling(asking([(text,)], kind="loglikelihood_rolling"), disable_tqdm=True)
    ids = a3.tok_encode(text)
    expected, start = 0.0, 0
    while start < len(ids):
        end = min(start + 16, len(ids))
        # lm-eval's windows: the last one is as long as the others, its context what came before
        context = [a3.prefix_token_id] if start == 0 else ids[min(start, end - 16) - 1 : start]
        expected += chain(a3, context, ids[start:end], [])[0]
        start = end
    assert total == pytest.approx(expected, abs=1e-3)
    assert a3.speed.table()["loglikelihood_rolling"]["tokens"] == 40


@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": 4},
        {"decoding": "speculative", "draft_tokens": 3},
        {"decoding": "dynamic", "criterion": "entropy", "tokens_per_step": 2},
    ],
)
def test_a_continuation_is_what_the_model_generates(source, settings):
    a3 = like(source, batch_size=2, block_length=8, **settings)
    kwargs = {"until": [], "max_gen_toks": 8, "do_sample": False}
    requests = asking([("w1 w2 w3", kwargs), ("w5", kwargs), ("w7 w8", kwargs)], kind="generate_until")
    config = {key: value for key, value in a3.settings()["decoding"].items()}
    for request, text in zip(requests, a3.generate_until(requests, disable_tqdm=True), strict=True):
        ids = torch.tensor([[1, *a3.tok_encode(request.args[0])]])
        output = a3.model.generate_any_order(ids, max_new_tokens=8, eos_token_id=2, pad_token_id=2, seed=0, **config)
        written = output.sequences[0, ids.shape[1] :][output.commit_step[0, ids.shape[1] :] >= 0]
        assert text == a3.tok_decode(written.tolist())


def test_left_to_right_blocks_change_nothing_and_stop_sequences_end(source):
    kwargs = {"max_gen_toks": 24, "until": []}
    requests = asking([("w1 w2 w3", kwargs), ("w5", kwargs)], kind="generate_until")
    texts = [like(source, block_length=n).generate_until(requests, disable_tqdm=True) for n in (1, 5, 24)]
    assert texts[0] == texts[1] == texts[2]
    stop = texts[0][0].split()[4]
    cut = like(source, block_length=4)
    requests = asking([("w1 w2 w3", {**kwargs, "until": [stop]})], kind="generate_until")
    assert cut.generate_until(requests, disable_tqdm=True) == [texts[0][0][: texts[0][0].index(stop)]]
    assert cut.speed.table()["toy"]["tokens"] < 24
    assert cut_at("one. two", ["two", "."]) == "one" and cut_at("one", []) == "one"


def test_blanks_are_filled_as_infill_does(a3):
    blank = Blank(" w5 w6", length_of=" w1 w2 w3")
    requests = asking(
        [("w1 w2", blank.in_kwargs()), ("w9", Blank("", length_of=" w1").in_kwargs())], kind="generate_until"
    )
    texts = a3.generate_until(requests, disable_tqdm=True)
    output = a3.model.fill_templates(a3.tokenizer, [Template(("w1 w2", " w5 w6"), (3,))])
    assert texts[0].strip() == output.written[0][0].strip() and len(texts[0].split()) == 3
    assert len(texts[1].split()) == 1
    table = a3.speed.table()["toy"]
    assert table["tokens"] >= 4 and table["passes"] > 0

    (text,) = a3.generate_until(asking([("w1 w2", Blank(" w5 w6", lengths=(2, 5)).in_kwargs())]), disable_tqdm=True)
    chosen = a3.model.fill_templates(a3.tokenizer, [Template(("w1 w2", " w5 w6"), ((2, 5),))])
    assert text.strip() == chosen.written[0][0].strip()


FIM_TOKENS = "w50 w51 w52"


@pytest.mark.parametrize("infilling", ["prefix", "suffix_prompt", "best_of", "psm", "spm"])
def test_baselines_fill_blanks(source, infilling):
    fim = {"fim_tokens": FIM_TOKENS} if infilling in ("psm", "spm") else {}
    ar = CausalLM(str(source), device="cpu", batch_size=2, infilling=infilling, **fim)
    requests = asking(
        [(context, Blank(" w5 w6", length_of=" w1 w2 w3").in_kwargs()) for context in ("w1 w2", "w9 w8 w7")],
        kind="generate_until",
    )
    texts = ar.generate_until(requests, disable_tqdm=True)
    assert texts == ar.generate_until(requests, disable_tqdm=True) and all(
        1 <= len(text.split()) <= 3 for text in texts
    )
    base = LlamaForCausalLM.from_pretrained(source).eval()
    encode = ar.tokenizer.encode
    prompt = {
        "prefix": "w1 w2",
        "suffix_prompt": "w5 w6\nw1 w2",
        "psm": "w50 w1 w2 w51 w5 w6 w52",
        "spm": "w50 w51 w5 w6 w52 w1 w2",
    }.get(infilling)
    if prompt:
        ids = torch.tensor([[1, *encode(prompt)]])
        expected = base.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, suppress_tokens=[0, 1, 2])
        assert texts[0].split() == ar.tok_decode(expected[0, ids.shape[1] :].tolist()).split()
    (pair,) = ar.loglikelihood(asking([("w1 w2", " w3", {"suffix": " w5 w6"})]), disable_tqdm=True)
    plain = {
        "prefix": ("w1 w2", " w3"),
        "suffix_prompt": ("w5 w6\nw1 w2", " w3"),
        "best_of": ("w1 w2", " w3 w5 w6"),
        "psm": (prompt, " w3"),
        "spm": (prompt, " w3"),
    }[infilling]
    assert pair[0] == pytest.approx(ar.loglikelihood(asking([plain]), disable_tqdm=True)[0][0], abs=1e-3)
    assert pair.num_tokens == 1


@pytest.mark.parametrize("infilling", ["psm", "spm"])
def test_a_fim_middle_ends_where_the_model_says_and_fits_its_context(source, infilling, monkeypatch):
    ar = CausalLM(
        str(source), device="cpu", batch_size=2, infilling=infilling, fim_tokens=FIM_TOKENS.split(), max_length=16
    )
    assert ar.settings()["fim_tokens"] == FIM_TOKENS
    generate, calls = ar.model.generate, []

    def ended(ids, **settings):
        calls.append((ids, settings))
        output = generate(ids, **settings)
        if settings["min_new_tokens"] == 1:
            output[0, ids.shape[1] + 1] = 2  # EOS after one token
        return output

    monkeypatch.setattr(ar.model, "generate", ended)
    free, fixed = Blank(" w5 w6", lengths=(1, 4)), Blank(" w5 w6", length_of=" w1 w2 w3")
    texts = ar.generate_until(
        asking([("w1 w2", blank.in_kwargs()) for blank in (free, fixed)], kind="generate_until"), disable_tqdm=True
    )
    assert [len(text.split()) for text in texts] == [1, 3]
    assert {2 in settings["suppress_tokens"] for _, settings in calls} == {True, False}

    asked, scored = [], ar.score_batch
    monkeypatch.setattr(ar, "score_batch", lambda batch: asked.extend(batch) or scored(batch))
    words = " ".join(f"w{i}" for i in range(10, 22))
    ar.loglikelihood(asking([(words, " w3 w4", {"suffix": " w5 w6"})]), disable_tqdm=True)
    (row,) = asked
    form = ar._without_suffix(row)
    assert len(form.context) + len(form.continuation) == 16 + 1 and ar.truncated["toy"] == 1
    assert set(row.suffix) < set(form.context) and row.context[-1] in form.context
    ar.generate_until(asking([(words, fixed.in_kwargs())], kind="generate_until"), disable_tqdm=True)
    ids, _ = calls[-1]
    assert ids.shape[1] + 3 <= 16 and ar.truncated["toy"] == 2


def test_fim_tokens_are_checked(source):
    for wrong in (None, "w50 w51", "w50 w50 w51"):
        with pytest.raises(ValueError, match="fim_tokens=.*three different tokens"):
            CausalLM(str(source), device="cpu", infilling="psm", fim_tokens=wrong)
    with pytest.raises(ValueError, match="fim_tokens=.*infilling='prefix'"):
        CausalLM(str(source), device="cpu", fim_tokens=FIM_TOKENS)
    with pytest.raises(ValueError, match="no token '<fim>'"):
        CausalLM(str(source), device="cpu", infilling="spm", fim_tokens="<fim> w51 w52")


def test_best_of_takes_the_sample_that_fits_the_suffix(source):
    """Against the same samples, scored one by one."""
    ar = CausalLM(str(source), device="cpu", infilling="best_of", num_samples=6)
    texts = [("w1", [4]), ("w2", [7]), ("w3", [9])]
    ids, blank = [5, 6], Blank(" w5 w6", length_of=" w1")
    scores = []
    for _, tokens in texts:
        row = torch.tensor([[*ids, *tokens, *ar.tokenizer.encode("w5 w6")]])
        with torch.no_grad():
            log_probs = ar.model(row).logits[0, :-1].log_softmax(-1)
        scores.append(log_probs.gather(1, row[0, 1:, None]).flatten()[1:].sum())
    assert ar._likeliest(ids, texts, blank) == int(torch.stack(scores).argmax())


def test_a_baseline_ends_at_a_sentence_where_the_length_is_its_own(source, tokenizer, monkeypatch):
    ar = CausalLM(str(source), device="cpu")
    ar.tokenizer = tokenizer
    ids = tokenizer.encode("The dog ran home. Tom was happy. And")
    text, kept = ar._ended([], ids, Blank(lengths=(1, 40), sentences=2))
    assert text == "The dog ran home. Tom was happy." and tokenizer.decode(kept).startswith(text)
    assert ar._ended([], ids, Blank(lengths=(1, 40)))[1] == ids


def test_an_a3_checkpoint_under_a3_ar_is_its_content_stream(source, tmp_path):
    model = A3LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.query_embed.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    one, other = (CausalLM(str(path), device="cpu").loglikelihood(asking(PAIRS)) for path in (tmp_path, source))
    assert one == other


def test_a_killed_run_goes_on_from_lm_evals_cache(source, tmp_path, monkeypatch):
    path = str(tmp_path / "cache.db")
    whole = like(source, batch_size=2).loglikelihood(asking(PAIRS), disable_tqdm=True)
    lm = like(source, batch_size=2)
    score_batch, calls = lm.score_batch, []

    def struck(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score_batch(batch)

    lm.score_batch = struck
    with pytest.raises(KeyboardInterrupt):
        CachingLM(lm, path).loglikelihood(asking(PAIRS))
    again = like(source, batch_size=2)
    answers = CachingLM(again, path).loglikelihood(asking(PAIRS))
    assert [one[0] for one in answers] == pytest.approx([one[0] for one in whole], abs=1e-3)
    assert all(isinstance(one, LogLikelihood) for one in answers) and again.speed.table()["toy"]["requests"] == 2

    kwargs = {"until": [], "max_gen_toks": 4}
    texts = CachingLM(again, path).generate_until(asking([("w1", kwargs)], kind="generate_until"))
    unused = like(source)
    unused.continue_batch = None
    assert CachingLM(unused, path).generate_until(asking([("w1", kwargs)], kind="generate_until")) == texts
    with pytest.raises(ValueError, match="a cache of another model or other settings: .*order was"):
        CachingLM(like(source, order="right_to_left"), path)


def test_two_processes_answer_as_one(source, tmp_path):
    """Through lm-eval's own splitting of the items."""
    task = tmp_path / "toy.yaml"
    items = [{"text": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{3 * i}"], "gold": i % 2} for i in range(9)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    fields = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "items.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    task.write_text(json.dumps(fields))
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys
            import lm_eval
            from lm_eval.tasks import TaskManager
            from a3_hf.evaluation.lm_harness.a3_lm import A3LM

            lm = A3LM(sys.argv[1], device="cpu", batch_size=2, order="random", num_orders=2)
            manager = TaskManager(include_defaults=False, include_path=sys.argv[2])
            results = lm_eval.simple_evaluate(lm, tasks=["toy"], task_manager=manager, bootstrap_iters=0)
            if lm.rank == 0:
                samples = sorted(results["samples"]["toy"], key=lambda sample: sample["doc_id"])
                answers = [[round(answer[0][0], 4) for answer in sample["resps"]] for sample in samples]
                score = results["results"]["toy"]["acc,none"]
                json.dump({"score": score, "answers": answers, "world": lm.world_size}, open(sys.argv[3], "w"))
            """
        )
    )
    outputs = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path.cwd()),
        }
        done = subprocess.run(
            [sys.executable, *launcher, str(script), str(source), str(tmp_path), str(out)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(json.loads(out.read_text()))
    assert [one.pop("world") for one in outputs] == [1, 2]
    assert outputs[0] == outputs[1] and len(outputs[0]["answers"]) == 9


def saved_adapter(source, rows: str, path: Path) -> PeftModel:
    """An adapter with weights that change its model's answers, saved without a tokenizer."""
    adapted = attach(load_model(str(source)), LoraArguments(r=4, rows=rows))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(path)
    return adapted.eval()


def test_an_adapter_is_loaded_from_its_folder_alone_or_beside_its_base(source, tmp_path):
    saved_adapter(source, "slots", tmp_path)
    alone = like(tmp_path, batch_size=4).loglikelihood(asking(PAIRS), disable_tqdm=True)
    beside = like(source, peft=str(tmp_path), batch_size=4).loglikelihood(asking(PAIRS), disable_tqdm=True)
    plain = like(source, batch_size=4).loglikelihood(asking(PAIRS), disable_tqdm=True)
    assert alone == beside and abs(alone[0][0] - plain[0][0]) > 1e-2


@pytest.mark.parametrize("rows", ["slots", "all"])
def test_an_adapter_under_a3_ar_is_its_content_stream(source, rows, tmp_path):
    adapted = saved_adapter(source, rows, tmp_path)
    ar, plain = (CausalLM(str(path), device="cpu", dtype="float32", batch_size=4) for path in (tmp_path, source))
    assert type(ar.model) is LlamaForCausalLM and ar.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    answers = ar.loglikelihood(asking(PAIRS), disable_tqdm=True)
    for (context, continuation), answer in zip(PAIRS, answers, strict=True):
        row = ar._encode((context, continuation), "toy")
        ids = torch.tensor([[*row.context, *row.continuation]])
        scored = torch.arange(ids.shape[1])[None] >= len(row.context)
        log_probs, _ = next_token_scores(adapted, ids, torch.ones_like(ids), scored)
        assert answer[0] == pytest.approx(float(log_probs.sum()), abs=1e-4)
    wanted = plain.loglikelihood(asking(PAIRS), disable_tqdm=True)
    if rows == "slots":
        assert answers == wanted
    else:
        assert max(abs(one[0] - other[0]) for one, other in zip(answers, wanted, strict=True)) > 1e-2

    requests = asking([("w1 w2", {"until": [], "max_gen_toks": 8})], kind="generate_until")
    texts = [one.generate_until(requests, disable_tqdm=True) for one in (ar, plain)]
    assert (texts[0] == texts[1]) == (rows == "slots")


def test_a3_ar_takes_an_adapters_base_and_no_adapted_model(source, tmp_path):
    adapted = saved_adapter(source, "slots", tmp_path / "adapter")
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    ar = CausalLM(str(tmp_path / "adapter"), base=str(moved), device="cpu")
    assert ar.identity["arguments"]["pretrained"] == str(moved)
    with pytest.raises(ValueError, match="a model with adapters: expected its folder"):
        CausalLM(adapted, tokenizer=ar.tokenizer)
    with pytest.raises(ValueError, match="base=.*leave it out"):
        CausalLM(str(source), base=str(moved), device="cpu")


def test_models_are_registered_beside_lm_evals_own():
    assert get_model("a3") is A3LM and get_model("a3_ar") is CausalLM and get_model("hf") is HFLM


def test_auto_batch_size_and_chat_templates(source):
    lm = like(source, batch_size="auto", max_batch_size=4)
    assert lm.loglikelihood(asking(PAIRS), disable_tqdm=True)[0][0] == pytest.approx(
        like(source, batch_size=1).loglikelihood(asking(PAIRS), disable_tqdm=True)[0][0], abs=1e-3
    )
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"
    assert lm.apply_chat_template([{"role": "user", "content": "w1"}]) == "w1 w9 "


def test_blanks_survive_the_trip_through_gen_kwargs():
    for blank in (Blank(" w1", length_of="w2"), Blank("", lengths=(1, 4), sentences=3)):
        rest, again = take_blank({"until": ["."], **json.loads(json.dumps(blank.in_kwargs()))})
        assert again == blank and rest == {"until": ["."]}
    assert take_blank({"until": []}) == ({"until": []}, None)
    answer = LogLikelihood(-1.5, True, 3)
    import pickle

    assert pickle.loads(pickle.dumps(answer)) == (-1.5, True) and pickle.loads(pickle.dumps(answer)).num_tokens == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"order": "sideways"}, "left_to_right, right_to_left, random, spans"),
        ({"decoding": "magic"}, "groupwise, dynamic, speculative, refine"),
        ({"num_orders": 2}, "num_orders=2 with order='left_to_right'"),
        ({"num_orders": 0}, "num_orders=0"),
        ({"order": "spans"}, "span_length=None"),
        ({"group_size": 0}, "group_size=0"),
        ({"block_length": 0}, "block_length=0"),
        ({"criterion": "entropy"}, "criterion='entropy' has no effect with strategy='groupwise'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(source, settings, message):
    with pytest.raises(ValueError, match=message):
        like(source, **settings)


@pytest.mark.parametrize("settings", [{"infilling": "suffix"}, {"num_samples": 0}, {"temperature": 0.0}])
def test_settings_of_the_baseline_that_do_not_fit_are_refused(source, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        CausalLM(str(source), device="cpu", **settings)


def test_requests_that_can_not_be_answered_are_refused(a3, source):
    with pytest.raises(ValueError, match="no token of its own"):
        a3.loglikelihood(asking([("w1", "  ")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks=128 of toy"):
        a3.generate_until(asking([("w1", {"max_gen_toks": 128, "until": []})]), disable_tqdm=True)
    with pytest.raises(ValueError, match="'num_beams', which has no effect"):
        a3.generate_until(asking([("w1", {"num_beams": 2, "until": []})]), disable_tqdm=True)
    with pytest.raises(ValueError, match="exactly one of them"):
        Blank("", length_of="w1", lengths=(1, 2))
    with pytest.raises(ValueError, match="leave no room"):
        a3.generate_until(asking([("w1", Blank(" w1" * 130, length_of="w1").in_kwargs())]), disable_tqdm=True)


def test_a_tokenizer_without_bos_begins_with_eos_and_without_either_is_refused(source):
    lm = like(source)
    lm.tokenizer.bos_token = None
    ids = lm.tok_encode("w11 w12")
    (answer,) = lm.loglikelihood(asking([("", "w11 w12")]), disable_tqdm=True)
    assert answer[0] == pytest.approx(chain(lm, [lm.tokenizer.eos_token_id], ids, [])[0], abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        like(source, tokenizer=tokenizer)
