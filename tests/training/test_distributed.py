"""Runs spread over two processes (gloo, CPU) against the same run in one: the command `a3 adapt` itself."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

STEPS = 20
RECIPE = {
    "block_size": 8,
    "seed": 5,
    "max_steps": STEPS,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "curriculum": {
        "unit": "steps",
        "stages": [
            {"name": "ar", "until": 6},
            {"name": "expand", "until": 12, "group_size": [1, 2]},
            {"name": "permute", "group_size": 2},
        ],
    },
}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "zero_optimization": {"stage": 2, "stage3_gather_16bit_weights_on_model_save": True},
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs the extra 'deepspeed'"
)


def command(source: Path, output_dir: Path, *, processes: int, **settings) -> list[str]:
    """`a3 adapt` on the folder's model (without dropout, which draws in another order on two ranks) and text."""
    model = output_dir.with_name("model")
    if not model.exists():
        model.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file():
                (model / path.name).write_bytes(path.read_bytes())
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    recipe = {
        **RECIPE,
        "model_name_or_path": str(model),
        "train_file": str(source / "train.txt"),
        "cache_dir": str(source / "cache"),
        "per_device_train_batch_size": 4 // processes,
        "output_dir": str(output_dir),
        **settings,
    }
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    backend = ["--ddp_backend", "gloo"]
    adapt = ["-m", "a3_hf", "adapt", str(path)]
    return [sys.executable, *(launch + adapt + backend if processes > 1 else adapt)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}


def adapt(source: Path, output_dir: Path, *, processes: int, **settings) -> Path:
    arguments = command(source, output_dir, processes=processes, **settings)
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output_dir


