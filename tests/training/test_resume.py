"""Runs that are killed, interrupted or cut off while they save, each in a process of its own, end in the very weights
of a run that was not.
"""

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from a3_hf import A3LlamaForCausalLM
from a3_hf.data.arguments import DataArguments
from a3_hf.training import run as train_module
from a3_hf.training.arguments import A3TrainingArguments, ModelArguments, Recipe
from a3_hf.training.callbacks import InterruptCallback
from a3_hf.training.checkpoints import last_whole_checkpoint
from a3_hf.training.curriculum import Curriculum

MAX_STEPS = 12  # of 4 rows, in two epochs of 7 steps
STAGES = [
    {"name": "ar", "until": 3},
    {"name": "expand", "until": 8, "group_size": [1, 2]},
    {"name": "permute", "group_size": 2},
]
STAGE_ENDS = [3, 8, 12]

# A server that has imported everything once; its children start at once and can be killed.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["a3_hf.training.run"])


def recipe(source: Path, output_dir: Path, *, num_workers: int = 0) -> Recipe:
    return Recipe(
        model=ModelArguments(model_name_or_path=str(source)),
        data=DataArguments(
            train_file=str(source / "train.txt"),
            validation_file=str(source / "validation.txt"),
            block_size=8,
            cache_dir=str(source / "cache"),
        ),
        training=A3TrainingArguments(
            str(output_dir),
            max_steps=MAX_STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=3,
            save_total_limit=2,
            eval_strategy="steps",
            eval_steps=1000,
            dataloader_num_workers=num_workers,
            use_cpu=True,
            seed=11,
        ),
        curriculum=Curriculum.from_config(STAGES, unit="steps"),
    )


def _child(source: Path, output_dir: Path, num_workers: int, accident: Callable | None, said: Path) -> None:
    os.setsid()  # signals to the group, as from a terminal, reach the loader's workers but not the tests
    with said.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers: as in a run of its own
    if accident is not None:
        accident()
    code = train_module.run(recipe(source, output_dir, num_workers=num_workers))
    sys.stdout.flush()
    os._exit(code)


def run(source: Path, output_dir: Path, *, num_workers: int = 0, accident: Callable | None = None) -> tuple[int, str]:
    """Runs the recipe in a process: its exit code (−9 where it was killed) and what it said."""
    said = output_dir.with_suffix(".said")
    said.unlink(missing_ok=True)
    process = processes.Process(target=_child, args=(source, output_dir, num_workers, accident, said))
    process.start()
    process.join(60)
    assert process.exitcode is not None, f"still running: {said.read_text()}"
    return process.exitcode, said.read_text()


class At:
    """An accident: a signal to all processes of the run, in the middle of the step after `step` steps."""

    def __init__(self, step: int, signum: int, *, times: int = 1):
        self.step, self.signum, self.times = step, signum, times

    def __call__(self) -> None:
        accident = self

        class Struck(InterruptCallback):
            def on_substep_end(self, args, state, control, **kwargs):
                if state.global_step == accident.step:
                    for _ in range(accident.times):
                        os.killpg(0, accident.signum)

        train_module.InterruptCallback = Struck


class WhileSaving:
    """An accident when the weights of a step's checkpoint are written and the rest is not: killed, or the disk is full."""

    def __init__(self, step: int, *, disk_full: bool = False):
        self.step, self.disk_full = step, disk_full

    def __call__(self) -> None:
        save, step, disk_full = Trainer._save_optimizer_and_scheduler, self.step, self.disk_full

        def struck(trainer, output_dir):
            if trainer.state.global_step == step:
                if disk_full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.killpg(0, signal.SIGKILL)
            save(trainer, output_dir)

        Trainer._save_optimizer_and_scheduler = struck


class BeforeTheModelIsWritten:
    """An accident: killed when all steps are done and saved, before the model is written to the run's folder."""

    def __call__(self) -> None:
        def struck(trainer, output_dir=None, _internal_call=False):
            if not _internal_call:
                os.killpg(0, signal.SIGKILL)
            save(trainer, output_dir, _internal_call)

        save = Trainer.save_model
        Trainer.save_model = struck


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("unbroken") / "out"
    code, said = run(source, output_dir)
    assert code == 0, said
    return output_dir


