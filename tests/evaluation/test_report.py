import copy
import inspect
import json
import math

import pytest
from transformers.utils import is_matplotlib_available

from a3_hf.evaluation.reporting import report
from a3_hf.evaluation.reporting.lm_eval_results import DEFAULTS, Run, gather_scores, run_of
from a3_hf.evaluation.reporting.plots import unbeaten
from a3_hf.evaluation.reporting.published import COLUMNS, JUDGE_STEPS, JUDGED, RESULTS, SUSPECT, published_scores
from a3_hf.evaluation.reporting.report import write_report
from a3_hf.evaluation.reporting.results import read_results

needs_matplotlib = pytest.mark.skipif(not is_matplotlib_available(), reason="needs matplotlib")
MULTIPLE_CHOICE = {"output_type": "multiple_choice"}
TEXTS = {"output_type": "generate_until"}


def harness(scores, *, model="a3", model_args="pretrained=models/a", speed=None, configs=None, **changes):
    """A file as lm-eval writes it: `scores` are {task: {metric: (value, standard error, items)}}."""
    results, samples, higher = {}, {}, {}
    for task, metrics in scores.items():
        results[task] = {"name": task, "alias": task}
        for metric, (value, error, items) in metrics.items():
            name, _, filtered = metric.partition(",")
            filtered = filtered or "none"
            results[task] |= {f"{name},{filtered}": value, f"{name}_stderr,{filtered}": error, "sample_len": items}
            samples[task] = {"original": 50, "effective": items}
            higher[task] = {**higher.get(task, {}), name: "perplexity" not in name}
    config = {
        "model": model,
        "model_args": model_args,
        "model_num_parameters": 260032,
        "model_dtype": "torch.float32",
        "batch_size": 4,
        "device": "cpu",
        "gen_kwargs": None,
        "random_seed": 0,
        "numpy_seed": 1234,
        "torch_seed": 1234,
        "fewshot_seed": 1234,
    }
    content = {
        "results": results,
        "configs": configs or {task: MULTIPLE_CHOICE if "acc" in scores[task] else TEXTS for task in scores},
        "versions": dict.fromkeys(scores, 1.0),
        "n-shot": dict.fromkeys(scores, 0),
        "higher_is_better": higher,
        "n-samples": samples,
        "config": {**config, **({} if speed is None else {"speed": speed})},
        "git_hash": "1234567",
        "date": 1767225600.5,
        "pretty_env_info": "PyTorch version: 2.13.0+cpu\nPython version: 3.11.7 (main)\n\nModel name:      A CPU @ 2GHz\n",
        "transformers_version": "5.23.0",
        "lm_eval_version": "0.4.13",
    }
    return {**content, **changes}


def spent(per_second, *, requests=10, passes=20, tokens=40):
    return {
        "requests": requests,
        "tokens": tokens,
        "passes": passes,
        "seconds": tokens / per_second,
        "tokens_per_second": per_second,
        "tokens_per_forward": tokens / passes,
    }


def measured(kind, rows, **config):
    return {
        "kind": kind,
        "config": {"model": "models/a", **config},
        "versions": {"lm_eval": None, "torch": "2.13.0", "python": "3.12.1"},
        "git_commit": "1234567890abcdef",
        "device": "CPU, 2 threads",
        "date": "2026-01-02",
        "rows": rows,
    }


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def told(folder, **files):
    return write_report(write(folder, **files), plots=False).read_text()


def line(text, start):
    """The cells of the one line of the report's tables that begins so."""
    (found,) = [one for one in text.splitlines() if one.startswith(start)]
    return [cell.strip() for cell in found.strip("|").split(" | ")]


