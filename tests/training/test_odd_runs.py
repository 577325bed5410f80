"""Odd settings and odd files: each is one line that names the thing, told before anything is trained or written."""

import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
import zstandard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer
from typer.testing import CliRunner

from a3_hf.cli import app
from a3_hf.training import run as train_module
from a3_hf.training.run_lock import LOCK_FILE, sole_use

STEPS = 4
ROOT = Path(__file__).parents[2]


def settings(source: Path, output_dir: Path, **changes) -> dict:
    return {
        "model_name_or_path": str(source),
        "train_file": str(source / "train.txt"),
        "cache_dir": str(source / "cache"),
        "block_size": 8,
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "curriculum": {"unit": "steps", "stages": [{"name": "ar", "until": 2}, {"name": "permute", "group_size": 2}]},
        **changes,
    }


def adapt(source: Path, tmp_path: Path, *options: str, **changes):
    """`a3 adapt` on a recipe with those settings, in this process."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(source, tmp_path / "out", **changes)))
    return CliRunner().invoke(app, ["adapt", str(path), *options])


def assert_one_line(done, *names: str) -> None:
    assert done.exit_code == 2, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit) and "Traceback" not in done.output, done.exception
    lines = [line for line in done.stderr.splitlines() if line.startswith("a3: ")]
    assert len(lines) == 1 and done.stderr.rstrip().endswith(lines[0]), done.stderr
    for name in names:
        assert name in lines[0], lines[0]


ODD_SETTINGS = [
    ("learning_rate", "-1"),
    ("learning_rate", "nan"),
    ("learning_rate", "inf"),
    ("learning_rate", "fast"),
    ("gradient_accumulation_steps", "0"),
    ("gradient_accumulation_steps", "-1"),
    ("per_device_train_batch_size", "0"),
    ("per_device_train_batch_size", "-2"),
    ("per_device_eval_batch_size", "0"),
    ("eval_accumulation_steps", "0"),
    ("num_train_epochs", "0"),
    ("num_train_epochs", "-1"),
    ("num_train_epochs", "nan"),
    ("max_steps", "0"),
    ("max_steps", "-2"),
    ("max_steps", "1.5"),
    ("weight_decay", "-0.1"),
    ("weight_decay", "nan"),
    ("max_grad_norm", "-1"),
    ("max_grad_norm", "inf"),
    ("adam_beta1", "1"),
    ("adam_beta2", "-0.1"),
    ("adam_epsilon", "-1"),
    ("warmup_steps", "-5"),
    ("logging_steps", "0"),
    ("logging_steps", "-1"),
    ("save_steps", "0"),
    ("save_steps", "-3"),
    ("save_total_limit", "0"),
    ("dataloader_num_workers", "-1"),
    ("seed", "-1"),
    ("seed", "4294967296"),
    ("optim", "adamw_8bits"),
    ("optim", "adamw_bnb_8bit"),
    ("optim", "galore_adamw"),
    ("optim", "lomo"),
    ("lr_scheduler_type", "steep"),
    ("save_strategy", "often"),
    ("attn_implementation", "flash_attention_2"),
    ("attn_implementation", "flash_attention_3"),
    ("attn_implementation", "fast"),
    ("deepspeed", "nowhere.json"),
    ("dtype", "float8"),
    ("architecture", "mamba"),
    ("slot_start", "right_token"),
    ("block_size", "1"),
    ("block_size", "1000000"),
    ("document_boundary", "pad"),
    ("documents", "apart"),
    ("validation_documents", "-1"),
    ("max_train_rows", "0"),
    ("num_shards", "3"),
    ("document_separator", ""),
    ("loss", "fancy"),
    ("peak_flops", "-1"),
    ("content_loss_weight", "-1"),
    ("masking", "count"),
    ("anneal_steps", "3"),
    ("load_in_4bit", "true"),
    ("resume_from_checkpoint", "true"),
    ("resume_from_checkpoint", "checkpoint-2"),
    ("ignore_data_skip", "true"),
    ("enable_jit_checkpoint", "true"),
    ("do_train", "true"),
    ("do_eval", "true"),
    ("load_best_model_at_end", "true"),
    ("metric_for_best_model", "loss"),
    ("prediction_loss_only", "true"),
    ("batch_eval_metrics", "true"),
    ("bf16_full_eval", "true"),
    ("auto_find_batch_size", "true"),
    ("neftune_noise_alpha", "5"),
    ("use_cache", "true"),
    ("save_only_model", "true"),
    ("remove_unused_columns", "true"),
    ("use_liger_kernel", "true"),
    ("label_smoothing_factor", "0.1"),
    ("train_sampling_strategy", "group_by_length"),
    ("eval_strategy", "steps"),
    ("train_file", "nowhere.txt"),
    ("model_name_or_path", "nowhere/at/all"),
    ("tokenizer_name_or_path", "nowhere/at/all"),
    ("lora", "{r: 0}"),
    ("lora", "{rank: 3}"),
    ("curriculum", "{unit: weeks, stages: [{name: ar}]}"),
    ("curriculum", "[1]"),
    ("no_such_setting", "1"),
]


@pytest.mark.parametrize(("name", "value"), ODD_SETTINGS, ids=lambda value: str(value)[:30])
def test_an_odd_setting_is_one_line(source, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(train_module, "load_to_train", None)
    assert_one_line(adapt(source, tmp_path, f"--{name}={value}"), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), ODD_SETTINGS, ids=lambda value: str(value)[:30])
def test_a_dry_run_refuses_what_the_run_refuses(source, tmp_path, name, value):
    options = ["--dry-run", "--accelerate-configs", str(ROOT / "accelerate_configs")]
    assert_one_line(adapt(source, tmp_path, *options, f"--{name}={value}"), name)


@pytest.mark.parametrize("option", ["content_loss_weight", "distillation_weight"])
def test_a_dry_run_refuses_a_loss_that_no_stage_has_rows_for(source, tmp_path, option):
    options = ["--dry-run", "--accelerate-configs", str(ROOT / "accelerate_configs")]
    options += ["--curriculum={stages: [{name: permute}]}", f"--{option}=0.5"]
    assert_one_line(adapt(source, tmp_path, *options), option)


ODD_FILES = {
    "latin.txt": "a cat \xf6".encode("latin-1"),
    "empty.txt": b"",
    "blank.txt": b" \n\n ",
    "latin.jsonl": '{"text": "\xf6"}\n'.encode("latin-1"),
    "cut.jsonl": b'{"text": "w1 w2"}\n{"text": "w3',
    "list.jsonl": b'[{"text": "w1"}]\n',
    "number.jsonl": b'{"text": 3}\n',
    "column.jsonl": b'{"body": "w1"}\n',
    "half.jsonl": b'{"text": "\\ud83d"}\n',
    "blank.jsonl": b'{"text": " "}\n{"text": null}\n',
    "cut.json": b'[{"text": "w1"}, {"te',
    "numbers.json": b"[1, 2]",
    "plain.jsonl.gz": b'{"text": "w1"}\n',
    "plain.jsonl.zst": b'{"text": "w1"}\n',
    "cut.jsonl.gz": gzip.compress(b'{"text": "w1 w2"}\n' * 100)[:20],
    "cut.json.gz": gzip.compress(b'{"text": "w1 w2"}\n' * 100)[:20],
    "cut.txt.gz": gzip.compress(b"w1 w2 " * 100)[:20],
    "cut.jsonl.zst": zstandard.compress(b'{"text": "w1 w2"}\n' * 100)[:-5],
    "second.jsonl.zst": zstandard.compress(b'{"text": "w1"}\n' * 9) + zstandard.compress(b'{"text": "w2"}\n' * 9)[:-5],
    "empty.parquet": b"",
    "cut.parquet": b"PAR1\x00\x00",
    "kind.csv": b"text\nw1\n",
    "kind.parquet.gz": gzip.compress(b"PAR1"),
}


@pytest.mark.parametrize("name", ODD_FILES)
@pytest.mark.parametrize("role", ["train_file", "validation_file", "sources"])
def test_an_odd_file_is_one_line_that_names_it(source, tmp_path, monkeypatch, name, role):
    monkeypatch.setattr(train_module, "load_to_train", None)
    path = tmp_path / name
    path.write_bytes(ODD_FILES[name])
    changes = {role: str(path), "eval_strategy": "steps", "eval_steps": 2}
    if role == "train_file":
        changes = {role: str(path)}
    if role == "sources":
        changes = {"train_file": None, "sources": {"mine": {"path": str(path)}}, "num_shards": 16}
    blank_source = role == "sources" and name in ("empty.txt", "blank.txt", "blank.jsonl", "empty.jsonl")
    assert_one_line(adapt(source, tmp_path, **changes), "mine" if blank_source else name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"block_size: [", b"a: 1\na: 2", b"\xff\xfe\x00", b"- a\n- b", b"block_size: eight"]
)
def test_an_odd_recipe_is_one_line_that_names_it(tmp_path, content):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    assert_one_line(CliRunner().invoke(app, ["adapt", str(path)]), "odd.yaml")


@pytest.fixture(scope="module")
def stopped(source, tmp_path_factory) -> Path:
    """A run's folder, stopped after 2 of 4 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    assert adapt(source, folder).exit_code == 0
    shutil.rmtree(folder / "out" / f"checkpoint-{STEPS}")
    for name in ("model.safetensors", "trainer_state.json"):
        (folder / "out" / name).unlink()
    return folder / "out"


