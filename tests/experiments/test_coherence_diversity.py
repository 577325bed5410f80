"""Samples by temperature: words counted by hand, and rows that are what the models would write."""

import string
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from a3_hf import DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM
from a3_hf.data.arguments import DataArguments
from a3_hf.evaluation.measures import coherence_diversity as samples
from a3_hf.evaluation.measures.coherence_diversity import (
    coherence_and_diversity,
    held_out_rows,
    measure_samples,
    row_text,
    words,
)
from a3_hf.evaluation.measures.trained_run import Trained
from a3_hf.experiments.initial_models import character_tokenizer
from a3_hf.models.masked_diffusion_llama.configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from tests.conftest import CORPUS, tiny_config, tiny_model

ARCHITECTURES = ("a3", "decoupled_rope", "masked_diffusion", "llama")
DOCUMENTS = ("The dog ran home. Tom was happy, and so was his dog.", "One day, the cat sat on a mat!")
TOKENIZER = character_tokenizer("\n".join(CORPUS) + string.ascii_letters)


def trained(architecture: str, *, documents=DOCUMENTS, training_documents=(), **changes) -> Trained:
    """A random tiny model of characters."""
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    changes = {"vocab_size": len(TOKENIZER), "num_hidden_layers": 2, **tokens, **changes}
    settings = tiny_config(**changes).to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "architectures")}
    torch.manual_seed(1)
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**settings))
    elif architecture == "decoupled_rope":
        model = DecoupledRopeLlamaForCausalLM(DecoupledRopeLlamaConfig(**settings))
    elif architecture == "masked_diffusion":
        model = MaskedDiffusionLlamaForCausalLM(MaskedDiffusionLlamaConfig(**settings))
        model.set_mask_token(TOKENIZER)
    else:
        model = tiny_model(**changes)
    data = DataArguments(train_file="train.txt", block_size=16)
    recipe = SimpleNamespace(model=SimpleNamespace(architecture=architecture), data=data)
    return Trained(model.eval(), TOKENIZER, recipe, documents, training_documents, [])


# Words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The dogs RAN, Home!", ["dogs", "home"]),
        ("don't wouldn't", ["wouldn"]),
        ("abcd1efgh_ijkl mn-opqr", ["abcd", "efgh", "ijkl", "opqr"]),
        ("café naïve\nwörter", ["café", "naïve", "wörter"]),
        ("", []),
    ],
)
def test_words_are_runs_of_four_letters_or_more(text, expected):
    assert words(text) == expected


def test_coherence_and_diversity_by_hand():
    vocabulary = {"once", "upon", "time", "there"}
    texts = [". Once upon a tmie, upon.", "!There was upon a time wxyz "]
    # once upon tmie upon | there upon time wxyz: 6 of 8 known; once upon tmie there time wxyz: 6 of 8 different
    assert coherence_and_diversity(texts, vocabulary) == {"coherence": 0.75, "diversity": 0.75, "num_words": 8}
    assert coherence_and_diversity(["... once once once once!"], vocabulary) == {
        "coherence": 1.0,
        "diversity": 0.25,
        "num_words": 4,
    }


def test_a_run_of_letters_at_either_end_may_be_a_part_of_a_word():
    assert coherence_and_diversity(["ther once time"], {"once"}) == {"coherence": 1.0, "diversity": 1.0, "num_words": 1}
    assert coherence_and_diversity(["onceuponatime", "a bc", ""], {"once"}) == {"num_words": 0}


def test_special_tokens_part_words():
    ids = TOKENIZER("cat")["input_ids"] + [TOKENIZER.eos_token_id] + TOKENIZER("sat.")["input_ids"]
    assert row_text(TOKENIZER, [TOKENIZER.bos_token_id, *ids, TOKENIZER.unk_token_id]) == "cat\nsat.\n"


def test_held_out_rows_are_those_of_training():
    subject = trained("a3")
    stream = [token for text in DOCUMENTS for token in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]]
    rows = held_out_rows(subject, length=16, count=99)
    assert rows == [[TOKENIZER.bos_token_id, *stream[start : start + 15]] for start in range(0, len(stream) - 14, 15)]
    assert held_out_rows(subject, length=16, count=2) == rows[:2]


# Samples


def measured(subject: Trained, monkeypatch, **settings) -> tuple[dict, list[list[list[int]]]]:
    """What the measurement returns, and the rows that it counted."""
    written, write = [], samples._write

    def watched(*args, **kwargs):
        rows, rate = write(*args, **kwargs)
        written.append(rows)
        return rows, rate

    monkeypatch.setattr(samples, "_write", watched)
    return measure_samples(subject, **settings), written


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_the_recipes_length_behind_bos(architecture, monkeypatch):
    settings = {"temperatures": (0.5, 2.0), "num_samples": 3, "seed": 4}
    _, written = measured(trained(architecture), monkeypatch, **settings)
    texts = [CORPUS[0], *(row_text(TOKENIZER, row) for rows in written for row in rows)]  # some words will be known
    subject = trained(architecture, training_documents=texts)
    result, written = measured(subject, monkeypatch, **settings)
    vocabulary = {word for text in texts for word in words(text)}
    assert any(entry.get("coherence", 0.0) > 0 for entry in result["samples"])
    assert [entry["temperature"] for entry in result["samples"]] == [0.5, 2.0]
    for entry, rows in zip(result["samples"], written, strict=True):
        assert [len(row) for row in rows] == [16] * 3 and all(row[0] == 1 for row in rows)
        expected = coherence_and_diversity([row_text(TOKENIZER, row) for row in rows], vocabulary)
        assert {name: entry[name] for name in expected} == expected
        assert entry["tokens_per_forward"] == 1.0 and entry["text"] == row_text(TOKENIZER, rows[0])[:200]
        assert entry["order"] == ("left_to_right" if architecture == "llama" else "random")
    assert len({tuple(row) for rows in written for row in rows}) == 6
    assert measure_samples(subject, **settings) == result
    assert measure_samples(subject, **{**settings, "seed": 5}) != result
    rows = held_out_rows(subject, length=16, count=3)
    reference = coherence_and_diversity([row_text(TOKENIZER, row) for row in rows], vocabulary)
    assert {name: result[f"held_out_{name}"] for name in reference} == reference