SMALL = {
    "a": harness(
        {
            "a3_piqa": {"acc": (0.625, 0.125, 16)},
            "lambada": {"perplexity": (1234.56, "N/A", 50), "acc": (0.5, 0.05, 50)},
        },
        speed={"a3_piqa": spent(80.0, requests=32, passes=32)},
    ),
    "b": harness(
        {"rocstories_infill_3": {"rouge1": (11.84, 1.25, 16), "rouge2": (math.nan, math.nan, 16)}},
        model_args={"pretrained": "models/a", "order": "left_to_right", "batch_size": 8},
        speed={"rocstories_infill_3": spent(51.25)},
    ),
    "c": harness(
        {"rocstories_infill_3": {"rouge1": (9.5, 1.0, 16), "rouge2": (0.5, 0.25, 16)}},
        model_args="pretrained=models/a,decoding=dynamic,tokens_per_step=4",
        speed={"rocstories_infill_3": spent(123.5, passes=10)},
        git_hash="v0.1-3-gabcdef0",
    ),
    "d": harness({"a3_piqa": {"acc": (0.5, 0.125, 16)}}, model="hf", model_args="pretrained=models/base"),
    "e": measured("ppl", [{"order": "random", "nats_per_token": 2.34567, "adaptation_cost": None}], seed=3, base=None),
    "f": measured("memory", [{"GiB|peak": 3}, {"note": "two\nlines"}]),
}
GOLDEN = """\
# Results

|  | in the files |
|---|---|
| date | 2026-01-01 (4 of 6 files); 2026-01-02 (2 of 6 files) |
| lm_eval | 0.4.13 (4 of 6 files) |
| transformers | 5.23.0 (4 of 6 files) |
| torch | 2.13.0+cpu (4 of 6 files); 2.13.0 (2 of 6 files) |
| python | 3.11.7 (4 of 6 files); 3.12.1 (2 of 6 files) |
| dtype | torch.float32 (4 of 6 files) |
| git commit | 1234567 (5 of 6 files); abcdef0 (1 of 6 files) |
| device | cpu (A CPU @ 2GHz) (4 of 6 files); CPU, 2 threads (2 of 6 files) |
| seeds of lm-eval | random 0, numpy 1234, torch 1234, few-shot 1234 (4 of 6 files) |
| seed | 3 (1 of 6 files) |

## Scores

| run | model | pretrained | settings | parameters | a3_piqa acc % (16 of 50 items) | lambada perplexity (50 items) | lambada acc % (50 items) | rocstories_infill_3 rouge1 (16 of 50 items) | rocstories_infill_3 rouge2 (16 of 50 items) |
|---|---|---|---|---|---|---|---|---|---|
| 1 | a3 | models/a | – | 0.26M | 62.5 ± 12.5 | 1235 | 50.0 ± 5.0 | 11.8 ± 1.2 | nan |
| 2 | a3 | models/a | decoding=dynamic tokens_per_step=4 | 0.26M | – | – | – | 9.5 ± 1.0 | 0.5 ± 0.2 |
| 3 | hf | models/base | – | 0.26M | 50.0 ± 12.5 | – | – | – | – |
| – | Llama-3.1-8B, autoregressive (paper, suspect) | – | – | – | 80.3 | – | – | 11.7 | 2.3 |
| – | Dream-7B (paper, suspect) | – | – | – | 55.8 | – | – | 11.7 | 2.3 |
| – | DiffuLLaMA-7B (paper) | – | – | – | 63.3 | – | – | 23.3 | 5.5 |
| – | A3-1B (paper) | – | – | – | 64.7 | – | – | 11.8 | 1.7 |
| – | A3-3B (paper) | – | – | – | 70.1 | – | – | 11.3 | 2.3 |
| – | A3-8B (paper) | – | – | – | 78.1 | – | – | 19.2 | 4.6 |

± is the standard error. Settings are those other than the defaults (`a3`: order=left_to_right, group_size=1, num_orders=1, seed=0, decoding=groupwise, block_length=32; `a3_ar`: infilling=prefix, num_samples=8, temperature=1.0, seed=0).

Lower is better: perplexity of lambada.

Lines marked (paper) are the paper's own figures (arXiv 2601.13228, ICLR 2026), at other sizes and on its own items; they were not run here. Suspect among them:

- Llama-3.1-8B, autoregressive: on ROCStories it was given the text before the blank only, and a length counted in characters; the others saw the text on both sides, and the true length in tokens.
- Dream-7B: its ROCStories figures are those of the autoregressive line, to the digit, and its own authors report 73.3 on HellaSwag, 74.8 on WinoGrande and 75.8 on PIQA.
- TriviaQA of the diffusion models: the public script of that name loads SQuAD.

## Speed

| run | settings | task | type | requests | tokens/s | passes per request | tokens per forward |
|---|---|---|---|---|---|---|---|
| 1 a3 | – | a3_piqa | multiple_choice | 32 | 80 | 1 | 1.25 |
| 1 a3 | – | rocstories_infill_3 | generate_until | 10 | 51.25 | 2 | 2 |
| 2 a3 | decoding=dynamic tokens_per_step=4 | rocstories_infill_3 | generate_until | 10 | 123.5 | 1 | 4 |

Tokens are those scored or written, without the prompt. Batch 4, device cpu (A CPU @ 2GHz).

## Rolling perplexity

Settings: `model=models/a`, `seed=3`.

| order | nats_per_token | adaptation_cost |
|---|---|---|
| random | 2.346 | – |

## memory

Settings: `model=models/a`.

| GiB\\|peak | note |
|---|---|
| 3 | – |
| – | two lines |

## Files

| file | run | what | date | git commit | device |
|---|---|---|---|---|---|
| `a.json` | 1 | a3_piqa, lambada | 2026-01-01 | 1234567 | cpu (A CPU @ 2GHz) |
| `b.json` | 1 | rocstories_infill_3 | 2026-01-01 | 1234567 | cpu (A CPU @ 2GHz) |
| `c.json` | 2 | rocstories_infill_3 | 2026-01-01 | abcdef0 | cpu (A CPU @ 2GHz) |
| `d.json` | 3 | a3_piqa | 2026-01-01 | 1234567 | cpu (A CPU @ 2GHz) |
| `e.json` | – | ppl | 2026-01-02 | 1234567 | CPU, 2 threads |
| `f.json` | – | memory | 2026-01-02 | 1234567 | CPU, 2 threads |
"""  # noqa: E501


