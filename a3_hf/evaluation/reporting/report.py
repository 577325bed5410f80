"""Reports of `a3 eval`: all results in a folder as one page of tables, plots, and the paper's numbers."""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .lm_eval_results import (
    DEFAULTS,
    SCALES,
    Column,
    Run,
    Score,
    Task,
    Timing,
    differing_settings,
    facts_of,
    gather_scores,
    gather_timings,
    run_of,
    unit,
)
from .markdown import ABSENT, is_number, markdown_table, plain, shown
from .plots import draw_judge, draw_losses, draw_needle, draw_quality, plot_reliability
from .published import JUDGE_STEPS, JUDGED, RESULTS, SOURCE, SUSPECT, published_scores
from .results import read_results

TITLES = {
    "ppl": "Rolling perplexity",
    "judge": "Texts under a judge",
    "needle": "Needle in long texts",
    "calibration": "Calibration",
    "speed": "More of speed",
}
# By kind, the columns that must be finite numbers in a row for it to be plotted.
DRAWN = {
    "ppl": ("nats_per_token",),
    "judge": ("judge_perplexity",),
    "needle": ("length", "depth", "accuracy"),
    "calibration": ("above", "up_to", "count"),
}


@dataclass(frozen=True)
class Plot:
    """A plot of the report: its file, its title, and the function that draws it to a path."""

    name: str
    title: str
    draw: Callable[[Path], None]


def write_report(folder: Path, output: Path | None = None, *, plots: bool = True) -> Path:
    """Reads all results under a folder and writes `report.md` and the PNG plots in it.

    Args:
        folder: folder of lm-eval's `--output_path`, and of files of `write_result`; sub-folders are included.
        output: folder of the report; None: the same folder.
        plots: False: tables only, without matplotlib.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: no results, an unreadable or incomplete file, two values for one score, an `output` that is a file, no
            matplotlib. Nothing is written then.
    """
    if plots and find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'a3-hf[plot]', or set plots to False")
    results = read_results(folder)
    output = folder if output is None else output
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r}: expected a folder, got a file")
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


# Tables


def _head(results: Sequence[Mapping[str, Any]]) -> str:
    counts_of: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for result in results:
        for name, value in facts_of(result).items():
            counts_of[name][value] += 1
    lines = []
    for name, counts in counts_of.items():
        every = list(counts.values()) == [len(results)]
        values = (value if every else f"{value} ({count} of {len(results)} files)" for value, count in counts.items())
        lines.append((name, "; ".join(values)))
    return markdown_table(("", "in the files"), lines)


def _names(tasks: Iterable[Task]) -> dict[Task, str]:
    """Each task's name, with what distinguishes it from others of the same name."""
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
    """Each column's name, with the number of items if it is the same in all runs."""
    columns = list(dict.fromkeys(column for line in scores.values() for column in line))
    names = _names(column.task for column in columns)
    headings = {}
    for column in columns:
        words = [names[column.task], unit(column)]
        if any(other.filter != column.filter and replace(other, filter=column.filter) == column for other in columns):
            words.append(column.filter)
        counts = _counts(column, scores)
        headings[column] = " ".join(words) + (f" ({_items(*counts.pop())})" if len(counts) == 1 else "")
    return headings


def _counts(column: Column, scores: Mapping[Run, Mapping[Column, Score]]) -> set[tuple[int | None, int | None]]:
    return {(line[column].items, line[column].of) for line in scores.values() if column in line}


def _items(items: int | None, of: int | None) -> str:
    return f"{shown(items)} items" if of in (None, items) else f"{shown(items)} of {of} items"


def _scaled(column: Column, value: float) -> str:
    scale = SCALES.get(column.metric)
    return shown(value) if scale is None else f"{scale * value:.1f}"


