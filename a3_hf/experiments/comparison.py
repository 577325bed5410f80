"""Results of experiments in words: a table of means over seeds, and where one arm beats another."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from a3_hf.evaluation.reporting.lm_eval_results import is_number, plain

SEED = "seed"
MISSING = "—"
CELL_COLUMNS = ("tokens", "train_seconds", "parameters")
RULE = (
    "Differences are paired by seed. “wins” and “loses”: all seeds agree in sign, and the mean difference is more than two "
    "of its standard errors from zero; otherwise “ties”. That is a rule of thumb: by chance alone, three seeds pass it about "
    "once in five times, five seeds once in nine."
)


class Variant(NamedTuple):
    """What differs in nothing but the seed: an arm, and the other axes by name, as text."""

    arm: str
    axes: tuple[tuple[str, str], ...]


def group_cells(result: Mapping[str, Any]) -> dict[Variant, list[Mapping[str, Any]]]:
    """The cells of each variant, in order of first appearance.

    Raises:
        ValueError: a result without cells; two cells with the same arm and the same axes, seed included.
    """
    if not result.get("cells"):
        raise ValueError(f"result of experiment {result.get('experiment')!r} has no cells; it takes at least one")
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


def values_by_seed(cells: Iterable[Mapping[str, Any]], column: str) -> dict[Any, float]:
    """A column of some cells by seed, without those that lack it.

    Args:
        column: a measure, or `"tokens"`, `"train_seconds"` or `"parameters"` of the cell itself.
    """
    values = {}
    for cell in cells:
        source = cell if column in CELL_COLUMNS and column not in cell["measures"] else cell["measures"]
        if is_number(source.get(column)):
            values[cell["axes"].get(SEED)] = source[column]
    return values


def check_columns(result: Mapping[str, Any], columns: Iterable[str]) -> None:
    """Raises a ValueError for a column that is a number in no cell, and names those that there are."""
    known = scalar_columns(result)
    for column in columns:
        if column not in known and not values_by_seed(result["cells"], column):
            raise ValueError(
                f"column {column!r} is a number in no cell of the result; there are {', '.join((*known, *CELL_COLUMNS))}"
            )


def summary_table(
    result: Mapping[str, Any], *, columns: Sequence[str] | None = None, against: str | None = None
) -> str:
    """A Markdown table with a line for each arm and axes other than the seed: the mean over seeds ± the sample standard
    deviation (of a single seed: the value alone), and how many seeds there are.

    A value that is missing reads "—"; where some seeds have it, their number stands behind it. One that is not finite makes
    its cell "not finite".

    Args:
        result: of an experiment, as its JSON holds it.
        columns: measures that are numbers, or `"tokens"` (trained on), `"train_seconds"`, `"parameters"`; None: all measures.
        against: an arm; the other arms' cells tell in brackets how far their mean is above the mean of this arm with the
            same axes, over all seeds of each.

    Raises:
        ValueError: no cells, two for one seed, a column that is a number nowhere, an arm that is not there.
    """
    groups = group_cells(result)
    columns = scalar_columns(result) if columns is None else list(columns)
    check_columns(result, columns)
    if against is not None:
        check_arm(result, "against", against)
    axes = list(dict.fromkeys(name for variant in groups for name, _ in variant.axes))
    decimals = {column: decimals_for(values_by_seed(cells, column) for cells in groups.values()) for column in columns}
    lines = []
    for variant, cells in groups.items():
        line = [variant.arm, *(dict(variant.axes).get(name, MISSING) for name in axes), str(len(cells))]
        for column in columns:
            values = list(values_by_seed(cells, column).values())
            text = mean_and_spread(values, decimals[column])
            if 0 < len(values) < len(cells):
                text += f", {len(values)} of {len(cells)} seeds"
            if against not in (None, variant.arm):
                base = values_by_seed(groups.get(Variant(against, variant.axes), ()), column).values()
                if base and values and all(map(math.isfinite, (*base, *values))):
                    text += f" ({_number(fmean(values) - fmean(base), decimals[column], sign=True)})"
            line.append(text)
        lines.append(line)
    return markdown_table(["arm", *axes, "seeds", *columns], lines)


def list_table(result: Mapping[str, Any], of: str, columns: Sequence[str]) -> str:
    """A measure that is a list of dicts as a Markdown table, with a line for each entry of each arm and axes other than the
    seed: text as it stands, numbers as means over seeds.

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
            raise ValueError(f"{of} has no {column!r}; its entries have {', '.join(entries[0])}")
    numbers = {
        column: decimals_for([{0: entry[column]} for entry in entries if is_number(entry.get(column))])
        for column in columns
    }
    axes = list(dict.fromkeys(name for variant in groups for name, _ in variant.axes))
    lines = []
    for variant, lists in groups.items():
        for same in zip(*lists, strict=True):
            line = [variant.arm, *(dict(variant.axes).get(name, MISSING) for name in axes)]
            for column in columns:
                values = [entry[column] for entry in same if column in entry]
                if all(map(is_number, values)):
                    line.append(mean_and_spread(values, numbers[column]))
                else:
                    line.append(str(values[0]))
            lines.append(line)
    return markdown_table(["arm", *axes, *columns], lines)


