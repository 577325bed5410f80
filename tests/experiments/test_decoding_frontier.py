"""Quality against passes: stories one at a time, by the plainest calls, beside what the measure makes of batches."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("lm_eval")
pytest.importorskip("rouge_score")

from a3_hf import DecoupledRopeLlamaConfig, DecoupledRopeLlamaForCausalLM
from a3_hf.data.arguments import DataArguments
from a3_hf.evaluation.measures.decoding_frontier import STRATEGIES, measure_decoding
from a3_hf.evaluation.measures.trained_run import Trained
from a3_hf.evaluation.tasks.functions import rouge
from a3_hf.models.a3_llama.infilling_templates import decode_after, encode_piece, encode_prompt
from a3_hf.models.a3_llama.orders import seed_of
from a3_hf.models.masked_diffusion_llama.configuration_masked_diffusion_llama import MaskedDiffusionLlamaConfig
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from a3_hf.training.arguments import A3TrainingArguments, ModelArguments, Recipe
from tests.conftest import tiny_config, tiny_model

STORIES = [
    [
        "The dog ran home.",
        "Tom was happy!",
        "So was his dog, the cat.",
        "One day it ran.",
        "It was on a mat.",
    ],
    ["Tom ran.", "The cat sat.", "His dog was happy, and ran.", "Tom sat on the mat.", "So it was."],
    ["One day, the cat sat.", "So was Tom.", "It ran.", "The dog sat on it.", "And Tom was happy."],
]
ENDING = "RandomFifthSentenceQuiz"
DOCUMENTS = ["Too short. Not five.", "\n\n".join(STORIES[0]) + " And more.", *(" ".join(one) for one in STORIES[1:])]


def settings_of(tokenizer, **changes) -> dict:
    settings = tiny_config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, num_hidden_layers=1).to_dict()
    del settings["model_type"]
    return {**settings, **changes}


def trained(model, tokenizer, architecture: str = "a3") -> Trained:
    recipe = Recipe(
        ModelArguments(model_name_or_path="none", architecture=architecture),
        DataArguments(train_file="none.txt"),
        A3TrainingArguments(output_dir="none", report_to=[]),
        None,
    )
    return Trained(model, tokenizer, recipe, DOCUMENTS, [], [])


@pytest.fixture(scope="module")
def a3(tokenizer):
    return trained(
        tiny_model(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, num_hidden_layers=1), tokenizer
    )


@pytest.fixture(scope="module")
def judge(tokenizer, tmp_path_factory) -> str:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("judge")
    LlamaForCausalLM(LlamaConfig(**settings_of(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    starts, endings = (
        [f"{name}{number}" for number in range(1, most)] for name, most in (("InputSentence", 5), (ENDING, 3))
    )
    lines = [",".join(["InputStoryid", *starts, *endings, "AnswerRightEnding"])]
    for number, (*four, right) in enumerate(STORIES):
        endings = ["Wrong.", right] if number % 2 else [right, "Wrong."]
        lines.append(",".join(f'"{one}"' for one in (str(number), *four, *endings, 1 + number % 2)))
    (folder / "rocstories").mkdir()
    (folder / "rocstories" / "cloze_test_val__spring2016.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def one_by_one(trained: Trained, judge: str, settings: dict, seed: int, documents=None) -> dict:
    """A strategy's figures, story by story without batch or padding, and each likelihood token by token."""
    model, tokenizer = trained.model, trained.tokenizer
    judging = LlamaForCausalLM.from_pretrained(judge).eval()
    tokens = passes = judged = 0
    nats = judge_nats = 0.0
    rouges = []
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    for number, sentences in enumerate(documents or STORIES):
        gap = "" if documents else " "
        before, true, behind = gap.join(sentences[:2]), gap + sentences[2], gap + gap.join(sentences[3:])
        left = encode_prompt(tokenizer, before)
        blank, right = (encode_piece(tokenizer, text, is_start=False) for text in (true, behind))
        ids = torch.tensor([[*left, *blank, *right]])
        blanks = torch.zeros_like(ids).bool()
        blanks[0, len(left) : len(left) + len(blank)] = True
        output = model.generate_any_order(
            ids, blanks, seed=[seed_of(seed, number)], suppress_tokens=special, **settings
        )
        tokens, passes = tokens + len(blank), passes + output.num_forward_passes
        # token by token: given all that is not blank, then the blanks from the left
        groups = torch.where(blanks, blanks.long().cumsum(1), 0)
        given = ~blanks
        groups[given] = torch.arange(int(given.sum())) - len(ids[0])
        for column in blanks[0].nonzero().flatten().tolist():
            scored = torch.zeros_like(blanks)
            scored[0, column] = True
            nats -= model.log_likelihood(output.sequences, groups, scored_mask=scored).sum().item()
        written = decode_after(tokenizer, left, output.sequences[blanks].tolist())
        rouges.append(rouge({"target": true}, [written]))
        whole = encode_prompt(tokenizer, before + written + behind)
        start = next(i for i in range(len(left) + 1) if i == len(left) or whole[i] != left[i])
        log_probs = judging(torch.tensor([whole])).logits[0].log_softmax(-1)
        judge_nats -= sum(log_probs[i - 1, whole[i]].item() for i in range(start, len(whole)))
        judged += len(whole) - start
    return {
        "tokens_per_forward": tokens / passes,
        "nll_model": nats / tokens,
        "nll_judge": judge_nats / judged,
        **{kind: sum(one[kind] for one in rouges) / len(rouges) for kind in ("rouge1", "rougeL")},
    }


