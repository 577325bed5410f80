"""`a3 eval` and `a3 report` as they are typed: every task of the pack on ten items, and a page of what came out."""

import json
import logging
import sys
from functools import partial

import pytest

pytest.importorskip("lm_eval")

import lm_eval.tasks
from typer.testing import CliRunner

from a3_hf.cli import app
from a3_hf.cli import evaluation as command
from a3_hf.evaluation.lm_harness.command import TASKS, leave_out_expected_warnings
from tests.evaluation.test_task_sources import write_all
from tests.evaluation.test_tasks import METRICS


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """lm-eval indexes its thousands of tasks for ten seconds."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(sys, "argv", ["a3"])


@pytest.mark.parametrize("model", ["a3", "a3_ar"])
def test_every_task_on_ten_items_and_a_report(source, tmp_path, own_tasks_alone, model):
    data, results = tmp_path / "data", tmp_path / "results"
    write_all(data)
    arguments = ["--model", model, "--model_args", f"pretrained={source}", "--batch_size", "8"]
    arguments += ["--tasks", ",".join(METRICS), "--metadata", f"data_dir={data}", "lengths=[2,4]", "--limit", "10"]
    arguments += ["--gen_kwargs", "max_gen_toks=8", "--output_path", str(results), "--confirm_run_unsafe_code"]
    command.run([*arguments, "--use_cache", str(tmp_path / "cache")])
    (path,) = results.rglob("results_*.json")
    found = json.loads(path.read_text())
    assert set(METRICS) <= set(found["results"])
    for task, metrics in METRICS.items():
        assert metrics <= {name.split(",")[0] for name in found["results"][task]}
    assert set(METRICS) == set(found["config"]["speed"]) and found["config"]["settings"]["model"] == model
    assert all(spent["requests"] >= 10 for spent in found["config"]["speed"].values())

    told = run("report", str(results), "--no-plots")
    assert told.exit_code == 0, told.output
    page = (results / "report.md").read_text()
    assert all(task in page for task in METRICS) and "(paper)" in page


def test_help_and_measurements_are_found():
    assert run("eval").output == run("eval", "--help").output == command.HELP + "\n"
    shown = run("eval", "ppl", "--help")
    assert shown.exit_code == 0 and "--orders" in shown.output and "a3 eval ppl" in shown.output
    assert (TASKS / "paper" / "a3_hellaswag.yaml").is_file()


@pytest.mark.parametrize("words", [["--tasks", "list"], ["--tasks=list"], ["ls", "tasks"]])
def test_tasks_are_listed(words, own_tasks_alone):
    shown = run("eval", *words)
    assert "a3_hellaswag" in shown.output and "rocstories_infill_3" in shown.output


def test_what_is_wrong_is_said_in_a_line(source, own_tasks_alone, monkeypatch):
    settings = f"pretrained={source},decoding=magic"
    result = run("eval", "--model", "a3", "--model_args", settings, "--tasks", "a3_piqa", "--metadata", "data_dir=no")
    assert result.exit_code == 2 and "groupwise, dynamic, speculative, refine" in result.stderr
    assert run("report", "no/such/folder").exit_code == 2
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    result = run("eval", "--tasks", "a3_piqa")
    assert result.exit_code == 2 and "pip install 'a3-hf[eval]'" in result.stderr


def test_what_is_meant_is_no_warning(monkeypatch):
    leave_out_expected_warnings()
    index, task = logging.getLogger("lm_eval.tasks._index"), logging.getLogger("lm_eval.api.task")
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    for logger in (index, task):
        monkeypatch.setattr(logger, "handlers", [handler])
    index.warning("Task 'piqa' from %s/stock/piqa.yaml overrides existing task from there", TASKS)
    task.warning("a3_piqa: Custom kwargs can be passed to `--metadata` in console")
    index.warning("Task 'piqa' from mine/piqa.yaml overrides existing task from there")
    task.warning("a3_piqa: something else")
    assert [record.getMessage().split()[-1] for record in said] == ["there", "else"]


def test_options_take_hyphens(source, tmp_path, own_tasks_alone):
    write_all(tmp_path / "data")
    settings = [
        "--model-args",
        f"pretrained={source},slot_start=left_token",
        "--include-path",
        str(TASKS),
    ]
    settings += ["--tasks", "a3_piqa", f"--metadata=data_dir={tmp_path / 'data'}", "--limit=2"]
    command.run(["--model", "a3", *settings, "--output-path", str(tmp_path / "results-of-a-run")])
    assert list((tmp_path / "results-of-a-run").rglob("results_*.json"))
