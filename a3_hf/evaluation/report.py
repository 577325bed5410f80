"""Results in a folder as one page: tables, plots, and the paper's numbers beside ours."""

import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .calibration import plot_reliability
from .published import JUDGE_STEPS, JUDGED, RESULTS, SOURCE, SUSPECT, published_scores
from .results import read_results

# What a model takes where `--model_args` says nothing; a run is told by what differs.
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
# Arguments of a model that say where and how it computes, not what it answers.
NEUTRAL = ("pretrained", "batch_size", "max_batch_size", "device", "parallelize", "trust_remote_code")
# What a metric is multiplied by, and then shown to one decimal, as in the paper. Other metrics are shown as they are.
SCALES = {
    **dict.fromkeys(("acc", "acc_norm", "exact_match", "alias_match", "em", "f1", "qa_f1_score", "pass@1"), 100),
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), 1),
}
TITLES = {
    "ppl": "Rolling perplexity",
    "judge": "Texts under a judge",
    "needle": "Needle in long texts",
    "calibration": "Calibration",
    "speed": "More of speed",
}
# What a row of a kind needs, as a finite number, to be in its plot.
DRAWN = {
    "ppl": ("nats_per_token",),
    "judge": ("judge_perplexity",),
    "needle": ("length", "depth", "accuracy"),
    "calibration": ("above", "up_to", "count"),
}
MARKERS = "osD^vPX"
LEGEND_WIDTH = 100
ABSENT = "–"
SAME = 1e-5  # relative: batches of other sizes round differently


@dataclass(frozen=True)
class Run:
    """What is compared: a model and its settings, whatever the batch and the device."""

    model: str
    pretrained: str
    settings: str

    def __str__(self):
        return " ".join(filter(None, (self.model, self.pretrained, self.settings)))


@dataclass(frozen=True)
class Task:
    """What is asked: a task of lm-eval, and what makes it another one."""

    name: str
    version: str
    shots: int
    lengths: str  # those that the model chooses from, where the task lets it


@dataclass(frozen=True)
class Column:
    """What is measured: a metric of a task, and the filter that answers went through, as lm-eval names them."""

    task: Task
    metric: str
    filter: str


@dataclass(frozen=True)
class Score:
    """A value with its standard error, over how many items of how many, and the file that it stands in."""

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
    """What a run spent on a task, as `BatchedLM` tells it: tokens without the prompt, passes summed over rows."""

    run: Run
    task: Task
    kind: str
    batch: str
    device: str
    requests: int
    passes: int
    tokens_per_second: float
    tokens_per_forward: float


@dataclass(frozen=True)
class Plot:
    """A picture of the report: its file, what it shows, and what draws it to a path."""

    name: str
    title: str
    draw: Callable[[Path], None]


def write_report(folder: Path, output: Path | None = None, *, plots: bool = True) -> Path:
    """Reads all results under a folder and writes `report.md`, and PNG plots that it shows.

    Args:
        folder: what lm-eval wrote to its `--output_path`, and files of `write_result`, in any folders below.
        output: where the report goes; the same folder by default.
        plots: False writes the tables alone, and does not need matplotlib.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: no results, a file that can't be read or lacks what belongs there, two values for one score, an
            `output` that is a file, no matplotlib. Nothing has been written then.
    """
    if plots and find_spec("matplotlib") is None:
        raise ValueError("plots are drawn with matplotlib: pip install 'a3-hf[plot]', or ask for no plots")
    results = read_results(folder)
    output = folder if output is None else output
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r} is a file; it takes a folder")
    from_tasks = [result for result in results if "kind" not in result]
    measured = defaultdict(list)
    for result in results:
        if "kind" in result:
            measured[str(result["kind"])].append(result)
    scores, timings = gather_scores(from_tasks), gather_timings(from_tasks)
    numbers = {run: number for number, run in enumerate(scores, start=1)}
    sections = ["# Results", _head(results)]
    drawn: list[Plot] = []

    def add(title: str, text: str, of_section: list[Plot]) -> None:
        shown = of_section if plots else []
        drawn.extend(shown)
        sections.extend([f"## {title}", text, *(f"{plot.title}:\n\n![{plot.title}]({plot.name})" for plot in shown)])

    if scores:
        add("Scores", _score_section(from_tasks, scores, numbers), [])
    if timings:
        add("Speed", _speed_section(timings, numbers), _plots_of_scores(from_tasks, scores, timings, numbers))
    # the known kinds in their own order, then the others
    for kind in dict.fromkeys(kind for kind in (*TITLES, *measured) if kind in measured):
        files = measured[kind]
        add(TITLES.get(kind, kind), _measured_section(kind, files), _plots_of_kind(kind, files))
    add("Files", _files_section(results, numbers), [])

    output.mkdir(parents=True, exist_ok=True)
    for plot in drawn:
        plot.draw(output / plot.name)
    path = output / "report.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