def check(rows: list[dict], name: str, expected: dict) -> None:
    (row,) = [dict(row) for row in rows if row["strategy"] == name]
    del row["strategy"]
    assert row.pop("tokens_per_second") > 0
    assert row == pytest.approx(expected, rel=1e-4), name


def test_every_kind_of_strategy_is_as_story_by_story(a3, judge, stories):
    with torch.no_grad():
        rows = measure_decoding(a3, judge=judge, num_stories=3, data_dir=stories, seed=5)["decoding"]
        assert [row["strategy"] for row in rows] == list(STRATEGIES)
        kinds = (
            "groupwise 4, dynamic 2, threshold 0.3, entropy 8, speculative model, speculative ngram, refine 4".split(
                ", "
            )
        )
        for name in kinds:
            check(rows, name, one_by_one(a3, judge, STRATEGIES[name], 5))


def test_strategies_differ_in_passes(a3, stories):
    names = ["groupwise 1", "groupwise 2", "groupwise 4", "dynamic 1", "speculative ngram", "refine 1"]
    few = {name: STRATEGIES[name] for name in names}
    rows = measure_decoding(a3, num_stories=3, data_dir=stories, strategies=few)["decoding"]
    speed = {row["strategy"]: row["tokens_per_forward"] for row in rows}
    assert speed["groupwise 1"] == speed["dynamic 1"] == 1.0 < speed["groupwise 2"] < speed["groupwise 4"]
    assert speed["refine 1"] < 1.0 <= speed["speculative ngram"]


def test_draws_come_from_the_seed_and_the_storys_number(a3, judge, stories):
    drawn = {
        "sampled": {"do_sample": True, "temperature": 1.5},
        "random": {"strategy": "dynamic", "criterion": "random"},
    }
    shared = {"judge": judge, "num_stories": 3, "data_dir": stories, "strategies": drawn}
    with torch.no_grad():
        rows = measure_decoding(a3, **shared, seed=5, batch_size=2)["decoding"]
        for name, settings in drawn.items():
            check(rows, name, one_by_one(a3, judge, settings, 5))
    again, other = (measure_decoding(a3, **shared, seed=seed, batch_size=1)["decoding"] for seed in (5, 6))
    for row, same, different in zip(rows, again, other, strict=True):
        assert row["nll_model"] == pytest.approx(same["nll_model"], rel=1e-4)
        assert abs(row["nll_model"] - different["nll_model"]) > 0.01


def test_held_out_documents_with_five_sentences(a3, judge):
    sentences = [[part if i == 0 else "\n\n" + part for i, part in enumerate(STORIES[0])]]
    sentences += [[part if i == 0 else " " + part for i, part in enumerate(story)] for story in STORIES[1:]]
    with torch.no_grad():
        rows = measure_decoding(a3, judge=judge, num_stories=3, strategies={"one": {}})["decoding"]
        check(rows, "one", one_by_one(a3, judge, {}, 0, documents=sentences))


