"""bfloat16 by itself where a device multiplies it fast, and never against what was set or begun."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from a3_hf import devices
from a3_hf.cli import app
from a3_hf.training.arguments import A3TrainingArguments
from a3_hf.training.recipes import build_recipe
from a3_hf.training.run import run
from a3_hf.training.run_record import RECORD_FILE, check_resume, describe, write_record

SAID = "Passes are in bfloat16"


@pytest.fixture
def fast_bf16(monkeypatch):
    """A CPU with bfloat16 products, and no word from accelerate."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")


def small_recipe(source, folder, overrides=(), **changes):
    settings = {
        "model_name_or_path": str(source),
        "train_file": str(source / "train.txt"),
        "cache_dir": str(source / "cache"),
        "block_size": 14,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "output_dir": str(folder),
        "use_cpu": True,
        "curriculum": {"stages": [{"name": "permute", "group_size": 2}]},
    }
    return build_recipe({**settings, **changes}, overrides, origin="a test")


def precision(folder, **settings) -> tuple[bool, str]:
    made = A3TrainingArguments(str(folder), use_cpu=True, **settings)
    return made.bf16, made.mixed_precision


def test_absent_is_automatic_and_false_is_false(tmp_path, source, fast_bf16):
    assert precision(tmp_path) == (True, "bf16")
    assert precision(tmp_path, bf16=False) == (False, "no")
    for changes, expected in (
        ({}, "bf16"),
        ({"bf16": None}, "bf16"),
        ({"bf16": False}, "no"),
        ({"bf16": True}, "bf16"),
    ):
        assert small_recipe(source, tmp_path, **changes).training.mixed_precision == expected
    recipe, overridden = small_recipe(source, tmp_path), small_recipe(source, tmp_path, ["--bf16", "false"])
    assert recipe.training.bf16_by_default and not overridden.training.bf16_by_default
    assert overridden.training.mixed_precision == "no"


def test_a_cpu_without_such_products_trains_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert precision(tmp_path) == (False, "no")
    assert precision(tmp_path, bf16=True) == (True, "bf16")


@pytest.mark.parametrize("value", ["no", "fp16", "bf16"])
def test_accelerate_decides_where_it_says_anything(tmp_path, monkeypatch, fast_bf16, value):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)
    assert precision(tmp_path) == (False, value)


def test_fp16_and_deepspeed_decide(tmp_path, fast_bf16):
    assert precision(tmp_path, fp16=True) == (False, "fp16")
    made = A3TrainingArguments(str(tmp_path), use_cpu=True)
    made.deepspeed = {"bf16": {"enabled": "auto"}}
    assert not made._runs_well_in_bf16()


@pytest.mark.parametrize("lora", [None, {"r": 2}, {"r": 2, "rows": "slots"}])
def test_a_run_says_so_and_its_passes_are_in_bf16(source, tmp_path, fast_bf16, capsys, lora):
    losses = {}
    for name, changes in {"automatic": {}, "off": {"bf16": False}}.items():
        recipe = small_recipe(source, tmp_path / name, lora=lora, **changes)
        assert run(recipe) == 0
        assert (SAID in capsys.readouterr().out) == (name == "automatic")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [loss for line in lines if (loss := json.loads(line).get("loss"))]
    assert losses["automatic"] == pytest.approx(losses["off"], rel=0.02) and len(losses["off"]) == 2
    assert losses["automatic"] != losses["off"]
    assert json.loads((tmp_path / "automatic" / RECORD_FILE).read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize("began_in_bf16", [True, False])
def test_a_run_does_not_go_on_in_another_precision(source, tmp_path, monkeypatch, fast_bf16, began_in_bf16):
    tokenizer = AutoTokenizer.from_pretrained(source)
    first = {} if began_in_bf16 else {"bf16": False}
    write_record(small_recipe(source, tmp_path, **first), tokenizer)
    assert check_resume(small_recipe(source, tmp_path, **first), tokenizer) == []
    if began_in_bf16:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    before, now = ("bf16", "no") if began_in_bf16 else ("no", "bf16")
    word = "true" if began_in_bf16 else "false"
    with pytest.raises(
        ValueError, match=rf"mixed_precision was '{before}' and is '{now}' \(bf16: {word} in the recipe\)"
    ):
        check_resume(small_recipe(source, tmp_path), tokenizer)
    assert check_resume(small_recipe(source, tmp_path, bf16=began_in_bf16), tokenizer) == []


def test_the_same_precision_from_accelerate_and_from_a_recipe_is_the_same(source, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(source)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    write_record(small_recipe(source, tmp_path), tokenizer)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert check_resume(small_recipe(source, tmp_path, bf16=True), tokenizer) == []


@pytest.mark.parametrize(("flags", "expected"), [({}, "no"), ({"bf16": True}, "bf16"), ({"fp16": True}, "fp16")])
def test_records_from_before_hold_flags(source, tmp_path, flags, expected):
    tokenizer, recipe = AutoTokenizer.from_pretrained(source), small_recipe(source, tmp_path)
    record = {**describe(recipe, tokenizer), "bf16": False, "fp16": False, **flags}
    del record["mixed_precision"]
    Path(tmp_path, RECORD_FILE).write_text(json.dumps(record))
    assert check_resume(small_recipe(source, tmp_path, **flags), tokenizer) == []
    other = {"bf16": expected != "bf16"}
    with pytest.raises(ValueError, match=f"mixed_precision was '{expected}'"):
        check_resume(small_recipe(source, tmp_path, **other), tokenizer)


def test_an_adapter_is_run_in_bf16_by_commands(source, tmp_path, monkeypatch, fast_bf16):
    monkeypatch.setattr(devices, "default_dtype", lambda device: torch.bfloat16)
    assert run(small_recipe(source, tmp_path, lora={"r": 2, "rows": "slots"})) == 0
    shown = CliRunner().invoke(app, ["infill", str(tmp_path), "w1 w2 <blank:3> w4"])
    assert shown.exit_code == 0, shown.output
    assert "Computing in bfloat16" in shown.stderr and "3 tokens in 3 passes" in shown.stderr
