"""Stages that end where their loss is flat: against a decision made from the whole history of losses, on two ranks, and
across a SIGKILL.
"""

import json
import os
import random
import re
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from a3_hf.training import run as train_module
from a3_hf.training.curriculum import Curriculum
from a3_hf.training.curriculum_callbacks import CurriculumCallback
from a3_hf.training.loss_report import losses_table
from a3_hf.training.schedule import RECORD, AdaptiveSchedule, Schedule
from tests.training.test_resume import (
    At,
    BeforeTheModelIsWritten,
    assert_same_metrics,
    assert_same_weights,
    processes,
    recipe,
)
from tests.training.test_trainer import make_trainer, rows

MAX_STEPS = 24
STAGES = [
    {"name": "ar", "until": {"flat": 0.4, "window": 3, "at_least": 4, "at_most": 9}},
    {"name": "expand", "until": {"flat": 0.3, "window": 3, "at_least": 4, "at_most": 9}, "group_size": [1, 2]},
    {"name": "permute", "group_size": 2, "rehearsal": 0.2},
]


def schedule_of(stages, *, unit="steps", max_steps=MAX_STEPS, **settings):
    return Curriculum.from_config(stages, unit=unit).resolve(max_steps=max_steps, **settings)


def naive_ends(losses: list[float], stages=STAGES, max_steps=MAX_STEPS) -> list[int]:
    """Where each stage ends, given the losses of all steps."""
    ends, start = [], 0
    for stage in stages:
        until = stage.get("until")
        if not isinstance(until, dict):
            ends.append(max_steps if until is None else until)
        else:
            first, last = size if isinstance(size := stage.get("group_size", 1), list) else (size, size)
            num_sizes = last - first + 1
            for end in range(start + until["at_least"], start + until["at_most"] + 1):
                last_size_begins = next(
                    step
                    for step in range(start, end)
                    if (step - start) * num_sizes >= until["at_least"] * (num_sizes - 1)
                )
                window = losses[end - until["window"] : end]
                if end - until["window"] >= max(last_size_begins, start):
                    slope, _ = np.polyfit(range(len(window)), window, 1)
                    if -slope * (len(window) - 1) < until["flat"]:
                        break
            ends.append(end)
        start = ends[-1]
    return ends


def random_losses(seed: int, steps: int = MAX_STEPS) -> list[float]:
    generator = np.random.default_rng(seed)
    return (6 - 2 * np.log1p(np.arange(steps) * generator.uniform(0, 1)) + generator.normal(size=steps) / 5).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_stages_end_where_the_whole_history_says(seed):
    losses = random_losses(seed)
    schedule = schedule_of(STAGES)
    assert schedule.ends == (9, 18, 24)  # as long as they may become
    drawn = []
    for step, loss in enumerate(losses):
        drawn.append(schedule.at(step))
        reason = schedule.observe(step, loss)
        assert (reason is not None) == (step + 1 in naive_ends(losses)[:2])
    assert list(schedule.ends) == naive_ends(losses)
    # Looking back from the end of the run, each step has the stage that it had when it was made.
    assert [schedule.at(step) for step in range(MAX_STEPS)] == drawn
    assert [stage.name for stage in drawn] == [
        STAGES[next(i for i, end in enumerate(schedule.ends) if step < end)]["name"] for step in range(MAX_STEPS)
    ]


def test_the_random_losses_end_stages_early_and_late():
    ends = {tuple(naive_ends(random_losses(seed))) for seed in range(20)}
    assert {4, 9} <= {end[0] for end in ends} and len(ends) > 8


@pytest.mark.parametrize("seed", range(5))
def test_a_schedule_goes_on_from_its_record_at_every_step(seed):
    losses = random_losses(seed)
    for cut in range(1, MAX_STEPS):
        before, after = schedule_of(STAGES), schedule_of(STAGES)
        for step in range(cut):
            before.observe(step, losses[step])
        after.observe(0, 99.0)  # what it had seen before does not matter
        after.restore(json.loads(json.dumps(before.record())), step=cut)
        assert after.record() == before.record()
        for step in range(cut, MAX_STEPS):
            after.observe(step, losses[step])
        assert list(after.ends) == naive_ends(losses)


def test_sizes_grow_over_the_least_length_and_the_window_lies_after():
    until = {"flat": 0.5, "window": 4, "at_least": 8, "at_most": 30}
    stages = [{"name": "expand", "until": until, "group_size": [1, 4]}, {"name": "permute", "group_size": 4}]
    schedule = schedule_of(stages, max_steps=40)
    flat = [3.0] * 40
    assert [schedule.at(step).group_size for step in range(12)] == [1, 1, 2, 2, 3, 3] + [4] * 6
    for step in range(40):
        schedule.observe(step, flat[step])
    assert schedule.ends == (10, 40)  # the last size begins at 6


