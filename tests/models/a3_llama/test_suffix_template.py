"""Text after the last blank, read before all else: against the same text written out by hand."""

import pytest
import torch

from a3_hf import A3LlamaForCausalLM, DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM
from a3_hf.evaluation.lm_harness.a3_lm import A3LM
from a3_hf.evaluation.tasks.requests import Blank
from a3_hf.models.a3_llama.infilling_templates import Template
from tests.conftest import tiny_config, tiny_model
from tests.models.a3_llama.test_infilling_batches import other_model

WORDS = "Later:{suffix}\n\n"
TEXTS = ["The dog <blank:3> home. Tom was happy.", "One <blank:2>, the cat <blank:3> on a mat!", "Tom was <blank:2>"]
# the words by hand, the text with blanks, and what comes back at the end
BY_HAND = [
    ("Later: home. Tom was happy.\n\n", "The dog <blank:3>", " home. Tom was happy."),
    ("Later: on a mat!\n\n", "One <blank:2>, the cat <blank:3>", " on a mat!"),
    ("", "Tom was <blank:2>", ""),
]


@pytest.fixture(params=["stored", "given"])
def model_and_words(request, tokenizer):
    """A model that has the words, or one to which each call gives them."""
    stored = {"suffix_template": WORDS} if request.param == "stored" else {}
    model = tiny_model(vocab_size=len(tokenizer), slot_start="left_token", **stored)
    return model, {} if stored else {"suffix_template": WORDS}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "dynamic", "tokens_per_step": 2},
        {"strategy": "speculative", "do_sample": True, "seed": 3},
        {"strategy": "refine"},
    ],
    ids=lambda settings: settings.get("strategy", "groupwise"),
)
def test_it_is_the_text_written_out_by_hand(model_and_words, tokenizer, settings):
    model, words = model_and_words
    together = model.infill(tokenizer, TEXTS, **words, **settings)
    for text, filled, (front, blanked, end) in zip(TEXTS, together, BY_HAND, strict=True):
        by_hand = model.infill(tokenizer, front + blanked, suffix_template="", **settings)
        assert by_hand.startswith(front)
        assert filled == by_hand.removeprefix(front) + end == model.infill(tokenizer, text, **words, **settings)
    assert together[0] != model.infill(tokenizer, TEXTS[0], suffix_template="", **settings)


def test_all_that_is_returned_belongs_to_the_text(model_and_words, tokenizer):
    model, words = model_and_words
    output = model.infill(
        tokenizer, TEXTS, do_sample=True, seed=1, num_return_sequences=2, return_outputs=True, **words
    )
    assert output.lengths == [(3,), (3,), (2, 3), (2, 3), (2,), (2,)]
    for text, written, template in zip(output.texts, output.written, [one for one in TEXTS for _ in "12"], strict=True):
        whole = ""
        for piece, part in zip(Template.parse(template).pieces, [*written, ""], strict=True):
            whole += piece + part
        assert text == whole


def test_lengths_are_chosen_with_the_suffix_at_its_place(model_and_words, tokenizer):
    model, words = model_and_words
    text = "The dog <blank:1..4> home. Tom was happy."
    first, second = (
        model.infill(tokenizer, text, return_outputs=True, **one) for one in (words, {"suffix_template": ""})
    )
    assert first.lengths == second.lengths and first.length_scores == second.length_scores


def test_rewrite_reads_the_suffix_first_too(model_and_words, tokenizer):
    model, words = model_and_words
    text = "The dog ran home. Tom was happy."
    filled = model.rewrite(tokenizer, text, [(8, 11)], length=3, **words)
    assert filled == model.infill(tokenizer, "The dog <blank:3> home. Tom was happy.", **words)


def test_lm_evals_fills_read_it_first_too(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), slot_start="left_token", suffix_template=WORDS, dtype=torch.float32)
    written = A3LM(model, tokenizer=tokenizer, batch_size=2).fill_batch(
        ["The dog ", "Tom was "], [Blank(" home. Tom was happy.", length_of="ran home"), Blank("", length_of="sad")]
    )
    texts = [f"The dog <blank:{written[0].tokens}> home. Tom was happy.", f"Tom was <blank:{written[1].tokens}>"]
    output = model.infill(tokenizer, texts, return_outputs=True)
    assert [one.text.strip() for one in written] == [blank.strip() for (blank,) in output.written]


def test_the_controls_take_it_from_the_call(tokenizer):
    model = other_model(tokenizer, DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM)
    front, blanked, end = BY_HAND[0]
    by_hand = model.infill(tokenizer, front + blanked)
    assert model.infill(tokenizer, TEXTS[0], suffix_template=WORDS) == by_hand.removeprefix(front) + end


@pytest.mark.parametrize("wrong", ["Later:", "{suffix}{suffix}", 5])
def test_words_without_a_place_for_the_suffix_are_refused(model, tokenizer, wrong):
    with pytest.raises(ValueError, match="suffix_template="):
        model.infill(tokenizer, TEXTS[0], suffix_template=wrong)
    with pytest.raises(ValueError, match="suffix_template="):
        tiny_config(suffix_template=wrong)


def test_a_text_too_long_with_the_words_is_refused(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=40)
    assert model.infill(tokenizer, TEXTS[0])
    with pytest.raises(ValueError, match="more than the model's context"):
        model.infill(tokenizer, TEXTS[0], suffix_template=40 * "and " + "{suffix}")


def test_it_is_stored_with_the_model(tmp_path):
    tiny_model(suffix_template=WORDS).save_pretrained(tmp_path)
    assert A3LlamaForCausalLM.from_pretrained(tmp_path).config.suffix_template == WORDS