def test_the_true_sentences_are_measured_too(a3, judge, stories, monkeypatch):
    measured = measure_decoding(a3, judge=judge, num_stories=3, data_dir=stories, strategies={"one": {}})
    # a model that writes the true sentences, whose figures are then those of a strategy
    fill = a3.model.generate_any_order

    def cheat(input_ids, blank_mask, *, attention_mask, **settings):
        output = fill(input_ids, blank_mask, attention_mask=attention_mask, **settings)
        for row, (_, _, true, *_) in enumerate(STORIES):
            ids = torch.tensor(encode_piece(a3.tokenizer, f" {true}", is_start=False))
            output.sequences[row, blank_mask[row]] = ids
        return output

    monkeypatch.setattr(a3.model, "generate_any_order", cheat)
    (row,) = measure_decoding(a3, judge=judge, num_stories=3, data_dir=stories, strategies={"one": {}})["decoding"]
    assert measured["decoding_true_nll_model"] == pytest.approx(row["nll_model"])
    assert measured["decoding_true_nll_judge"] == pytest.approx(row["nll_judge"])
    assert row["rouge1"] == row["rougeL"] == 100


def test_without_a_judge(a3, stories):
    measured = measure_decoding(a3, num_stories=2, data_dir=stories, strategies={"one": {}})
    assert set(measured) == {"decoding", "decoding_true_nll_model"}
    assert set(measured["decoding"][0]) == {
        "strategy",
        "tokens_per_forward",
        "tokens_per_second",
        "nll_model",
        "rouge1",
        "rougeL",
    }


def test_other_architectures_take_some_of_the_strategies(tokenizer, judge, stories):
    torch.manual_seed(1)
    decoupled = DecoupledRopeLlamaForCausalLM(DecoupledRopeLlamaConfig(**settings_of(tokenizer))).eval()
    width = settings_of(tokenizer, vocab_size=len(tokenizer) + 1, mask_token_id=len(tokenizer))
    diffusion = MaskedDiffusionLlamaForCausalLM(MaskedDiffusionLlamaConfig(**width)).eval()
    taken = {
        "decoupled_rope": (decoupled, ["groupwise 1"]),
        "masked_diffusion": (diffusion, [name for name, one in STRATEGIES.items() if one.get("strategy") == "dynamic"]),
    }
    for architecture, (model, names) in taken.items():
        seen = trained(model, tokenizer, architecture)
        with torch.no_grad():
            rows = measure_decoding(seen, judge=judge, num_stories=3, data_dir=stories)["decoding"]
            assert [row["strategy"] for row in rows] == names
            check(rows, names[0], one_by_one(seen, judge, STRATEGIES[names[0]], 0))
    assert (
        measure_decoding(trained(decoupled, tokenizer, "decoupled_rope"), strategies={"all": {"group_size": 4}}) == {}
    )
    assert measure_decoding(trained(None, tokenizer, "llama")) == {}


def test_what_is_refused(a3, tokenizer, judge, stories, tmp_path):
    one = {"strategies": {"one": {}}, "data_dir": stories}
    for settings, message in (
        ({"num_stories": 0}, "num_stories=0: expected a whole number"),
        ({"batch_size": 1.5}, "batch_size=1.5: expected a whole number"),
        ({"num_stories": 4}, "num_stories=4: 3 stories of ROCStories give 3 stories"),
        ({"num_stories": 4, "data_dir": None}, "num_stories=4: 4 held-out documents give 3 stories"),
        ({"strategies": {}}, "strategies is empty"),
        ({"strategies": {"one": 4}}, "'one' is 4"),
        ({"strategies": {"one": {"seed": 4}}}, "'one': unknown key 'seed'"),
        ({"strategies": {"one": {"threshold": 0.5}}}, "'one': threshold=0.5 has no effect with strategy='groupwise'"),
        ({"judge": str(tmp_path / "none")}, "none' can't be loaded"),
        ({"data_dir": str(tmp_path)}, "cloze_test_val__spring2016.csv"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_decoding(a3, **{**one, "num_stories": 3, **settings})
    a3.model.save_pretrained(tmp_path / "a3")
    with pytest.raises(ValueError, match="model_type='a3_llama': expected a plain LLaMA"):
        measure_decoding(a3, **one, num_stories=3, judge=str(tmp_path / "a3"))
    short = tiny_model(vocab_size=len(tokenizer), num_hidden_layers=1, max_position_embeddings=20)
    with pytest.raises(ValueError, match=r"story 1 has \d+ tokens, more than the model's context"):
        measure_decoding(trained(short, tokenizer), **one)
    with pytest.raises(ValueError, match="held-out documents give 0 stories of five sentences that fit"):
        measure_decoding(trained(short, tokenizer), num_stories=1)
