"""Measurements in the terminal: progress bars, and a table of the rows of each kind."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from a3_hf.evaluation.measures.calibration import WHOLE

Row = Mapping[str, Any]
WIDTH = 160  # characters, if the output is not a terminal
# For each kind of measurement: the headings of its columns, and the keys of their values.
COLUMNS = {
    "ppl": {
        "length": "max_length",
        "model": "model",
        "order": "order",
        "group": "group_size",
        "orders": "num_orders",
        "windows": "windows",
        "nats/token": "nats_per_token",
        "mean of orders": "nats_per_token_mean_of_orders",
        "perplexity": "perplexity",
        "bits/byte": "bits_per_byte",
        "cost": "adaptation_cost",
        "tokens/s": "tokens_per_second",
    },
    "judge": {
        "strategy": "strategy",
        "criterion": "criterion",
        "steps": "steps",
        "tokens/step": "tokens_per_step",
        "perplexity": "judge_perplexity",
        "nats/token": "judge_nats_per_token",
        "unique tokens": "unique_tokens",
        "passes": "passes",
        "tokens/s": "tokens_per_second",
    },
    "calibration": {
        "confidence": "confidence",
        "tokens": "count",
        "mean confidence": "mean_confidence",
        "accuracy": "accuracy",
    },
}


def progress(items: Sequence, description: str) -> Iterable:
    """The items, with a progress bar on stderr."""
    return track(items, description, console=Console(stderr=True), transient=True)


def print_rows(kind: str, rows: Sequence[Row], *, title: str) -> None:
    """Prints the rows of a measurement as a table.

    Args:
        kind: "ppl", "judge", "needle" or "calibration".
        rows: as the measurement returns them.
    """
    if kind == "needle":
        columns, rows = _by_depth(rows)
    else:
        columns = COLUMNS[kind]
    if kind == "calibration":
        rows = [{**row, "confidence": _bin_name(row)} for row in rows]
    table = Table(title=Text(title))
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(Text(_shown(row[key])) for key in columns.values()))
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(table)


def _by_depth(rows: Sequence[Row]) -> tuple[dict[str, str], list[Row]]:
    """Columns and lines of a table with a line per length and a column per depth."""
    depths = dict.fromkeys(row["depth"] for row in rows)
    lines: dict[int, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["length"], {"length": row["length"]})
        line[f"depth {row['depth']:g}"] = f"{row['accuracy']:.2f} / {row['exact_match']:.2f}"
    headings = ("length", *(f"depth {depth:g}" for depth in depths))
    return {heading: heading for heading in headings}, list(lines.values())


def _bin_name(row: Row) -> str:
    return WHOLE if row["bin"] == WHOLE else f"{row['above']:.2f} to {row['up_to']:.2f}"


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return str(value)
