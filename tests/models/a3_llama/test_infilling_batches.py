"""Infilling: what is written where, several texts and several sequences at once, and lengths chosen for them."""

import pytest
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from a3_hf import (
    A3GenerationConfig,
    DecoupledRopeLlamaConfig,
    DecoupledRopeLlamaForCausalLM,
    MaskedDiffusionLlamaConfig,
    MaskedDiffusionLlamaForCausalLM,
)
from a3_hf.models.a3_llama.infilling_templates import Template, begins_with_space, special_token_ids
from tests.conftest import tiny_config, tiny_model
from tests.models.a3_llama.test_infilling_templates import kind

STARTS = ["query_embed", "left_token"]
STRATEGIES = {
    "groupwise": {"group_size": 2},
    "right_to_left": {"order": "right_to_left"},
    "random": {"order": "random"},
    "dynamic": {"strategy": "dynamic", "tokens_per_step": 2},
    "speculative": {"strategy": "speculative", "draft_tokens": 3},
    "refine": {"strategy": "refine"},
}
TEXTS = [
    "The dog <blank:3>'s bone <blank:2> ran.",
    "Tom <blank:1> <blank:2>",
    "def f():\n    <blank:4>\n",
    "<blank:2> ran",
]


def model_for(tokenizer, slot_start: str = "left_token"):
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return tiny_model(vocab_size=len(tokenizer), slot_start=slot_start, **ids)


def other_model(tokenizer, config_class, model_class):
    settings = tiny_config(vocab_size=len(tokenizer) + 1).to_dict()
    for name in ("model_type", "slot_start"):
        settings.pop(name, None)
    if config_class is MaskedDiffusionLlamaConfig:
        settings["mask_token_id"] = len(tokenizer)
    torch.manual_seed(0)
    return model_class(config_class(**settings)).eval()


def only(wanted: list[int], favour: float = 100.0):
    """A logits hook that makes a model want these tokens."""

    def hook(step, columns, logits):
        logits = logits.clone()
        logits[..., wanted] += favour
        return logits

    return hook


