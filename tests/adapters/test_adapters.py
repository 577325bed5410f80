"""LoRA on all rows or on the query slots alone: what it leaves untouched, what it learns, and how it is kept."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_bitsandbytes_available
from typer.testing import CliRunner

from a3_hf import A3LlamaForCausalLM
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoints import check_same, load_model, load_tokenizer, merge
from a3_hf.adapters.layers import SlotLinear, attach
from a3_hf.cli import app
from a3_hf.data.arguments import DataArguments
from a3_hf.training import run as train_module
from a3_hf.training import run_checks as settings_module
from a3_hf.training import run_inputs
from a3_hf.training.arguments import A3TrainingArguments, ModelArguments, Recipe
from a3_hf.training.callbacks import InterruptCallback
from a3_hf.training.curriculum import Curriculum
from a3_hf.training.recipes import parse_recipe
from tests.conftest import tiny_model as tiny_model_of

tiny_model = partial(tiny_model_of, dtype=torch.float32)  # which adapters are kept in
ROOT = Path(__file__).parents[2]
SLOT_TARGETS = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GROUPS = torch.tensor([[0, 2, 1, 1, 3, 2, 4, 4, 3], [0, 1, 1, 2, 2, 3, 3, 4, 4]])
IDS = torch.randint(3, 61, GROUPS.shape, generator=torch.Generator().manual_seed(5))
LABELS = IDS.masked_fill(GROUPS == 0, -100)
STAGES = [
    {"name": "ar", "until": 3},
    {"name": "expand", "until": 6, "group_size": [1, 2]},
    {"name": "permute", "group_size": 2},
]


def adapted(rows: str, *, seed: int = 1, **settings) -> PeftModel:
    """A tiny model whose adapters and `query_embed` are no longer what they were at the start."""
    model = attach(tiny_model(), LoraArguments(r=4, rows=rows, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def content_alone(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of the content stream, run alone: left to right, as the LLaMA that it is."""
    body = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return body.lm_head(body.model(ids, target_position_ids=ids[:, :0]).content_hidden_state)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, group_ids=GROUPS).logits


# ---------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("rows", ["all", "slots"])
def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(rows):
    base = tiny_model()
    model = attach(tiny_model(), LoraArguments(r=4, rows=rows))
    assert torch.equal(logits(model), logits(base))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name or "query_embed" in name for name in trained)
    kinds = {name.split(".lora_")[0].rpartition(".")[2] for name in trained if ".lora_" in name}
    assert kinds == (SLOT_TARGETS if rows == "slots" else SLOT_TARGETS | {"k_proj", "v_proj"})
    assert len(trained) == 3 * 2 * len(kinds) + 1


def test_targets_are_what_the_recipe_names():
    model = attach(tiny_model(), LoraArguments(r=2, target=["layers.1.mlp.up_proj", "o_proj"]))
    names = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.partition("layers.")[2] for name in names} == {
        "1.mlp.up_proj",
        *(f"{i}.self_attn.o_proj" for i in "012"),
    }


@pytest.mark.parametrize("rows", ["all", "slots"])
def test_dropout_is_for_training_and_alpha_is_a_factor(rows):
    model = adapted(rows, dropout=0.5, alpha=8.0)
    assert torch.equal(logits(model), logits(model))
    assert not torch.equal(logits(model), logits(adapted(rows, dropout=0.5, alpha=9.0)))
    assert torch.equal(logits(model), logits(adapted(rows, alpha=8.0)))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(content_alone(model), content_alone(tiny_model())) == (rows == "slots")


@pytest.mark.parametrize("rows", ["all", "slots"])
def test_a_bfloat16_base_is_adapted_in_fp32(rows):
    base = tiny_model().bfloat16()
    model = attach(tiny_model().bfloat16(), LoraArguments(r=4, rows=rows))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(IDS, group_ids=GROUPS, labels=LABELS).loss.backward()
        optimizer.step()
    assert logits(model).dtype == torch.bfloat16 and not torch.equal(logits(model), logits(base))
    assert torch.equal(content_alone(model), content_alone(base)) == (rows == "slots")


# ---------------------------------------------------------------------------------------------- rows: slots


