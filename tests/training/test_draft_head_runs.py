"""Draft heads trained by recipes: rows of written documents, the same weights after a stop, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoint_info import CheckpointInfo
from a3_hf.adapters.checkpoints import load_model
from a3_hf.adapters.layers import attach
from a3_hf.data.arguments import DataArguments
from a3_hf.data.collator import RowCollator
from a3_hf.data.written import load_written
from a3_hf.evaluation.measures.draft_heads import measure_drafts
from a3_hf.evaluation.measures.trained_run import Trained
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.training import run as train_module
from a3_hf.training.draft_head_trainer import likely_tokens, measure_guesses
from a3_hf.training.recipes import parse_recipe

SIZES = {"num_drafts": 2, "rank": 2, "sampler_size": 4, "num_candidates": 20}


@pytest.fixture
def written(source, tmp_path):
    """Documents in the form of `scripts/write_text.py`: every second one has EOS in its opening, as in a chat."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    lines = []
    for number in range(16):
        words = tokenizer(" ".join(f"w{(number * place) % 11}" for place in range(1, 10)))["input_ids"]
        opening = [tokenizer.bos_token_id, words[0], *([tokenizer.eos_token_id] if number % 2 else [])]
        lines.append(json.dumps({"input_ids": opening + words, "prompt_length": len(opening)}))
    path = tmp_path / "written.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(source, written, folder, *overrides: str, **changes):
    settings = {
        "model_name_or_path": str(source),
        "architecture": "draft_head",
        "draft_head": SIZES,
        "train_file": str(written),
        "validation_documents": 4,
        "block_size": 64,
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 6,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))
    return parse_recipe(path, list(overrides))


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_recipe_trains_it_and_a_resume_ends_in_the_same_weights(source, written, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_module.run(recipe(source, written, out)) == 0
    assert f'a3 generate {out} "Once upon a time"' in capsys.readouterr().out
    stored = weights(out)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.int32}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (line for line in lines if "eval_loss_distance_2" in line)
    assert (before["step"], after["step"]) == (0, 6)
    assert after["eval_loss_distance_2"] < before["eval_loss_distance_2"] - 0.1
    card = (out / "README.md").read_text()
    assert "| rank | 2 |" in card and "| base |" in card and "a3_draft_head" in card
    assert f"| 3 | {after['eval_loss_distance_3']:.3f} | {after['eval_right_distance_3']:.3f} |" in card

    shutil.rmtree(out / "checkpoint-6")  # as if it had been stopped after the one before
    for name in ("model.safetensors", "trainer_state.json"):
        (out / name).unlink()
    assert train_module.run(recipe(source, written, out)) == 0
    assert "Resuming" in capsys.readouterr().out
    assert all(torch.equal(weights(out)[name], tensor) for name, tensor in stored.items())
    (out / "trainer_state.json").unlink()  # killed between the last step and the end
    assert train_module.run(recipe(source, written, out)) == 0
    assert all(torch.equal(weights(out)[name], tensor) for name, tensor in stored.items())
    with pytest.raises(ValueError, match="draft_head was .*rank"):
        (out / "trainer_state.json").unlink()
        train_module.run(recipe(source, written, out, "--draft_head.rank", "3"))

    model = load_model(str(out))
    assert model.drafter.head.config.rank == 2 and CheckpointInfo.read(out).base == str(source)
    ids = torch.tensor([json.loads(written.read_text().splitlines()[0])["input_ids"][:2]])
    text = model.generate_any_order(ids, max_new_tokens=8, strategy="speculative").sequences
    plain = A3LlamaForCausalLM.from_pretrained(source, slot_start="left_token")
    assert torch.equal(text, plain.generate_any_order(ids, max_new_tokens=8).sequences)