@pytest.fixture
def a_stopped_run(stopped, tmp_path) -> Path:
    shutil.copytree(stopped, tmp_path / "out")
    record = tmp_path / "out" / "run.json"
    record.write_text(record.read_text().replace(str(stopped), str(tmp_path / "out")))
    return tmp_path / "out"


@pytest.mark.parametrize("content", ["[]", "3", "", '{"block_size": 8', "\udcff"])
def test_a_damaged_record_is_one_line(source, tmp_path, a_stopped_run, content):
    (a_stopped_run / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    assert_one_line(adapt(source, tmp_path), "run.json", "is damaged")
    (a_stopped_run / "run.json").unlink()
    assert adapt(source, tmp_path).exit_code == 0


@pytest.mark.parametrize("content", ["[]", "3", "", '{"global_step": 4', '{"global_step": "x"}', "\udcff"])
def test_a_damaged_state_is_one_line(source, tmp_path, a_stopped_run, content):
    (a_stopped_run / "trainer_state.json").write_bytes(content.encode(errors="surrogateescape"))
    assert_one_line(adapt(source, tmp_path), "trainer_state.json", "is damaged")


@pytest.mark.parametrize(
    "line", ["[1]", "3", "null", "{", '{"step": "x"}', '{"step": [1]}', "{}", "\udcff", "[" * 9999]
)
def test_odd_lines_of_the_metrics_are_dropped(source, tmp_path, a_stopped_run, line):
    with (a_stopped_run / "metrics.jsonl").open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    done = adapt(source, tmp_path)
    assert done.exit_code == 0, (done.output, done.exception)
    assert all(json.loads(line)["step"] for line in (a_stopped_run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["ENOSPC", "EDQUOT", "safetensors", "torch"],
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(source, tmp_path, monkeypatch, error):
    save = Trainer._save_optimizer_and_scheduler

    def full(trainer, output_dir):
        if trainer.state.global_step == STEPS:
            raise error
        save(trainer, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        assert_one_line(adapt(source, tmp_path), str(tmp_path / "out"), "the disk is full", "checkpoint-2")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert adapt(source, tmp_path).exit_code == 0


@pytest.mark.parametrize("architecture", ["a3", "llama"])
@pytest.mark.parametrize("rate", ["1e30", "1e9"])
def test_weights_that_are_none_are_not_saved(source, tmp_path, rate, architecture):
    """Before: rc 0 and "The model is in …"."""
    options = ["--learning_rate", rate, "--architecture", architecture, "--lr_scheduler_type", "constant"]
    done = adapt(source, tmp_path, *options, *(["--curriculum", "null"] if architecture == "llama" else []))
    assert_one_line(done, "step ")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.parametrize("architecture", ["a3", "llama"])
def test_a_model_whose_weights_are_none_is_not_called_a_model(source, tmp_path, architecture):
    base = tmp_path / "base"
    shutil.copytree(source, base, ignore=shutil.ignore_patterns("cache"))
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    options = ["--architecture", architecture, *(["--curriculum", "null"] if architecture == "llama" else [])]
    assert_one_line(adapt(source, tmp_path, *options, model_name_or_path=str(base)), "step ", "finite")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_folder_is_for_one_run_at_a_time(source, tmp_path):
    """Before: both ended with rc 0, each writing over the other. The lock dies with its process, killed or not."""
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import time; from a3_hf.training.run_lock import sole_use\nwith sole_use({str(tmp_path / 'out')!r}): "
            "print('held', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert_one_line(adapt(source, tmp_path), str(tmp_path / "out"), "another run is writing there", str(holder.pid))
        assert os.listdir(tmp_path / "out") == [LOCK_FILE]
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert adapt(source, tmp_path).exit_code == 0
    assert LOCK_FILE not in os.listdir(tmp_path / "out")


def test_children_do_not_hold_the_folder_on(tmp_path):
    with sole_use(tmp_path / "out"):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    try:
        check = f"from a3_hf.training.run_lock import sole_use\nwith sole_use({str(tmp_path / 'out')!r}): print('held')"
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == "held\n", done.stderr
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not (tmp_path / "out").exists(), "nothing came of it, and nothing was there before"


def rewritten(path: Path, change: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"grew": b"w1 w2 w3 " + content, "was appended to": content + b" w9", "is another": content[::-1]}[change]
    )


CHANGES = ["grew", "was appended to", "is another"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_between_stop_and_resume_is_named(source, tmp_path, change):
    file = tmp_path / "text.txt"
    shutil.copy(source / "train.txt", file)
    changes = {"train_file": str(file), "cache_dir": str(tmp_path / "cache")}
    stop_after_two_steps(source, tmp_path, **changes)
    rewritten(file, change)
    assert_one_line(adapt(source, tmp_path, **changes), "train_file: text.txt", "accept_changed_inputs")
    done = adapt(source, tmp_path, "--accept_changed_inputs", "true", **changes)
    assert done.exit_code == 0 and "Accepted although changed" in done.output, done.output


@pytest.mark.parametrize("change", ["grew", "was appended to", "is another"])
def test_a_source_that_changed_between_stop_and_resume_is_named(source, tmp_path, change):
    """Before: read on at a count, documents lost and read twice, rc 0."""
    lines = [json.dumps({"text": f"w{number % 50} w{number % 7}"}) + "\n" for number in range(200)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(lines))
    changes = {"train_file": None, "sources": {"mine": {"path": str(file)}}, "num_shards": 2}
    stop_after_two_steps(source, tmp_path, **changes)
    new = {"grew": lines[:9] + lines, "was appended to": lines + lines[:9], "is another": lines[::-1]}[change]
    file.write_text("".join(new))
    assert_one_line(adapt(source, tmp_path, **changes), "sources.mine: a.jsonl", "accept_changed_inputs")
    done = adapt(source, tmp_path, "--accept_changed_inputs", "true", **changes)
    assert done.exit_code == 0, done.output
    assert (
        json.loads((tmp_path / "out" / "run.json").read_text())["inputs"]["sources.mine"][0][1] == file.stat().st_size
    )


def test_the_base_of_an_adapter_that_changed_is_named(source, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(source, base, ignore=shutil.ignore_patterns("cache"))
    changes = {"model_name_or_path": str(base), "lora": {"r": 2}}
    stop_after_two_steps(source, tmp_path, **changes)
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: weight * 2 for name, weight in weights.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    assert_one_line(adapt(source, tmp_path, **changes), "model_name_or_path: model.safetensors")


def stop_after_two_steps(source: Path, tmp_path: Path, **changes) -> None:
    done = adapt(source, tmp_path, **changes)
    assert done.exit_code == 0, (done.output, done.exception)
    shutil.rmtree(tmp_path / "out" / f"checkpoint-{STEPS}")
    for path in (*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out" / "trainer_state.json"):
        path.unlink()