def check_spaces(tokenizer, model, **settings):
    """A model that wants tokens without a space, and special ones most of all."""
    inside = tokenizer.encode("bone", add_special_tokens=False)
    wanted = [*special_token_ids(tokenizer, len(tokenizer)), *inside]
    output = model.infill(tokenizer, TEXTS, return_outputs=True, logits_hook=only(wanted), **settings)
    spaced, special = set(begins_with_space(tokenizer)), set(special_token_ids(tokenizer, len(tokenizer)))
    generation = output.generation
    for row, text in enumerate(output.texts):
        template, ids = Template.parse(TEXTS[row]), generation.sequences[row]
        real, is_written = generation.group_ids[row] >= 0, generation.commit_step[row] >= 0
        assert not special & set(ids[is_written].tolist())
        lengths = iter(ids[is_written].tolist())
        for piece, length in zip(template.pieces, template.lengths, strict=False):
            tokens = [next(lengths) for _ in range(length)]
            assert not piece.endswith(" ") or tokens[0] in spaced
        whole = tokenizer.decode(ids[real], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert text == whole
    return output


@pytest.mark.parametrize("slot_start", STARTS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_shown_is_what_was_written_and_no_special_token_is(name, slot_start):
    tokenizer = kind("byte_level")
    model = model_for(tokenizer, slot_start)
    for extra in ({}, {"do_sample": True, "seed": 1}):
        check_spaces(tokenizer, model, **STRATEGIES[name], **extra)
    output = check_spaces(tokenizer, model, **STRATEGIES[name])
    group_ids, mask = output.generation.group_ids, output.generation.group_ids >= 0
    again = model.log_likelihood(output.generation.sequences, group_ids, mask.long())
    is_written = output.generation.commit_step >= 0
    assert torch.allclose(again[is_written], output.generation.log_probs[is_written], atol=1e-4)


@pytest.mark.parametrize(
    "classes",
    [
        (DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM),
        (MaskedDiffusionLlamaConfig, MaskedDiffusionLlamaForCausalLM),
    ],
)
def test_the_other_architectures_write_as_said(classes):
    tokenizer = kind("byte_level")
    check_spaces(tokenizer, other_model(tokenizer, *classes))


def test_tokens_that_the_caller_bans_and_those_of_the_config_stay_banned():
    tokenizer = kind("byte_level")
    model = model_for(tokenizer)
    first = model.infill(tokenizer, ["Tom<blank:1>"], return_outputs=True)
    token = int(first.generation.sequences[0, -1])
    config = A3GenerationConfig(suppress_tokens=[token])
    for settings in ({"suppress_tokens": [token]}, {"generation_config": config}):
        output = model.infill(tokenizer, ["Tom<blank:1>"], return_outputs=True, **settings)
        assert int(output.generation.sequences[0, -1]) not in (token, *special_token_ids(tokenizer, len(tokenizer)))


def test_a_text_that_begins_with_bos_is_filled_as_the_same_text():
    tokenizer = kind("byte_level")
    model = model_for(tokenizer)
    plain = model.infill(tokenizer, ["The dog <blank:3>."], return_outputs=True)
    again = model.infill(tokenizer, ["<s>The dog <blank:3>."], return_outputs=True)
    assert again.generation.sequences.equal(plain.generation.sequences)
    assert again.texts == ["<s>" + plain.texts[0]]
    rows = [model.score(tokenizer, text) for text in ("The dog", "<s>The dog")]
    assert rows[0].token_ids.tolist() == rows[1].token_ids.tolist() and rows[0].totals.equal(rows[1].totals)
    spoken = model.rewrite(tokenizer, "<s>The dog ran", [(7, 10)], return_outputs=True)
    assert spoken.generation.sequences[0].tolist().count(tokenizer.bos_token_id) == 1


def test_a_literal_marker_comes_back_as_it_is():
    tokenizer = kind("byte_level")
    filled = model_for(tokenizer).infill(tokenizer, r"A \<blank:3> is a <blank:2>.")
    assert filled.startswith("A <blank:3> is a ") and filled.endswith(".")
    text = "The <blank:3> ran"  # to rewrite, a marker is text
    filled = model_for(tokenizer).rewrite(tokenizer, text, [(14, 17)])
    assert filled.startswith("The <blank:3> ")


# Several sequences


def test_several_sequences_have_a_list_for_each_text():
    tokenizer = kind("byte_level")
    model = model_for(tokenizer)
    settings = {"do_sample": True, "num_return_sequences": 3, "seed": 4}
    output = model.infill(tokenizer, TEXTS, return_outputs=True, **settings)
    texts = model.infill(tokenizer, TEXTS, **settings)
    assert len(output.texts) == len(output.written) == len(output.lengths) == len(output.length_scores) == 12
    assert texts == [output.texts[start : start + 3] for start in (0, 3, 6, 9)]
    for text, group in zip(TEXTS, texts, strict=True):
        assert len(set(group)) > 1 and model.infill(tokenizer, text, **settings) == group
        template = Template.parse(text)
        assert all(one.startswith(template.pieces[0]) and one.endswith(template.pieces[-1]) for one in group)
    again = model.rewrite(tokenizer, "The dog ran home", [(8, 11)], **settings)
    assert isinstance(again, list) and len(again) == 3 and all(one.startswith("The dog ") for one in again)


@pytest.mark.parametrize("copies", [1, 2])
def test_several_sequences_of_a_chosen_length(copies):
    tokenizer = kind("byte_level")
    model = model_for(tokenizer)
    texts = ["The dog <blank:auto> home.", "Tom <blank:1..3>", "The <blank:2> dog"]
    several = {} if copies == 1 else {"num_return_sequences": copies}
    seeds = list(range(3 * copies))
    output = model.infill(
        tokenizer, texts, auto_lengths=(1, 4), return_outputs=True, do_sample=True, seed=seeds, **several
    )
    assert len(output.texts) == 3 * copies
    for row in range(3 * copies):
        scores = output.length_scores[row]
        assert output.length_scores[row - row % copies] == scores
        assert output.lengths[row] == tuple(max(one, key=one.get) if one else 2 for one in scores)
    alone = model.infill(
        tokenizer, texts[1], auto_lengths=(1, 4), do_sample=True, seed=seeds[copies : 2 * copies], **several
    )
    assert ([alone] if copies == 1 else alone) == output.texts[copies : 2 * copies]


@pytest.mark.parametrize(
    "settings", [{}, {"do_sample": True}, {"do_sample": True, "seed": 7}, {"do_sample": True, "seed": [7]}]
)
@pytest.mark.parametrize("text", ["The dog <blank:1..6> home. Tom", "Tom<blank:1..6>"])
def test_what_is_returned_is_the_likeliest_candidate(text, settings):
    """By the log-likelihood of the whole text, from left to right: no fixed length's fill is above it."""
    tokenizer = kind("byte_level")
    model = model_for(tokenizer)
    torch.manual_seed(3)
    output = model.infill(tokenizer, [text], return_outputs=True, **settings)

    def whole(generation) -> float:
        ids = generation.sequences
        if text.endswith(">"):  # the text's end is part of it
            ids = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
        return model.log_likelihood(ids, torch.arange(ids.shape[1])[None]).double().sum().item()

    chosen, scores = whole(output.generation), output.length_scores[0][0]
    before = model.score(tokenizer, Template.parse(text).pieces[0].rstrip(" ")).totals.item()
    assert chosen - before == pytest.approx(max(scores.values()), abs=1e-4)
    for length, score in scores.items():
        torch.manual_seed(3)
        if "seed" not in settings and settings:
            seed = int(torch.randint(2**62, ()))
        fixed = model.infill(
            tokenizer,
            [text.replace("1..6", str(length))],
            return_outputs=True,
            **{**settings, **({"seed": seed} if "seed" not in settings and settings else {})},
        )
        assert (
            whole(fixed.generation) - before == pytest.approx(score, abs=1e-4)
            and whole(fixed.generation) <= chosen + 1e-4
        )


def test_the_choice_prefers_no_length_by_itself():
    """Where the blank's tokens and those behind it are all equally likely, as many nats are lost as there are tokens."""
    tokenizer = kind("byte_level")
    model = model_for(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    output = model.infill(tokenizer, ["The dog <blank:1..5> home."], return_outputs=True)
    scores = output.length_scores[0][0]
    step = torch.tensor(float(len(tokenizer))).log().item()
    assert scores[1] - scores[5] == pytest.approx(4 * step, abs=1e-3) and output.lengths == [(1,)]


# Shapes of the pipeline


@pytest.fixture(scope="module")
def fill():
    tokenizer = kind("byte_level")
    return pipeline("infilling", model=model_for(tokenizer), tokenizer=tokenizer, device="cpu")


def like(fill, texts, **settings) -> list:
    return fill.model.infill(fill.tokenizer, texts, **settings)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 8])
def test_the_pipeline_takes_lists_generators_and_datasets(fill, batch_size):
    expected, size = like(fill, TEXTS), {} if batch_size is None else {"batch_size": batch_size}
    data = KeyDataset([{"text": text} for text in TEXTS], "text")
    assert [one["text"] for one in fill(TEXTS, **size)] == expected
    assert [one["text"] for one in fill(tuple(TEXTS), **size)] == expected
    assert [one["text"] for one in fill((text for text in TEXTS), **size)] == expected
    assert [one["text"] for one in fill(data, **size)] == expected
    assert fill(TEXTS[0], **size)["text"] == expected[0] and fill(TEXTS[:1], **size)[0]["text"] == expected[0]


def test_the_pipeline_takes_a_dataset(fill):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": TEXTS})
    assert [one["text"] for one in fill(KeyDataset(data, "text"), batch_size=3)] == like(fill, TEXTS)
    with pytest.raises(ValueError, match="expected a string, a list of strings"):
        fill(data)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_pipeline_has_a_list_where_several_sequences_are_asked_for(fill, batch_size):
    settings = {"num_return_sequences": 2, "do_sample": True, "seed": 5}
    expected = like(fill, TEXTS, **settings)
    results = fill(TEXTS, batch_size=batch_size, **settings)
    assert [[one["text"] for one in group] for group in results] == expected
    assert [one["text"] for one in fill(TEXTS[1], **settings)] == expected[1]
    assert all(set(one) == {"text", "written", "lengths", "length_scores", "log_likelihood"} for one in results[0])
    assert [
        [one["text"] for one in group] for group in fill(iter_of(TEXTS), batch_size=batch_size, **settings)
    ] == expected


def iter_of(texts):
    yield from texts


def test_the_pipeline_of_nothing_is_nothing(fill):
    assert fill([]) == [] and fill(()) == [] and list(fill(iter_of([]))) == []


def test_results_of_a_batch_know_their_lengths_and_likelihoods(fill):
    texts = ["The dog <blank:auto> home.", "Tom <blank:2> <blank:1..2>."]
    results = fill(texts, batch_size=2, auto_lengths=(1, 3))
    for text, result in zip(texts, results, strict=True):
        alone = fill(text, auto_lengths=(1, 3))
        assert alone.pop("log_likelihood") == pytest.approx(result.pop("log_likelihood"), abs=1e-4)
        for one, other in zip(alone.pop("length_scores"), result.pop("length_scores"), strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        assert alone == result and len(result["written"]) == text.count("<blank")