def assert_same_weights(output_dir: Path, unbroken: Path) -> None:
    weights, expected = load_file(output_dir / "model.safetensors"), load_file(unbroken / "model.safetensors")
    assert weights.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(weights[name], expected[name])]
    assert not different, different


def assert_same_metrics(output_dir: Path, unbroken: Path) -> None:
    def lines(folder):
        read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        timeless = ("step", "stage", "group_size", "loss", "learning_rate", "grad_norm")
        return [
            {name: value for name, value in line.items() if name in timeless or name.startswith("eval_loss")}
            for line in read
            if "loss" in line or "eval_loss" in line
        ]

    assert lines(output_dir) == lines(unbroken)


def test_an_unbroken_run_leaves_what_it_promises(source, unbroken):
    said = unbroken.with_suffix(".said").read_text()
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    training, evaluations = [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == list(range(1, MAX_STEPS + 1))
    assert [line["stage"] for line in training] == ["ar"] * 3 + ["expand"] * 5 + ["permute"] * 4
    assert [line["group_size"] for line in training] == [1] * 3 + [1, 1, 1, 2, 2] + [2] * 4
    assert [line["step"] for line in evaluations] == [0, *STAGE_ENDS]

    table = said[said.index("loss per order") :]
    for line in evaluations:
        assert f"{line['eval_loss_scattered_4']:.4f}" in table
    assert f'a3 infill {unbroken} "Once upon a time <blank:8> happy."' in table
    assert (unbroken / "tokenizer.json").is_file()
    assert sorted(path.name for path in unbroken.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]

    code, said = run(source, unbroken)
    assert code == 0 and "is finished" in said
    assert "step 0" not in said


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_ends_in_the_same_weights(source, unbroken, tmp_path, num_workers):
    step = random.randrange(MAX_STEPS)
    print(f"killed in step {step}")
    code, said = run(source, tmp_path / "out", num_workers=num_workers, accident=At(step, signal.SIGKILL))
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "out" / "model.safetensors").exists()

    code, said = run(source, tmp_path / "out", num_workers=num_workers)
    assert code == 0, said
    last = step // 3 * 3
    expected = f"Resuming from {tmp_path / 'out' / f'checkpoint-{last}'} (step {last} of {MAX_STEPS})"
    assert (expected in said) if last else ("Resuming" not in said)
    assert_same_weights(tmp_path / "out", unbroken)
    assert_same_metrics(tmp_path / "out", unbroken)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("signum", "times", "expected"), [(signal.SIGINT, 1, 130), (signal.SIGTERM, 3, 143)])
def test_a_signal_saves_and_the_same_command_goes_on(source, unbroken, tmp_path, num_workers, signum, times, expected):
    """Ctrl-C, and SIGTERM as SLURM and Kubernetes send it, to the loader's workers as well."""
    step = random.randrange(MAX_STEPS - 1)
    print(f"interrupted in step {step}")
    code, said = run(source, tmp_path / "out", num_workers=num_workers, accident=At(step, signum, times=times))
    assert code == expected, said
    assert f"Stopped after step {step + 1} of {MAX_STEPS}" in said and "Traceback" not in said
    assert (tmp_path / "out" / f"checkpoint-{step + 1}" / "trainer_state.json").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()

    code, said = run(source, tmp_path / "out", num_workers=num_workers)
    assert code == 0, said
    assert f"step {step + 1} of {MAX_STEPS}" in said
    assert_same_weights(tmp_path / "out", unbroken)
    assert_same_metrics(tmp_path / "out", unbroken)


class Ignoring:
    """As under `nohup`: the signals are ignored when the run starts, and come in the middle of it."""

    def __init__(self, step: int, *signums: int):
        self.step, self.signums = step, signums

    def __call__(self) -> None:
        for signum in self.signums:
            signal.signal(signum, signal.SIG_IGN)
            At(self.step, signum)()