def _score_section(
    results: Sequence[Mapping[str, Any]],
    scores: Mapping[Run, Mapping[Column, Score]],
    numbers: Mapping[Run, int],
) -> str:
    headings = _headings(scores)
    parameters = {run_of(result): result["config"].get("model_num_parameters") for result in results}
    lines = [
        (
            numbers[run],
            run.model,
            run.pretrained,
            run.settings,
            _millions(parameters[run]),
            *(_score_cell(column, line.get(column), scores) for column in headings),
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
        markdown_table(("run", "model", "pretrained", "settings", "parameters", *headings.values()), lines),
        f"± is the standard error. Settings are those other than the defaults ({settings}).",
    ]
    lower = [f"{column.metric} of {column.task.name}" for column in headings if _is_lower_better(results, column)]
    if lower:
        text.append(f"Lower is better: {', '.join(sorted(set(lower)))}.")
    truncated = [
        f"{task}: {count} (run {numbers[run_of(result)]})"
        for result in results
        for task, count in result["config"].get("truncated", {}).items()
    ]
    if truncated:
        text.append(f"Requests that were cut to the model's context: {', '.join(truncated)}.")
    if any(published.values()):
        text.append(
            f"Lines marked (paper) are the paper's own figures ({SOURCE}), at other sizes and on its own items; they were not "
            "run here. Suspect among them:\n\n" + "\n".join(f"- {what}: {why}." for what, why in SUSPECT.items())
        )
    return "\n\n".join(text)


def _score_cell(column: Column, score: Score | None, scores: Mapping[Run, Mapping[Column, Score]]) -> str:
    if score is None:
        return ABSENT
    text = _scaled(column, score.value)
    if score.error is not None and not math.isnan(score.error):
        text += f" ± {_scaled(column, score.error)}"
    return text if len(_counts(column, scores)) == 1 else f"{text} ({_items(score.items, score.of)})"


def _is_lower_better(results: Sequence[Mapping[str, Any]], column: Column) -> bool:
    return any(
        result.get("higher_is_better", {}).get(column.task.name, {}).get(column.metric) is False for result in results
    )


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
    return f"{markdown_table(headings, lines)}\n\n{note}"


def _measured_section(kind: str, files: Sequence[Mapping[str, Any]]) -> str:
    differing = differing_settings(files)
    names = dict.fromkeys(name for result in files for row in result["rows"] for name in row)
    same = _listed({name: value for name, value in files[0].get("config", {}).items() if name not in differing})
    text = [f"Settings: {same}."] if same else []
    several = len(files) > 1
    if several:
        own = (_listed({name: result.get("config", {}).get(name) for name in differing}) for result in files)
        listed = enumerate(zip(files, own, strict=True), start=1)
        text.append(
            "\n".join(
                f"- file {number}, `{result['path']}`: {own_settings}" for number, (result, own_settings) in listed
            )
        )
    lines = [
        (*([number] if several else []), *(row.get(name) for name in names))
        for number, result in enumerate(files, start=1)
        for row in result["rows"]
    ]
    text.append(markdown_table((*(["file"] if several else []), *names), lines))
    if kind == "judge":
        lines = [(f"{model} (paper)", criterion, *values) for (model, criterion), values in JUDGED.items()]
        text.append(f"The paper's own ({SOURCE}), on The Pile under Llama-3.1-8B, at other sizes and lengths:")
        text.append(
            markdown_table(("model", "criterion", *(f"perplexity, {steps} steps" for steps in JUDGE_STEPS)), lines)
        )
    return "\n\n".join(text)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={plain(value)}`" for name, value in settings.items() if value is not None)


def _files_section(results: Sequence[Mapping[str, Any]], numbers: Mapping[Run, int]) -> str:
    lines = []
    for result in results:
        facts = facts_of(result)
        is_kind = "kind" in result
        what = result["kind"] if is_kind else ", ".join(result["results"])
        run = None if is_kind else numbers[run_of(result)]
        lines.append(
            (f"`{result['path']}`", run, what, *(facts.get(name) for name in ("date", "git commit", "device")))
        )
    return markdown_table(("file", "run", "what", "date", "git commit", "device"), lines)


# Plots


def _plots_of_scores(
    results: Sequence[Mapping[str, Any]],
    scores: Mapping[Run, Mapping[Column, Score]],
    timings: Sequence[Timing],
    numbers: Mapping[Run, int],
) -> list[Plot]:
    """Quality against speed, for each task in which texts are written, by the task's first metric."""
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
            lower = _is_lower_better(results, column)
            draw = partial(draw_quality, title, points, numbers, column, lower_is_better=lower)
            plots.append(Plot(_file_name(f"quality_{names[task]}"), title, draw))
    return plots


def _plots_of_kind(kind: str, files: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """One plot for all files of perplexities, one for each file of the other kinds; none if no row can be drawn."""
    if kind not in DRAWN:
        return []
    drawable = []
    for result, label in zip(files, _labels(files), strict=True):
        rows = [row for row in result["rows"] if _can_draw(kind, row)]
        if rows and (kind != "calibration" or "expected_calibration_error" in rows[-1]):
            drawable.append((label, rows))
    if kind == "ppl":
        return [Plot("ppl.png", "Losses per order", partial(draw_losses, drawable))] if drawable else []
    draw = {"judge": draw_judge, "needle": draw_needle, "calibration": plot_reliability}[kind]
    return [
        Plot(f"{kind}{f'_{number}' if len(drawable) > 1 else ''}.png", label, partial(draw, rows))
        for number, (label, rows) in enumerate(drawable, start=1)
    ]


def _can_draw(kind: str, row: Mapping[str, Any]) -> bool:
    return all(is_number(row.get(name)) and math.isfinite(row[name]) for name in DRAWN[kind])


def _labels(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short label of each file of a kind: the model, and the settings that differ and are not in its rows."""
    differing = differing_settings(files)
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
