"""Telling an experiment's result as its `report` says: the table, who wins, and the plots."""

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import is_matplotlib_available

from a3_hf.settings import check_keys, nearest

from .comparison import write_report
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


def check_report(report: Mapping[str, Any], arms: Collection[str]) -> None:
    """Checks what an experiment's `report` asks for of its `arms`, as far as it can be without a result: `columns` of the
    table; `lists`, measures that are lists, with the columns of their tables; `better`, columns that are compared, with
    "lower" or "higher"; `compare`, pairs of arms; `plots`, mappings with a `title`, the `kind` of plot and its arguments.

    Raises:
        ValueError: an unknown key, kind or argument of a plot; a plot without title; two whose titles give one file name;
            `better` without `compare` or the reverse; a pair that is none, or of arms that there are not.
    """
    check_keys("report", report, KEYS)
    for column, better in (report.get("better") or {}).items():
        if better not in ("lower", "higher"):
            raise ValueError(f"report: better.{column}={better!r}; it takes 'lower' or 'higher'")
    better, compare = report.get("better"), report.get("compare")
    if bool(better) != bool(compare):
        raise ValueError(
            f"report: better={better!r} and compare={compare!r}; who wins takes both, columns and pairs of arms"
        )
    for pair in compare or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"report: compare holds {pair!r}; it takes pairs of arms, [of, against]")
        for arm in pair:
            if arm not in arms:
                raise ValueError(
                    f"report: compare holds the arm {arm!r}{nearest(str(arm), arms)}; there are {', '.join(arms)}"
                )
    files = set()
    for plot in report.get("plots") or []:
        kind, title = plot.get("kind"), plot.get("title")
        if kind not in KINDS:
            raise ValueError(f"report: a plot of kind {kind!r}; it takes {', '.join(KINDS)}")
        if not isinstance(title, str) or not re.search(r"\w", title):
            raise ValueError(f"report: a plot with title={title!r}; it takes text")
        if _file_name(title) in files:
            raise ValueError(
                f"report: two plots would be drawn in one file, {_file_name(title)}; rename title={title!r}"
            )
        files.add(_file_name(title))
        parameters = inspect.signature(KINDS[kind]).parameters
        known = [name for name in parameters if name not in ("result", "path")]
        for name in plot.keys() - {"kind", "title"}:
            if name not in known:
                raise ValueError(f"report: the plot {title!r} has an unknown {name!r}; {kind} takes {', '.join(known)}")
        for name in known:
            if name not in plot and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(f"report: the plot {title!r} lacks {name!r}, which {kind} takes")


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
        print("matplotlib is not installed, so no plots: pip install 'a3-hf[plot]'")
    page = output / REPORT_FILE
    write_report(
        result,
        page,
        drawn,
        columns=report.get("columns"),
        lists=report.get("lists"),
        better=report.get("better"),
        compare=[tuple(pair) for pair in report.get("compare") or []],
    )
    return page


def _file_name(title: str) -> str:
    return re.sub(r"[^\w-]", "", title.lower().replace(" ", "_")) + ".png"