def test_the_report_of_a_small_folder(tmp_path):
    path = write_report(write(tmp_path / "results", **SMALL), plots=False)
    assert path == tmp_path / "results" / "report.md"
    assert path.read_text(encoding="utf-8") == GOLDEN
    assert not list(tmp_path.rglob("*.png"))


@needs_matplotlib
def test_a_second_report_of_the_same_folder_is_the_same(tmp_path):
    write(tmp_path, **SMALL)
    assert write_report(tmp_path).read_text() == write_report(tmp_path).read_text()


def test_output_goes_elsewhere_if_asked(tmp_path):
    write(tmp_path / "results", **SMALL)
    path = write_report(tmp_path / "results", tmp_path / "new" / "page", plots=False)
    assert path == tmp_path / "new" / "page" / "report.md" and path.is_file()
    assert not list((tmp_path / "results").glob("*.md"))
    with pytest.raises(ValueError, match=r"output='.*report\.md': expected a folder, got a file"):
        write_report(tmp_path / "results", path, plots=False)


# Runs


@pytest.mark.parametrize(
    "model_args",
    [
        "pretrained=m,order=left_to_right,group_size=1,seed=0,batch_size=8,device=cpu,span_length=None",
        {"pretrained": "m", "group_size": 1, "num_orders": 1, "decoding": "groupwise", "span_length": None},
    ],
)
def test_defaults_batch_and_device_do_not_make_another_run(model_args):
    assert run_of(harness({}, model_args=model_args)) == Run("a3", "m", "")


def test_settings_make_another_run():
    run = run_of(harness({}, model_args="pretrained=m,seed=1,group_size=4,dtype=bfloat16"))
    assert run == Run("a3", "m", "dtype=bfloat16 group_size=4 seed=1")
    assert run_of(harness({}, model_args={"pretrained": "m", "seed": 1, "group_size": 4, "dtype": "bfloat16"})) == run
    assert run_of(harness({}, model="hf", model_args="pretrained=m,seed=0")).settings == "seed=0"
    template = harness({}, chat_template_sha="0123456789", system_instruction="Be brief.")
    assert run_of(template).settings == "chat_template=01234567 system_instruction=Be brief."
    sampled = harness({})
    sampled["config"]["gen_kwargs"] = {"do_sample": True}
    assert run_of(sampled).settings == 'gen_kwargs={"do_sample": true}'
    assert run_of(harness({}, model="LlamaForCausalLM", model_args=None)) == Run("LlamaForCausalLM", "", "")


@pytest.mark.parametrize(("module", "model"), [("a3_lm", "A3LM"), ("causal_lm", "CausalLM")])
def test_the_defaults_are_the_models_own(module, model):
    pytest.importorskip("lm_eval")
    loaded = pytest.importorskip(f"a3_hf.evaluation.lm_harness.{module}")
    signature = inspect.signature(getattr(loaded, model)).parameters
    own = {name: one.default for name, one in signature.items() if one.default not in (None, inspect.Parameter.empty)}
    if model == "A3LM":
        assert signature["decoding"].default is None
        own["decoding"] = "groupwise"  # what None is for an A3 model
    assert DEFAULTS[{"a3_lm": "a3", "causal_lm": "a3_ar"}[module]] == own


