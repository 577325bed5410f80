"""What a run was started with, and what a resume may change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.training.curriculum import Curriculum
from a3_hf.training.run import run
from a3_hf.training.run_record import RECORD_FILE, check_resume, describe, write_record
from tests.training.test_resume import recipe as small_recipe


@pytest.fixture
def started(source, tmp_path):
    """A recipe whose run has begun, and its tokenizer."""
    recipe, tokenizer = small_recipe(source, tmp_path / "out"), AutoTokenizer.from_pretrained(source)
    write_record(recipe, tokenizer)
    return recipe, tokenizer


def test_the_same_recipe_may_go_on(started):
    assert check_resume(*started) == []
    recipe, tokenizer = started
    recorded = json.loads((Path(recipe.training.output_dir) / RECORD_FILE).read_text())
    assert recorded["learning_rate"] == 1e-2 and recorded["curriculum"]["stages"][0]["name"] == "ar"
    assert recorded == describe(recipe, tokenizer)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logging_steps", 7), ("save_steps", 5), ("dataloader_num_workers", 1), ("per_device_eval_batch_size", 3)],
)
def test_what_makes_no_difference_is_told(started, name, value):
    recipe, tokenizer = started
    setattr(recipe.training, name, value)
    (change,) = check_resume(recipe, tokenizer)
    assert change.startswith(f"{name} was ") and change.endswith(f"is {value}")


def test_a_batch_may_be_divided_otherwise(started):
    recipe, tokenizer = started
    recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps = 1, 4
    assert len(check_resume(recipe, tokenizer)) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", 1e-4), ("seed", 12), ("max_steps", 13), ("weight_decay", 0.5), ("lr_scheduler_type", "cosine")],
)
def test_what_changes_the_result_is_refused(started, name, value):
    recipe, tokenizer = started
    setattr(recipe.training, name, value)
    with pytest.raises(ValueError, match=rf"other settings: {name} was .* another output_dir"):
        check_resume(recipe, tokenizer)


def test_all_that_changed_is_listed(started, tokenizer):
    recipe, _ = started
    recipe.training.gradient_accumulation_steps = 3
    recipe.data.block_size = 16
    curriculum = Curriculum.from_config([{"name": "ar"}])
    changed = replace(recipe, curriculum=curriculum, lora=LoraArguments(r=4))
    with pytest.raises(ValueError) as raised:
        check_resume(changed, tokenizer)
    for name in ("block_size was 8 and is 16", "rows_per_step was 4 and is 6", "curriculum was", "lora was None"):
        assert name in str(raised.value)
    assert "the tokenizer has another vocabulary" in str(raised.value)
    assert "gradient_accumulation_steps was" not in str(raised.value)


def test_a_run_without_a_record_goes_on(source, tmp_path):
    assert check_resume(small_recipe(source, tmp_path), AutoTokenizer.from_pretrained(source)) == []


def test_a_tokenizer_with_more_ids_than_the_model_embeds_is_refused(source, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = small_recipe(source, tmp_path / "out")
    recipe.model.tokenizer_name_or_path = str(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"ids up to \d+, and the model .* embeds ids below 61"):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_an_adapters_base_may_not_change_and_a_models_start_may(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    for lora in (None, LoraArguments(r=4)):
        recipe = replace(small_recipe(source, tmp_path / str(lora is None)), lora=lora)
        write_record(recipe, tokenizer)
        recipe.model.model_name_or_path = "elsewhere"
        if lora is None:
            assert len(check_resume(recipe, tokenizer)) == 1
        else:
            with pytest.raises(ValueError, match="other settings: model_name_or_path was"):
                check_resume(recipe, tokenizer)
