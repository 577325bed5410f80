"""Tables of experiments' results: means over seeds, and comparisons of arms."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from a3_hf.evaluation.reporting.markdown import ABSENT, is_number, markdown_table, plain

SEED = "seed"
CELL_COLUMNS = ("tokens", "train_seconds", "parameters")
# The measures of a column, and whether a lower or a higher value is better.
Better = Mapping[str, Literal["lower", "higher"]]


class Variant(NamedTuple):
    """Cells that differ only in the seed: an arm, and the other axes by name, as text."""

    arm: str
    axes: tuple[tuple[str, str], ...]


def group_cells(result: Mapping[str, Any]) -> dict[Variant, list[Mapping[str, Any]]]:
    """The cells of each variant, in order of first appearance.

    Raises:
        ValueError: a result without cells; two cells with the same arm and the same axes, seed included.
    """
    if not result.get("cells"):
        raise ValueError(f"result of experiment {result.get('experiment')!r} has no cells: expected at least one")
    groups: dict[Variant, dict[Any, Mapping[str, Any]]] = {}
    for cell in result["cells"]:
        others = tuple(sorted((name, plain(value)) for name, value in cell["axes"].items() if name != SEED))
        cells = groups.setdefault(Variant(cell["arm"], others), {})
        seed = cell["axes"].get(SEED)
        if seed in cells:
            raise ValueError(f"result has two cells with arm={cell['arm']!r}, axes={dict(cell['axes'])}")
        cells[seed] = cell
    return {variant: list(cells.values()) for variant, cells in groups.items()}


def scalar_columns(result: Mapping[str, Any]) -> list[str]:
    """The measures that are numbers in some cell, in order of first appearance."""
    return list(
        dict.fromkeys(name for cell in result["cells"] for name, value in cell["measures"].items() if is_number(value))
    )


def _value(cell: Mapping[str, Any], column: str) -> Any:
    return cell["measures"].get(column, cell.get(column) if column in CELL_COLUMNS else None)


def _values(result: Mapping[str, Any], column: str) -> list[float]:
    return [value for cell in result["cells"] if is_number(value := _value(cell, column))]


def values_by_seed(cells: Iterable[Mapping[str, Any]], column: str) -> dict[Any, float]:
    """A column of the cells of a variant by seed, without those that lack it.

    Args:
        column: a measure, or `"tokens"`, `"train_seconds"` or `"parameters"` of the cell itself.
    """
    return {cell["axes"].get(SEED): _value(cell, column) for cell in cells if is_number(_value(cell, column))}


def _axes_of(variants: Iterable[Variant]) -> list[str]:
    return list(dict.fromkeys(name for variant in variants for name, _ in variant.axes))


def check_columns(result: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Raises ValueError for a column that is a number in no cell; the message lists the columns that exist."""
    known = scalar_columns(result)
    for column in columns:
        if not _values(result, column):
            raise ValueError(
                f"column {column!r} is a number in no cell of the result: expected one of {', '.join((*known, *CELL_COLUMNS))}"
            )


def summary_table(result: Mapping[str, Any], *, columns: Sequence[str] | None = None) -> str:
    """A Markdown table with a line for each arm and axes other than the seed: the mean over seeds ± the sample standard
    deviation (of a single seed: the value alone), and the number of seeds. A missing value is "–"; if only some seeds have it,
    their number follows. A value that is not finite makes its cell "not finite".

    Args:
        result: an experiment's result, as in its JSON.
        columns: measures that are numbers, or `"tokens"` (trained on), `"train_seconds"`, `"parameters"`; None: all measures.

    Raises:
        ValueError: no cells, two for one seed, a column that is a number nowhere.
    """
    groups = group_cells(result)
    columns = scalar_columns(result) if columns is None else list(columns)
    check_columns(result, columns)
    axes = _axes_of(groups)
    decimals = {column: decimals_for(_values(result, column)) for column in columns}
    lines = []
    for variant, cells in groups.items():
        line = [variant.arm, *map(dict(variant.axes).get, axes), len(cells)]
        for column in columns:
            values = list(values_by_seed(cells, column).values())
            text = mean_and_spread(values, decimals[column])
            line.append(f"{text}, {len(values)} of {len(cells)} seeds" if 0 < len(values) < len(cells) else text)
        lines.append(line)
    return markdown_table(["arm", *axes, "seeds", *columns], lines)


def list_table(result: Mapping[str, Any], of: str, columns: Sequence[str]) -> str:
    """A Markdown table of a measure that is a list of dicts, with a line for each entry of each arm and axes other than the
    seed: text unchanged, numbers as means over seeds.

    Args:
        of: the measure; its lists are of one length for all seeds.
        columns: keys of the dicts.

    Raises:
        ValueError: a measure that is a list nowhere, or a key that no entry has.
    """
    groups = {
        variant: [cell["measures"][of] for cell in cells if isinstance(cell["measures"].get(of), list)]
        for variant, cells in group_cells(result).items()
    }
    groups = {variant: lists for variant, lists in groups.items() if lists}
    entries = [entry for lists in groups.values() for entries in lists for entry in entries]
    if not entries:
        raise ValueError(f"of={of!r} is a list of entries in no cell of the result")
    for column in columns:
        if not any(column in entry for entry in entries):
            raise ValueError(f"{of} has no {column!r}: expected one of {', '.join(entries[0])}")
    numbers = {
        column: decimals_for(entry[column] for entry in entries if is_number(entry.get(column))) for column in columns
    }
    axes = _axes_of(groups)
    lines = []
    for variant, lists in groups.items():
        for same in zip(*lists, strict=True):
            line = [variant.arm, *map(dict(variant.axes).get, axes)]
            for column in columns:
                values = [entry[column] for entry in same if column in entry]
                is_mean = all(map(is_number, values))
                line.append(mean_and_spread(values, numbers[column]) if is_mean else str(values[0]))
            lines.append(line)
    return markdown_table(["arm", *axes, *columns], lines)