def test_the_units_agree():
    def ends(unit, scale):
        lengths = {"window": 4, "at_least": 4, "at_most": 20}
        until = {"flat": 0.1, **{name: length * scale for name, length in lengths.items()}}
        stages = [{"name": "ar", "until": until}, {"name": "expand", "until": 30 * scale}, {"name": "permute"}]
        schedule = schedule_of(stages, unit=unit, max_steps=40, tokens_per_step=1000)
        found = [schedule.ends]
        for step in range(40):
            schedule.observe(step, 5.0 + max(0, 8 - step))
        return [*found, schedule.ends]

    assert ends("steps", 1) == ends("tokens", 1000) == ends("fraction", 1 / 40) == [(20, 30, 40), (12, 30, 40)]


def test_curricula_without_a_plateau_stay_functions_of_the_step():
    assert type(schedule_of([{"name": "ar", "until": 5}, {"name": "permute"}])) is Schedule
    assert type(schedule_of(STAGES)) is AdaptiveSchedule


GOOD = STAGES[0]["until"]
BAD = {
    "a key missing": ({"flat": 0.1, "window": 3}, "expected a plateau with the keys flat, window, at_least, at_most"),
    "a key too many": ({**GOOD, "patience": 2}, "expected a plateau with the keys"),
    "flat 0": ({**GOOD, "flat": 0}, "flat=0: expected a number of nats above 0"),
    "flat a word": ({**GOOD, "flat": "x"}, "flat='x'"),
    "flat a bool": ({**GOOD, "flat": True}, "flat=True"),
    "flat nan": ({**GOOD, "flat": float("nan")}, "flat=nan"),
    "half a step": ({**GOOD, "window": 2.5}, "window=2.5: expected a whole number of steps"),
    "no minimum": ({**GOOD, "at_least": 0}, "at_least=0: expected a whole number of steps, at least 1"),
    "a word": ({**GOOD, "at_most": "many"}, "at_most='many': expected a number"),
    "null": ({**GOOD, "at_most": None}, "at_most=None: expected a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_plateaus_are_refused(name):
    until, message = BAD[name]
    with pytest.raises(ValueError, match=r"stage 1 \('ar'\).*" + message):
        Curriculum.from_config([{"name": "ar", "until": until}, {"name": "permute"}], unit="steps")


def test_the_last_stage_goes_on_to_the_end():
    with pytest.raises(ValueError, match=r"stage 2 \('permute'\).*the last stage can't end at a plateau"):
        Curriculum.from_config([{"name": "ar", "until": 3}, {"name": "permute", "until": GOOD}], unit="steps")


@pytest.mark.parametrize(
    "stages, message",
    [
        ([{**STAGES[0], "until": {**GOOD, "window": 1}}, STAGES[2]], "window=1 step: expected 2"),
        ([{**STAGES[0], "until": {**GOOD, "at_most": 4}}, STAGES[2]], "at_most=4 steps is too short"),
        ([{**STAGES[0], "until": {**GOOD, "window": 9}}, STAGES[2]], "a window of 9 steps"),
        ([{**STAGES[1], "until": {**GOOD, "at_most": 5}}, STAGES[2]], "begins, 2 steps into the stage"),
        ([{**STAGES[0], "until": {**GOOD, "at_most": 30}}, STAGES[2]], "stage 2 .* would begin at step 30"),
        ([STAGES[0], {"name": "expand", "until": 7}, STAGES[2]], r"stage 2 \('expand'\) has no step of its own"),
    ],
)
def test_plateaus_that_do_not_fit_the_run_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(stages)


@pytest.mark.parametrize(
    "record, message",
    [
        (None, "of step 10 has no record of where stages ended"),
        ({"ends": [[0, 10]], "losses": []}, "has stage 1 ending at step 10, which does not fit this curriculum"),
        ({"ends": [[0, 3]], "losses": []}, "has stage 1 ending at step 3"),
        ({"ends": [], "losses": []}, "has stage 1 ending at step None"),
        ({"ends": [[0, 5], [1, 11]], "losses": []}, "has stage 2 ending at step 11"),  # later than the checkpoint
        ({"ends": [[0, 5], [2, 9]], "losses": []}, "has stage 3 ending at step 9"),
        ({"ends": [[0, 5], [7, 9]], "losses": []}, "has stage 8 ending at step 9"),
    ],
)
def test_records_of_other_curricula_are_refused(record, message):
    with pytest.raises(ValueError, match=message):
        schedule_of(STAGES).restore(record, step=10)


def test_the_trainer_decides_by_the_losses_of_its_steps(tmp_path):
    train = rows([9, 4, 7, 2, 8, 3, 9, 5] * 12)
    trainer = make_trainer(
        tmp_path, train, rows([6] * 3), stages=STAGES, max_steps=MAX_STEPS, eval_strategy="steps", eval_steps=1000
    )
    observed, observe = {}, trainer.schedule.observe

    def spy(step, loss):
        observed[step] = loss
        return observe(step, loss)

    trainer.schedule.observe = spy
    trainer.train()
    logged = {entry["step"] - 1: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    ends = naive_ends([logged[step] for step in range(MAX_STEPS)])
    assert list(trainer.schedule.ends) == ends and ends[0] < 9
    assert sorted(observed) == list(range(ends[1]))  # no losses are gathered where none decide
    for step, loss in observed.items():
        assert loss == pytest.approx(logged[step], abs=1e-5)
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == ends
    assert trainer.state.stateful_callbacks[RECORD]["ends"] == [[0, ends[0]], [1, ends[1]]]
    table = losses_table(trainer.state, trainer.schedule)
    assert list(table.columns[1].cells) == [str(end) for end in ends]


def test_a_callback_that_can_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="need the trainer's own callback"):
        make_trainer(
            tmp_path,
            rows([6] * 4),
            stages=STAGES,
            max_steps=MAX_STEPS,
            callbacks=[CurriculumCallback(schedule_of(STAGES))],
        )


def child(source: Path, output_dir: Path, accident, rank: int, world_size: int, port: int) -> None:
    os.setsid()
    with output_dir.with_suffix(f".said{rank}").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if world_size > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if accident is not None:
        accident()
    run = recipe(source, output_dir)
    run = replace(run, curriculum=Curriculum.from_config(STAGES, unit="steps"))
    run.training.max_steps = MAX_STEPS
    run.training.per_device_train_batch_size = 2 // world_size
    made = train_module._make_trainer

    def keep(*arguments, **settings):
        trainer = made(*arguments, **settings)
        trainer.add_callback(Says(trainer.schedule, output_dir.with_suffix(f".ends{rank}")))
        return trainer

    train_module._make_trainer = keep
    code = train_module.run(run)
    sys.stdout.flush()
    os._exit(code)


class Says(CurriculumCallback):
    """Writes down where the stages ended on this rank."""

    def __init__(self, schedule, path: Path):
        super().__init__(schedule)
        self.path = path

    def on_step_begin(self, args, state, control, **kwargs):
        return control

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == MAX_STEPS:
            self.path.write_text(json.dumps({"ends": self.schedule.ends, "record": self.schedule.record()}))
        return control


def run_it(source, output_dir: Path, *, accident=None, world_size: int = 1) -> tuple[int, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        processes.Process(target=child, args=(source, output_dir, accident, rank, world_size, port))
        for rank in range(world_size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode is not None, "still running"
    return started[0].exitcode, output_dir.with_suffix(".said0").read_text()


def ends_of(output_dir: Path, rank: int = 0) -> list[int]:
    return json.loads(output_dir.with_suffix(f".ends{rank}").read_text())["ends"]


def logged_losses(output_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("adaptive") / "out"
    code, said = run_it(source, output_dir)
    assert code == 0, said
    return output_dir


def test_a_run_says_where_its_stages_ended_and_why(unbroken):
    ends = ends_of(unbroken)
    assert ends == naive_ends(logged_losses(unbroken))
    said = unbroken.with_suffix(".said0").read_text()
    for end, name in zip(ends[:2], ("ar", "expand"), strict=True):
        assert re.search(
            rf"step {end}: stage {name} ends: (its loss fell by -?\d\.\d+ over 3 steps|it has had its 9)", said
        )
    assert f"step {ends[1]}: stage permute begins, group size 2" in said


def test_a_killed_run_ends_its_stages_where_an_unbroken_one_does(source, unbroken, tmp_path):
    output_dir = tmp_path / "out"
    first_end = ends_of(unbroken)[0]
    # In a stage whose losses so far are in the checkpoint, then anywhere.
    for step in (first_end - 1, random.randrange(first_end, MAX_STEPS)):
        print(f"killed in step {step}")
        code, said = run_it(source, output_dir, accident=At(step, signal.SIGKILL))
        assert code == -signal.SIGKILL, said
    code, said = run_it(source, output_dir)
    assert code == 0 and "Resuming from" in said, said
    assert ends_of(output_dir) == ends_of(unbroken)
    assert_same_weights(output_dir, unbroken)
    assert_same_metrics(output_dir, unbroken)


def test_a_run_killed_before_its_model_is_written_knows_its_stages(source, unbroken, tmp_path):
    output_dir = tmp_path / "out"
    code, said = run_it(source, output_dir, accident=BeforeTheModelIsWritten())
    assert code == -signal.SIGKILL, said
    code, said = run_it(source, output_dir)
    table = said[said.index("loss per order") :]
    assert code == 0 and all(re.search(rf"\b{end}\b", table) for end in ends_of(unbroken)), said


def test_two_ranks_end_their_stages_at_the_same_steps(source, tmp_path):
    output_dir = tmp_path / "out"
    code, said = run_it(source, output_dir, world_size=2)
    assert code == 0, said
    assert ends_of(output_dir, rank=0) == ends_of(output_dir, rank=1) == naive_ends(logged_losses(output_dir))
