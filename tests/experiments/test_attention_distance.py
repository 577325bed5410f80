"""Attention by distance against loops over texts, layers, heads, rows and keys, from passes stored in another way."""

from collections import defaultdict

import pytest
import torch

from a3_hf.evaluation.measures.attention_distance import measure_attention
from a3_hf.evaluation.measures.coherence_diversity import held_out_rows
from a3_hf.evaluation.measures.trained_run import Trained
from a3_hf.training.base_trainer import row_generator
from tests.experiments.test_coherence_diversity import trained as small_model

ARCHITECTURES = ("a3", "decoupled_rope", "masked_diffusion", "llama")
DOCUMENTS = ("The dog ran home. Tom was happy, and so was his dog.", "One day, the cat sat on a mat!") * 2
LENGTH, SEED = 11, 6
KINDS = {
    "a3": {("query", "textual"), ("query", "generation"), ("content", "textual"), ("content", "generation")},
    "decoupled_rope": {("single", "textual"), ("single", "generation")},
    "masked_diffusion": {("single", "textual")},
    "llama": {("single", "textual")},
}


def trained(architecture: str, **changes) -> Trained:
    return small_model(architecture, documents=DOCUMENTS, **{"num_hidden_layers": 3, **changes})


def ranks_of(number: int) -> list[int]:
    """The turn of each token of a text in its random order; BOS has the first."""
    noise = torch.rand(LENGTH, generator=row_generator(SEED, number)).tolist()
    turns = sorted(range(LENGTH - 1), key=lambda place: noise[place])
    return [0, *(1 + turns.index(place) for place in range(LENGTH - 1))]


@torch.no_grad()
def attentions(model, ids: list[int], **inputs) -> list[list]:
    """Of each layer, as nested lists (heads, rows, keys)."""
    inputs = {name: torch.tensor([value]) if isinstance(value, list) else value for name, value in inputs.items()}
    return [
        layer[0].tolist()
        for layer in model.model(torch.tensor([ids]), output_attentions=True, use_cache=False, **inputs).attentions
    ]


