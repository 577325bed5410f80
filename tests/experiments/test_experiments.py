"""Grids of runs: what their YAML becomes, what is refused and resumed, and the small form of every experiment there is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

from a3_hf.cli import app
from a3_hf.experiments import runner as runner_module
from a3_hf.experiments.grid import check_record, read_experiment
from a3_hf.experiments.runner import MEASURES, run
from a3_hf.training.run_checks import check_settings

pytest.importorskip("rouge_score")

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "recipes" / "experiments").glob("*.yaml"))


@pytest.fixture
def plan(source, tmp_path):
    """A small experiment on a random model: two arms, two seeds."""
    recipe = {
        "model_name_or_path": str(source),
        "train_file": str(source / "train.txt"),
        "validation_file": str(source / "validation.txt"),
        "cache_dir": str(source / "cache"),
        "block_size": 8,
        "output_dir": str(tmp_path / "never"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "curriculum": {"unit": "fraction", "stages": [{"name": "permute", "group_size": 2}]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return {
        "question": "Which is better?",
        "recipe": str(tmp_path / "recipe.yaml"),
        "arms": {"a3": {}, "ar": {"architecture": "llama", "curriculum": None}},
        "axes": {"seed": [1, 2]},
        "measures": {"losses": {"num_documents": 1, "max_length": 16, "group_size": 2}},
        "report": {"better": {"nll_left_to_right": "lower"}, "compare": [["a3", "ar"]]},
        "sizes": {
            "cpu": {},
            "longer": {"settings": {"max_steps": 6}, "axes": {"seed": [7]}, "arms": {"ar": None}, "report": None},
        },
    }


def written(plan, tmp_path, size="cpu"):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    return read_experiment(str(path), size=size, runs=tmp_path / "runs", known_measures=MEASURES)


def test_a_cell_is_an_arm_at_a_point_of_the_axes(plan, tmp_path):
    plan["axes"]["learning_rate"] = [0.1, 0.2]
    experiment = written(plan, tmp_path)
    assert [cell.name for cell in experiment.cells] == [
        f"{arm}-seed_{seed}-learning_rate_{rate}" for arm in ("a3", "ar") for seed in (1, 2) for rate in (0.1, 0.2)
    ]
    cell = experiment.cells[-1]
    assert cell.recipe.model.architecture == "llama" and cell.recipe.curriculum is None
    assert (cell.recipe.training.seed, cell.recipe.training.learning_rate) == (2, 0.2)
    assert Path(cell.recipe.training.output_dir) == tmp_path / "runs" / "plan" / "cpu" / cell.name
    assert experiment.cells[0].recipe.training.max_steps == 4


def test_a_size_changes_it_key_by_key(plan, tmp_path):
    experiment = written(plan, tmp_path, size="longer")
    (cell,) = experiment.cells
    assert (cell.arm, cell.recipe.training.seed, cell.recipe.training.max_steps) == ("a3", 7, 6)


BARS = {"kind": "bars", "measure": "nll_left_to_right"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": {"sead": [1]}}, "unknown axis 'sead'; did you mean 'seed'"),
        ({"axes": {"seed": []}}, "axis seed: expected a list of values"),
        ({"axes": {"seed": [1, 1]}}, "a value twice"),
        ({"axes": {"curriculum": [{"stages": []}]}}, "expected plain values"),
        ({"axes": {"architecture": ["a3"]}}, "architecture is set by the axis architecture, and the arm 'ar' sets it"),
        ({"axes": {"seed": [1], "go": {"a": {"seed": 2}}}}, "seed is set by the axis go, and the axis seed sets it"),
        ({"arms": {"a": {"output_dir": "x"}}, "report": {}}, "output_dir is set by the arm 'a'"),
        ({"arms": {"a b": {}, "a_b": {}}, "report": {}}, "two cells would train in one folder, a_b-seed_1"),
        ({"measures": {"losses": {"num_docs": 3}}}, "losses: unknown key 'num_docs'; did you mean 'num_documents'"),
        (
            {"arms": {"a3": {"learning_rat": 1}}, "report": {}},
            "cell a3-seed_1: .*learning_rat.*did you mean 'learning_rate'",
        ),
        ({"measures": {"loss": {}}}, "unknown measure 'loss'; did you mean 'losses'"),
        ({"question": None}, "question is missing"),
        ({"answers": {}}, "unknown key 'answers'"),
        ({"report": {"plot": []}}, "report: unknown key 'plot'; did you mean 'plots'"),
        ({"report": {"plots": [{"kind": "pie", "title": "Pie"}]}}, "a plot of kind 'pie'"),
        ({"report": {"plots": [{"kind": "bars", "title": "Bars"}]}}, "lacks 'measure'"),
        ({"report": {"better": {"rouge1": "more"}}}, "'lower' or 'higher'"),
        ({"report": {"plots": [{**BARS, "title": 2024}]}}, "title=2024: expected text"),
        ({"report": {"better": {"rouge1": "higher"}}}, "compare=None: expected both"),
        ({"report": {"better": {"rouge1": "higher"}, "compare": [["a3"]]}}, "compare holds .'a3'.: expected pairs"),
        ({"report": {"better": {"rouge1": "higher"}, "compare": [["a3", "arr"]]}}, "arm 'arr'; did you mean 'ar'"),
        (
            {"report": {"plots": [{**BARS, "title": "A, b"}, {**BARS, "title": "a b"}]}},
            "in one file, a_b.png; rename title='a b'",
        ),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused(plan, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        written({**plan, **change}, tmp_path)


def test_an_unknown_experiment_or_size_lists_those_there_are(plan, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="expected one of the sizes in .*: cpu, longer"):
        written(plan, tmp_path, size="gpu")
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="Experiments: .*equal_tokens"):
        read_experiment("equal_token", size="cpu", runs=tmp_path, known_measures=MEASURES)


def test_a_grid_whose_recipe_changed_is_not_gone_on_with(plan, tmp_path):
    check_record(written(plan, tmp_path))
    check_record(written(plan, tmp_path))
    more = {**plan, "axes": {"seed": [1, 2, 3]}}
    check_record(written(more, tmp_path))
    check_record(written(plan, tmp_path))  # cells may be left out again
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    path = tmp_path / "plan.yaml"
    check_record(read_experiment(str(path), size="cpu", runs=tmp_path / "elsewhere", known_measures=MEASURES))
    (tmp_path / "elsewhere").rename(tmp_path / "runs")
    plan["arms"]["ar"]["learning_rate"] = 0.5
    with pytest.raises(ValueError, match="ar-seed_1: learning_rate was 0.01 and is 0.5"):
        check_record(written(plan, tmp_path))


def test_it_is_trained_measured_told_and_not_done_twice(plan, tmp_path, monkeypatch):
    output, trained = tmp_path / "out", []
    run_recipe = runner_module.train.run
    monkeypatch.setattr(runner_module.train, "run", lambda recipe: trained.append(recipe) or run_recipe(recipe))
    assert run(written(plan, tmp_path), output, command="a3 experiment plan") == 0
    assert len(trained) == 4
    result = json.loads((output / "result.json").read_text())
    assert [(cell["arm"], cell["axes"]) for cell in result["cells"]] == [
        (arm, {"seed": seed}) for arm in ("a3", "ar") for seed in (1, 2)
    ]
    for cell in result["cells"]:
        assert cell["tokens"] == 4 * 2 * 8 and cell["train_seconds"] > 0 and cell["parameters"] > 1000
        assert [point["tokens"] for point in cell["curve"]] == [0, 32, 64]
        assert cell["measures"]["nll_left_to_right"] > 0
    assert "nll_scattered_2" in result["cells"][0]["measures"]
    assert result["cells"][0]["measures"] != result["cells"][1]["measures"], "seeds differ"
    page = (output / "report.md").read_text()
    assert "Which is better?" in page and "a3 against ar" in page and "a3 experiment plan" in page

    # Again: nothing is trained or measured, and the result is the same. Of other measurements, the new alone is taken.
    assert run(written(plan, tmp_path), tmp_path / "again", command="a3 experiment plan") == 0
    assert len(trained) == 4
    assert json.loads((tmp_path / "again" / "result.json").read_text())["cells"] == result["cells"]
    plan["measures"]["losses"]["num_documents"] = 2
    measured = []

    def counted(trained, *, num_documents, max_length, group_size):
        measured.append(num_documents)
        return {"x": 1.0}

    monkeypatch.setitem(runner_module.MEASURES, "losses", counted)
    plan["report"] = {}
    run(written(plan, tmp_path), tmp_path / "again", command="")
    assert measured == [2] * 4


def test_several_at_a_time_give_what_one_at_a_time_gives(plan, tmp_path):
    plan["arms"].pop("ar")
    plan["report"] = {}
    results = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for jobs in (1, 2):
            (tmp_path / str(jobs)).mkdir()
            experiment = written(plan, tmp_path / str(jobs))
            assert run(experiment, tmp_path / f"out{jobs}", jobs=jobs, command="") == 0
            results.append(json.loads((tmp_path / f"out{jobs}" / "result.json").read_text())["cells"])
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        assert one["measures"] == other["measures"] and one["curve"] == other["curve"]
    with pytest.raises(ValueError, match="jobs=0"):
        run(experiment, tmp_path / "out", jobs=0, command="")


PARENT = """
import multiprocessing, time