# What the files say


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
            settings[name] = _plain(value)
    told = " ".join(f"{name}={value}" for name, value in sorted(settings.items()))
    return Run(model, arguments.get("pretrained", ""), told)


def _model_args(given: str | Mapping[str, Any] | None) -> dict[str, str]:
    """lm-eval keeps them as they were given: as a string, or as a dict."""
    if isinstance(given, str):
        given = dict(pair.partition("=")[::2] for pair in given.split(",") if pair)
    return {name.strip(): _plain(value).strip() for name, value in (given or {}).items()}


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def gather_scores(results: Iterable[Mapping[str, Any]]) -> dict[Run, dict[Column, Score]]:
    """The scores of lm-eval's results, those of the same run in one line whatever their files.

    Raises:
        ValueError: two files tell different values for the same run, task and metric.
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
                    float(value) if _is_number(value) else math.nan,
                    error if _is_number(error) else None,
                    items,
                    samples.get("original"),
                    result["path"],
                )
                before = line.setdefault(column, score)
                if not before.is_same(score):
                    raise ValueError(
                        f"{before.path} and {score.path} tell different {metric} of {task} for the run "
                        f"{run}: {before.value} ({before.items} items) and {score.value} "
                        f"({score.items} items); leave one of them in the folder"
                    )
    return table


def _task(result: Mapping[str, Any], name: str) -> Task:
    return Task(
        name,
        _plain(result.get("versions", {}).get(name, "")),
        result.get("n-shot", {}).get(name) or 0,
        _plain(result["configs"].get(name, {}).get("lengths", "")),
    )


def gather_timings(results: Iterable[Mapping[str, Any]]) -> list[Timing]:
    """What each run spent on each task; models other than ours don't tell.

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
                    _plain(config.get("batch_size")),
                    _device(result),
                    spent["requests"],
                    spent["passes"],
                    spent["tokens_per_second"],
                    spent["tokens_per_forward"],
                )
            )
    return timings


def _device(result: Mapping[str, Any]) -> str:
    if "kind" in result:
        return _plain(result.get("device") or "unknown")
    place, environment = _plain(result["config"].get("device") or "unknown"), result.get("pretty_env_info") or ""
    names = re.findall(r"GPU \d+: *(.+)", environment)
    if place.startswith("cpu"):
        names = re.findall(r"^Model name: *(.+)", environment, re.MULTILINE)
    return f"{place} ({', '.join(dict.fromkeys(name.strip() for name in names))})" if names else place


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    """Date, versions, commit, device and seeds of a result, as far as it tells them."""
    config = result.get("config", {})
    if "kind" in result:
        commit, seeds = result.get("git_commit"), ""
        facts = {"date": result.get("date"), **result.get("versions", {})}
        seed = config.get("seed")
    else:
        environment = result.get("pretty_env_info") or ""
        found = {
            name: re.search(pattern, environment)
            for name, pattern in (("torch", r"PyTorch version: *(\S+)"), ("python", r"Python version: *(\d[\d.]*)"))
        }
        began = result.get("date")
        facts = {
            "date": datetime.fromtimestamp(began, UTC).date().isoformat() if _is_number(began) else began,
            "lm_eval": result.get("lm_eval_version"),
            "transformers": result.get("transformers_version"),
            **{name: match and match.group(1) for name, match in found.items()},
            "dtype": config.get("model_dtype"),
        }
        commit = result.get("git_hash")
        seed = config.get("settings", {}).get("seed", _model_args(config.get("model_args")).get("seed"))
        names = {"random": "random_seed", "numpy": "numpy_seed", "torch": "torch_seed", "few-shot": "fewshot_seed"}
        seeds = ", ".join(f"{name} {config[key]}" for name, key in names.items() if config.get(key) is not None)
    # `git describe` may put a tag before it, and shortens it
    facts["git commit"] = re.sub(r"^.*-g(?=[0-9a-f]+$)", "", commit)[:7] if commit else "unknown"
    facts["device"] = _device(result)
    facts["seed"] = seed
    facts["seeds of lm-eval"] = seeds or None
    return {name: _plain(value) for name, value in facts.items() if value is not None}


