"""The dry run: its figures against the formulas of accelerate_configs/README.md, worked out by hand."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from typer.testing import CliRunner

from a3_hf import A3LlamaConfig
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.cli import app
from a3_hf.training.dry_run import ModelSize, state_bytes
from tests.conftest import tiny_config, tiny_model

ROOT = Path(__file__).parents[2]
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
P = 8_030_261_248 + 4096  # Llama-3.1-8B's published number, and query_embed


@pytest.fixture(scope="module")
def size() -> ModelSize:
    return ModelSize.of(A3LlamaConfig(**LLAMA_8B))


def test_parameters_are_those_of_llama_and_query_embed(size):
    layer = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    assert size.total == size.trained == P
    assert size.layer == layer and size.outside == P - 32 * layer


def test_memory_is_that_of_the_formulas(size):
    outside = 2 * 128256 * 4096 + 4096 + 4096
    layer = (P - outside) // 32
    expected = {
        "cpu": (4 * P, 4 * P, 8 * P, 0),
        "ddp": (4 * P, 4 * P, 8 * P, 4 * P),
        "ddp_multinode": (4 * P, 4 * P, 8 * P, 4 * P),
        "fsdp2": (4 * P / 8, 4 * P / 8, 8 * P / 8, 2 * (2 * layer + outside)),
        "fsdp2_multinode": (4 * P / 32, 4 * P / 32, 8 * P / 32, 2 * (2 * layer + outside)),
        "zero2": (2 * P, 2 * P / 8, 12 * P / 8, 0),
        "zero3": (2 * P / 8, 2 * P / 8, 12 * P / 8, 2 * 10**9),
        "zero3_multinode": (2 * P / 32, 2 * P / 32, 12 * P / 32, 2 * 10**9),
    }
    paths = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert {path.stem for path in paths} == expected.keys()
    for path in paths:
        found = state_bytes(size, load_config_from_file(str(path)), weight_bytes=4, pass_bytes=2)
        assert tuple(found.values()) == pytest.approx(expected[path.stem], rel=1e-12), path.stem


def test_adapters_alone_have_gradients_and_moments():
    config = A3LlamaConfig(**LLAMA_8B)
    size = ModelSize.of(config, LoraArguments(r=8, target=["q_proj"]))
    trained = 32 * 8 * (4096 + 4096) + 4096
    assert size.trained == trained
    ddp = load_config_from_file(str(ROOT / "accelerate_configs/ddp.yaml"))
    found = state_bytes(size, ddp, weight_bytes=2, pass_bytes=2)
    assert found == {
        "weights": 2 * P + 4 * trained,
        "gradients": 4 * trained,
        "moments": 8 * trained,
        "engine": 4 * trained,
    }


@pytest.fixture
def recipe(source, tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    settings = {
        "model_name_or_path": str(source),
        "train_file": str(source / "train.txt"),
        "cache_dir": str(source / "cache"),
        "block_size": 8,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "curriculum": {"stages": [{"name": "ar", "until": 0.4}, {"name": "permute", "group_size": 2}]},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_dry_run_tells_and_trains_nothing(recipe):
    shown = CliRunner().invoke(app, ["adapt", str(recipe), "--dry-run", "--learning_rate", "1e-3"])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert any("ar" in line and "0" in line and " 4 " in line and " 64 " in line for line in lines)  # 4 steps of 2 × 8
    assert any("permute" in line and " 96 " in line for line in lines)
    for name in ("cpu", "ddp", "fsdp2", "zero2", "zero3_multinode"):
        assert any(line.strip("│ ").startswith(f"{name} ") for line in lines), name
    rows = [line for line in lines if "'<s>'·0" in line]
    assert len(rows) == 10 and all(line.count("·") == 8 for line in rows)
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accelerate-configs", "nowhere"], "accelerate_configs='nowhere'"),
        (["--tflops", "0"], "tflops=0.0"),
        (["--block_size", "4096"], "block_size=4096"),
        (["--no_such_setting", "1"], "no_such_setting"),
    ],
)
def test_a_dry_run_refuses_what_it_cannot_tell(recipe, arguments, message):
    shown = CliRunner().invoke(app, ["adapt", str(recipe), "--dry-run", *arguments])
    assert shown.exit_code == 2 and message in shown.output


@pytest.mark.parametrize("tied", [False, True])
def test_the_tiny_models_size_is_counted_as_it_is(tied):
    model = tiny_model(tie_word_embeddings=tied)
    assert ModelSize.of(tiny_config(tie_word_embeddings=tied)).total == sum(w.numel() for w in model.parameters())
    adapted = ModelSize.of(tiny_config(tie_word_embeddings=tied), LoraArguments(r=2, target=["q_proj"]))
    assert adapted.trained == 3 * 2 * (32 + 32) + 32


def test_tied_embeddings_are_counted_once():
    """SmolLM2-135M's shape has 134.5 million parameters; counted twice, its embeddings made 162.8 of them."""
    shape = {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    size = ModelSize.of(A3LlamaConfig(**shape))
    assert size.total == 134_515_008 + 576
    assert size.outside == 49152 * 576 + 576 + 576
    ddp = load_config_from_file(str(ROOT / "accelerate_configs/ddp.yaml"))
    assert state_bytes(size, ddp, weight_bytes=4, pass_bytes=2)["weights"] == 4 * size.total