def work():
    from a3_hf.experiments.runner import _start_worker
    _start_worker(1)
    print("at work", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    worker = multiprocessing.get_context("spawn").Process(target=work)
    worker.start()
    print(worker.pid, flush=True)
    worker.join()
"""


@pytest.mark.parametrize("is_ignored", [False, True], ids=["", "under nohup"])
def test_a_worker_stops_where_its_parent_was_killed(tmp_path, is_ignored):
    script = tmp_path / "parent.py"
    ignored = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    script.write_text(ignored * is_ignored + PARENT)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    worker = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "at work\n"
    parent.kill()
    try:
        worker.wait(timeout=30)
    except psutil.TimeoutExpired:
        assert worker.status() == psutil.STATUS_ZOMBIE  # ended, and nobody has asked how
    finally:
        parent.wait()


def test_one_that_was_stopped_goes_on_to_the_same_result(plan, tmp_path, monkeypatch):
    plan["arms"].pop("ar")
    plan["report"] = {}
    (tmp_path / "whole").mkdir()
    run(written(plan, tmp_path / "whole"), tmp_path / "out", command="")
    calls, run_recipe = [], runner_module.train.run

    def interrupted(recipe):
        calls.append(recipe)
        return 130 if len(calls) == 2 else run_recipe(recipe)

    monkeypatch.setattr(runner_module.train, "run", interrupted)
    assert run(written(plan, tmp_path), tmp_path / "again", command="") == 130
    assert not (tmp_path / "again").exists()
    assert run(written(plan, tmp_path), tmp_path / "again", command="") == 0
    assert len(calls) == 3, "the finished cell is not trained again"
    cells = [json.loads((tmp_path / name / "result.json").read_text())["cells"] for name in ("out", "again")]
    assert [cell["measures"] for cell in cells[0]] == [cell["measures"] for cell in cells[1]]


@pytest.fixture
def beside_models(beside_data):
    """`beside_data`, and the small LLaMA in place of SmolLM2, with tokens that no text uses, and documents of it."""
    folder = beside_data / "models" / "smollm2-135m"
    if not folder.is_dir():
        (small,) = (beside_data.parent / "shared" / "data" / "models").iterdir()
        tokenizer, model = AutoTokenizer.from_pretrained(small), LlamaForCausalLM.from_pretrained(small)
        tokenizer.add_tokens(["<repo_name>", "<reponame>", "<file_sep>"])
        model.resize_token_embeddings(len(tokenizer))
        for part in (tokenizer, model):
            part.save_pretrained(folder)
        write_drafts(beside_data / "runs" / "drafts", tokenizer)
    return beside_data


def write_drafts(folder: Path, tokenizer) -> None:
    """Files in the form of `scripts/write_text.py`: every second document is an answer to a question, which EOS ends."""
    folder.mkdir(parents=True)
    for name in ("greedy", "sampled", "held_out"):
        lines = []
        for number in range(40):
            words = tokenizer(f"the {name} dog ran home {number} times", add_special_tokens=False)["input_ids"]
            opening = [tokenizer.bos_token_id, *words[:2], *([tokenizer.eos_token_id] if number % 2 else [])]
            lines.append({"input_ids": opening + words * 2, "prompt_length": len(opening)})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_there_are_experiments():
    assert {path.stem for path in EXPERIMENTS} >= {
        "better_recipe",
        "curriculum",
        "decoding_frontier",
        "equal_tokens",
        "two_streams_by_length",
    }


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["smoke", "cpu", "gpu"])
def test_every_size_of_every_experiment_can_be_read(path, size, beside_models, tmp_path):
    experiment = read_experiment(path.stem, size=size, runs=tmp_path, known_measures=MEASURES)
    assert experiment.cells
    for cell in experiment.cells:
        check_settings(cell.recipe)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_small_form_of_every_experiment_runs(path, beside_models, tmp_path):
    arguments = ["experiment", path.stem, "--size", "smoke", "--runs", str(tmp_path / "runs")]
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output[-2000:]
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert all(cell["measures"] for cell in result["cells"])
    plots = yaml.safe_load(path.read_text())["report"]["plots"]
    assert len(list((tmp_path / "out").glob("*.png"))) == len(plots)
    refused = CliRunner().invoke(app, [*arguments[:3], "huge", *arguments[4:]])
    assert refused.exit_code == 2
