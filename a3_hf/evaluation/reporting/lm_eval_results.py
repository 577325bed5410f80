"""Runs, their scores and their speed, read from files of results."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .markdown import ABSENT, is_number, plain

# Defaults of `--model_args`; a run is described by what differs.
DEFAULTS = {
    "a3": {
        "order": "left_to_right",
        "group_size": 1,
        "num_orders": 1,
        "seed": 0,
        "decoding": "groupwise",
        "block_length": 32,
    },
    "a3_ar": {"infilling": "prefix", "num_samples": 8, "temperature": 1.0, "seed": 0},
}
# Arguments that change where and how a model computes, not its answers.
NEUTRAL = ("pretrained", "batch_size", "max_batch_size", "device", "parallelize", "trust_remote_code")
# Factors of the metrics that are shown scaled and to one decimal, as in the paper. Others are shown unscaled.
SCALES = {
    **dict.fromkeys(("acc", "acc_norm", "exact_match", "alias_match", "em", "f1", "qa_f1_score", "pass@1"), 100),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), 1),
}
SAME = 1e-5  # relative: batches of other sizes round differently


@dataclass(frozen=True)
class Run:
    """A model and its settings, apart from batch size and device."""

    model: str
    pretrained: str
    settings: str

    def __str__(self):
        return " ".join(filter(None, (self.model, self.pretrained, self.settings)))


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, with what distinguishes it from others of the same name."""

    name: str
    version: str
    shots: int
    lengths: str  # the range that the model chooses from, if any


@dataclass(frozen=True)
class Column:
    """A metric of a task, and the filter of the answers, by lm-eval's names."""

    task: Task
    metric: str
    filter: str


@dataclass(frozen=True)
class Score:
    """A value, its standard error, the number of items measured, the number of all items, and the file."""

    value: float
    error: float | None
    items: int | None
    of: int | None
    path: str

    def is_same(self, other: "Score") -> bool:
        both_nan = math.isnan(self.value) and math.isnan(other.value)
        return self.items == other.items and (both_nan or math.isclose(self.value, other.value, rel_tol=SAME))


@dataclass(frozen=True)
class Timing:
    """The cost of a task in a run, from `BatchedLM`: tokens without the prompt, passes summed over rows."""

    run: Run
    task: Task
    kind: str
    batch: str
    device: str
    requests: int
    passes: int
    tokens_per_second: float
    tokens_per_forward: float


def run_of(result: Mapping[str, Any]) -> Run:
    """The model and the settings other than the defaults that a result of lm-eval was made with."""
    config = result["config"]
    arguments = _model_args(config.get("model_args"))
    model = str(config.get("model"))
    defaults = DEFAULTS.get(model, {})
    settings = {
        name: value
        for name, value in arguments.items()
        if name not in NEUTRAL and value != "None" and (name not in defaults or _parsed(value) != defaults[name])
    }
    template = result.get("chat_template_sha")
    for name, value in (
        ("gen_kwargs", config.get("gen_kwargs")),
        ("system_instruction", result.get("system_instruction")),
        ("chat_template", template and template[:8]),
    ):
        if value:
            settings[name] = plain(value)
    shown = " ".join(f"{name}={value}" for name, value in sorted(settings.items()))
    return Run(model, arguments.get("pretrained", ""), shown)


