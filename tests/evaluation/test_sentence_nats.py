"""Nats of a blanked sentence against a LLaMA's own next-token probabilities, and against a pass per token."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from a3_hf import A3LlamaForCausalLM
from a3_hf.evaluation.measures.sentence_nats import (
    IN_PLACE,
    PREFIX_ALONE,
    arrange,
    blank_nats,
    mean_nats,
    split_story,
)
from tests.conftest import tiny_config, tiny_model

STORIES = [
    split_story(["The dog ran.", "Tom was happy.", " So was his dog. ", "One day it sat.", "The cat ran home!"]),
    split_story(["One day, Tom sat.", "The cat ran.", "On a mat!", "The dog was home.", "So happy."]),
    split_story(["Tom.", "Dog.", "The cat sat on a mat, so Tom was happy.", "One day.", "Home."]),
]
WORDS = "Later:{suffix}\nAll:\n"


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    """A LLaMA's folder, whose A3 model starts its slots from the token on their left."""
    folder = tmp_path_factory.mktemp("llama")
    settings = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=512).to_dict()
    del settings["model_type"], settings["slot_start"]
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def test_a_story_is_shown_in_each_way(tokenizer):
    before, target, after = STORIES[0]
    assert STORIES[0] == ("The dog ran. Tom was happy.", " So was his dog.", " One day it sat. The cat ran home!")
    shown = {}
    for way in (IN_PLACE, PREFIX_ALONE, WORDS):
        row = arrange(tokenizer, STORIES[0], way)
        assert row[0][0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in row[0][1:]
        shown[way] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in row]
    assert shown == {
        IN_PLACE: [before, target, after],
        PREFIX_ALONE: [before, target, ""],
        WORDS: [f"Later:{after}\nAll:\n{before}", target, ""],
    }


@pytest.mark.parametrize("way", [PREFIX_ALONE, WORDS])
def test_with_nothing_after_the_blank_they_are_the_llamas_own(llama, tokenizer, way):
    rows = [arrange(tokenizer, story, way) for story in STORIES]
    model = A3LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    nats = blank_nats(model, rows, batch_size=2)
    plain = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float64).eval()
    for (before, target, _), found in zip(rows, nats, strict=True):
        ids = torch.tensor([[*before, *target]])
        with torch.no_grad():
            log_probs = plain(ids).logits[0].log_softmax(dim=-1)
        expected = -sum(log_probs[len(before) + n - 1, token].item() for n, token in enumerate(target))
        assert found == pytest.approx(expected, rel=1e-5)  # LLaMA's norms round to float32
    assert mean_nats(nats, rows) == pytest.approx(sum(nats) / sum(len(target) for _, target, _ in rows))


def test_in_place_each_token_sees_both_sides_and_the_blank_so_far(tokenizer):
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    rows = [arrange(tokenizer, story, IN_PLACE) for story in STORIES]
    shown = []
    nats = blank_nats(model, rows, batch_size=2, track=lambda batches, about: shown.append(about) or batches, about="x")
    assert shown == ["x"]
    for (before, target, after), found in zip(rows, nats, strict=True):
        expected = 0.0
        for number, token in enumerate(target):
            given = [*before, *after, *target[:number]]  # as they are read, one token after another
            first, last = len(before), len(before) + len(target)
            places = [*range(first), *range(last, last + len(after)), *range(first, first + number)]
            with torch.no_grad():
                logits = model(
                    torch.tensor([given]),
                    position_ids=torch.tensor([places]),
                    group_ids=torch.arange(len(given))[None],
                    target_position_ids=torch.tensor([[first + number]]),
                    target_group_ids=torch.tensor([[len(given)]]),
                ).logits
            expected -= logits[0, 0].log_softmax(dim=-1)[token].item()
        assert found == pytest.approx(expected, rel=1e-5)
