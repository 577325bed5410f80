"""Reports of experiments: a page with the tables and figures that an experiment's `report` lists."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import is_matplotlib_available

from a3_hf.settings import check_keys, nearest

from .comparison import Better, list_table, summary_table, verdict_table, verdicts
from .plots import draw_attention, draw_bars, draw_curves, draw_frontier, draw_scatter

REPORT_FILE = "report.md"
KEYS = ("columns", "lists", "better", "compare", "plots")
KINDS: dict[str, Callable[..., None]] = {
    "attention": draw_attention,
    "bars": draw_bars,
    "curves": draw_curves,
    "frontier": draw_frontier,
    "scatter": draw_scatter,
}
RULE = (
    "Differences are paired by seed. “wins” and “loses”: all seeds agree in sign, and the mean difference is more than two "
    "of its standard errors from zero; otherwise “ties”. That is a rule of thumb: by chance alone, three seeds pass it about "
    "once in five times, five seeds once in nine."
)


def check_report(report: Mapping[str, Any], arms: Collection[str]) -> None:
    """Checks an experiment's `report` before there is a result: `columns` of the table; `lists`, measures that are lists, with
    the columns of their tables; `better`, columns that are compared, with "lower" or "higher"; `compare`, pairs of `arms`;
    `plots`, mappings with a `title`, the `kind` of plot and its arguments.

    Raises:
        ValueError: an unknown key, kind or argument of a plot; a plot without title; two whose titles give one file name;
            `better` without `compare` or the reverse; a pair that is not two known arms.
    """
    check_keys("report", report, KEYS)
    for column, better in (report.get("better") or {}).items():
        if better not in ("lower", "higher"):
            raise ValueError(f"report: better.{column}={better!r}: expected 'lower' or 'higher'")
    _check_together(report.get("better"), report.get("compare"))
    for pair in report.get("compare") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"report: compare holds {pair!r}: expected pairs of arms, [of, against]")
        for arm in pair:
            if arm not in arms:
                raise ValueError(
                    f"report: compare holds the arm {arm!r}{nearest(str(arm), arms)}; expected one of {', '.join(arms)}"
                )
    files = set()
    for plot in report.get("plots") or []:
        file = _check_plot(plot)
        if file in files:
            raise ValueError(f"report: two plots would be drawn in one file, {file}; rename title={plot['title']!r}")
        files.add(file)


def _check_together(better: Better | None, compare: Sequence | None) -> None:
    if bool(better) != bool(compare):
        raise ValueError(
            f"report: better={better!r} and compare={compare!r}: expected both (columns, pairs of arms) or neither"
        )


def _check_plot(plot: Mapping[str, Any]) -> str:
    """The file of a plot."""
    kind, title = plot.get("kind"), plot.get("title")
    if kind not in KINDS:
        raise ValueError(f"report: a plot of kind {kind!r}: expected {', '.join(KINDS)}")
    if not isinstance(title, str) or not re.search(r"\w", title):
        raise ValueError(f"report: a plot with title={title!r}: expected text")
    parameters = inspect.signature(KINDS[kind]).parameters
    known = [name for name in parameters if name not in ("result", "path")]
    check_keys(f"report: the plot {title!r}", plot, ("kind", "title", *known))
    for name in known:
        if name not in plot and parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"report: the plot {title!r} lacks {name!r}, which kind {kind} needs")
    return _file_name(title)


def present(result: Mapping[str, Any], report: Mapping[str, Any], output: Path) -> Path:
    """Writes the plots (without matplotlib, none) and the page into the folder `output`; returns the page."""
    drawn = []
    if is_matplotlib_available():
        for plot in report.get("plots") or []:
            arguments = {key: value for key, value in plot.items() if key not in ("kind", "title")}
            name = _file_name(plot["title"])
            KINDS[plot["kind"]](result, path=output / name, **arguments)
            drawn.append((plot["title"], name))
    elif report.get("plots"):
        print("matplotlib is not installed, so nothing is plotted: pip install 'a3-hf[plot]'")
    page = output / REPORT_FILE
    tables = {key: report.get(key) for key in ("columns", "lists", "better", "compare")}
    write_report(result, page, drawn, **tables)
    return page


def write_report(
    result: Mapping[str, Any],
    path: str | Path,
    plots: Sequence[tuple[str, str]] = (),
    *,
    columns: Sequence[str] | None = None,
    lists: Mapping[str, Sequence[str]] | None = None,
    better: Better | None = None,
    compare: Sequence[Sequence[str]] | None = None,
) -> None:
    """Writes a result as a Markdown page: question, command, date and environment, tables, comparisons, and plots.

    Args:
        path: path of the page.
        plots: titles and names of PNG files that are in the page's folder already.
        columns: columns of the table, see `summary_table`.
        lists: measures that are lists, each with the columns of its table, see `list_table`.
        better: columns that are compared, and whether "lower" or "higher" is better.
        compare: pairs of arms, each (of, against), see `verdicts`.

    Raises:
        ValueError: the errors of `summary_table` and `verdicts`; `better` without `compare` or the reverse; a missing picture.
            Nothing is written then.
    """
    path = Path(path)
    _check_together(better, compare)
    for _, name in plots:
        if not (path.parent / name).is_file():
            raise ValueError(f"plots: no {name!r} in {str(path.parent)!r}. Draw it first")
    parts = [
        f"# {result['experiment']}",
        result["question"],
        f"```bash\n{result['command']}\n```",
        _circumstances(result),
        "## Results",
        summary_table(result, columns=columns),
        "Means over seeds ± sample standard deviations.",
    ]
    for of, keys in (lists or {}).items():
        parts += [f"## {of}", list_table(result, of, keys)]
    for number, (of, against) in enumerate(compare or []):
        rows = verdicts(result, columns=better, of=of, against=against)
        parts += [f"## {of} against {against}", *([RULE] if number == 0 else [])]
        parts.append(verdict_table(rows, of=of, against=against))
    for title, name in plots:
        parts += [f"## {title}", f"![{title}]({name})"]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _circumstances(result: Mapping[str, Any]) -> str:
    """Date, size, device, versions and commit."""
    environment = result["environment"]
    commit = environment.get("git_commit")
    facts = [
        f"{result['date']}, size {result['size']}",
        environment.get("device"),
        *(f"{name} {version}" for name, version in environment.get("versions", {}).items() if version is not None),
        commit and f"commit {commit[:7]}",
    ]
    return "; ".join(filter(None, facts)) + "."


def _file_name(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "_")) + ".png"