def test_adapters_of_slots_leave_the_content_stream_as_it_was_bit_for_bit():
    base, model = tiny_model(), adapted("slots")
    assert (logits(model) - logits(base)).abs().max() > 0.1
    assert torch.equal(content_alone(model), content_alone(base))
    llama = LlamaForCausalLM(base.config)
    llama.load_state_dict(base.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(content_alone(model), llama.eval()(IDS).logits)
    # and beside slots, where products have other shapes than alone
    views = {"group_ids": GROUPS, "content_hidden_state": True}
    with torch.no_grad():
        assert torch.equal(model(IDS, **views).content_hidden_state, base(IDS, **views).content_hidden_state)
    assert not torch.equal(content_alone(adapted("all")), content_alone(base))


def dense(model: PeftModel) -> A3LlamaForCausalLM:
    """An oracle: a plain model with the adapters' products in its weights, for content and slots alike."""
    plain = tiny_model()
    modules = dict(plain.named_modules())
    with torch.no_grad():
        for name, module in model.get_base_model().named_modules():
            if isinstance(module, SlotLinear):
                product = module.lora_B["default"].weight @ module.lora_A["default"].weight
                modules[name].weight += product * module.scaling["default"]
        plain.model.query_embed.weight.copy_(model.get_base_model().model.query_embed.weight)
    return plain


def group_by_group(base: A3LlamaForCausalLM, slots: A3LlamaForCausalLM, ids, groups) -> torch.Tensor:
    """An oracle for one row: the base reads what comes before a group, and another model writes it from the base's cache."""
    losses = []
    for group in groups.unique()[1:]:
        before, now = (groups < group)[0], (groups == group)[0]
        cache = DynamicCache(config=base.config)
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            base.model(
                ids[:, before],
                position_ids=positions[:, before],
                group_ids=groups[:, before],
                target_position_ids=positions[:, :0],
                past_key_values=cache,
                use_cache=True,
            )
        written = slots(
            ids[:, :0],
            position_ids=positions[:, :0],
            group_ids=groups[:, :0],
            target_position_ids=positions[:, now],
            target_group_ids=groups[:, now],
            past_key_values=cache,
            use_cache=True,
        ).logits
        losses.append(nn.functional.cross_entropy(written[0], ids[0, now], reduction="sum"))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_of_slots_equal_a_model_of_their_own_on_the_bases_cache(checkpointing):
    base, model = tiny_model(), adapted("slots")
    plain = dense(model)
    expected = sum(group_by_group(base, plain, IDS[i : i + 1], GROUPS[i : i + 1]) for i in range(2))
    expected.backward()
    if checkpointing:
        model.train()
        model.get_base_model().gradient_checkpointing_enable()
    loss = model(IDS, group_ids=GROUPS, labels=LABELS).loss * (LABELS != -100).sum()
    loss.backward()
    assert (loss - expected).abs() < 1e-2
    body = model.get_base_model()
    assert torch.allclose(body.model.query_embed.weight.grad, plain.model.query_embed.weight.grad, atol=1e-2)
    modules, compared = dict(plain.named_modules()), 0
    for name, module in body.named_modules():
        if isinstance(module, SlotLinear):
            down, up, scale = (
                module.lora_A["default"].weight,
                module.lora_B["default"].weight,
                module.scaling["default"],
            )
            whole = modules[name].weight.grad
            assert torch.allclose(down.grad, scale * up.detach().T @ whole, atol=1e-2, rtol=1e-2)
            assert torch.allclose(up.grad, scale * whole @ down.detach().T, atol=1e-2, rtol=1e-2)
            compared += 1
    assert compared == 15


def test_passes_with_other_numbers_of_slots_may_come_before_backward():
    grads = []
    for checkpointing in (False, True):
        model = adapted("slots").train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable()
        first = model(IDS, group_ids=GROUPS, labels=LABELS).loss
        second = model(IDS[:, :5], group_ids=GROUPS[:, :5], labels=LABELS[:, :5]).loss
        with torch.no_grad():
            content_alone(model)
        (first + second).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.allclose(*grads, atol=1e-3) and grads[0].abs().sum() > 0


@pytest.mark.parametrize("rows", ["all", "slots"])
@pytest.mark.parametrize("settings", [{"group_size": 3}, {"strategy": "dynamic", "tokens_per_step": 2}])
def test_decoding_is_exact_with_adapters(rows, settings):
    model = adapted(rows)
    blanks = torch.zeros_like(IDS, dtype=torch.bool)
    blanks[:, 3:8] = True
    output = model.generate_any_order(IDS, blanks, **settings)
    assert torch.equal(output.sequences[~blanks], IDS[~blanks])
    scored = model.log_likelihood(output.sequences, output.group_ids)
    assert (output.log_probs - scored.masked_fill(~blanks, 0)).abs().max() < 1e-3
    plain = tiny_model().generate_any_order(IDS, blanks, **settings)
    assert not torch.equal(output.log_probs, plain.log_probs)


@pytest.mark.parametrize("rows", ["all", "slots"])
def test_transformers_generate_and_a_disabled_adapter(rows):
    model, base = adapted(rows), tiny_model()
    ids = IDS[:1]
    written = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2, eos_token_id=None)
    for length in range(9, 13):
        with torch.no_grad():
            assert int(model(written[:, :length]).logits[0, -1].argmax()) == int(written[0, length])
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