def test_the_same_value_twice_is_one_cell(tmp_path):
    one = harness({"a3_piqa": {"acc": (0.625, 0.1, 16)}})
    two = harness({"a3_piqa": {"acc": (0.625 + 1e-9, 0.1, 16)}}, model_args="pretrained=models/a,batch_size=2")
    nan = {"toy": {"exact_match": (math.nan, "N/A", 5)}}
    text = told(tmp_path, one=one, two=two, three=harness(nan), four=harness(nan))
    assert line(text, "| 1 |")[5:] == ["62.5 ± 10.0", "nan"] or line(text, "| 1 |")[5:] == ["nan", "62.5 ± 10.0"]


@pytest.mark.parametrize("other", [(0.626, 0.1, 16), (0.625, 0.1, 17), (math.nan, 0.1, 16)])
def test_two_values_for_a_cell_name_both_files(tmp_path, other):
    write(tmp_path, one=harness({"a3_piqa": {"acc": (0.625, 0.1, 16)}}), two=harness({"a3_piqa": {"acc": other}}))
    with pytest.raises(
        ValueError, match=r"one\.json and two\.json have different acc of a3_piqa for the run a3 models/a"
    ):
        write_report(tmp_path, plots=False)
    assert not (tmp_path / "report.md").exists()


def test_items_stand_in_the_cells_where_they_differ(tmp_path):
    text = told(
        tmp_path,
        one=harness({"toy": {"acc": (0.5, 0.1, 16)}}),
        two=harness({"toy": {"acc": (0.25, 0.1, 50)}}, model_args="pretrained=models/b"),
    )
    assert line(text, "| run | model |")[5] == "toy acc %"
    assert line(text, "| 1 |")[5] == "50.0 ± 10.0 (16 of 50 items)"
    assert line(text, "| 2 |")[5] == "25.0 ± 10.0 (50 items)"


def test_items_of_a_group_are_those_behind_its_metric():
    result = {**harness({"some": {"acc": (0.5, 0.1, 10)}}), "path": "x"}
    result["results"]["some"]["sample_count"] = {"acc,none": 5}
    ((score,),) = [line.values() for line in gather_scores([result]).values()]
    assert score.items == 5


def test_tasks_that_differ_have_columns_of_their_own(tmp_path):
    one = harness({"toy": {"exact_match,strict": (0.5, 0.1, 5), "exact_match,flexible": (0.75, 0.1, 5)}})
    more = {"three": harness({"toy": {"exact_match,strict": (0.25, 0.1, 5)}}, versions={"toy": 2.0})}
    more["four"] = harness({"toy": {"exact_match,strict": (0.1, 0.1, 5)}}, **{"n-shot": {"toy": 3}})
    more["five"] = harness(
        {"toy": {"exact_match,strict": (0.0, 0.1, 5)}}, configs={"toy": {**TEXTS, "lengths": [4, 8]}}
    )
    cells = line(told(tmp_path, one=one), "| run | model |")[5:]
    assert cells == ["toy exact_match % strict (5 of 50 items)", "toy exact_match % flexible (5 of 50 items)"]
    headings = line(told(tmp_path, **more), "| run | model |")[5:]
    assert len(headings) == len(set(headings)) == 5
    for words in ("version 2.0", "3-shot", "lengths [4, 8]"):
        assert sum(words in heading for heading in headings) == 1
    cells = line(told(tmp_path, **more), "| 1 |")[5:]
    assert sorted(cells) == [f"{x} ± 10.0" for x in ("0.0", "10.0", "25.0", "50.0", "75.0")]


def test_cut_requests_are_told(tmp_path):
    result = copy.deepcopy(SMALL["b"])
    result["config"]["truncated"] = {"rocstories_infill_3": 7}
    assert "cut to the model's context: rocstories_infill_3: 7 (run 1)." in told(tmp_path, b=result)


