import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import a3_hf.data
from a3_hf import A3LlamaConfig, A3LlamaForCausalLM
from a3_hf.arguments import parse_recipe
from a3_hf.data import load_rows

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
LOCAL = ROOT / "recipes/stories260k/config_cpu.yaml"
HUB_RECIPES = [path for path in RECIPES if path != LOCAL]
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def name_of(path):
    return str(path.relative_to(ROOT))


def test_there_are_recipes():
    assert LOCAL in RECIPES
    assert len(HUB_RECIPES) >= 3
    assert {"cpu.yaml", "ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"} <= {path.name for path in ACCELERATE_CONFIGS}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_parses_and_its_curriculum_resolves(path):
    recipe = parse_recipe(path)
    training = recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    recipe.curriculum.resolve(max_steps=training.max_steps, tokens_per_step=rows * recipe.data.block_size)
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^seed: \d+", text, re.MULTILINE)
    assert re.search(r"^output_dir: runs/", text, re.MULTILINE)
    assert "../shared" not in text or path == LOCAL


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_the_readme_of_a_recipe_names_it_in_a_command(path):
    readme = (path.parent / "README.md").read_text(encoding="utf-8")
    commands = [
        line for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) for line in block.splitlines() if line
    ]
    assert any(re.search(rf"a3(_hf)? adapt {re.escape(name_of(path))}(\s|$)", line) for line in commands)
    assert "## Measured" in readme
    for command in commands:
        for file in re.findall(r"\S+\.yaml", command):
            assert (ROOT / file).is_file(), f"{command}: there is no {file}"


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=name_of)
def test_accelerate_reads_its_configs(path):
    config = load_config_from_file(str(path))
    assert (config.num_machines > 1) == path.stem.endswith("_multinode")
    assert config.use_cpu == (path.name == "cpu.yaml")
    kinds = {"cpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[path.stem.split("_")[0]]
    if path.stem.startswith("fsdp2"):
        assert config.fsdp_config["fsdp_version"] == 2
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        model = A3LlamaForCausalLM(A3LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=8))
        assert {type(layer).__name__ for layer in model.model.layers} == {wrapped}
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[4])


def test_several_machines_differ_from_one_in_how_they_meet_alone():
    meeting = {"num_machines", "num_processes", "rdzv_backend", "main_process_port", "deepspeed_multinode_launcher"}
    for path in ACCELERATE_CONFIGS:
        one = path.with_name(path.name.replace("_multinode", ""))
        settings, others = (yaml.safe_load(each.read_text(encoding="utf-8")) for each in (path, one))
        for config in (settings, others):
            for nested in ("fsdp_config", "deepspeed_config"):
                config.update(config.pop(nested, {}))
        different = {name for name in settings.keys() | others.keys() if settings.get(name) != others.get(name)}
        assert different <= meeting, path


def test_hub_recipes_make_steps_of_half_a_million_tokens():
    processes = load_config_from_file(str(ROOT / "accelerate_configs/ddp.yaml")).num_processes
    for path in HUB_RECIPES:
        recipe = parse_recipe(path)
        training = recipe.training
        rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes
        assert rows * recipe.data.block_size == 524288
        assert recipe.data.max_train_rows == rows * training.max_steps


@pytest.mark.parametrize("path", HUB_RECIPES, ids=name_of)
def test_hub_recipes_go_as_far_as_the_download(path, monkeypatch):
    class Downloading(Exception):
        pass

    def load_dataset(*names, split, cache_dir):
        raise Downloading(names, split)

    recipe = parse_recipe(path)
    for name in (recipe.model.model_name_or_path, recipe.data.dataset_name):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(a3_hf.data, "load_dataset", load_dataset)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1})), bos_token="<s>", eos_token="</s>"
    )
    with pytest.raises(Downloading) as reached:
        load_rows(recipe.data, tokenizer, seed=recipe.training.seed, context_length=131072)
    assert reached.value.args == (("HuggingFaceFW/fineweb", "sample-10BT"), "train")


def test_the_local_recipe_reads_its_data(tmp_path):
    recipe = parse_recipe(LOCAL, ["--max_train_rows", "20", "--max_eval_rows", "5", "--cache_dir", str(tmp_path)])
    model, text = ROOT / recipe.model.model_name_or_path, ROOT / recipe.data.train_file
    if not (model.is_dir() and text.is_file()):
        pytest.skip(f"{recipe.model.model_name_or_path} and {recipe.data.train_file} are not here")
    recipe.data.train_file = str(text)
    train, evaluation = load_rows(
        recipe.data,
        AutoTokenizer.from_pretrained(model),
        seed=recipe.training.seed,
        context_length=AutoConfig.from_pretrained(model).max_position_embeddings,
    )
    assert (len(train), len(evaluation)) == (20, 5)
    for row in [*train, *evaluation]:
        assert len(row["input_ids"]) == recipe.data.block_size
        assert row["input_ids"][0] == 1
        assert row["labels"] == [-100, *row["input_ids"][1:]]
