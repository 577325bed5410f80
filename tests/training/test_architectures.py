"""Runs of the architectures without orders: masked diffusion and next-token training from a recipe, resumed, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from a3_hf.adapters.checkpoint_info import CheckpointInfo
from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.data.packing import load_rows
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.models.auto import ARCHITECTURES
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import MaskedDiffusionLlamaForCausalLM
from a3_hf.training import run as train_module
from a3_hf.training.callbacks import InterruptCallback
from a3_hf.training.recipes import parse_recipe

WITHOUT_ORDERS = ("masked_diffusion", "llama")


def recipe(source, folder, architecture, *overrides: str):
    path = folder.parent / f"{folder.name}.yaml"
    settings = {
        "model_name_or_path": str(source),
        "architecture": architecture,
        "train_file": str(source / "train.txt"),
        "validation_file": str(source / "validation.txt"),
        "cache_dir": str(source / "cache"),
        "block_size": 8,
        "output_dir": str(folder),
        "max_steps": 9,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 9,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 11,
    }
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    return parse_recipe(path, list(overrides))


class Crash(Exception):
    pass


class Crashing(InterruptCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Crash


@pytest.mark.parametrize("architecture", WITHOUT_ORDERS)
def test_a_recipe_trains_it_and_a_resume_ends_in_the_same_weights(source, tmp_path, monkeypatch, capsys, architecture):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train_module.run(recipe(source, unbroken, architecture)) == 0
    assert "(end)" in capsys.readouterr().out
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 9]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"] - 0.1
    assert not any("stage" in line for line in lines)
    model = load_model(str(unbroken), architecture=architecture)
    assert type(model) is ARCHITECTURES[architecture].model

    monkeypatch.setattr(train_module, "InterruptCallback", Crashing)
    with pytest.raises(Crash):
        train_module.run(recipe(source, broken, architecture))
    monkeypatch.undo()
    torch.manual_seed(99)
    assert train_module.run(recipe(source, broken, architecture)) == 0
    assert "Resuming" in capsys.readouterr().out
    weights, expected = (load_file(folder / "model.safetensors") for folder in (broken, unbroken))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert train_module.run(recipe(source, broken, architecture)) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_control_is_a_llama_and_its_loss_is_that_of_next_tokens(source, tmp_path):
    run = recipe(source, tmp_path / "out", "llama")
    train_module.run(run)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.config.model_type == "llama"
    entries = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    measured = [entry["eval_loss"] for entry in entries if "eval_loss" in entry][-1]
    tokenizer = load_tokenizer(str(source))
    _, rows = load_rows(run.data, tokenizer, seed=11)
    total = tokens = 0
    for row in rows:
        ids = torch.tensor([[t for t, real in zip(row["input_ids"], row["attention_mask"], strict=True) if real]])
        log_probs = model(ids).logits.log_softmax(dim=-1)
        total -= float(log_probs[:, :-1].gather(2, ids[:, 1:, None]).sum())
        tokens += ids.shape[1] - 1
    assert measured == pytest.approx(total / tokens, abs=1e-4)


def test_a_llama_stays_one_only_where_it_is_said(source, tmp_path):
    assert CheckpointInfo.read(source).architecture == "a3"
    assert type(load_model(str(source))) is A3LlamaForCausalLM
    assert type(load_model(str(source), architecture="llama")) is LlamaForCausalLM
    load_model(str(source), architecture="masked_diffusion").save_pretrained(tmp_path / "diffusion")
    assert type(load_model(str(tmp_path / "diffusion"))) is MaskedDiffusionLlamaForCausalLM
    with pytest.raises(ValueError, match="'llama' expects a LLaMA"):
        load_model(str(tmp_path / "diffusion"), architecture="llama")
    with pytest.raises(ValueError, match="masked_diffusion_llama"):
        load_model(str(tmp_path / "diffusion"), architecture="a3")


@pytest.mark.parametrize("architecture", WITHOUT_ORDERS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--curriculum", "{stages: [{name: ar}]}"], "curriculum has no effect"),
        (["--content_loss_weight", "2"], "content_loss_weight=2.0 has no effect"),
        (["--loss", "chunked"], "loss='chunked' has no effect"),
        (["--lora", "{r: 2}"], "lora: expected architecture 'a3'"),
    ],
)
def test_settings_without_effect_are_refused(source, tmp_path, architecture, overrides, message):
    with pytest.raises(ValueError, match=message):
        train_module.run(recipe(source, tmp_path / "out", architecture, *overrides))
    assert not (tmp_path / "out").exists()


def test_a_loss_of_masked_diffusion_is_refused_elsewhere(source, tmp_path):
    with pytest.raises(ValueError, match="masking='count' has no effect with architecture 'llama'"):
        train_module.run(recipe(source, tmp_path / "out", "llama", "--masking", "count"))
    with pytest.raises(ValueError, match="documents='isolated'"):
        train_module.run(recipe(source, tmp_path / "out", "llama", "--documents", "isolated"))


def test_a_mixture_is_for_those_with_a_curriculum(source, tmp_path):
    recipe(source, tmp_path / "out", "masked_diffusion")
    path = tmp_path / "out.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith(("train_file", "validation_file"))]
    lines += [f"sources: {{words: {{path: {source / 'train.txt'}}}}}", "validation_documents: 1"]
    path.write_text("\n".join(lines))
    with pytest.raises(
        ValueError, match="sources: expected train_file or dataset_name with architecture 'masked_diffusion'"
    ):
        train_module.run(parse_recipe(path))


def test_how_it_masks_is_the_recipes(source, tmp_path):
    made = []

    class Spy(train_module.DiffusionTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    original, train_module.DiffusionTrainer = train_module.DiffusionTrainer, Spy
    try:
        settings = ["--masking", "count", "--low_discrepancy", "true", "--anneal_steps", "4"]
        train_module.run(recipe(source, tmp_path / "out", "masked_diffusion", *settings))
    finally:
        train_module.DiffusionTrainer = original
    assert (made[0].masking, made[0].low_discrepancy, made[0].anneal_steps) == ("count", True, 4)