def states_of(architecture: str, model, ids: list[int], number: int):
    """For each state that is counted: stream, layer, and for each visible key its weight, mean over heads, textual distance
    and generation distance (None where there is none).
    """
    heads = range(model.config.num_attention_heads)

    def mean(layer, row, key):
        return sum(layer[head][row][key] for head in heads) / len(heads)

    if architecture == "a3":
        ranks = ranks_of(number)  # in text order: content first, slots behind
        layers = attentions(model, ids, group_ids=ranks)
        for index, layer in enumerate(layers):
            for token, rank in enumerate(ranks):
                if 0 < rank:
                    keys = [key for key in range(LENGTH) if ranks[key] < rank]
                    if 2 * len(keys) >= LENGTH - 1:
                        row = LENGTH + token
                        yield "query", index, [(mean(layer, row, k), abs(token - k), rank - ranks[k]) for k in keys]
                if rank < LENGTH - 1 and index < len(layers) - 1:
                    keys = [key for key in range(LENGTH) if ranks[key] <= rank]
                    if 2 * len(keys) >= LENGTH - 1:
                        yield "content", index, [(mean(layer, token, k), abs(token - k), rank - ranks[k]) for k in keys]
    elif architecture == "decoupled_rope":
        ranks = ranks_of(number)
        order = [ranks.index(turn) for turn in range(LENGTH)]  # the attention is that of generation order
        for index, layer in enumerate(attentions(model, ids, group_ids=ranks)):
            for turn in range(LENGTH - 1):
                if 2 * (turn + 1) >= LENGTH - 1:
                    target = order[turn + 1]
                    keys = [(mean(layer, turn, k), abs(target - order[k]), turn + 1 - k) for k in range(turn + 1)]
                    yield "single", index, keys
    elif architecture == "llama":
        for index, layer in enumerate(attentions(model, ids)):
            for place in range(LENGTH - 1):
                if 2 * (place + 1) >= LENGTH - 1:
                    yield "single", index, [(mean(layer, place, k), place + 1 - k, None) for k in range(place + 1)]
    else:
        chosen = torch.randperm(LENGTH - 1, generator=row_generator(SEED, number))[: LENGTH // 2]
        masked = [1 + place for place in chosen.tolist()]
        text = [model.config.mask_token_id if place in masked else token for place, token in enumerate(ids)]
        for index, layer in enumerate(attentions(model, text)):
            for place in masked:
                yield "single", index, [(mean(layer, place - 1, k), abs(place - k), None) for k in range(LENGTH)]


def slowly(subject: Trained, num_rows: int, bins: list[tuple[int, int]]) -> tuple[dict, dict]:
    """Mass and uniform mass by (stream, layer, kind, bin), and the scalars."""
    mass, even, count, near = (defaultdict(float) for _ in range(4))
    subject.model.set_attn_implementation("eager")
    for number, ids in enumerate(held_out_rows(subject, length=LENGTH, count=num_rows)):
        for stream, layer, keys in states_of(subject.architecture, subject.model, ids, number):
            count[stream, layer] += 1
            for weight, textual, generation in keys:
                for kind, distance in (("textual", textual), ("generation", generation)):
                    if distance is None:
                        continue
                    (where,) = [(first, last) for first, last in bins if first <= distance <= last]
                    mass[stream, layer, kind, where] += weight
                    even[stream, layer, kind, where] += 1 / len(keys)
                    if distance in (1, 2):
                        near[stream, layer, kind] += weight
                        near[stream, "even", kind] += 1 / len(keys)
                        near[stream, "layers", kind] = max(near[stream, "layers", kind], layer + 1)
    table = {key: (mass[key] / count[key[:2]], even[key] / count[key[:2]]) for key in mass}
    scalars = {
        f"attention_{kind}_{stream}": sum(
            near[stream, layer, kind] for layer in range(int(near[stream, "layers", kind]))
        )
        / near[stream, "even", kind]
        for stream, _, kind in list(near)
    }
    return table, scalars


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("distances", "bins"),
    [
        (None, [(0, 0), (1, 1), (2, 3), (4, 7), (8, 10)]),
        ((0, 3, 9), [(0, 2), (3, 8), (9, 10)]),
    ],
)
def test_the_same_as_loops(architecture, distances, bins):
    subject = trained(architecture)
    subject.model.set_attn_implementation("sdpa")
    result = measure_attention(subject, num_rows=3, length=LENGTH, distances=distances, seed=SEED)
    assert subject.model.config._attn_implementation == "sdpa"
    table = {
        (entry["stream"], entry["layer"], entry["kind"], (entry["distance_from"], entry["distance_to"])): (
            entry["mass"],
            entry["uniform"],
        )
        for entry in result["attention"]
    }
    expected, scalars = slowly(subject, 3, bins)
    assert set(table) == set(expected) and len(table) == len(result["attention"])
    assert {(stream, kind) for stream, _, kind, _ in table} == KINDS[architecture]
    for key, values in expected.items():
        assert table[key] == pytest.approx(values, abs=1e-4), key
    assert {name: value for name, value in result.items() if name != "attention"} == pytest.approx(scalars, abs=1e-4)
    for stream, layer, kind in {key[:3] for key in table}:
        sums = [
            sum(values) for values in zip(*(v for k, v in table.items() if k[:3] == (stream, layer, kind)), strict=True)
        ]
        assert sums == pytest.approx([1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_without_preference_is_uniform(architecture):
    subject = trained(architecture)
    for layer in subject.model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    result = measure_attention(subject, num_rows=2, length=LENGTH)
    assert all(entry["mass"] == pytest.approx(entry["uniform"], abs=1e-4) for entry in result["attention"])
    scalars = {name: value for name, value in result.items() if name != "attention"}
    assert scalars == pytest.approx(dict.fromkeys(scalars, 1.0), abs=1e-4)
    assert set(scalars) == {f"attention_{kind}_{stream}" for stream, kind in KINDS[architecture]}


def test_content_of_the_last_layer_is_left_out():
    streams = {(entry["stream"], entry["layer"]) for entry in measure_attention(trained("a3"), num_rows=1)["attention"]}
    assert streams == {("query", 0), ("query", 1), ("query", 2), ("content", 0), ("content", 1)}
    only = measure_attention(trained("a3", num_hidden_layers=1), num_rows=1)
    assert {entry["stream"] for entry in only["attention"]} == {"query"}


def test_the_same_again_and_by_default_of_the_recipes_length():
    subject = trained("a3")
    result = measure_attention(subject, num_rows=2)
    assert result == measure_attention(subject, num_rows=2, length=16, distances=(0, 1, 2, 4, 8))
    assert result != measure_attention(subject, num_rows=2, seed=1)
    assert max(entry["distance_to"] for entry in result["attention"]) == 15


def test_the_implementation_is_put_back_after_an_error(monkeypatch):
    subject = trained("decoupled_rope")

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(subject.model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_attention(subject, num_rows=1)
    assert subject.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"num_rows": 0}, "num_rows=0"),
        ({"num_rows": 99}, r"num_rows=99 of 16 tokens: the 4 held-out documents fill \d+"),
        ({"length": 2}, "length=2"),
        ({"length": 129}, "length=129 is above the model's context"),
        ({"distances": ()}, "distances"),
        ({"distances": (1, 2)}, "distances"),
        ({"distances": (0, 4, 4)}, "distances"),
        ({"distances": (0, 16)}, r"stay below the row's length, 16"),
    ],
)
def test_bad_input(settings, what):
    with pytest.raises(ValueError, match=what):
        measure_attention(trained("a3"), **settings)