class NohupThenTerminated:
    def __call__(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        At(4, signal.SIGTERM)()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_signals_that_were_ignored_stay_ignored(source, unbroken, tmp_path, num_workers):
    accident = Ignoring(4, signal.SIGINT, signal.SIGTERM)
    code, said = run(source, tmp_path / "out", num_workers=num_workers, accident=accident)
    assert code == 0 and "saving at the end of this step" not in said, said
    assert_same_weights(tmp_path / "out", unbroken)


def test_sigterm_saves_where_ctrl_c_is_ignored(source, unbroken, tmp_path):
    code, said = run(source, tmp_path / "out", accident=NohupThenTerminated())
    assert code == 143 and "Stopped after step 5" in said, said
    code, said = run(source, tmp_path / "out")
    assert code == 0, said
    assert_same_weights(tmp_path / "out", unbroken)


def test_a_second_ctrl_c_stops_at_once(source, tmp_path):
    code, said = run(source, tmp_path / "out", accident=At(4, signal.SIGINT, times=2))
    assert code == 130, said
    assert f"Stopped at once, without a checkpoint of this step; the last whole checkpoint is {tmp_path}" in said
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(source, unbroken, tmp_path):
    output_dir = tmp_path / "out"
    code, said = run(source, output_dir, accident=WhileSaving(6))
    assert code == -signal.SIGKILL, said
    assert (output_dir / "checkpoint-6" / "model.safetensors").is_file()

    code, said = run(source, output_dir)
    assert code == 0, said
    assert f"{output_dir / 'checkpoint-6'} is half-written" in said
    assert f"Resuming from {output_dir / 'checkpoint-3'} (step 3 of" in said
    assert (output_dir / "half-written-checkpoint-6").is_dir()
    assert_same_weights(output_dir, unbroken)
    assert_same_metrics(output_dir, unbroken)


def test_a_run_killed_before_the_model_is_written_trains_no_further(source, unbroken, tmp_path):
    output_dir = tmp_path / "out"
    code, said = run(source, output_dir, accident=BeforeTheModelIsWritten())
    assert code == -signal.SIGKILL, said
    code, said = run(source, output_dir)
    assert code == 0 and "loss per order" in said, said
    assert "stage permute begins" not in said
    assert_same_weights(output_dir, unbroken)
    assert_same_metrics(output_dir, unbroken)


def test_no_resume_keeps_its_hands_off_an_earlier_run(source, unbroken):
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        train_module.run(recipe(source, unbroken), resume=False)


def test_what_is_wrong_is_said_before_the_model_is_loaded(source, tmp_path, monkeypatch):
    monkeypatch.setattr(A3LlamaForCausalLM, "from_pretrained", None)
    good = recipe(source, tmp_path / "out")

    bad = recipe(source, tmp_path / "out")
    bad.data.train_file = str(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"train_file='.*nowhere.txt': no such file"):
        train_module.run(bad)

    bad = recipe(source, tmp_path / "out")
    bad.training.save_only_model = True
    with pytest.raises(ValueError, match="save_only_model=True"):
        train_module.run(bad)

    bad = recipe(source, tmp_path / "out")
    bad.training.max_steps = 8
    with pytest.raises(ValueError, match="would begin at step 8, but the run has 8"):
        train_module.run(bad)

    good.data.validation_file = None
    with pytest.raises(ValueError, match="needs evaluation data"):
        train_module.run(good)


def test_a_full_disk_leaves_the_checkpoint_before_whole(source, unbroken, tmp_path):
    output_dir = tmp_path / "out"
    code, said = run(source, output_dir, accident=WhileSaving(6, disk_full=True))
    assert code == 1 and f"the disk is full; the last whole checkpoint is {output_dir / 'checkpoint-3'}" in said, said
    whole, half_written = last_whole_checkpoint(output_dir)
    assert whole == output_dir / "checkpoint-3" and half_written == [output_dir / "checkpoint-6"]
    code, said = run(source, output_dir)
    assert code == 0 and "Resuming from" in said, said
    assert_same_weights(output_dir, unbroken)