def test_seeds_and_gpus(tmp_path):
    result = copy.deepcopy(SMALL["b"])
    result["config"] |= {"device": "cuda:0", "settings": {"seed": 5}, "fewshot_seed": 9}
    result["pretty_env_info"] += "GPU models and configuration: \nGPU 0: Some GPU\nGPU 1: Some GPU\nGPU 2: Another\n"
    text = told(tmp_path, a=result, b=SMALL["a"])
    assert line(text, "| seed |") == ["seed", "5 (1 of 2 files)"]
    assert "few-shot 9 (1 of 2 files); random 0, numpy 1234, torch 1234, few-shot 1234 (1 of 2 files)" in text
    assert line(text, "| device |")[1].startswith("cuda:0 (Some GPU, Another) (1 of 2 files)")
    assert line(text, "| 1 a3 | – | rocstories_infill_3 |")[-2:] == ["4", "cuda:0 (Some GPU, Another)"]


def test_a_speed_that_lacks_a_figure_is_named(tmp_path):
    entry = spent(5.0)
    del entry["passes"]
    write(tmp_path, bad=harness({"toy": {"acc": (0.5, 0.1, 5)}}, speed={"toy": entry}))
    with pytest.raises(ValueError, match=r"bad\.json: the speed of toy lacks passes"):
        write_report(tmp_path, plots=False)


def test_no_requests_are_no_passes_per_request(tmp_path):
    result = harness({"toy": {"acc": (0.5, 0.1, 5)}}, speed={"toy": {**spent(5.0), "requests": 0, "passes": 0}})
    assert line(told(tmp_path, a=result), "| 1 a3 |")[6] == "–"


# Measurements


def test_several_files_of_a_kind_are_one_table(tmp_path):
    one = measured("needle", [{"length": 8, "accuracy": 1.0}], seed=0, count=4)
    two = measured("needle", [{"length": 9, "depth": 0.5, "accuracy": math.inf}], seed=1, count=4)
    text = told(tmp_path, one=one, two=two)
    assert "Settings: `model=models/a`, `count=4`." in text
    assert "- file 1, `one.json`: `seed=0`\n- file 2, `two.json`: `seed=1`" in text
    assert "| file | length | accuracy | depth |\n|---|---|---|---|\n| 1 | 8 | 1 | – |\n| 2 | 9 | inf | 0.5 |" in text


def test_the_papers_texts_under_a_judge_stand_beside_ours(tmp_path):
    text = told(tmp_path, a=measured("judge", [{"steps": 8, "judge_perplexity": 20.0}]))
    assert line(text, "| A3-8B (paper) | entropy |")[2:] == ["14.3", "11.2"]
    assert JUDGE_STEPS == (512, 1024) and all(len(values) == 2 for values in JUDGED.values())


# The paper


def test_the_papers_table():
    assert published_scores("a3_hellaswag", "acc")["A3-8B"] == 58.4
    assert published_scores("rocstories_infill_3", "rougeL") == {
        "Llama-3.1-8B, autoregressive": 10.5,
        "Dream-7B": 10.5,
        "DiffuLLaMA-7B": 21.2,
        "A3-1B": 11.1,
        "A3-3B": 10.2,
        "A3-8B": 18.6,
    }
    assert not published_scores("hellaswag", "acc") and not published_scores("a3_hellaswag", "acc_norm")
    assert all(len(scores) == len(COLUMNS) for scores in RESULTS.values())
    assert len(set(SUSPECT) & set(RESULTS)) == 2


def test_the_papers_tasks_are_in_the_pack():
    """Each with the metric that its figures are set beside."""
    yaml = pytest.importorskip("yaml")
    folder = report.Path(__file__).parents[2] / "a3_hf" / "evaluation" / "tasks"

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)

    def load(path):
        content = yaml.load(path.read_text(), Loader)
        included = load(path.parent / content["include"]) if "include" in content else {}
        return {**included, **content}

    tasks = {
        content.get("task"): content for content in map(load, folder.rglob("[!_]*.yaml")) if "group" not in content
    }
    for task, metric in COLUMNS:
        assert metric in [one["metric"] for one in tasks[task]["metric_list"]], f"{task} has no {metric}"


def test_without_such_a_task_the_paper_is_not_quoted(tmp_path):
    assert "paper" not in told(tmp_path, a=harness({"hellaswag": {"acc": (0.5, 0.1, 5)}}))


# Plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, by file name."""
    figures = {}
    if is_matplotlib_available():
        from matplotlib.figure import Figure

        save = Figure.savefig

        def savefig(self, path, **kwargs):
            figures[path.name] = self
            save(self, path, **kwargs)

        monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


