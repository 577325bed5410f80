"""Needles in haystacks: where they lie, how answers are scored, and models that find them or don't."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

from a3_hf.evaluation.measures.needle import ANSWERS, FACT, QUESTION, Needle, make_needle, needle_rows, score_answers
from a3_hf.models.a3_llama.infilling_templates import encode_piece, encode_prompt
from tests.conftest import CORPUS, tiny_model

HAY = " ".join(CORPUS[:10])
SHORT = {"lengths": [110, 128], "depths": [0.0, 0.5, 1.0], "answers": ["dog", "tree", "hat"], "count": 3}


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)


@pytest.mark.parametrize("depth", [0, 0.1, 0.3, 0.5, 0.9, 1])
def test_the_fact_lies_where_it_should(tokenizer, depth):
    hay = encode_prompt(tokenizer, HAY)[1:]
    needle = make_needle(tokenizer, hay, length=190, depth=depth, right=3, seed=2)
    longest = max(len(encode_piece(tokenizer, f" {answer}", is_start=False)) for answer in ANSWERS)
    assert len(needle.prompt) + longest == 190 and needle.prompt[0] == tokenizer.bos_token_id
    assert [tokenizer.decode(ids) for ids in needle.answers] == [
        f" {answer}" for answer in ANSWERS
    ] and needle.right == 3
    text = tokenizer.decode(needle.prompt[1:])
    fact = FACT.format(answer=ANSWERS[3])
    assert text.endswith(QUESTION) and text.count(fact) == 1
    before, after = text.removesuffix(QUESTION).split(fact)
    assert before + after in HAY
    share = len(before) / len(before + after)
    assert share <= depth + 0.02
    if depth in (0, 1):
        assert share == depth
    elif depth >= 0.3:
        assert before.endswith((".", "!")) and share > depth - 0.3


def test_a_haystack_without_sentences_is_cut_at_its_share(tokenizer):
    hay = [50] * 300
    needle = make_needle(tokenizer, hay, length=200, depth=0.25, right=0, seed=0)
    assert (
        needle.prompt[1:].index(next(token for token in needle.prompt[1:] if token != 50))
        == needle.prompt.count(50) // 4
    )


def test_every_depth_has_the_same_piece_of_the_haystack(tokenizer):
    hay = encode_prompt(tokenizer, HAY)[1:]

    def piece(depth, seed):
        text = tokenizer.decode(make_needle(tokenizer, hay, length=150, depth=depth, right=0, seed=seed).prompt[1:])
        return text.removesuffix(QUESTION).replace(FACT.format(answer=ANSWERS[0]), "")

    assert piece(0, 1) == piece(0.6, 1) == piece(1, 1) != piece(0, 2)


def test_answers_are_scored_as_a_chain_of_single_forwards(model, tokenizer):
    prompts = [encode_prompt(tokenizer, text) for text in ("The dog ran home. The", "Tom was")]
    answers = [encode_piece(tokenizer, f" {word}", is_start=False) for word in ("dog", "happy", "xylophone")]
    assert len({len(ids) for ids in answers}) > 1
    needles = [Needle(prompt, answers, 0) for prompt in prompts]
    scores, found = score_answers(model, needles, batch_size=4)
    assert not found.any()
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            ids, total = list(prompt), 0.0
            for token in answer:
                with torch.no_grad():
                    total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
                ids.append(token)
            assert scores[row, column].item() == pytest.approx(total / len(answer), abs=1e-5)
    alone, _ = score_answers(model, needles, batch_size=1)
    assert (alone - scores).abs().max() < 1e-5


def test_found_is_what_the_model_writes(model, tokenizer):
    prompt = encode_prompt(tokenizer, "The dog ran home. The")
    written = model.generate_any_order(torch.tensor([prompt]), max_new_tokens=3).sequences[0, -3:].tolist()
    wrong_at = [
        [(token + (place == wrong)) % len(tokenizer) for place, token in enumerate(written)] for wrong in range(3)
    ]
    _, found = score_answers(model, [Needle(prompt, [*wrong_at, written, written[:1]], 3)])
    assert found.tolist() == [[False, False, False, True, True]]


def reader(finds: bool):
    """A model to which a token is likely if it stands earlier in the text, or if it does not."""

    def log_likelihood_and_greedy(input_ids, group_ids, attention_mask, *, scored_mask):
        ids = input_ids
        earlier = torch.zeros_like(ids, dtype=torch.bool)
        for column in range(1, ids.shape[1]):
            earlier[:, column] = (ids[:, :column] == ids[:, column : column + 1]).any(dim=1)
        likely = (earlier == finds) & scored_mask
        return torch.where(likely, -0.1, -9.0) * scored_mask, likely

    return SimpleNamespace(
        config=SimpleNamespace(max_position_embeddings=256),
        device="cpu",
        log_likelihood_and_greedy=log_likelihood_and_greedy,
    )


@pytest.mark.parametrize("finds", [True, False])
def test_a_model_that_finds_it_and_one_that_does_not(tokenizer, finds):
    """A rare letter for each answer, which stands nowhere else."""
    settings = {**SHORT, "answers": ["Q", "X", "Z"], "lengths": [128, 200]}
    rows = needle_rows(reader(finds), tokenizer, **settings)
    assert [(row["length"], row["depth"]) for row in rows] == [(n, d) for n in (128, 200) for d in (0.0, 0.5, 1.0)]
    assert all(row["accuracy"] == finds for row in rows)
    assert all(row["exact_match"] == finds for row in rows) or not finds
    assert rows[0]["choices"] == 3 and rows[0]["passes"] == 9


def test_batches_change_nothing_and_constant_answers_are_right_by_chance(model, tokenizer):
    one, several = (needle_rows(model, tokenizer, batch_size=size, haystack=HAY, **SHORT) for size in (1, 5))
    for row, same in zip(one, several, strict=True):
        assert (row["accuracy"], row["exact_match"]) == (same["accuracy"], same["exact_match"])
        assert row["nats_per_token"] == pytest.approx(same["nats_per_token"], abs=1e-5)
    constant = reader(True)
    constant.log_likelihood_and_greedy = lambda input_ids, scored_mask, **_: (
        -input_ids * scored_mask * 1.0,
        scored_mask,
    )
    assert all(row["accuracy"] == pytest.approx(1 / 3) for row in needle_rows(constant, tokenizer, **SHORT))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lengths": [128, 129]}, "lengths=129 is above the model's context .*rope_scaling"),
        ({"lengths": [20]}, "lengths holds 20: expected more than the .* tokens of fact"),
        ({"lengths": []}, "lengths is empty"),
        ({"depths": []}, "depths is empty"),
        ({"depths": [1.5]}, "depths holds 1.5"),
        ({"haystack": "Too short."}, "haystack has .* tokens: expected at least .* for length 110"),
        ({"answers": ["dog"]}, "expected at least two"),
        ({"answers": ["dog", " "]}, "answers holds ' ', which has no token"),
        ({"answers": ["dog", "dog"]}, "answers holds 'dog' and 'dog', which have the same tokens"),
        ({"count": 0}, "count=0"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input_names_the_argument(model, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        needle_rows(model, tokenizer, **{**SHORT, **changes})


def test_a_tokenizer_without_bos(model, tokenizer):
    without = deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(ValueError, match="tokenizer has no BOS"):
        needle_rows(model, without, **SHORT)
