"""Runs on rows of one blank each: an adapter with its suffix template, and a LLaMA as the control."""

import json

import pytest

from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.training import run as train
from a3_hf.training.recipes import parse_recipe

WORDS = "w1 w2{suffix} w3"


def recipe(source, tmp_path, fim: str, *more: str):
    path = tmp_path / "recipe.yaml"
    lines = [f"model_name_or_path: {source}", f"train_file: {source / 'train.txt'}", f"fim: {fim}", "block_size: 16"]
    lines += [f"validation_file: {source / 'validation.txt'}", "eval_strategy: steps", "max_steps: 3", "use_cpu: true"]
    path.write_text("\n".join([*lines, f"output_dir: {tmp_path / 'out'}", *more]))
    return path


def test_an_adapter_of_slots_holds_its_suffix_template(source, tmp_path):
    a3 = ("lora: {r: 2, rows: slots}", "slot_start: left_token", "curriculum: {stages: [{name: ar}]}")
    fim = "{rate: 1.0, suffix_template: 1, middle: [1, 4], score: middle}"
    path = recipe(source, tmp_path, fim, f"suffix_template: {WORDS}", *a3)
    assert train.run(parse_recipe(path)) == 0
    out = tmp_path / "out"
    assert json.loads((out / "adapter_config.json").read_text())["suffix_template"] == WORDS
    assert "suffix_template" in (out / "README.md").read_text()
    model, tokenizer = load_model(str(out)), load_tokenizer(str(out))
    assert model.config.suffix_template == WORDS
    text = "w5 w6 <blank:2> w7 w8"
    own, by_hand = (model.infill(tokenizer, text, **one) for one in ({}, {"suffix_template": WORDS}))
    assert own == by_hand and own.endswith("w7 w8")
    assert load_model(str(out), suffix_template="{suffix} w9").config.suffix_template == "{suffix} w9"
    # trained further without the words in the recipe: they are stored
    path.write_text(path.read_text().replace(f"suffix_template: {WORDS}\n", ""))
    again = ("--model_name_or_path", str(out), "--output_dir", str(tmp_path / "again"))
    assert train.run(parse_recipe(path, [*again, "--tokenizer_name_or_path", str(source)])) == 0
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["suffix_template"] == WORDS
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss_left_to_right" in line for line in losses)


@pytest.mark.parametrize(("setting", "first"), [("eval_on_start: false", 3), ("eval_on_start: true", 0), ("", 0)])
def test_a_run_evaluates_before_training_if_it_is_told_to(source, tmp_path, setting, first):
    fim = "{rate: 0.5, psm: 1, spm: 1, tokens: [w50, w51, w52]}"
    path = recipe(source, tmp_path, fim, "architecture: llama", "eval_steps: 3", setting)
    assert train.run(parse_recipe(path)) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert next(entry["step"] for entry in state["log_history"] if "eval_loss" in entry) == first


def test_a_llama_learns_rows_with_marks(source, tmp_path):
    fim = "{rate: 0.5, psm: 1, spm: 1, tokens: [w50, w51, w52]}"
    assert train.run(parse_recipe(recipe(source, tmp_path, fim, "architecture: llama"))) == 0
    assert load_model(str(tmp_path / "out"), architecture="llama").config.model_type == "llama"


@pytest.mark.parametrize("architecture", ["decoupled_rope", "masked_diffusion"])
@pytest.mark.parametrize("score", ["all", "middle"])
def test_the_other_controls_learn_them_too(source, tmp_path, architecture, score):
    fim = f"{{rate: 1.0, psm: 1, spm: 1, tokens: [w50, w51, w52], score: {score}}}"
    curriculum = ["curriculum: {stages: [{name: ar}]}"] if architecture == "decoupled_rope" else []
    assert train.run(parse_recipe(recipe(source, tmp_path, fim, f"architecture: {architecture}", *curriculum))) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in lines)


@pytest.mark.parametrize(
    "more, message",
    [
        (["architecture: llama", "suffix_template: '{suffix}'"], "suffix_template='{suffix}' has no effect with"),
        (["suffix_template: words", "curriculum: {stages: [{name: ar}]}"], "suffix_template='words': expected text"),
        (["curriculum: {stages: [{name: ar}]}"], "set suffix_template, the words around the suffix"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(source, tmp_path, more, message, capsys):
    with pytest.raises(ValueError, match=message):
        train.run(parse_recipe(recipe(source, tmp_path, "{suffix_template: 1}", *more)))
    assert not (tmp_path / "out").exists()