def test_a_run_may_start_from_a_head(source, written, tmp_path):
    first = tmp_path / "first"
    train_module.run(recipe(source, written, first))
    kept = {"model_name_or_path": str(first), "draft_head": None, "learning_rate": 0.0}
    train_module.run(recipe(source, written, tmp_path / "same", **kept))
    same = weights(tmp_path / "same")
    assert all(torch.equal(same[name], tensor) for name, tensor in weights(first).items())
    assert CheckpointInfo.read(tmp_path / "same").base == str(source)
    with pytest.raises(ValueError, match="draft_head.rank=3: expected 2, as in"):
        train_module.run(recipe(source, written, tmp_path / "other", **{**kept, "draft_head": {**SIZES, "rank": 3}}))
    attach(A3LlamaForCausalLM.from_pretrained(source), LoraArguments(r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter: expected a LLaMA or a draft head"):
        train_module.run(recipe(source, written, tmp_path / "b", model_name_or_path=str(tmp_path / "adapter")))
    with pytest.raises(ValueError, match="holds a draft head: expected a model"):
        changes = {"architecture": "a3", "draft_head": None, "curriculum": {"stages": [{"name": "ar"}]}}
        train_module.run(recipe(source, written, tmp_path / "a3", **{**kept, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "llama"}, "draft_head has no effect with architecture 'llama'"),
        ({"draft_head": {"ranks": 3}}, "draft_head: unknown key 'ranks'; did you mean 'rank'"),
        ({"draft_head": {"rank": "3"}}, "draft_head: rank: expected an integer"),
        ({"draft_head": 3}, "draft_head: expected a mapping of num_drafts"),
        ({"draft_head": {"num_drafts": 0}}, "draft_head.num_drafts=0: expected 1 to 16"),
        ({"draft_head": {"first_layer": 99}}, "draft_head.first_layer=99: expected 0 to"),
        ({"lora": {"r": 2}}, "lora has no effect with architecture 'draft_head'"),
        ({"curriculum": {"stages": [{"name": "ar"}]}}, "trained without orders"),
        ({"text_column": "words"}, "text_column='words' has no effect with architecture 'draft_head'"),
        ({"shuffle_documents": True}, "shuffle_documents=True has no effect"),
        ({"train_file": None, "dataset_name": "x/y"}, "train_file=None: expected a .jsonl file"),
        ({"loss": "chunked"}, "loss='chunked' has no effect"),
        ({"validation_documents": 16}, "validation_documents=16: expected fewer than the 16 documents"),
        ({"train_file": "no.jsonl"}, "train_file='no.jsonl': can't be read"),
    ],
)
def test_what_a_draft_head_cannot_use_is_refused(source, written, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_module.run(recipe(source, written, tmp_path / "out", **changes))


def test_rows_score_what_was_written(tmp_path):
    path = tmp_path / "some.jsonl"
    documents = [([1, 5, 6, 7, 8, 9], 2), ([1, 2, 3], 1), ([1, 4, 4, 4, 4], 1)]
    path.write_text("".join(json.dumps({"input_ids": ids, "prompt_length": given}) + "\n" for ids, given in documents))
    rows, held_out = load_written(
        DataArguments(train_file=str(path), block_size=5, validation_documents=1), vocab_size=10
    )
    assert list(rows) == [{"input_ids": [1, 5, 6, 7, 8], "attention_mask": [1] * 5, "labels": [-100, -100, 6, 7, 8]}]
    assert [row["input_ids"] for row in held_out] == [[1, 4, 4, 4, 4]]
    rows, held_out = load_written(
        DataArguments(train_file=str(path), validation_file=str(path), max_train_rows=1), vocab_size=10
    )
    assert (len(rows), len(held_out)) == (1, 2)
    with pytest.raises(ValueError, match=r"no document has 3 written tokens in its first 3"):
        load_written(DataArguments(train_file=str(path), block_size=3), vocab_size=10)
    with pytest.raises(ValueError, match=r"line 1: token 9: expected ids below 9"):
        load_written(DataArguments(train_file=str(path)), vocab_size=9)
    for line in (
        "[1]",
        '{"input_ids": [1, "2"], "prompt_length": 1}',
        '{"input_ids": [1, 2], "prompt_length": 3}',
        "{",
    ):
        path.write_text(line)
        with pytest.raises(ValueError, match=r"line 1: expected .*as scripts/write_text.py writes"):
            load_written(DataArguments(train_file=str(path)), vocab_size=10)


def test_candidates_are_the_most_frequent_tokens():
    rows = [{"labels": [-100, 7, 7, 5]}, {"labels": [9, 9, 9, -100]}]
    assert likely_tokens(rows, 2).tolist() == [7, 9]
    assert likely_tokens(rows, 5).tolist() == [0, 1, 5, 7, 9]


# The measure


@pytest.fixture
def trained(source, written, tmp_path):
    run = recipe(source, written, tmp_path / "head", validation_documents=6)
    train_module.run(run)
    model = load_model(str(tmp_path / "head")).eval()
    return Trained(model, AutoTokenizer.from_pretrained(source), run, [], [], [])


def test_guesses_are_those_of_the_head_whatever_the_batch(trained, written):
    _, rows = load_written(trained.recipe.data, vocab_size=10**6)
    head = trained.model.drafter.head
    assert measure_guesses(head, rows, batch_size=2) == [
        {name: pytest.approx(value, rel=1e-5) for name, value in one.items()}
        for one in measure_guesses(head, rows, batch_size=6)
    ]
    result = measure_drafts(trained, num_prompts=2, length=6, trees={"chain": {"draft_tokens": 2, "draft_width": 1}})
    for kind, own in (("stories", [0, 2, 4]), ("chat", [1, 3, 5])):
        output = head(**RowCollator()([rows[index] for index in own]))
        for number in range(2):
            (guess,) = [one for one in result["guesses"] if one["prompts"] == kind and one["distance"] == 2 + number]
            assert guess["right"] == pytest.approx(float(output.right[number]), rel=1e-6)
            assert guess["nats"] == pytest.approx(float(output.losses[number]), rel=1e-5)
            assert guess["tokens"] == int(output.num_scored[number])
            assert result[f"right_{2 + number}_{kind}"] == guess["right"]
    assert result["head_parameters"] == sum(parameter.numel() for parameter in head.parameters())


def test_tokens_a_pass_are_those_of_generate_any_order(trained):
    trees = {"chain": {"draft_tokens": 2, "draft_width": 1}, "tree": {"draft_tokens": 6}}
    result = measure_drafts(trained, num_prompts=2, length=9, trees=trees)
    _, rows = load_written(trained.recipe.data, vocab_size=10**6)
    for kind, own in (("stories", (0, 2)), ("chat", (1, 3))):
        for draft, source in (("head", "head"), ("lookup", "ngram+head")):
            for tree, settings in trees.items():
                tokens = passes = 0
                for index in own:
                    ids = torch.tensor([[t for t, given in zip(rows[index]["input_ids"], rows[index]["labels"], strict=True)
                                         if given == -100]])  # fmt: skip
                    output = trained.model.generate_any_order(
                        ids, max_new_tokens=9, strategy="speculative", draft=source, verify="content", **settings
                    )
                    tokens += int((output.commit_step[0] >= 0).sum())
                    passes += output.num_forward_passes
                assert result[f"tokens_per_pass_{kind}_{draft}_{tree}"] == tokens / passes
    assert len(result["passes"]) == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_prompts": 0}, "num_prompts=0: expected a whole number"),
        ({"num_prompts": 4}, "num_prompts=4: expected at most the 3 documents of kind"),
        ({"trees": {"one": {"nodes": 3}}}, "trees: 'one': unknown key 'nodes'"),
        ({"trees": {"one": {"draft_tokens": 0}}}, "trees: 'one': draft_tokens=0"),
        ({"trees": {"one": 3}}, "trees: 'one' is 3: expected draft_tokens and draft_width"),
    ],
)
def test_settings_of_the_measure_are_checked(trained, settings, message):
    with pytest.raises(ValueError, match=message):
        measure_drafts(trained, **settings)


def test_only_draft_heads_are_measured(source, trained, written, tmp_path):
    without = recipe(source, written, tmp_path / "without", validation_documents=0, eval_strategy="no")
    with pytest.raises(ValueError, match="no evaluation documents"):
        measure_drafts(Trained(trained.model, trained.tokenizer, without, [], [], []))
    other = recipe(
        source,
        written,
        tmp_path / "other",
        architecture="llama",
        draft_head=None,
    )
    with pytest.raises(ValueError, match="architecture='llama': expected 'draft_head'"):
        measure_drafts(Trained(trained.model, trained.tokenizer, other, [], [], []))