def verdicts(
    result: Mapping[str, Any], *, columns: Mapping[str, Literal["lower", "higher"]], of: str, against: str
) -> list[dict[str, Any]]:
    """Where arm `of` wins, ties and loses against arm `against`, seed by seed: the same seed has the same data in both.

    "wins" and "loses" are said only where all seeds agree in sign and the mean difference is more than two of its standard
    errors from zero (the standard deviation of the differences over √seeds), and else "ties"; with fewer than two seeds "one
    seed", and where a value is not finite, "not finite". It is a rule of thumb, not a test: where there is no difference,
    normal noise passes it with three seeds about once in five times, with five once in nine.

    Args:
        columns: for each whether "lower" or "higher" is better.

    Returns:
        A dict for each combination of the other axes that both arms have, and each column: `axes` (as text), `column`,
        `better`, `of` and `against` (means over the seeds that both have), `difference` (the first less the second),
        `spread` (sample standard deviation of the differences per seed) and `standard_error` (both None with one seed),
        `seeds` (that both have), `unpaired` (values of seeds that only one of them has, which are left out), `verdict`. Where
        they have no seed in common, the numbers are None and the verdict is "not measured".

    Raises:
        ValueError: as `summary_table`; a direction that is neither "lower" nor "higher"; the same arm twice; two arms that
            have no axes in common.
    """
    groups = group_cells(result)
    check_columns(result, columns)
    for column, better in columns.items():
        if better not in ("lower", "higher"):
            raise ValueError(f"columns: {column!r} has {better!r}; it takes 'lower' or 'higher', whichever is better")
    check_arm(result, "of", of)
    check_arm(result, "against", against)
    if of == against:
        raise ValueError(f"of={of!r} and against={against!r} are the same arm; they take two")
    shared = [variant.axes for variant in groups if variant.arm == of and Variant(against, variant.axes) in groups]
    if not shared:
        raise ValueError(
            f"of={of!r} and against={against!r} have no cells with the same axes; there is nothing to compare"
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
            rows.append(
                {
                    "axes": dict(axes),
                    "column": column,
                    "better": better,
                    "of": fmean(ours[seed] for seed in seeds) if seeds else None,
                    "against": fmean(theirs[seed] for seed in seeds) if seeds else None,
                    "difference": fmean(differences) if seeds else None,
                    "spread": spread,
                    "standard_error": error,
                    "seeds": len(seeds),
                    "unpaired": len(ours) + len(theirs) - 2 * len(seeds),
                    "verdict": _verdict(differences, error, better),
                }
            )
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
    """What `verdicts` returns, as a Markdown table."""
    axes = list(dict.fromkeys(name for row in rows for name in row["axes"]))
    lines = []
    for row in rows:
        decimals = decimals_for([{key: row[key] for key in ("of", "against") if row[key] is not None}])
        difference = MISSING
        if row["difference"] is not None:
            difference = _number(row["difference"], decimals, sign=True)
            if row["spread"] is not None:
                difference += f" ± {_number(row['spread'], decimals)}"
        seeds = str(row["seeds"]) + (f" (and {row['unpaired']} unpaired)" if row["unpaired"] else "")
        means = [MISSING if row[key] is None else _number(row[key], decimals) for key in ("of", "against")]
        named = [row["axes"].get(name, MISSING) for name in axes]
        lines.append([*named, row["column"], row["better"], *means, difference, seeds, row["verdict"]])
    headings = [*axes, "column", "better", of, against, "difference ± spread", "seeds", f"{of} against {against}"]
    return markdown_table(headings, lines)


def write_report(
    result: Mapping[str, Any],
    path: str | Path,
    plots: Sequence[tuple[str, str]] = (),
    *,
    columns: Sequence[str] | None = None,
    lists: Mapping[str, Sequence[str]] | None = None,
    better: Mapping[str, Literal["lower", "higher"]] | None = None,
    compare: Sequence[tuple[str, str]] = (),
) -> None:
    """Writes a result as a Markdown page: the question, the command, when and where it ran, the table, who wins, and pictures.

    Args:
        path: of the page.
        plots: titles and names of PNG files that lie in the page's folder already.
        columns: of the table, as in `summary_table`.
        lists: measures that are lists, each with the columns of a table of its own, as in `list_table`.
        better: columns that are compared, and whether "lower" or "higher" is better.
        compare: pairs of arms, each (of, against), as in `verdicts`.

    Raises:
        ValueError: as `summary_table` and `verdicts`; `better` without `compare` or the reverse; a picture that is not there.
            Nothing has been written then.
    """
    path = Path(path)
    if bool(better) != bool(compare):
        raise ValueError(f"better={better!r} and compare={compare!r}; who wins takes both, columns and pairs of arms")
    for _, name in plots:
        if not (path.parent / name).is_file():
            raise ValueError(f"plots: there is no {name!r} in {str(path.parent)!r}; draw it first")
    parts = [
        f"# {result['experiment']}",
        result["question"],
        f"```bash\n{result['command']}\n```",
        _where(result),
        "## Results",
        summary_table(result, columns=columns),
        "Means over seeds ± sample standard deviations.",
    ]
    for of, keys in (lists or {}).items():
        parts += [f"## {of}", list_table(result, of, keys)]
    for number, (of, against) in enumerate(compare):
        rows = verdicts(result, columns=better, of=of, against=against)
        parts += [f"## {of} against {against}", *([RULE] if number == 0 else [])]
        parts.append(verdict_table(rows, of=of, against=against))
    for title, name in plots:
        parts += [f"## {title}", f"![{title}]({name})"]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _where(result: Mapping[str, Any]) -> str:
    environment = result["environment"]
    commit = environment.get("git_commit")
    facts = [
        f"{result['date']}, size {result['size']}",
        environment.get("device"),
        *(f"{name} {version}" for name, version in environment.get("versions", {}).items() if version is not None),
        commit and f"commit {commit[:7]}",
    ]
    return "; ".join(filter(None, facts)) + "."


def markdown_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table of texts."""
    rows = [headings, *lines]
    shown = ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([shown[0], "|" + "---|" * len(headings), *shown[1:]])


def mean_and_spread(values: Sequence[float], decimals: int) -> str:
    """E.g. "1.603 ± 0.012"; "1.603" of one value, "—" of none."""
    if not values:
        return MISSING
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = _number(fmean(values), decimals)
    return mean if len(values) == 1 else f"{mean} ± {_number(stdev(values), decimals)}"


def _number(value: float, decimals: int, *, sign: bool = False) -> str:
    return f"{value:{'+' if sign else ''},.{decimals}f}".replace("-", "−")


def decimals_for(values: Iterable[Mapping[Any, float]]) -> int:
    """So many that the largest number has four digits that count."""
    sizes = [abs(value) for one in values for value in one.values() if math.isfinite(value)]
    largest = max(sizes, default=0.0)
    return 3 if largest == 0 else max(3 - math.floor(math.log10(largest)), 0)


def check_arm(result: Mapping[str, Any], option: str, arm: str) -> None:
    """Raises a ValueError for an arm that no cell has."""
    arms = dict.fromkeys(cell["arm"] for cell in result["cells"])
    if arm not in arms:
        raise ValueError(f"{option}={arm!r} is no arm of the result; there are {', '.join(arms)}")