def _model_args(given: str | Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the arguments, which lm-eval stores as a string or as a dict."""
    if isinstance(given, str):
        given = dict(pair.partition("=")[::2] for pair in given.split(",") if pair)
    return {name.strip(): plain(value).strip() for name, value in (given or {}).items()}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def gather_scores(results: Iterable[Mapping[str, Any]]) -> dict[Run, dict[Column, Score]]:
    """Gathers the scores of lm-eval's results by run; a run may be spread over several files.

    Raises:
        ValueError: two files have different values for the same run, task and metric.
    """
    table: dict[Run, dict[Column, Score]] = {}
    for result in results:
        run = run_of(result)
        line = table.setdefault(run, {})
        for task, metrics in result["results"].items():
            for key, value in metrics.items():
                metric, comma, filtered = key.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                column = Column(_task(result, task), metric, filtered)
                error = metrics.get(f"{metric}_stderr,{filtered}")
                samples = result.get("n-samples", {}).get(task, {})
                items = metrics.get("sample_count", {}).get(key, samples.get("effective", metrics.get("sample_len")))
                score = Score(
                    float(value) if is_number(value) else math.nan,
                    error if is_number(error) else None,
                    items,
                    samples.get("original"),
                    result["path"],
                )
                before = line.setdefault(column, score)
                if not before.is_same(score):
                    raise ValueError(
                        f"{before.path} and {score.path} have different {metric} of {task} for the run {run}: "
                        f"{before.value} ({before.items} items) and {score.value} ({score.items} items). Keep only "
                        "one of them in the folder"
                    )
    return table


def _task(result: Mapping[str, Any], name: str) -> Task:
    return Task(
        name,
        plain(result.get("versions", {}).get(name, "")),
        result.get("n-shot", {}).get(name) or 0,
        plain(result["configs"].get(name, {}).get("lengths", "")),
    )


def gather_timings(results: Iterable[Mapping[str, Any]]) -> list[Timing]:
    """The cost of each task in each run of this package's models.

    Raises:
        ValueError: an entry lacks a figure.
    """
    timings = []
    for result in results:
        config = result["config"]
        for task, spent in config.get("speed", {}).items():
            missing = {"requests", "passes", "tokens_per_second", "tokens_per_forward"} - set(spent)
            if missing:
                raise ValueError(f"{result['path']}: the speed of {task} lacks {', '.join(sorted(missing))}")
            timings.append(
                Timing(
                    run_of(result),
                    _task(result, task),
                    result["configs"].get(task, {}).get("output_type", ABSENT),
                    plain(config.get("batch_size")),
                    device_of(result),
                    spent["requests"],
                    spent["passes"],
                    spent["tokens_per_second"],
                    spent["tokens_per_forward"],
                )
            )
    return timings


def device_of(result: Mapping[str, Any]) -> str:
    if "kind" in result:
        return plain(result.get("device") or "unknown")
    place, environment = plain(result["config"].get("device") or "unknown"), result.get("pretty_env_info") or ""
    names = re.findall(r"GPU \d+: *(.+)", environment)
    if place.startswith("cpu"):
        names = re.findall(r"^Model name: *(.+)", environment, re.MULTILINE)
    return f"{place} ({', '.join(dict.fromkeys(name.strip() for name in names))})" if names else place


def facts_of(result: Mapping[str, Any]) -> dict[str, str]:
    """Date, versions, commit, device and seeds of a result, as far as it has them."""
    config = result.get("config", {})
    if "kind" in result:
        commit, seed, seeds = result.get("git_commit"), config.get("seed"), ""
        facts = {"date": result.get("date"), **result.get("versions", {})}
    else:
        environment, began = result.get("pretty_env_info") or "", result.get("date")
        facts = {
            "date": datetime.fromtimestamp(began, UTC).date().isoformat() if is_number(began) else began,
            "lm_eval": result.get("lm_eval_version"),
            "transformers": result.get("transformers_version"),
        }
        for name, pattern in (("torch", r"PyTorch version: *(\S+)"), ("python", r"Python version: *(\d[\d.]*)")):
            found = re.search(pattern, environment)
            facts[name] = found and found.group(1)
        facts["dtype"] = config.get("model_dtype")
        commit = result.get("git_hash")
        seed = config.get("settings", {}).get("seed", _model_args(config.get("model_args")).get("seed"))
        names = {"random": "random_seed", "numpy": "numpy_seed", "torch": "torch_seed", "few-shot": "fewshot_seed"}
        seeds = ", ".join(f"{name} {config[key]}" for name, key in names.items() if config.get(key) is not None)
    # `git describe` shortens it and may put a tag before it
    facts["git commit"] = re.sub(r"^.*-g(?=[0-9a-f]+$)", "", commit)[:7] if commit else "unknown"
    facts |= {"device": device_of(result), "seed": seed, "seeds of lm-eval": seeds or None}
    return {name: plain(value) for name, value in facts.items() if value is not None}


def differing_settings(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are not the same in all files of a kind."""
    names = dict.fromkeys(name for result in files for name in result.get("config", {}))
    return [name for name in names if len({plain(result.get("config", {}).get(name)) for result in files}) > 1]


def unit(column: Column) -> str:
    return f"{column.metric} %" if SCALES.get(column.metric) == 100 else column.metric
