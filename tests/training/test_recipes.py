import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
import zstandard
from accelerate.commands.config.config_args import load_config_from_file
from datasets import IterableDataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import a3_hf.data.mixture
from a3_hf import A3LlamaConfig, A3LlamaForCausalLM
from a3_hf.cli import app
from a3_hf.data.mixture import check_readers, open_mixture
from a3_hf.data.packing import load_rows
from a3_hf.training.recipes import parse_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if not {"experiments", "serving"} & set(path.relative_to(ROOT / "recipes").parts)
)
LOCAL = ROOT / "recipes/stories260k/config_cpu.yaml"
HUB_RECIPES = [path for path in RECIPES if path.parent != LOCAL.parent and path.name == "config_full.yaml"]
ACCELERATE_CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def name_of(path):
    return str(path.relative_to(ROOT))


def test_there_are_recipes():
    assert LOCAL in RECIPES
    assert len(HUB_RECIPES) >= 3
    assert {"cpu.yaml", "ddp.yaml", "fsdp2.yaml", "zero2.yaml", "zero3.yaml"} <= {
        path.name for path in ACCELERATE_CONFIGS
    }


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_parses_and_its_curriculum_resolves(path):
    recipe = parse_recipe(path)
    training = recipe.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if recipe.curriculum is not None:  # the controls without orders have none
        recipe.curriculum.resolve(max_steps=training.max_steps, tokens_per_step=rows * recipe.data.block_size)
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^seed: \d+", text, re.MULTILINE)
    assert re.search(r"^output_dir: runs/", text, re.MULTILINE)
    assert "../shared" not in text or path.parent == LOCAL.parent


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
        model = A3LlamaForCausalLM(
            A3LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=8)
        )
        assert all(wrapped in {kind.__name__ for kind in type(layer).__mro__} for layer in model.model.layers)
        assert {type(layer).__name__ for layer in model.model.layers} <= set(model._no_split_modules)
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
        check_readers(recipe.data.num_shards, world_size=processes, num_workers=training.dataloader_num_workers)


@pytest.mark.parametrize("path", HUB_RECIPES, ids=name_of)
def test_hub_recipes_stream_the_papers_two_sources(path, monkeypatch):
    opened = []

    class Builder:
        config = SimpleNamespace(data_files=None)

        def __init__(self, name, config):
            self.names = (name, config)

        def as_streaming_dataset(self, *, split):
            opened.append((*self.names, split))
            return IterableDataset.from_generator(lambda: iter([{"text": "the dog " * 1000}] * 200))

    recipe = parse_recipe(path, ["--validation_documents", "10"])
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model.model_name_or_path)
    monkeypatch.setattr(a3_hf.data.sources, "load_dataset_builder", Builder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    mixture, evaluation = open_mixture(recipe.data, tokenizer, seed=recipe.training.seed, context_length=131072)
    assert opened == [("HuggingFaceFW/fineweb", "sample-10BT", "train"), ("cerebras/SlimPajama-627B", None, "train")]
    assert [len(row["input_ids"]) for row in (next(iter(mixture)), evaluation[0])] == [2048, 2048]


def test_the_papers_recipe_runs_on_a_small_model_and_local_files(stories, tmp_path):
    """Model, sources and sizes are replaced on the command line alone."""
    words = random.Random(0)
    names = ["Tom", "Lily", "the dog", "a cat", "the sun", "mom"]
    for name, suffix in (("fineweb", "jsonl"), ("slimpajama", "jsonl.zst")):
        texts = [f"{words.choice(names)} saw {words.choice(names)}. " * words.randrange(1, 9) for _ in range(400)]
        lines = "".join(json.dumps({"text": text, "meta": {"source": name}}) + "\n" for text in texts).encode()
        (tmp_path / f"{name}.{suffix}").write_bytes(zstandard.compress(lines) if suffix.endswith("zst") else lines)
    recipe = ROOT / "recipes/llama-3.1-8b/config_full.yaml"
    replaced = {
        "model_name_or_path": stories,
        "sources.fineweb.path": tmp_path / "fineweb.jsonl",
        "sources.slimpajama.path": tmp_path / "slimpajama.jsonl.zst",
        "block_size": 64,
        "validation_documents": 20,
        "max_eval_rows": 4,
        "max_steps": 6,
        "gradient_accumulation_steps": 4,
        "dataloader_num_workers": 0,
        "warmup_steps": 1,
        "learning_rate": 1e-3,
        "curriculum": "{unit: steps, stages: [{name: ar, until: 2}, {name: expand, until: 4, group_size: [1, 4]}, "
        "{name: permute, group_size: 4}]}",
        "logging_steps": 1,
        "eval_steps": 6,
        "save_steps": 4,
        "use_cpu": "true",
        "output_dir": tmp_path / "out",
    }
    options = [word for name, value in replaced.items() for word in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["adapt", str(recipe), *options])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "loss per order" in done.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
    position = json.loads((tmp_path / "out" / "checkpoint-4" / "stream_position.json").read_text())
    assert position["num_batches"] == 16
    assert set(position["mixture"]["weights"]) == {"fineweb", "slimpajama"}


LLAMA_3 = {
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
# As published, and query_embed; adapters of rank 16 on all but keys and values, worked out by hand from the shapes, and
# query_embed.
SIZES = {
    "llama-3.2-1b": (1_235_814_400 + 2048, 16 * 16 * (4 * 2048 + 3 * 10240) + 2048),
    "llama-3.2-3b": (3_212_749_824 + 3072, 28 * 16 * (4 * 3072 + 3 * 11264) + 3072),
    "llama-3.1-8b": (8_030_261_248 + 4096, 32 * 16 * (4 * 4096 + 3 * 18432) + 4096),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_recipe_of_slots_runs_dry_without_weights_and_hub(name, source, tmp_path):
    shape = {**LLAMA_3, **SHAPES[name], "tie_word_embeddings": name != "llama-3.1-8b"}
    LlamaConfig(**shape).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    recipe = ROOT / "recipes" / name / "config_slots.yaml"
    words = {
        "model_name_or_path": tmp_path,
        "dataset_name": "null",
        "dataset_config_name": "null",
        "train_file": source / "train.txt",
        "validation_documents": "0",
        "max_eval_rows": "null",
        "eval_strategy": "no",
        "cache_dir": tmp_path / "cache",
        "output_dir": tmp_path / "out",
        "use_cpu": "true",
        "optim": "adamw_torch",
    }
    options = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    configs = ["--accelerate-configs", str(ROOT / "accelerate_configs")]
    shown = CliRunner().invoke(app, ["adapt", str(recipe), "--dry-run", *configs, *options])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    total, trained = SIZES[name]
    assert f"{total:,} parameters, of which {trained:,} are trained" in shown.output
    tables = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in shown.output.splitlines() if "│" in line}
    gib, hours = tables["cpu"][-2].strip(), tables["ddp"][-1].strip()
    readme = " ".join((recipe.parent / "README.md").read_text(encoding="utf-8").split())
    assert f"{trained:,} of {total:,} parameters are trained" in readme
    assert f"in one process are {gib} GiB" in readme and f"{hours} hours at 400 TFLOP/s with a slot for each" in readme


def test_the_local_recipe_reads_its_data(beside_data, tmp_path):
    recipe = parse_recipe(LOCAL, ["--max_train_rows", "20", "--max_eval_rows", "5", "--cache_dir", str(tmp_path)])
    model = recipe.model.model_name_or_path
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