# ---------------------------------------------------------------------------------------------- kept and merged


def save_base(folder: Path) -> str:
    tiny_model().save_pretrained(folder / "base")
    return str(folder / "base")


def save_adapter(folder: Path, rows: str) -> tuple[PeftModel, str]:
    """An adapter beside the base that it was made for."""
    model = adapted(rows)
    model.peft_config["default"].base_model_name_or_path = save_base(folder)
    model.save_pretrained(folder / rows)
    return model, str(folder / rows)


@pytest.mark.parametrize("rows", ["all", "slots"])
def test_an_adapter_loads_into_a_fresh_base(tmp_path, rows):
    model, path = save_adapter(tmp_path, rows)
    assert not (tmp_path / rows / "model.safetensors").exists()
    assert any("query_embed" in key for key in load_file(tmp_path / rows / "adapter_model.safetensors"))
    loaded = load_model(path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(content_alone(loaded), content_alone(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert any(parameter.requires_grad for parameter in load_model(path, trainable=True).parameters())


def test_adapters_of_all_rows_merge_into_a_plain_checkpoint(tmp_path):
    model, path = save_adapter(tmp_path, "all")
    save_tokenizer(tmp_path / "base")
    merge(path, tmp_path / "merged")
    merged = A3LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(model)).abs().max() < 1e-3
    assert set(merged.state_dict()) == set(tiny_model().state_dict())
    llama = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert (llama(IDS).logits - content_alone(model)).abs().max() < 1e-3


def save_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def test_adapters_of_slots_do_not_merge_nor_load_where_they_would_act_on_all_rows(tmp_path):
    model, path = save_adapter(tmp_path, "slots")
    with pytest.raises(ValueError, match="rows: slots can't be merged"):
        merge(path, tmp_path / "merged")
    with pytest.raises(ValueError, match="rows: slots can't be merged"):
        model.merge_and_unload()
    assert not (tmp_path / "merged").exists()
    for load in (
        A3LlamaForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        AutoPeftModel.from_pretrained,
        AutoPeftModelForCausalLM.from_pretrained,
        PeftConfig.from_pretrained,
        partial(PeftModel.from_pretrained, tiny_model()),
        tiny_model().load_adapter,
    ):
        with pytest.raises(ValueError, match=r"Load it by a3_hf.adapters.checkpoints.load_model\(path\)"):
            load(path)


def test_what_is_wrong_with_an_adapter_is_said(tmp_path):
    _, path = save_adapter(tmp_path, "all")
    base = str(tmp_path / "base")
    with pytest.raises(ValueError, match="holds no adapter"):
        merge(base, tmp_path / "merged")
    with pytest.raises(ValueError, match="new or empty"):
        merge(path, base)
    config = tmp_path / "all" / "adapter_config.json"
    settings = json.loads(config.read_text())

    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"its base '.*gone': no such folder .*--base"):
        load_model(path)
    assert isinstance(load_model(path, base=base), PeftModel)

    config.write_text(json.dumps({**settings, "of_a_newer_peft": None}))  # not in use
    assert isinstance(load_model(path), PeftModel)
    config.write_text(json.dumps({**settings, "of_a_newer_peft": 2}))
    with pytest.raises(ValueError, match=r"unknown to peft .*: of_a_newer_peft. Update peft"):
        load_model(path)

    config.write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="type 'IA3': expected LORA"):
        load_model(path)
    config.write_text(json.dumps(settings)[:100])
    with pytest.raises(ValueError, match="truncated"):
        load_model(path)

    config.write_text(json.dumps(settings))
    tiny_model(hidden_size=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="don't fit this base"):
        load_model(path, base=str(tmp_path / "narrow"))
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path / "deep")
    with pytest.raises(ValueError, match="14 missing weights"):
        load_model(path, base=str(tmp_path / "deep"))
    tiny_model(num_hidden_layers=2).save_pretrained(tmp_path / "shallow")
    with pytest.raises(ValueError, match="14 unexpected weights"):
        load_model(path, base=str(tmp_path / "shallow"))