def losses(output_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [float(line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def one_process(source, tmp_path_factory) -> Path:
    return adapt(source, tmp_path_factory.mktemp("distributed") / "one", processes=1)


def assert_same_run(output_dir: Path, expected: Path) -> None:
    assert len(losses(output_dir)) == STEPS
    assert losses(output_dir) == pytest.approx(losses(expected), abs=1e-4)
    weights, others = (load_file(folder / "model.safetensors") for folder in (output_dir, expected))
    assert weights.keys() == others.keys()
    assert max((weights[name] - others[name]).abs().max() for name in others) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(source, one_process, tmp_path, checkpointing):
    """The global batch, its orders and its losses do not depend on the number of processes; checkpointing changes nothing."""
    output_dir = adapt(source, tmp_path / "ddp", processes=2, gradient_checkpointing=checkpointing)
    assert_same_run(output_dir, one_process)


UNEVEN = {"max_train_rows": 17, "max_steps": -1, "num_train_epochs": 3.0, "train_file": None}
MIXED = {
    "unit": "steps",
    "stages": [
        {"name": "ar", "until": 5},
        {
            "name": "permute",
            "group_size": {"draw": [1, 3]},
            "shapes": {"scattered": 1, "spans": 1, "infilling": 1},
            "span_length": 2,
            "rehearsal": 0.2,
        },
    ],
}


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (
            2,
            {
                "curriculum": {
                    **RECIPE["curriculum"],
                    "stages": [{"name": "ar", "until": 4}, {"name": "permute", "group_size": 2}],
                }
            },
        ),
        (2, {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "curriculum": MIXED}),
        (2, {"documents": "isolated", "loss": "chunked", "curriculum": MIXED}),
        (2, {"architecture": "masked_diffusion", "curriculum": None, "low_discrepancy": True}),
        (2, {"architecture": "llama", "curriculum": None}),
        pytest.param(
            3,
            {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "curriculum": MIXED},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["a3", "mixture", "isolated", "masked_diffusion", "llama", "three"],
)
def test_rows_that_do_not_divide_come_once_an_epoch(source, tmp_path, processes, settings):
    """17 rows, 3 epochs, 8 rows a step (12 with three processes): two processes as one. With accelerate's even_batches the
    losses differ from the first epoch's last step on, and the weights by 0.1.
    """
    uneven = {**UNEVEN, "train_file": str(source / "train.txt"), **settings}
    many = adapt(source, tmp_path / "many", processes=processes, **uneven)
    rows = 8 if processes == 2 else 12
    one = adapt(
        source,
        tmp_path / "one",
        processes=1,
        **uneven | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": rows // 4},
    )
    assert len(losses(one)) == 3 * -(-17 // rows)
    assert losses(many) == pytest.approx(losses(one), abs=1e-4)
    weights, others = (load_file(folder / "model.safetensors") for folder in (many, one))
    assert max((weights[name] - others[name]).abs().max() for name in others) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(source, one_process, tmp_path, first, then):
    output_dir = tmp_path / "out"
    adapt(source, output_dir, processes=first, save_strategy="steps", save_steps=10)
    shutil.rmtree(output_dir / f"checkpoint-{STEPS}")
    for name in ("model.safetensors", "trainer_state.json"):
        (output_dir / name).unlink()
    adapt(source, output_dir, processes=then, save_strategy="steps", save_steps=10)
    assert_same_run(output_dir, one_process)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_one_process(source, one_process, tmp_path, stage):
    config = {**ZERO, "zero_optimization": {**ZERO["zero_optimization"], "stage": stage}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    output_dir = adapt(source, tmp_path / "zero", processes=2, deepspeed=str(tmp_path / "zero.json"))
    assert_same_run(output_dir, one_process)


def test_a_rank_that_dies_ends_the_run(source, tmp_path):
    """The launcher ends the other rank with a message; nobody waits for ever."""
    script = tmp_path / "dies.py"
    script.write_text(
        textwrap.dedent("""
            import os, signal, sys
            from a3_hf.training import run as train
            from a3_hf.cli import app

            class Dies(train.InterruptCallback):
                def on_step_begin(self, args, state, control, **kwargs):
                    if state.global_step == 3 and args.process_index == 1:
                        os.kill(os.getpid(), signal.SIGKILL)

            train.InterruptCallback = Dies
            sys.exit(app())
        """)
    )
    arguments = command(source, tmp_path / "out", processes=2)
    module = arguments.index("a3_hf")
    arguments[module - 1 : module + 1] = [str(script)]
    start = time.monotonic()
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and time.monotonic() - start < 100
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in done.stderr


def test_fully_sharded_agrees_with_whole(tmp_path):
    """FSDP2 (`fully_shard`) on two gloo ranks: three updates, one of them without slots, as on one process."""
    script = tmp_path / "fsdp2.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys, torch
            import torch.distributed as dist
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard
            sys.path.insert(0, {str(Path(__file__).parents[2])!r})
            from tests.conftest import tiny_model
            from a3_hf.models.a3_llama.orders import GroupOrder

            dist.init_process_group("gloo")
            whole, sharded = (tiny_model().train() for _ in range(2))
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in sharded.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            ids = torch.randint(3, 61, (4, 12), generator=torch.Generator().manual_seed(0))
            mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
            optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (whole, sharded)]
            for step in range(3):
                order = GroupOrder.scattered(torch.ones_like(ids, dtype=torch.bool), group_size=2,
                                             generator=torch.Generator().manual_seed(step))
                for model, optimizer, rows in zip((whole, sharded), optimizers, (slice(0, 4), mine)):
                    groups, row_ids = order.group_ids[rows], ids[rows]
                    labels = row_ids.masked_fill(groups == groups.amin(dim=1, keepdim=True), -100)
                    model(input_ids=row_ids, group_ids=groups, labels=labels).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            worst = max((mine.full_tensor() - theirs).abs().max().item()
                        for mine, theirs in zip(sharded.parameters(), whole.parameters()))
            if dist.get_rank() == 0:
                print("worst", worst)
            dist.destroy_process_group()
        """)
    )
    arguments = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    worst = next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("worst"))
    assert worst < 1e-3