def _differing(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that are not the same in all files of a kind."""
    names = dict.fromkeys(name for result in files for name in result.get("config", {}))
    return [name for name in names if len({_plain(result.get("config", {}).get(name)) for result in files}) > 1]


# Tables


def _table(headings: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(_shown(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    heading = "| " + " | ".join(heading.replace("|", "\\|") for heading in headings) + " |"
    return "\n".join([heading, "|" + "---|" * len(headings), *map(line, lines)])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) if value is not None else "None"


def _shown(value: Any) -> str:
    """A cell: numbers to four digits."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value) if isinstance(value, float) else _plain(value)


def _head(results: Sequence[Mapping[str, Any]]) -> str:
    told: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for result in results:
        for name, value in _facts(result).items():
            told[name][value] += 1
    lines = []
    for name, counts in told.items():
        every = list(counts.values()) == [len(results)]
        values = (value if every else f"{value} ({count} of {len(results)} files)" for value, count in counts.items())
        lines.append((name, "; ".join(values)))
    return _table(("", "in the files"), lines)


def _names(tasks: Iterable[Task]) -> dict[Task, str]:
    """Each task's name, with what tells it from others of the name."""
    names = {}
    tasks = list(dict.fromkeys(tasks))
    for task in tasks:
        akin = [other for other in tasks if other.name == task.name]
        words = [task.name]
        if len({other.version for other in akin}) > 1:
            words.append(f"version {task.version}")
        if len({other.lengths for other in akin}) > 1:
            words.append(f"lengths {task.lengths}")
        if len({other.shots for other in akin}) > 1 or task.shots:
            words.append(f"{task.shots}-shot")
        names[task] = " ".join(words)
    return names


def _headings(scores: Mapping[Run, Mapping[Column, Score]]) -> dict[Column, str]:
    """Each column's name, with the items where all runs had the same."""
    columns = list(dict.fromkeys(column for line in scores.values() for column in line))
    names = _names(column.task for column in columns)
    headings = {}
    for column in columns:
        words = [names[column.task], _unit(column)]
        if any(other.filter != column.filter and replace(other, filter=column.filter) == column for other in columns):
            words.append(column.filter)
        counts = _counts(column, scores)
        headings[column] = " ".join(words) + (f" ({_items(*counts.pop())})" if len(counts) == 1 else "")
    return headings


def _unit(column: Column) -> str:
    return f"{column.metric} %" if SCALES.get(column.metric) == 100 else column.metric


def _counts(column: Column, scores: Mapping[Run, Mapping[Column, Score]]) -> set[tuple[int | None, int | None]]:
    return {(line[column].items, line[column].of) for line in scores.values() if column in line}


def _items(items: int | None, of: int | None) -> str:
    return f"{_shown(items)} items" if of in (None, items) else f"{_shown(items)} of {of} items"


def _scaled(column: Column, value: float) -> str:
    scale = SCALES.get(column.metric)
    return _shown(value) if scale is None else f"{scale * value:.1f}"


def _score_section(
    results: Sequence[Mapping[str, Any]],
    scores: Mapping[Run, Mapping[Column, Score]],
    numbers: Mapping[Run, int],
) -> str:
    headings = _headings(scores)
    parameters = {run_of(result): result["config"].get("model_num_parameters") for result in results}

    def cell(column: Column, score: Score | None) -> str:
        if score is None:
            return ABSENT
        text = _scaled(column, score.value)
        if score.error is not None and not math.isnan(score.error):
            text += f" ± {_scaled(column, score.error)}"
        return text if len(_counts(column, scores)) == 1 else f"{text} ({_items(score.items, score.of)})"

    lines = [
        (
            numbers[run],
            run.model,
            run.pretrained,
            run.settings,
            _millions(parameters[run]),
            *(cell(column, line.get(column)) for column in headings),
        )
        for run, line in scores.items()
    ]
    published = {column: published_scores(column.task.name, column.metric) for column in headings}
    for model in RESULTS if any(published.values()) else ():
        marked = f"{model} (paper{', suspect' if model in SUSPECT else ''})"
        figures = (f"{values[model]:.1f}" if values else None for values in published.values())
        lines.append(("", marked, "", "", "", *figures))
    settings = "; ".join(
        f"`{model}`: {', '.join(f'{name}={value}' for name, value in defaults.items())}"
        for model, defaults in DEFAULTS.items()
    )
    text = [
        _table(("run", "model", "pretrained", "settings", "parameters", *headings.values()), lines),
        f"± is the standard error. Settings are those other than the defaults ({settings}).",
    ]
    lower = sorted(
        {
            f"{metric} of {task}"
            for result in results
            for task, metrics in result.get("higher_is_better", {}).items()
            for metric, higher in metrics.items()
            if higher is False and any((column.task.name, column.metric) == (task, metric) for column in headings)
        }
    )
    if lower:
        text.append(f"Lower is better: {', '.join(lower)}.")
    cut = [
        f"{task}: {count} (run {numbers[run_of(result)]})"
        for result in results
        for task, count in result["config"].get("truncated", {}).items()
    ]
    if cut:
        text.append(f"Requests that were cut to the model's context: {', '.join(cut)}.")
    if any(published.values()):
        text.append(
            f"Lines marked (paper) are the paper's own figures ({SOURCE}), at other sizes and on the items that it took; they "
            "were not run here. Suspect among them:\n\n"
            + "\n".join(f"- {what}: {why}." for what, why in SUSPECT.items())
        )
    return "\n\n".join(text)


def _millions(parameters: int | None) -> str:
    if not parameters or parameters < 0:
        return ABSENT
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def _speed_section(timings: Sequence[Timing], numbers: Mapping[Run, int]) -> str:
    headings = ["run", "settings", "task", "type", "requests", "tokens/s", "passes per request", "tokens per forward"]
    names = _names(timing.task for timing in timings)
    places = {(timing.batch, timing.device) for timing in timings}
    lines = []
    for timing in timings:
        figures = (
            timing.tokens_per_second,
            timing.passes / timing.requests if timing.requests else None,
            timing.tokens_per_forward,
        )
        about = (f"{numbers[timing.run]} {timing.run.model}", timing.run.settings, names[timing.task], timing.kind)
        place = (timing.batch, timing.device) if len(places) > 1 else ()
        lines.append((*about, timing.requests, *figures, *place))
    note = "Tokens are those scored or written, without the prompt."
    if len(places) > 1:
        headings += ["batch", "device"]
    else:
        note += " Batch {}, device {}.".format(*places.pop())
    return f"{_table(headings, lines)}\n\n{note}"


def _measured_section(kind: str, files: Sequence[Mapping[str, Any]]) -> str:
    differing = _differing(files)
    names = dict.fromkeys(name for result in files for row in result["rows"] for name in row)
    same = _told({name: value for name, value in files[0].get("config", {}).items() if name not in differing})
    text = [f"Settings: {same}."] if same else []
    several = len(files) > 1
    if several:
        own = (_told({name: result.get("config", {}).get(name) for name in differing}) for result in files)
        listed = enumerate(zip(files, own, strict=True), start=1)
        text.append("\n".join(f"- file {number}, `{result['path']}`: {told}" for number, (result, told) in listed))
    lines = [
        (*([number] if several else []), *(row.get(name) for name in names))
        for number, result in enumerate(files, start=1)
        for row in result["rows"]
    ]
    text.append(_table((*(["file"] if several else []), *names), lines))
    if kind == "judge":
        lines = [(f"{model} (paper)", criterion, *values) for (model, criterion), values in JUDGED.items()]
        text.append(f"The paper's own ({SOURCE}), on The Pile under Llama-3.1-8B, at other sizes and lengths:")
        text.append(_table(("model", "criterion", *(f"perplexity, {steps} steps" for steps in JUDGE_STEPS)), lines))
    return "\n\n".join(text)


def _told(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={_plain(value)}`" for name, value in settings.items() if value is not None)


def _files_section(results: Sequence[Mapping[str, Any]], numbers: Mapping[Run, int]) -> str:
    lines = []
    for result in results:
        facts = _facts(result)
        is_kind = "kind" in result
        what = result["kind"] if is_kind else ", ".join(result["results"])
        run = None if is_kind else numbers[run_of(result)]
        lines.append(
            (f"`{result['path']}`", run, what, *(facts.get(name) for name in ("date", "git commit", "device")))
        )
    return _table(("file", "run", "what", "date", "git commit", "device"), lines)


# Plots. matplotlib is an extra, imported only where something is drawn.


def _plots_of_scores(
    results: Sequence[Mapping[str, Any]],
    scores: Mapping[Run, Mapping[Column, Score]],
    timings: Sequence[Timing],
    numbers: Mapping[Run, int],
) -> list[Plot]:
    """Quality against speed, for each task in which texts are written: by the first metric that the task has."""
    plots = []
    names = _names(timing.task for timing in timings)
    for task in dict.fromkeys(timing.task for timing in timings if timing.kind == "generate_until"):
        column = next((column for line in scores.values() for column in line if column.task == task), None)
        points = [
            (timing, scores[timing.run][column])
            for timing in timings
            if timing.task == task and column in scores[timing.run] and timing.tokens_per_second > 0
        ]
        points = [(timing, score) for timing, score in points if math.isfinite(score.value)]
        if points:
            title = f"{names[task]}: quality against speed"
            lower = any(r.get("higher_is_better", {}).get(task.name, {}).get(column.metric) is False for r in results)
            draw = partial(_draw_quality, title, points, numbers, column, lower_is_better=lower)
            plots.append(Plot(_file_name(f"quality_{names[task]}"), title, draw))
    return plots


def _plots_of_kind(kind: str, files: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One for all files of perplexities, one for each file of the other kinds; none where no row has what is drawn."""
    if kind not in DRAWN:
        return []
    drawable = []
    for result, label in zip(files, _labels(files), strict=True):
        rows = [row for row in result["rows"] if _can_draw(kind, row)]
        if rows and (kind != "calibration" or "expected_calibration_error" in rows[-1]):
            drawable.append((label, rows))
    if kind == "ppl":
        return [Plot("ppl.png", "Losses per order", partial(_draw_losses, drawable))] if drawable else []
    draw = {"judge": _draw_judge, "needle": _draw_needle, "calibration": plot_reliability}[kind]
    return [
        Plot(f"{kind}{f'_{number}' if len(drawable) > 1 else ''}.png", label, partial(draw, rows))
        for number, (label, rows) in enumerate(drawable, start=1)
    ]


def _can_draw(kind: str, row: Mapping[str, Any]) -> bool:
    return all(_is_number(row.get(name)) and math.isfinite(row[name]) for name in DRAWN[kind])


def _labels(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells each file of a kind from the others, in a few words: the model, and settings that its rows don't tell."""
    differing = _differing(files)
    labels = []
    for result in files:
        config, in_rows = result.get("config", {}), {name for row in result["rows"] for name in row}
        words = [str(config["model"])] if "model" in config and ("model" in differing or not differing) else []
        for name in differing:
            value = config.get(name)
            if name != "model" and name not in in_rows and value is not None and not isinstance(value, list | dict):
                words.append(f"{name}={value}")
        labels.append(", ".join(words) or result["path"])
    return labels


def _file_name(title: str) -> str:
    return re.sub(r"[^\w.-]+", "_", title) + ".png"


def _draw_quality(
    title: str,
    points: Sequence[tuple[Timing, Score]],
    numbers: Mapping[Run, int],
    column: Column,
    path: Path,
    *,
    lower_is_better: bool,
) -> None:
    """A point with its standard error for each run, by its number, and for each device and batch a line through the runs
    that no other beats in both.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    times = SCALES.get(column.metric, 1)
    speeds = [timing.tokens_per_second for timing, _ in points]
    values = [times * score.value for _, score in points]
    models = list(dict.fromkeys((timing.run.model, timing.run.pretrained) for timing, _ in points))
    devices = list(dict.fromkeys((timing.device, timing.batch) for timing, _ in points))
    handles = [Line2D([], [], color="silver", label="not beaten in both")]
    for number, model in enumerate(models):
        handles.append(_entry(" ".join(filter(None, model)), color=f"C{number % 10}", marker="o"))
        own = dict.fromkeys(timing.run for timing, _ in points if (timing.run.model, timing.run.pretrained) == model)
        handles += [_entry(f"   {numbers[run]}  {run.settings or 'defaults'}") for run in own]
    for number, (device, batch) in enumerate(devices):
        marker = MARKERS[number % len(MARKERS)]
        handles.append(_entry(f"{device}, batch {batch}", color="grey", marker=marker))
    lines = sum(handle.get_label().count("\n") + 1 for handle in handles)
    figure = Figure(figsize=(8, 4.8 + 0.19 * lines), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _make_log(axes, "x", speeds)
    axes.margins(y=0.15)
    for device in devices:
        own = [i for i, (timing, _) in enumerate(points) if (timing.device, timing.batch) == device]
        best = unbeaten([speeds[i] for i in own], [-values[i] if lower_is_better else values[i] for i in own])
        axes.plot([speeds[own[i]] for i in best], [values[own[i]] for i in best], color="silver", zorder=1)
    for i, (timing, score) in enumerate(points):
        if score.error is not None and math.isfinite(score.error):
            axes.errorbar(speeds[i], values[i], times * score.error, color="gainsboro", zorder=0)
        color = f"C{models.index((timing.run.model, timing.run.pretrained)) % 10}"
        marker = MARKERS[devices.index((timing.device, timing.batch)) % len(MARKERS)]
        axes.plot(speeds[i], values[i], marker, color=color, zorder=2)
    axes.set_title(title)
    axes.set_xlabel("tokens per second, without the prompt")
    better = "; lower is better" if lower_is_better else ""
    axes.set_ylabel(_unit(column) + better)
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
    figure.draw_without_rendering()
    _put_labels(axes, list(zip(speeds, values, strict=True)), [str(numbers[timing.run]) for timing, _ in points])
    figure.savefig(path)


def _entry(label: str, **style: Any):
    """A line of a legend: a marker, or none."""
    from matplotlib.lines import Line2D

    label = textwrap.fill(label, LEGEND_WIDTH, subsequent_indent="        ", drop_whitespace=False)
    return Line2D([], [], linestyle="none", label=label, **style)


def _make_log(axes, name: str, values: Sequence[float]) -> None:
    """A logarithmic axis, "x" or "y", around values, wide enough to have a tick at 1, 2 or 5 of some power."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{name}scale": "log", f"{name}lim": (min(values) / 1.6, max(values) * 1.6)})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def unbeaten(speeds: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices, by rising speed, of the points than which no other is better in one and at least as good in the other.

    Example:
        >>> unbeaten([1.0, 2.0, 4.0], [5.0, 3.0, 4.0])
        [0, 2]
    """
    kept: list[int] = []
    for i in sorted(range(len(speeds)), key=lambda i: (-speeds[i], -qualities[i])):
        if not kept or qualities[i] > qualities[kept[-1]]:
            kept.append(i)
    return kept[::-1]


def _put_labels(axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Writes each text beside its point, at the nearest place that no point and no other text has taken."""
    scale = axes.figure.dpi / 72
    taken = [tuple(axes.transData.transform(point)) for point in points]
    # each ring turned a little, so that no leader runs through a text of the ring within
    places = [
        (distance * math.cos(angle), distance * math.sin(angle))
        for distance, turn in ((10, 0), (22, 12), (36, 24), (50, 36))
        for angle in (math.radians(degrees + turn) for degrees in (45, 135, 315, 225, 0, 180, 90, 270))
    ]
    for (x, y), point, text in zip(taken[: len(points)], points, texts, strict=True):
        for dx, dy in places:
            spot = (x + dx * scale, y + dy * scale)
            if all(math.dist(spot, other) > 13 * scale for other in taken if other != (x, y)):
                break
        taken.append(spot)
        axes.annotate(
            text,
            point,
            (dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5} if math.hypot(dx, dy) > 12 else None,
        )


def _draw_losses(files: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """A dot for each measurement, orders below each other; hollow where it is the mean of orders, not of likelihoods."""
    from matplotlib.figure import Figure

    lengths = {row.get("max_length") for _, rows in files for row in rows}
    orders: dict[str, None] = {}
    series: defaultdict[str, list[tuple[str, float, float | None]]] = defaultdict(list)
    for label, rows in files:
        for row in rows:
            order = str(row.get("order")).replace("_", " ")
            if row.get("group_size", 1) != 1:
                order += f", groups of {row['group_size']}"
            averaged = None
            if row.get("num_orders", 1) != 1:
                order += f", {row['num_orders']} orders"
                averaged = row.get("nats_per_token_mean_of_orders")
            orders[order] = None
            parts = [label if len(files) > 1 else "", row.get("model", "")]
            parts += [f"{row['max_length']} tokens"] if len(lengths) > 1 and row.get("max_length") else []
            series[", ".join(filter(None, parts)) or label].append((order, row["nats_per_token"], averaged))
    rows_of = {order: place for place, order in enumerate(reversed(orders))}
    figure = Figure(figsize=(8, 1.8 + 0.45 * len(orders) + 0.22 * len(series)), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, dots) in enumerate(series.items()):
        # beside each other within a line, so that equal values are seen
        shift = (0.5 - (number + 0.5) / len(series)) * 0.5
        style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)], "linestyle": "none"}
        xs, ys = [value for _, value, _ in dots], [rows_of[order] + shift for order, _, _ in dots]
        axes.plot(xs, ys, label=textwrap.fill(name, LEGEND_WIDTH), **style)
        hollow = [(mean, y) for (_, _, mean), y in zip(dots, ys, strict=True) if _is_number(mean)]
        if hollow:
            axes.plot(*zip(*hollow, strict=True), fillstyle="none", **style)
    if any(_is_number(mean) for dots in series.values() for _, _, mean in dots):
        axes.plot([], [], "o", color="grey", fillstyle="none", label="mean of the orders' own losses")
    axes.set_yticks(list(rows_of.values()), list(rows_of))
    axes.set_ylim(-0.5, len(rows_of) - 0.5)
    axes.grid(axis="x", color="lightgrey", linewidth=0.5)
    axes.set_title("Losses per order")
    axes.set_xlabel("nats per token")
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_judge(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line for each criterion over the steps; the texts' own perplexity as a level."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    lines: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        name = " ".join(filter(None, (row.get("strategy"), row.get("criterion"))))
        if row.get("steps") is None:
            axes.axhline(row["judge_perplexity"], color="grey", linestyle=":", label=name)
        else:
            lines[name].append((row["steps"], row["judge_perplexity"]))
    for name, dots in lines.items():
        axes.plot(*zip(*sorted(dots), strict=True), marker="o", markersize=4, label=name)
    steps = sorted({step for dots in lines.values() for step, _ in dots})
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    _make_log(axes, "y", [row["judge_perplexity"] for row in rows])
    axes.set_xlabel("steps")
    axes.set_ylabel("perplexity under the judge")
    axes.legend()
    figure.savefig(path, dpi=120)


def _draw_needle(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A field for each length and depth, its share of right answers written in it."""
    from matplotlib.figure import Figure

    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})
    found = {(row["depth"], row["length"]): row["accuracy"] for row in rows}
    field = [[found.get((depth, length), math.nan) for length in lengths] for depth in depths]
    figure = Figure(figsize=(2.5 + 0.8 * len(lengths), 2 + 0.5 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(field, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(field):
        for x, share in enumerate(line):
            if math.isfinite(share):
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="black" if share > 0.6 else "white")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth (1: before the question)")
    chance = {row.get("choices") for row in rows}
    bar = figure.colorbar(image, label="accuracy")
    if len(chance) == 1 and None not in chance:
        bar.ax.axhline(1 / chance.pop(), color="red")
        bar.set_label("accuracy (red: by chance)")
    figure.savefig(path, dpi=120)
