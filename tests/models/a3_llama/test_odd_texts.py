"""Odd calls of infill, rewrite, score and the pipeline: each says in words what is wrong, or is right."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast, pipeline

from a3_hf import A3GenerationConfig
from a3_hf.models.a3_llama.infilling_templates import Template
from tests.conftest import tiny_model
from tests.models.a3_llama.test_infilling_templates import kind


@pytest.fixture(scope="module")
def tokenizer():
    return kind("byte_level")


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, slot_start="left_token")


@pytest.fixture
def refuses(model, monkeypatch):
    """Calls that are refused, and before any pass of the model."""
    forward = model.forward

    def check(call, message):
        passes = []
        monkeypatch.setattr(model, "forward", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs))
        with pytest.raises(ValueError, match=message):
            call()
        assert not passes

    return check


HUGE = "9" * 5000
INFILLS = [
    ("", {}, "text='' holds no blank marker"),
    (" ", {}, "holds no blank marker"),
    ("no blank", {}, "holds no blank marker"),
    (r"\<blank:3>", {}, "holds no blank marker"),
    ([], {}, "empty list"),
    ((), {}, "empty list"),
    (None, {}, "text is a NoneType: expected a string or a list"),
    (5, {}, "text is a int"),
    (b"<blank:3>", {}, "text is a bytes"),
    ({"text": "<blank:3>"}, {}, "text is a dict"),
    ([None], {}, "text is a NoneType, None: expected a string"),
    (["<blank:2>", 3], {}, "text is a int, 3"),
    (["<blank:2>", "none"], {}, "text='none' holds no blank marker"),
    ([["<blank:2>"]], {}, "text is a list"),
    ("<blank:0>", {}, "length 0"),
    ("<blank:00>", {}, "length 0"),
    ("<blank:-1>", {}, "'<blank:-1>': expected <blank:N>"),
    ("<blank:1.5>", {}, "'<blank:1.5>': expected <blank:N>"),
    ("<blank:1..>", {}, "'<blank:1..>': expected <blank:N>"),
    ("<blank:3..1>", {}, "the range 3..1"),
    ("<blank:0..0>", {}, "the range 0..0"),
    ("<blank: 3>", {}, "holds the blank marker .*: expected <blank:N>"),
    ("<blank:3", {}, "holds the blank marker .*: expected <blank:N>"),
    ("<blank:AUTO>", {}, "holds the blank marker .*: expected <blank:N>"),
    ("<blank>", {}, "holds the blank marker .*: expected <blank:N>"),
    ("<blank:99999999999>", {}, "99999999999 tokens at most, take 100000000000 positions"),
    ("a <blank:1..99999999999> b", {}, "more than the model's context"),
    (f"<blank:{HUGE}>", {}, "holds the blank marker .*: expected <blank:N>"),
    ("<blank:64> and <blank:64>", {}, "more than the model's context"),
    ("<blank:auto>", {"auto_lengths": (1, 10**12)}, "more than the model's context"),
    ("<blank:auto>", {"auto_lengths": (0, 3)}, "auto_lengths has the range 0..3"),
    ("<blank:auto>", {"auto_lengths": (3, 1)}, "auto_lengths has the range 3..1"),
    ("<blank:2>", {"auto_lengths": (3, 1)}, "auto_lengths has the range 3..1"),
    ("<blank:auto>", {"auto_lengths": 4}, "auto_lengths=4: expected two numbers"),
    ("<blank:auto>", {"auto_lengths": (1, 2, 3)}, "expected two numbers"),
    ("<blank:auto>", {"auto_lengths": (1.0, 2.0)}, "auto_lengths has the range 1.0..2.0"),
    ("<blank:auto>", {"auto_lengths": "1..4"}, "auto_lengths='1..4'"),
    ("<blank:2>", {"max_new_tokens": 4}, "max_new_tokens=4: expected None for a text with blanks"),
    ("<blank:auto>", {"generation_config": A3GenerationConfig(max_new_tokens=4)}, "max_new_tokens=4"),
    ("<blank:2>", {"max_new_tokens": 4, "forced_eos_token_id": 1}, "max_new_tokens=4"),
    ("<blank:2>", {"forced_eos_token_id": 1}, "forced_eos_token_id"),
    ("<blank:2>", {"input_ids": torch.zeros(1, 3).long()}, "input_ids"),
    ("<blank:2>", {"blank_mask": torch.ones(1, 3).bool()}, "blank_mask"),
    ("<blank:2>", {"attention_mask": torch.ones(1, 3)}, "attention_mask"),
    ("<blank:2>", {"temperatur": 0.5}, "temperatur=0.5 is not an option"),
    ("<blank:auto>", {"strategy": "best"}, "strategy='best'"),
    ("<blank:auto>", {"generation_config": {"seed": 1}}, "generation_config is a dict"),
    ("<blank:auto>", {"num_return_sequences": 0, "do_sample": True}, "num_return_sequences=0"),
    ("<blank:auto>", {"num_return_sequences": 2}, "num_return_sequences"),
    (
        "<blank:auto>",
        {"num_return_sequences": 2, "do_sample": True, "seed": [1]},
        "seed holds 1 seeds: expected an integer, or 2",
    ),
    (["<blank:1>", "<blank:auto>"], {"seed": [1]}, "seed holds 1 seeds: expected an integer, or 2"),
    ("<blank:auto>", {"seed": [1, 2]}, "seed holds 2 seeds: expected an integer, or 1"),
    ("<blank:auto>", {"seed": []}, "seed holds 0 seeds"),
]


@pytest.mark.parametrize("text, settings, message", INFILLS)
def test_infill_refuses(model, tokenizer, refuses, text, settings, message):
    refuses(lambda: model.infill(tokenizer, text, **settings), message)


REWRITES = [
    (None, [(0, 1)], {}, "text is a NoneType"),
    (["The dog"], [(0, 3)], {}, "text is a list"),
    ("", [(0, 1)], {}, r"spans holds \(0, 1\).* 0, the text's length"),
    ("The dog", [], {}, "spans is empty"),
    ("The dog", None, {}, "spans=None"),
    ("The dog", (4, 7), {}, "spans holds 4: expected"),
    ("The dog", [(4,)], {}, r"spans holds \(4,\)"),
    ("The dog", [(4.0, 7.0)], {}, r"spans holds \(4.0, 7.0\)"),
    ("The dog", ["47"], {}, "spans holds '47'"),
    ("The dog", [(True, 3)], {}, r"spans holds \(True, 3\)"),
    ("The dog", [(-3, 2)], {}, r"spans holds \(-3, 2\)"),
    ("The dog", [(7, 4)], {}, r"spans holds \(7, 4\)"),
    ("The dog", [(0, 3), (2, 4)], {}, "spans overlap"),
    ("The dog", [(0, 3), (0, 3)], {}, "spans overlap"),
    ("The dog", [(0, 3)], {"length": 0}, "length=0"),
    ("The dog", [(0, 3)], {"length": True}, "length=True"),
    ("The dog", [(0, 3)], {"length": 2.0}, "length=2.0"),
    ("The dog", [(0, 3)], {"length": None}, "length=None"),
    ("The dog", [(0, 3)], {"length": (3, 1)}, "length has the range 3..1"),
    ("The dog", [(0, 3)], {"length": (1, 2, 3)}, r"length=\(1, 2, 3\)"),
    ("The dog", [(0, 3)], {"length": 10**11}, "more than the model's context"),
    ("The dog", [(0, 3)], {"length": "auto", "auto_lengths": (2, 1)}, "auto_lengths has the range 2..1"),
    ("The dog", [(0, 3)], {"max_new_tokens": 2}, "max_new_tokens=2"),
    ("The dog", [(0, 3)], {"lengths": 2}, "lengths=2 is not an option"),
]


@pytest.mark.parametrize("text, spans, settings, message", REWRITES)
def test_rewrite_refuses(model, tokenizer, refuses, text, spans, settings, message):
    refuses(lambda: model.rewrite(tokenizer, text, spans, **settings), message)


SCORES = [
    ("", {}, "text is empty"),
    ("<s>", {}, "text is empty"),
    (None, {}, "text is a NoneType: expected a string"),
    (["The dog"], {}, "text is a list: expected a string"),
    ("The dog " * 100, {}, "more than the model's context"),
    ("The dog", {"num_orders": 2}, "num_orders=2 with order='left_to_right'"),
    ("The dog", {"num_orders": 0}, "num_orders=0"),
    ("The dog", {"num_orders": 1.5, "order": "random"}, "num_orders=1.5: expected a whole number"),
    ("The dog", {"num_orders": 10**8, "order": "random"}, "num_orders=100000000"),
    ("The dog", {"order": "best"}, "order='best'"),
    ("The dog", {"order": 3}, "order=3"),
    ("The dog", {"group_size": 0}, "group_size=0"),
    ("The dog", {"group_size": 1.5}, "group_size=1.5"),
    ("The dog", {"order": "spans"}, "span_length"),
    ("The dog", {"span_length": 2}, "span_length"),
    ("The dog", {"seed": "one", "order": "random"}, "seed='one': expected a whole number"),
    ("The dog", {"seed": 0.5}, "seed=0.5"),
]


@pytest.mark.parametrize("text, settings, message", SCORES)
def test_score_refuses(model, tokenizer, refuses, text, settings, message):
    refuses(lambda: model.score(tokenizer, text, **settings), message)


PIPELINES = [
    ("none", {}, "holds no blank marker"),
    (None, {}, "inputs holds a NoneType"),
    (7, {}, "inputs holds a int"),
    ({"text": "<blank:2>"}, {}, "inputs holds a dict"),
    (["<blank:2>", None], {}, "inputs holds a NoneType"),
    (["<blank:2>", "<blank:0>"], {}, "length 0"),
    ([["<blank:2>"]], {}, "inputs holds a list"),
    ("<blank:2>", {"return_outputs": True}, "return_outputs"),
    ("<blank:2>", {"max_new_tokens": 2}, "max_new_tokens=2"),
    ("<blank:2>", {"top": 2}, "top=2 is not an option"),
    (["<blank:2>", "<blank:2>"], {"seed": [1, 2]}, "seed holds 2 seeds"),
    ("<blank:99999999999>", {}, "more than the model's context"),
]


@pytest.mark.parametrize("inputs, settings, message", PIPELINES)
def test_the_pipeline_refuses(model, tokenizer, refuses, inputs, settings, message):
    fill = pipeline("infilling", model=model, tokenizer=tokenizer, device="cpu")
    refuses(lambda: fill(inputs, **settings), message)


TEMPLATES = [
    ((("a",), ()), "pieces has 1 texts and lengths 0 blanks"),
    ((("a",), (1,)), "pieces has 1 texts and lengths 1 blanks"),
    ((("a", None), (1,)), "pieces holds None"),
    ((("a", "b"), (0,)), "lengths holds 0"),
    ((("a", "b"), (True,)), "lengths holds True"),
    ((("a", "b"), ("auto",)), "lengths holds 'auto'"),
    ((("a", "b"), ((2, 1),)), "lengths has the range 2..1"),
]


@pytest.mark.parametrize("fields, message", TEMPLATES)
def test_templates_refuse(fields, message):
    with pytest.raises(ValueError, match=message):
        Template(*fields)


def test_templates_of_unknown_lengths_and_other_things_are_refused(model, tokenizer, refuses):
    refuses(
        lambda: model.fill_templates(tokenizer, [Template.parse("<blank:auto>")]),
        "expected a Template whose lengths are numbers or ranges",
    )
    refuses(lambda: model.fill_templates(tokenizer, ["<blank:2>"]), "expected a Template")
    refuses(lambda: model.fill_templates(tokenizer, []), "templates is empty")


@pytest.mark.parametrize("call", ["infill", "rewrite", "score"])
def test_a_tokenizer_without_bos_is_refused_before_any_work(model, tokenizer, refuses, call):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    arguments = {"infill": ("The <blank:auto>",), "rewrite": ("The dog", [(0, 3)]), "score": ("The dog",)}[call]
    refuses(lambda: getattr(model, call)(bare, *arguments), "no BOS token")


RIGHT = [
    ("<blank:1>", {}),
    ("<blank:1><blank:1>", {}),
    (" <blank:1> ", {}),
    ("<blank:1> <blank:1>", {}),
    ("\n<blank:2>\n\n", {}),
    ("\t <blank:1..1>", {}),
    ("<blank:007>", {}),
    ("<blank:auto>", {"auto_lengths": [1, 2]}),
    ("<blank:auto><blank:auto>", {"auto_lengths": (2, 3)}),
    ("<blanket> <blank:2>", {}),
    ("a < b <blank:2> > c", {}),
    ("\u202e\x00 \ufeff<blank:2>\ufffd 🙂", {}),
    ("<s></s><blank:2></s>", {}),
    ("<|im_start|>user\n<blank:2><|im_end|>", {}),
    ("The dog <blank:2>", {"seed": [3], "do_sample": True}),
    ("The dog <blank:2>", {"num_return_sequences": 1}),
    ("The dog <blank:2>", {"suppress_tokens": [5]}),
    ("The dog <blank:2>", {"eos_token_id": 1}),
    ("The dog <blank:126>"[:8] + "<blank:60>", {}),
]


@pytest.mark.parametrize("text, settings", RIGHT)
def test_odd_texts_that_are_right(model, tokenizer, text, settings):
    output = model.infill(tokenizer, [text], return_outputs=True, **settings)
    (filled,), (written,) = output.texts, output.written
    pieces = Template.parse(text).pieces
    woven = pieces[0] + "".join(fresh + piece for fresh, piece in zip(written, pieces[1:], strict=True))
    assert filled == woven and model.infill(tokenizer, text, **settings) == filled
    counts = (output.generation.commit_step[0] >= 0).sum().item()
    assert counts == sum(output.lengths[0])
