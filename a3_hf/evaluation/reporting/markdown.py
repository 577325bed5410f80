"""Values as text, and Markdown tables of them."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

ABSENT = "–"


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def plain(value: Any) -> str:
    """A value of JSON as text: text unchanged, None as "None"."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) if value is not None else "None"


def shown(value: Any) -> str:
    """A cell of a table: numbers to four digits, "–" for None and empty text."""
    if value is None or value == "":
        return ABSENT
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value) if isinstance(value, float) else plain(value)


def markdown_table(headings: Sequence[str], lines: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; its cells are written by `shown`."""

    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(headings), "|" + "---|" * len(headings), *(line(map(shown, cells)) for cells in lines)])