@pytest.mark.parametrize("architecture", ["a3", "decoupled_rope", "masked_diffusion"])
@pytest.mark.parametrize("order", ["random", "left_to_right"])
def test_written_one_by_one_in_the_order(architecture, order, monkeypatch):
    subject = trained(architecture)
    outputs, generate = [], subject.model.generate_any_order

    def watched(*args, **kwargs):
        outputs.append(generate(*args, **kwargs))
        return outputs[-1]

    monkeypatch.setattr(subject.model, "generate_any_order", watched)
    settings = {"diffusion_steps": None} if architecture == "masked_diffusion" else {}
    measure_samples(subject, temperatures=(1.0, 0.7), num_samples=2, order=order, **settings)
    steps = [output.commit_step[:, 1:].tolist() for output in outputs]
    assert all(sorted(row) == list(range(15)) for rows in steps for row in rows)
    if order == "left_to_right":
        assert all(row == list(range(15)) for rows in steps for row in rows)
    else:
        assert steps[0][0] != steps[0][1] and list(range(15)) not in steps[0]
        assert steps[0] == steps[1]  # whatever the temperature


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_temperature_divides_the_logits(architecture, monkeypatch):
    subject, bos = trained(architecture), torch.tensor([[1], [1]])
    _, (rows,) = measured(subject, monkeypatch, temperatures=(1e-4,), num_samples=2, length=6, seed=7)
    if architecture == "llama":
        likeliest = subject.model.generate(bos, do_sample=False, max_new_tokens=5, eos_token_id=[])
    else:
        how = {"criterion": "random"} if architecture == "masked_diffusion" else {"order": "random"}
        likeliest = subject.model.generate_any_order(bos, max_new_tokens=5, seed=7, eos_token_id=[], **how).sequences
    assert rows == likeliest.tolist()
    # Hot enough, all first tokens are as likely, those too that a cut to the likeliest would leave out.
    _, (rows,) = measured(subject, monkeypatch, temperatures=(1e4,), num_samples=1000, length=2)
    assert len({row[1] for row in rows}) == len(TOKENIZER)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eos_does_not_end_a_row(architecture, monkeypatch):
    subject = trained(architecture)
    subject.model.lm_head.weight.data.zero_()
    _, (rows,) = measured(subject, monkeypatch, temperatures=(1.0,), num_samples=20, length=60)
    behind = [row[row.index(2) + 1 :] for row in rows if 2 in row]
    assert len(behind) > 10 and sum(token not in (0, 2) for row in behind for token in row) > 100


def test_diffusion_in_fewer_passes():
    subject = trained("masked_diffusion")
    (entry,) = measure_samples(subject, temperatures=(1.0,), num_samples=2, diffusion_steps=5)["samples"]
    assert entry["tokens_per_forward"] == 3.0
    (entry,) = measure_samples(subject, temperatures=(1.0,), num_samples=2, diffusion_steps=99)["samples"]
    assert entry["tokens_per_forward"] == 1.0


def test_as_many_tokens_at_every_length(monkeypatch):
    monkeypatch.setattr(samples, "TOKENS", 64)
    for length, count in ((16, 4), (8, 8), (60, 1), (100, 1)):
        _, (rows,) = measured(trained("a3"), monkeypatch, temperatures=(1.0,), length=length)
        assert len(rows) == count


def test_without_words_or_enough_held_out_text_their_figures_are_left_out():
    subject = trained("a3", documents=DOCUMENTS[:1])
    result = measure_samples(subject, temperatures=(1.0,), num_samples=4, length=4)
    assert set(result["samples"][0]) == {"temperature", "num_words", "tokens_per_forward", "order", "text"}
    assert set(measure_samples(subject, temperatures=(1.0,), num_samples=4)) == {"samples"}


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"temperatures": ()}, "temperatures"),
        ({"temperatures": (1.0, 0.0)}, "temperatures"),
        ({"temperatures": (float("nan"),)}, "temperatures"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"length": 1}, "length=1"),
        ({"length": 2.5}, "length=2.5"),
        ({"length": 129}, "length=129 is above the model's context"),
        ({"order": "backwards"}, "order='backwards'"),
        ({"diffusion_steps": 0}, "diffusion_steps=0"),
        ({"order": "left_to_right"}, "diffusion_steps=128 with order='left_to_right'"),
    ],
)
def test_bad_input(settings, what):
    with pytest.raises(ValueError, match=what):
        measure_samples(trained("masked_diffusion"), **settings)