RELIABILITY = [
    {"bin": 1, "above": 0.0, "up_to": 0.5, "count": 4, "mean_confidence": 0.3, "accuracy": 0.25},
    {"bin": 2, "above": 0.5, "up_to": 1.0, "count": 0, "mean_confidence": None, "accuracy": None},
    {"bin": "all", "above": 0.0, "up_to": 1.0, "count": 4, "mean_confidence": 0.3, "accuracy": 0.25}
    | {"expected_calibration_error": 0.05},
]
JUDGE = [
    {"strategy": "reference", "criterion": None, "steps": None, "judge_perplexity": 5.0},
    {"strategy": "dynamic", "criterion": "entropy", "steps": 32, "judge_perplexity": 10.0},
    {"strategy": "dynamic", "criterion": "entropy", "steps": 8, "judge_perplexity": 20.0},
    {"strategy": "groupwise", "criterion": None, "steps": 8, "judge_perplexity": math.nan},
]
LOSSES = [
    {"model": "base", "order": "left_to_right", "group_size": 1, "num_orders": 1, "nats_per_token": 2.0},
    {"model": "a3", "order": "left_to_right", "group_size": 4, "num_orders": 1, "nats_per_token": 3.0},
    {"model": "a3", "order": "random", "group_size": 1, "num_orders": 2, "nats_per_token": 2.5}
    | {"nats_per_token_mean_of_orders": 2.75},
]
NEEDLES = [{"length": n, "depth": d, "accuracy": d, "choices": 8} for n in (64, 128) for d in (0.0, 1.0)]


@needs_matplotlib
def test_every_plot_is_there_and_shown(tmp_path, drawn):
    files = {
        "cal": measured("calibration", RELIABILITY, strategy="groupwise"),
        "cal2": measured("calibration", RELIABILITY, strategy="dynamic"),
        "judge": measured("judge", JUDGE),
        "needle": measured("needle", NEEDLES),
        "ppl": measured("ppl", LOSSES),
        "other": measured("speed", [{"rows": 1}]),
    }
    text = write_report(write(tmp_path / "in", **SMALL, **files), tmp_path / "out").read_text()
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    once = {"judge.png", "needle.png", "ppl.png", "quality_rocstories_infill_3.png"}
    assert names == {"calibration_1.png", "calibration_2.png"} | once == set(drawn)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert text.count(f"]({name})") == 1
    assert "strategy=dynamic:\n\n![strategy=dynamic](calibration_2.png)" in text


@needs_matplotlib
def test_quality_against_speed(tmp_path, drawn):
    slow = harness(
        {"rocstories_infill_3": {"rouge1": (11.0, 1.0, 16)}},
        model_args="pretrained=models/b",
        speed={"rocstories_infill_3": spent(20.0)},
    )
    nothing = harness(
        {"rocstories_infill_3": {"rouge1": (math.nan, 1.0, 16)}},
        model_args="pretrained=models/c",
        speed={"rocstories_infill_3": spent(20.0)},
    )
    write_report(write(tmp_path, **SMALL, x=slow, y=nothing))
    figure = drawn["quality_rocstories_infill_3.png"]
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "rouge1"
    assert [text.get_text() for text in axes.texts] == ["1", "2", "4"]
    assert [text.xy for text in axes.texts] == [(51.25, 11.84), (123.5, 9.5), (20.0, 11.0)]
    front = [line for line in axes.lines if line.get_color() == "silver"]
    assert [list(line.get_xdata()) for line in front] == [[51.25, 123.5]]
    (legend,) = figure.legends
    labels = [text.get_text().strip() for text in legend.get_texts()]
    assert "1  defaults" in labels and "2  decoding=dynamic tokens_per_step=4" in labels and "a3 models/b" in labels


@needs_matplotlib
@pytest.mark.parametrize(("metric", "front"), [("exact_match", [20.0]), ("perplexity", [10.0, 20.0])])
def test_the_front_knows_what_is_better(tmp_path, drawn, metric, front):
    files = {
        name: harness(
            {"toy": {metric: (value, 0.0, 16)}}, model_args=f"pretrained={name}", speed={"toy": spent(per_second)}
        )
        for name, value, per_second in (("a", 0.25, 10.0), ("b", 0.75, 20.0))
    }
    write_report(write(tmp_path, **files))
    (axes,) = drawn["quality_toy.png"].axes
    assert [list(line.get_xdata()) for line in axes.lines if line.get_color() == "silver"] == [front]
    assert axes.get_ylabel() == {"exact_match": "exact_match %", "perplexity": "perplexity; lower is better"}[metric]


