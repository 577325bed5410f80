"""Whose answers a cache holds: whatever reaches the model and changes an answer, the cache of another model is refused."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.model import CachingLM
from transformers import AutoTokenizer, LlamaForCausalLM

from a3_hf.evaluation.lm_harness.a3_lm import A3LM
from a3_hf.evaluation.lm_harness.causal_lm import CausalLM
from tests.evaluation.test_lm_harness import PAIRS, asking

MODELS = {"a3": A3LM, "a3_ar": CausalLM}


@pytest.fixture
def checkpoint(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def made(kind, path, **settings):
    start = {"slot_start": "left_token"} if kind == "a3" else {}
    return MODELS[kind](str(path), device="cpu", **{**start, **settings})


def fill(cache, lm):
    return CachingLM(lm, str(cache)).loglikelihood(asking(PAIRS))


def other_weights(path):
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1e-3
    model.save_pretrained(path)


def other_tokenizer(path):
    file = path / "tokenizer.json"
    words = json.loads(file.read_text())
    vocab = words["model"]["vocab"]
    vocab["w1"], vocab["w2"] = vocab["w2"], vocab["w1"]
    file.write_text(json.dumps(words))


def other_generation_config(path):
    (path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 2.0}))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"add_bos_token": True}, "add_bos_token"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"revision": "other"}, "revision"),
        ({"max_length": 64}, "max_length"),
        ({"prefix_token_id": 5}, "prefix_token_id"),
        ({"attn_implementation": "eager"}, "attn_implementation"),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps"),
    ],
)
def test_other_arguments_are_refused(checkpoint, tmp_path, kind, settings, named):
    fill(tmp_path / "cache.db", made(kind, checkpoint))
    with pytest.raises(ValueError, match=rf"use_cache .*{named}"):
        fill(tmp_path / "cache.db", made(kind, checkpoint, **settings))


def test_another_slot_start_is_refused(checkpoint, tmp_path):
    fill(tmp_path / "cache.db", made("a3", checkpoint))
    with pytest.raises(ValueError, match="slot_start"):
        fill(tmp_path / "cache.db", made("a3", checkpoint, slot_start="query_embed"))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("change", "named"),
    [(other_weights, "weights"), (other_tokenizer, "tokenizer"), (other_generation_config, "config")],
)
def test_another_model_at_the_same_path_is_refused(checkpoint, tmp_path, kind, change, named):
    fill(tmp_path / "cache.db", made(kind, checkpoint))
    change(checkpoint)
    with pytest.raises(ValueError, match=f"use_cache .*{named} was"):
        fill(tmp_path / "cache.db", made(kind, checkpoint))


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_model_again_is_not(checkpoint, tmp_path, kind):
    first = fill(tmp_path / "cache.db", made(kind, checkpoint))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    again = made(kind, checkpoint, batch_size=3, max_batch_size=5)
    again.score_batch = None  # every answer comes from the cache
    assert fill(tmp_path / "cache.db", again) == first


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"softmax_dtype": "float32"}, "softmax_dtype='float32' has no effect"),
        ({"truncation": True}, "truncation=True has no effect"),
        ({"logits_cache": False}, "logits_cache=False has no effect"),
        ({"think_end_token": "</s>"}, "think_end_token"),
        ({"backend": "seq2seq"}, "backend='seq2seq'"),
        ({"autogptq": True}, "autogptq=True"),
        ({"batch_sise": 4}, "unknown option 'batch_sise'; did you mean 'batch_size'"),
    ],
)
def test_model_args_are_used_or_refused(source, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        made(kind, source, **settings)