# ---------------------------------------------------------------------------------------------- a run


def recipe(source: Path, output_dir: Path, *, lora: LoraArguments | None, model: Path | None = None) -> Recipe:
    return Recipe(
        model=ModelArguments(model_name_or_path=str(model or source)),
        data=DataArguments(
            train_file=str(source / "train.txt"),
            validation_file=str(source / "validation.txt"),
            block_size=8,
            cache_dir=str(source / "cache"),
        ),
        training=A3TrainingArguments(
            str(output_dir),
            max_steps=9,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=3e-2,
            logging_steps=1,
            save_steps=3,
            eval_strategy="steps",
            eval_steps=1000,
            use_cpu=True,
            disable_tqdm=True,
            seed=11,
        ),
        curriculum=Curriculum.from_config(STAGES, unit="steps"),
        lora=lora,
    )


@pytest.fixture(scope="module", params=["all", "slots"])
def finished(request, source, tmp_path_factory):
    """(rows, the folder of a run to its end, its evaluations)."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    lora = LoraArguments(r=4, dropout=0.1, rows=request.param)
    assert train_module.run(recipe(source, folder, lora=lora)) == 0
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return request.param, folder, [entry for entry in history if "eval_loss" in entry]


def test_a_run_with_adapters_learns_and_leaves_the_content_stream_where_it_should(finished, source):
    rows, folder, evaluations = finished
    before, after = evaluations[0], evaluations[-1]
    assert (before["step"], after["step"]) == (0, 9)
    assert after["eval_loss"] < before["eval_loss"] - 0.1
    assert after["eval_loss_scattered_1"] < before["eval_loss_scattered_1"]
    model, base = load_model(str(folder)), A3LlamaForCausalLM.from_pretrained(source)
    ids = IDS.clamp_max(60)
    assert torch.equal(content_alone(model, ids), content_alone(base, ids)) == (rows == "slots")


def test_chunked_loss_checkpointing_and_distillation_go_with_adapters(source, tmp_path):
    plain = recipe(source, tmp_path / "plain", lora=LoraArguments(r=4, rows="slots"))
    other = recipe(source, tmp_path / "other", lora=LoraArguments(r=4, rows="slots"))
    other.training.loss, other.training.gradient_checkpointing = "chunked", True
    taught = recipe(source, tmp_path / "taught", lora=LoraArguments(r=4, rows="slots"))
    taught.training.distillation_weight = 1.0
    for each in (plain, other, taught):
        assert train_module.run(each) == 0
    weights, same, differ = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "other", "taught")
    )
    for key in weights:
        assert torch.allclose(weights[key], same[key], atol=1e-3), key
    assert any(not torch.equal(weights[key], differ[key]) for key in weights)
    model, base = load_model(str(tmp_path / "taught")), A3LlamaForCausalLM.from_pretrained(source)
    assert torch.equal(content_alone(model), content_alone(base))


def test_the_recipe_on_stories260k_keeps_the_llama_and_learns_another_order(stories, story_text, tmp_path):
    text = tmp_path / "stories.txt"  # one story again and again: its loss falls in a few steps
    story, separator, _ = story_text.read_text(encoding="utf-8").partition("<|endoftext|>\n")
    text.write_text((story + separator) * 400, encoding="utf-8")
    small = {
        **{"model_name_or_path": stories, "train_file": text, "output_dir": tmp_path / "out", "cache_dir": tmp_path},
        **{
            "max_steps": 40,
            "eval_steps": 40,
            "learning_rate": "2e-2",
            "block_size": 32,
            "max_train_rows": 192,
            "max_eval_rows": 8,
        },
        **{"validation_documents": 2, "warmup_steps": 2, "disable_tqdm": "true"},
        "curriculum": "{unit: steps, stages: [{name: ar, until: 2}, {name: permute, group_size: 4}]}",
    }
    overrides = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    assert train_module.run(parse_recipe(ROOT / "recipes/stories260k/config_lora.yaml", overrides)) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss_scattered_4"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.03, losses
    model, llama = load_model(str(tmp_path / "out")), LlamaForCausalLM.from_pretrained(stories)
    ids = torch.randint(3, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(content_alone(model, ids), llama(ids).logits)


class Crash(Exception):
    pass


class Crashing(InterruptCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Crash


def test_a_run_with_adapters_resumes_to_the_same_weights(finished, source, tmp_path, monkeypatch):
    rows, unbroken, _ = finished
    lora = LoraArguments(r=4, dropout=0.1, rows=rows)
    monkeypatch.setattr(train_module, "InterruptCallback", Crashing)
    with pytest.raises(Crash):
        train_module.run(recipe(source, tmp_path, lora=lora))
    monkeypatch.undo()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "checkpoint-6" / "adapter_model.safetensors").is_file()

    # another kind of adapters, or none, would not be what was trained so far
    with pytest.raises(ValueError, match=r"checkpoint-6 holds adapters that differ from lora. lora.r=8: expected 4"):
        train_module.run(recipe(source, tmp_path, lora=LoraArguments(r=8, rows=rows)))
    with pytest.raises(ValueError, match="checkpoint-6 holds adapters, but the recipe trains a full model"):
        train_module.run(recipe(source, tmp_path, lora=None))

    torch.manual_seed(99)
    assert train_module.run(recipe(source, tmp_path, lora=lora)) == 0
    assert_same_adapters(tmp_path, unbroken)

    # killed when all steps were done and the model not yet written
    (tmp_path / "trainer_state.json").unlink()
    (tmp_path / "adapter_model.safetensors").unlink()
    assert train_module.run(recipe(source, tmp_path, lora=lora)) == 0
    assert_same_adapters(tmp_path, unbroken)


def assert_same_adapters(folder: Path, other: Path) -> None:
    weights, expected = (load_file(path / "adapter_model.safetensors") for path in (folder, other))
    assert weights.keys() == expected.keys() and len(weights) > 2
    for key in expected:
        assert torch.equal(weights[key], expected[key]), key


def test_a_run_may_start_from_an_adapter(finished, source, tmp_path):
    rows, folder, evaluations = finished
    end = evaluations[-1]["eval_loss_scattered_1"]
    further = recipe(source, tmp_path / "further", lora=LoraArguments(r=4, rows=rows), model=folder)
    assert train_module.run(further) == 0
    history = json.loads((tmp_path / "further" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["eval_loss_scattered_1"] == pytest.approx(end, abs=1e-5)
    assert json.loads((tmp_path / "further" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        source
    )

    with pytest.raises(ValueError, match="holds adapters that differ from lora. lora.r=2: expected 4; lora.target"):
        train_module.run(
            recipe(source, tmp_path / "o", lora=LoraArguments(r=2, rows=rows, target=["q_proj"]), model=folder)
        )
    whole = recipe(source, tmp_path / "whole", lora=None, model=folder)
    if rows == "slots":
        with pytest.raises(ValueError, match="without lora: an adapter with rows: slots can't be merged"):
            train_module.run(whole)
    else:
        assert train_module.run(whole) == 0
        history = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
        assert history[0]["eval_loss_scattered_1"] == pytest.approx(end, abs=1e-4)
        assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_every_command_takes_an_adapter(finished, tmp_path):
    rows, folder, _ = finished

    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    assert "2 tokens in 1 passes" in run("infill", folder, "w1 <blank:2> w3", "--group-size", "2").stderr
    assert run("generate", folder, "w1 w2", "--max-new-tokens", "3").exit_code == 0
    scored = run("score", folder, "w1 w2 w3 w4")
    assert scored.exit_code == 0, scored.output
    result = run("merge", folder, tmp_path / "merged")
    if rows == "slots":
        assert result.exit_code == 2 and "a3: " in result.stderr and "can't be merged" in result.stderr
    else:
        assert result.exit_code == 0, result.output
        tables = [run("score", tmp_path / "merged", "w1 w2 w3 w4").stdout, scored.stdout]
        totals, others = ([float(number) for number in re.findall(r"-?\d+\.\d+", table)] for table in tables)
        assert len(totals) > 4 and totals == pytest.approx(others, abs=1e-2)
    assert load_tokenizer(str(folder)).bos_token == "<s>"


# ---------------------------------------------------------------------------------------------- settings

RECIPE = "model_name_or_path: m\ntrain_file: t.txt\ncurriculum: {stages: [{name: ar}]}\n"


@pytest.fixture
def parsed(tmp_path):
    def parsed(extra: str, *overrides: str) -> LoraArguments | None:
        path = tmp_path / "config.yaml"
        path.write_text(f"output_dir: {tmp_path}/run\nuse_cpu: true\n{RECIPE}{extra}\n", encoding="utf-8")
        return parse_recipe(path, overrides).lora

    return parsed


def test_lora_in_a_recipe_and_on_the_command_line(parsed):
    assert parsed("") is None
    assert parsed("lora: {}") == LoraArguments()
    assert parsed("lora: {r: 8, alpha: 4, dropout: 0.1, target: [q_proj], rows: slots}") == LoraArguments(
        r=8, alpha=4.0, dropout=0.1, target=["q_proj"], rows="slots"
    )
    assert parsed("lora: {r: 8}", "--lora", "{r: 2, target: all-linear}") == LoraArguments(r=2)
    assert parsed("lora: {r: 8}", "--lora", "null") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora: 8", "lora: expected a mapping of r, alpha, dropout, target, rows, got 8"),
        ("lora: {rank: 8}", "lora: unknown key 'rank'"),
        ("lora: {targets: [q_proj]}", "lora: unknown key 'targets'; did you mean 'target'"),
        ("lora: {r: 8.0}", "lora: r: expected an integer, got 8.0"),
        ("lora: {r: true}", "lora: r: expected an integer, got True"),
        ("lora: {r: 0}", r"lora.r=0: expected 1 or more"),
        ("lora: {alpha: 0}", r"lora.alpha=0.0: expected a number above 0"),
        ("lora: {dropout: 1.0}", r"lora.dropout=1.0: expected 0 or more, and less than 1"),
        ("lora: {target: q_proj}", "lora: target: expected a list or one of 'all-linear', got 'q_proj'"),
        ("lora: {target: []}", r"lora.target=\[\]: expected a list of names"),
        ("lora: {target: [q_proj, q_proj]}", "expected each name once"),
        ("lora: {rows: content}", "lora: rows: expected one of 'all', 'slots', got 'content'"),
    ],
)
def test_wrong_settings_are_refused(parsed, text, message):
    with pytest.raises(ValueError, match=message):
        parsed(text)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            LoraArguments(target=["q_proj", "w_proj"]),
            "lora.target='w_proj' matches no linear layer of the decoder: expected q_proj, k_proj",
        ),
        (LoraArguments(target=["mlp"]), "'mlp' matches no linear layer"),
        (LoraArguments(target=["lm_head"]), "'lm_head' matches no linear layer"),
        (LoraArguments(target=["layers.7.mlp.up_proj"]), "'layers.7.mlp.up_proj' matches no linear layer"),
        (
            LoraArguments(target=["q_proj", "v_proj"], rows="slots"),
            "lora.target='v_proj' makes keys or values, which slots don't have: with rows: slots, expected q_proj, "
            "o_proj, gate_proj",
        ),
    ],
)
def test_a_target_that_matches_nothing_is_said_before_data_is_read(source, tmp_path, monkeypatch, lora, message):
    monkeypatch.setattr(run_inputs, "load_rows", None)
    monkeypatch.setattr(A3LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(ValueError, match=message):
        train_module.run(recipe(source, tmp_path, lora=lora))


def test_a_checkpoint_of_a_whole_model_is_not_taken_for_adapters(source):
    with pytest.raises(ValueError, match="holds a full model, but the recipe trains adapters"):
        check_same(source, LoraArguments(), tiny_model().config)


def test_four_bits_need_adapters_and_a_library(source, tmp_path, monkeypatch):
    wanted = recipe(source, tmp_path, lora=None)
    wanted.model.load_in_4bit = True
    with pytest.raises(ValueError, match="load_in_4bit=True: weights in 4 bits can't be trained. Set lora"):
        train_module.run(wanted)
    monkeypatch.setattr(settings_module, "is_bitsandbytes_available", lambda: False)
    wanted = recipe(source, tmp_path, lora=LoraArguments())
    wanted.model.load_in_4bit = True
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes"):
        train_module.run(wanted)


@pytest.mark.skipif(not is_bitsandbytes_available(), reason="needs bitsandbytes")
@pytest.mark.parametrize("rows", ["all", "slots"])
def test_a_base_in_four_bits(source, tmp_path, rows):
    wanted = recipe(source, tmp_path, lora=LoraArguments(r=4, rows=rows))
    wanted.model.load_in_4bit = True
    assert train_module.run(wanted) == 0
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert evaluations[-1] < evaluations[0]
    assert logits(load_model(str(tmp_path))).isfinite().all()
