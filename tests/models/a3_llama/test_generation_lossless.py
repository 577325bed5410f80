"""`custom_generate=lossless` against `generate` itself."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from a3_hf import lossless
from a3_hf.models.a3_draft_head import drafter
from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.a3_draft_head.drafter import attach_draft_head
from a3_hf.models.a3_draft_head.modeling_a3_draft_head import DraftHead
from tests.conftest import tiny_model

SHAPE = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "initializer_range": 0.8,
    "slot_start": "left_token",
}


@pytest.fixture(params=[False, True])
def model(request, monkeypatch):
    monkeypatch.setattr(drafter, "LEAST_PROBABILITY", 0.0)
    model = tiny_model(**SHAPE).double().eval()
    if request.param:
        attach_draft_head(model, DraftHead(DraftHeadConfig.for_base(model.config, rank=2, sampler_size=4)))
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 15},
        {"max_length": 12},
        {"max_new_tokens": 9, "eos_token_id": [3, 4]},
        {"max_new_tokens": 9, "eos_token_id": 5, "pad_token_id": 1, "repetition_penalty": 1.5},
        {"max_new_tokens": 9, "suppress_tokens": [2, 7], "bad_words_ids": [[6], [1, 8]]},
        {"max_new_tokens": 7, "forced_eos_token_id": 3, "eos_token_id": 3},
    ],
)
def test_the_text_is_that_of_generate(model, settings):
    ids = torch.randint(0, 13, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(7) >= torch.tensor([[0], [3], [1]])).long()
    settings = {"pad_token_id": 0, "do_sample": False, "attention_mask": mask, **settings}
    wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, custom_generate=lossless, **settings), wanted)
    output = model.generate(ids, custom_generate=lossless, return_dict_in_generate=True, **settings)
    assert torch.equal(output.sequences, wanted)


def test_samples_are_as_likely_as_those_of_generate(model):
    """A chi-squared test over the first two tokens, with the same warpers."""
    ids = torch.tensor([[1, 2, 1]])
    settings = {"do_sample": True, "max_new_tokens": 2, "temperature": 1.3, "top_k": 5, "pad_token_id": 0}
    counts = torch.zeros(2, 169)
    for number, own in enumerate(({}, {"custom_generate": lossless})):
        torch.manual_seed(number)
        texts = model.generate(ids, num_return_sequences=20_000, eos_token_id=None, **settings, **own)
        counts[number] = torch.bincount(texts[:, 3] * 13 + texts[:, 4], minlength=169)
    seen = counts.sum(dim=0) > 20
    distance = ((counts[0] - counts[1]) ** 2 / counts.sum(dim=0))[seen].sum()
    degrees = int(seen.sum()) - 1
    assert degrees > 10 and distance < degrees + 5 * (2 * degrees) ** 0.5


class Mine(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "generation mode='beam_search'"),
        ({"no_repeat_ngram_size": 2}, "logits_processor='NoRepeatNGram"),
        ({"use_cache": False}, "use_cache=False"),
        ({"logits_processor": LogitsProcessorList([Mine()])}, "logits_processor='Mine'"),
        (
            {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: torch.ones(len(ids)).bool()])},
            "stopping_criteria=",
        ),
        ({"max_time": 3.0}, "stopping_criteria='MaxTimeCriteria'"),
        ({"min_new_tokens": 3, "eos_token_id": 5}, "logits_processor='MinLength"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores=True"),
    ],
)
def test_what_generate_has_and_this_has_not_is_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate(
            torch.tensor([[1, 2, 1]]), custom_generate=lossless, max_new_tokens=4, pad_token_id=0, **settings
        )