@needs_matplotlib
def test_labels_of_points_keep_apart(tmp_path, drawn):
    from matplotlib.text import Text

    files = {
        f"f{i}": harness(
            {"toy": {"exact_match": (0.5, 0.0, 16)}},
            model_args=f"pretrained=models/a,group_size={i + 2}",
            speed={"toy": spent(50.0 + i / 100)},
        )
        for i in range(12)
    }
    write_report(write(tmp_path, **files))
    figure = drawn["quality_toy.png"]
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without their leaders
    assert len(boxes) == 12
    assert not [(i, j) for i in range(12) for j in range(i) if boxes[i].overlaps(boxes[j])]


def test_the_unbeaten():
    assert unbeaten([1.0, 2.0, 4.0], [5.0, 3.0, 4.0]) == [0, 2]
    assert unbeaten([1.0, 2.0, 2.0, 1.0], [5.0, 5.0, 4.0, 5.0]) == [1]


@needs_matplotlib
def test_losses_and_judge_and_needle(tmp_path, drawn):
    files = {"ppl": measured("ppl", LOSSES), "judge": measured("judge", JUDGE), "needle": measured("needle", NEEDLES)}
    write_report(write(tmp_path, **files))
    (axes,) = drawn["ppl.png"].axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["random, 2 orders", "left to right, groups of 4", "left to right"]
    dots = [(line.get_label(), list(line.get_xdata())) for line in axes.lines if len(line.get_xdata())]
    assert dots[:2] == [("base", [2.0]), ("a3", [3.0, 2.5])]
    assert dots[2][1] == [2.75]
    (axes,) = drawn["judge.png"].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["dynamic entropy"] == ([8, 32], [20.0, 10.0])
    assert lines["reference"][1] == [5.0, 5.0] and "groupwise" not in lines
    axes = drawn["needle.png"].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert [text.get_text() for text in axes.texts] == ["0.00", "0.00", "1.00", "1.00"]


@needs_matplotlib
def test_rows_without_what_is_drawn_are_in_the_table_alone(tmp_path):
    kinds = {kind: measured(kind, [{"odd": 1.5, "accuracy": math.nan}]) for kind in report.TITLES}
    text = write_report(write(tmp_path, **kinds)).read_text()
    assert text.count("| 1.5 | nan |") == len(kinds)
    assert not list(tmp_path.glob("*.png")) and "![" not in text


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    write(tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"pip install 'a3-hf\[plot\]'"):
        write_report(tmp_path)
    assert not (tmp_path / "report.md").exists()
    assert write_report(tmp_path, plots=False).is_file()


def test_a_folder_without_results(tmp_path):
    with pytest.raises(ValueError, match="expected a folder with results"):
        write_report(tmp_path, plots=False)


def test_what_lm_eval_writes_is_read(tmp_path):
    """A run of lm-eval on a dummy model, saved by its own tracker."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    (tmp_path / "items.jsonl").write_text('{"q": "a", "y": 0}\n{"q": "b", "y": 1}\n{"q": "c", "y": 1}\n')
    task = {
        "task": "toy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "items.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["x", "y"],
        "doc_to_target": "{{y}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    tracker = EvaluationTracker(output_path=str(tmp_path / "results"))
    answers = lm_eval.simple_evaluate(
        "dummy",
        tasks=[task],
        limit=2,
        task_manager=TaskManager(include_defaults=False),
        evaluation_tracker=tracker,
        bootstrap_iters=0,
    )
    answers.pop("samples")
    tracker.save_results_aggregated(answers)
    (result,) = read_results(tmp_path / "results")
    ((run, scores),) = gather_scores([result]).items()
    ((column, score),) = scores.items()
    assert run == Run("dummy", "", "")
    assert (column.task.name, column.metric, column.task.version) == ("toy", "acc", "1.0")
    assert (score.value, score.items, score.of) == (answers["results"]["toy"]["acc,none"], 2, 3)
    text = write_report(tmp_path / "results", plots=False).read_text()
    assert "toy acc % (2 of 3 items)" in text and f"| lm_eval | {answers['lm_eval_version']} |" in text