def verdicts(result: Mapping[str, Any], *, columns: Better, of: str, against: str) -> list[dict[str, Any]]:
    """Compares arm `of` with arm `against`, seed by seed: the same seed has the same data in both.

    The verdict is "wins" or "loses" if all seeds agree in sign and the mean difference is more than two of its standard
    errors from zero (the standard deviation of the differences over √seeds), else "ties"; with one seed "one seed", and if a
    value is not finite "not finite". It is a rule of thumb, not a test: without a difference, normal noise passes it with
    three seeds about once in five times, with five once in nine.

    Args:
        columns: whether "lower" or "higher" is better for each.

    Returns:
        A dict for each combination of the other axes that both arms have, and each column: `axes` (as text), `column`,
        `better`, `of` and `against` (means over the seeds that both have), `difference` (the first less the second),
        `spread` (sample standard deviation of the differences per seed) and `standard_error` (both None with one seed),
        `seeds` (that both have), `unpaired` (values of seeds that only one of them has, which are ignored), `verdict`. If they
        have no seed in common, the numbers are None and the verdict is "not measured".

    Raises:
        ValueError: the errors of `summary_table`; a direction that is neither "lower" nor "higher"; the same arm twice; two
            arms that have no axes in common.
    """
    groups = group_cells(result)
    check_columns(result, columns)
    for column, better in columns.items():
        if better not in ("lower", "higher"):
            raise ValueError(f"columns: {column!r} has {better!r}: expected 'lower' or 'higher', whichever is better")
    check_arm(result, "of", of)
    check_arm(result, "against", against)
    if of == against:
        raise ValueError(f"of={of!r} and against={against!r} are the same arm: expected two")
    shared = [variant.axes for variant in groups if variant.arm == of and Variant(against, variant.axes) in groups]
    if not shared:
        raise ValueError(
            f"of={of!r} and against={against!r} have no cells with the same axes: expected at least one to compare"
        )
    rows = []
    for axes in shared:
        for column, better in columns.items():
            ours, theirs = (values_by_seed(groups[Variant(arm, axes)], column) for arm in (of, against))
            seeds = [seed for seed in ours if seed in theirs]
            differences = [ours[seed] - theirs[seed] for seed in seeds]
            several = len(seeds) > 1 and all(map(math.isfinite, differences))
            spread = stdev(differences) if several else None
            error = spread / math.sqrt(len(seeds)) if several else None
            means = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds], differences
            row = {"axes": dict(axes), "column": column, "better": better}
            row |= dict(zip(("of", "against", "difference"), map(_mean, means), strict=True))
            row |= {"spread": spread, "standard_error": error, "seeds": len(seeds)}
            row |= {"unpaired": len(ours) + len(theirs) - 2 * len(seeds)}
            rows.append({**row, "verdict": _verdict(differences, error, better)})
    return rows


def _verdict(differences: Sequence[float], standard_error: float | None, better: str) -> str:
    if not differences:
        return "not measured"
    if not all(map(math.isfinite, differences)):
        return "not finite"
    if standard_error is None:
        return "one seed"
    mean = fmean(differences)
    agree = all(one > 0 for one in differences) or all(one < 0 for one in differences)
    if not agree or abs(mean) <= 2 * standard_error:
        return "ties"
    return "wins" if (mean < 0) == (better == "lower") else "loses"


def verdict_table(rows: Sequence[Mapping[str, Any]], *, of: str, against: str) -> str:
    """A Markdown table of the rows that `verdicts` returns."""
    axes = list(dict.fromkeys(name for row in rows for name in row["axes"]))
    lines = []
    for row in rows:
        decimals = decimals_for(row[key] for key in ("of", "against") if row[key] is not None)
        difference = _number(row["difference"], decimals, sign=True)
        if row["spread"] is not None:
            difference += f" ± {_number(row['spread'], decimals)}"
        seeds = str(row["seeds"]) + (f" (and {row['unpaired']} unpaired)" if row["unpaired"] else "")
        means = [_number(row[key], decimals) for key in ("of", "against")]
        named = map(row["axes"].get, axes)
        lines.append([*named, row["column"], row["better"], *means, difference, seeds, row["verdict"]])
    headings = [*axes, "column", "better", of, against, "difference ± spread", "seeds", f"{of} against {against}"]
    return markdown_table(headings, lines)


def mean_and_spread(values: Sequence[float], decimals: int) -> str:
    """Mean ± standard deviation as text, "1.603 ± 0.012"; "1.603" for one value, "–" for none."""
    if not values:
        return ABSENT
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = _number(fmean(values), decimals)
    return mean if len(values) == 1 else f"{mean} ± {_number(stdev(values), decimals)}"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _number(value: float | None, decimals: int, *, sign: bool = False) -> str:
    return ABSENT if value is None else f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", "−")


def decimals_for(values: Iterable[float]) -> int:
    """The number of decimals that gives the largest finite number four significant digits."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 3 if largest == 0 else max(3 - math.floor(math.log10(largest)), 0)


def check_arm(result: Mapping[str, Any], option: str, arm: str) -> None:
    """Raises ValueError for an arm that no cell has."""
    arms = dict.fromkeys(cell["arm"] for cell in result["cells"])
    if arm not in arms:
        raise ValueError(f"{option}={arm!r}: expected an arm of the result: {', '.join(arms)}")
