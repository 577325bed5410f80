"""Figures of experiments' results; their common parts are in `evaluation.reporting.plots`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from a3_hf.evaluation.reporting.markdown import is_number
from a3_hf.evaluation.reporting.plots import (
    MARKERS,
    add_legend,
    clean,
    legend_entry,
    make_figure,
    make_log,
    palette,
    put_labels,
    shorten_numbers,
    unbeaten,
)

from .comparison import Variant, check_columns, decimals_for, group_cells, mean_and_spread, values_by_seed

LABELS = {
    "tokens": "tokens trained on",
    "train_seconds": "training, seconds",
    "tokens_per_forward": "tokens per forward pass",
    "coherence": "coherence, fraction of words in the word list",
    "diversity": "diversity, different words / words",
    "exact_match": "exact match, fraction",
}
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
KIND_STYLES = {"textual": "-", "generation": "--"}
Result = Mapping[str, Any]
Point = tuple[float, float]


def axis_label(measure: str) -> str:
    """The measure in words, with its unit where its name implies it.

    Example:
        >>> axis_label("nll_left_to_right")
        'nll left to right, nats per token'
    """
    if measure in LABELS:
        return LABELS[measure]
    words = measure.replace("_", " ")
    if ("nll" in measure or "loss" in measure) and "per_" not in measure and "bits" not in measure:
        return f"{words}, nats per token"
    return f"{words}, F × 100" if "rouge" in measure else words


class Look:
    """Names, colours and styles by which a figure distinguishes variants.

    Args:
        variants: those in the figure.
        styles: line styles or markers, one for each combination of axes.
        panels: an axis with a panel for each of its values, which names and styles leave out.

    Attributes:
        names: the arm of each variant, with the axes that are not the same everywhere.
        colors: a colour for each arm.
        styles: a style for each variant.

    Raises:
        ValueError: more arms than colours, more combinations of axes than styles.
    """

    def __init__(self, variants: Iterable[Variant], styles: Sequence[Any] = STYLES, *, panels: str | None = None):
        variants = list(variants)
        axes = dict.fromkeys(name for variant in variants for name, _ in variant.axes)
        differing = [name for name in axes if len({dict(variant.axes).get(name) for variant in variants}) > 1]
        kept = {variant: tuple(axis for axis in variant.axes if axis[0] != panels) for variant in variants}
        self.names = {
            variant: ", ".join(
                filter(None, [variant.arm, *(f"{name} {value}" for name, value in own if name in differing)])
            )
            for variant, own in kept.items()
        }
        arms = dict.fromkeys(variant.arm for variant in variants)
        self.colors = dict(zip(arms, palette(len(arms)), strict=True))
        combinations = list(dict.fromkeys(kept.values()))
        if len(combinations) > len(styles):
            raise ValueError(
                f"the result has {len(combinations)} combinations of axes in one panel: expected at most {len(styles)}. "
                "Draw a part of it, or set panels to an axis"
            )
        self.styles = {variant: styles[combinations.index(own)] for variant, own in kept.items()}


def draw_bars(result: Result, measure: str, path: str | Path) -> None:
    """Draws a bar for each arm and axes other than the seed, up to the mean over seeds, with the mean and the standard
    deviation at its end; a dot for each seed.

    Raises:
        ValueError: no cells, two for one seed, a measure that is a number nowhere.
    """
    check_columns(result, [measure])
    groups = {variant: list(values_by_seed(cells, measure).values()) for variant, cells in group_cells(result).items()}
    groups = {variant: values for variant, values in groups.items() if values}
    decimals = decimals_for(value for values in groups.values() for value in values)
    look = Look(groups, range(len(groups)))
    figure, panels = make_figure(size=(8, 1.2 + 0.4 * len(groups)))
    axes = panels[""]
    for place, (variant, values) in enumerate(groups.items()):
        color = look.colors[variant.arm]
        axes.barh(place, fmean(values), height=0.7, color=color, alpha=0.5)
        if len(values) > 1:
            # below each other, so that equal values are visible
            ys = [place + 0.4 * (number / (len(values) - 1) - 0.5) for number in range(len(values))]
            axes.plot(values, ys, "o", color=color, markersize=3.5)
        text, end = mean_and_spread(values, decimals), max(*values, 0)
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), look.names.values())
    axes.invert_yaxis()
    axes.margins(x=0.25)  # for the numbers at the ends
    axes.set_xlabel(axis_label(measure))
    clean(axes, grid="x")
    figure.savefig(path)


def draw_curves(result: Result, measure: str, path: str | Path, *, panels: str | None = None) -> None:
    """Draws a loss over the tokens trained on: a colour for each arm, a line style for each combination of the other axes,
    thin for a seed, thick for the mean of the seeds at the tokens where all of them were measured.

    Args:
        measure: key of the entries of `curve`, e.g. "eval_loss_scattered_1". Cells without it have no line.
        panels: an axis with a panel for each of its values; None: one panel.

    Raises:
        ValueError: no cells, two for one seed, no entry of any curve with the measure, an axis that does not exist, more
            combinations of axes than line styles.
    """
    groups = group_cells(result)
    curves: dict[Variant, list[list[Point]]] = {}
    for variant, cells in groups.items():
        lines = [
            [(entry["tokens"], entry[measure]) for entry in cell.get("curve", ()) if is_number(entry.get(measure))]
            for cell in cells
        ]
        if any(lines):
            curves[variant] = [line for line in lines if line]
    if not curves:
        entries = (entry for cells in groups.values() for cell in cells for entry in cell.get("curve", ()))
        known = dict.fromkeys(name for entry in entries for name in entry if name != "tokens")
        raise ValueError(
            f"measure={measure!r} is in no curve of the result: expected one of {', '.join(known) or 'none'}"
        )
    look = Look(curves, panels=panels)
    figure, spots = _panels(curves, panels)
    for axes, own in spots:
        for variant in own:
            lines = curves[variant]
            style = {"color": look.colors[variant.arm], "linestyle": look.styles[variant]}
            if len(lines) > 1:
                for line in lines:
                    axes.plot(*zip(*line, strict=True), **style, linewidth=0.6, alpha=0.6)
            at = sorted(set.intersection(*({tokens for tokens, _ in line} for line in lines)))
            mean = [fmean(dict(line)[tokens] for line in lines) for tokens in at]
            axes.plot(at, mean, **style, linewidth=2, label=look.names[variant])
        axes.set_xlabel(LABELS["tokens"])
        shorten_numbers(axes)
        clean(axes, grid="both")
    spots[0][0].set_ylabel(axis_label(measure))
    add_legend(figure, [axes for axes, _ in spots])
    figure.savefig(path)


def draw_frontier(
    result: Result,
    of: str,
    x: str,
    y: str,
    path: str | Path,
    *,
    label: str | None = None,
    better: Literal["lower", "higher"] | None = None,
    panels: str | None = None,
) -> None:
    """Draws two figures of a measure that is a list of dicts against each other, a colour for each arm; means over seeds, the
    seeds themselves as small dots.

    Without `label`, points of an arm and axes are joined in order of temperature, from the lowest, which is hollow. With it,
    points are numbered, their names are in the legend, and a line joins those that no other point of the same arm and axes
    beats in both; a greater x is better, and the axis of x is logarithmic where all are above 0.

    Args:
        of: the measure, e.g. "samples" or "decoding".
        x, y: keys of its dicts.
        label: the key that names a point, e.g. "strategy"; None: temperature.
        better: with `label`, whether a lower or a higher y is better.
        panels: an axis with a panel for each of its values; None: one panel.

    Raises:
        ValueError: no cells, two for one seed, a measure that is not a list of dicts with these keys, `label` without
            `better` or the reverse, an axis that does not exist, too many combinations of axes.
    """
    if (label is None) != (better is None) or better not in (None, "lower", "higher"):
        raise ValueError(
            f"label={label!r} and better={better!r}: expected better='lower' or 'higher' with a label, and neither without"
        )
    points = _points(result, of, label or "temperature", x, y)
    if label is None:
        points = {variant: dict(sorted(own.items())) for variant, own in points.items()}
    look = Look(points, panels=panels)
    numbers = dict.fromkeys(name for own in points.values() for name in own) if label is not None else {}
    numbers = {name: number for number, name in enumerate(numbers, start=1)}
    figure, spots = _panels(points, panels)
    labelled: list[tuple[Any, list[Point], list[str]]] = []
    all_xs = [a for own in points.values() for seeds in own.values() for a, _ in seeds]
    for axes, variants in spots:
        means: list[Point] = []
        for variant in variants:
            style = {"color": look.colors[variant.arm], "linestyle": look.styles[variant], "label": look.names[variant]}
            means += _draw_front(axes, list(points[variant].values()), style, better)
        axes.margins(0.1)
        axes.set_xlabel(axis_label(x))
        clean(axes, grid="both")
        if label is not None:
            labelled.append((axes, means, [str(numbers[name]) for variant in variants for name in points[variant]]))
            if min(all_xs) > 0:
                make_log(axes, "x", all_xs)
    spots[0][0].set_ylabel(axis_label(y) + (f"; {better} is better" if better else ""))
    notes = [f"{number}  {name}" for name, number in numbers.items()]
    if label is None:
        ends = {(min(own), max(own)) for own in points.values()}
        has_one = len(ends) == 1
        notes = ["temperature: {} (hollow) to {}".format(*ends.pop()) if has_one else "hollow: the lowest temperature"]
    add_legend(figure, [axes for axes, _ in spots], notes=notes)
    for one in labelled:
        put_labels(*one)
    figure.savefig(path)


def _draw_front(axes, points: Sequence[Sequence[Point]], style: Mapping[str, Any], better: str | None) -> list[Point]:
    """Draws the points of a variant, each a list with one for each seed, and the line that joins them; returns their means."""
    color = style["color"]
    for seeds in points:
        if len(seeds) > 1:
            axes.plot(*zip(*seeds, strict=True), ".", color=color, markersize=3, alpha=0.5)
    xs, ys = ([fmean(point[i] for point in seeds) for seeds in points] for i in (0, 1))
    best = range(len(xs)) if better is None else unbeaten(xs, [-b if better == "lower" else b for b in ys])
    axes.plot([xs[i] for i in best], [ys[i] for i in best], **style, linewidth=1.5, zorder=1)
    if better is None:
        axes.plot(xs[0], ys[0], "o", color=color, markerfacecolor="white", markersize=5, zorder=3)
    axes.plot(xs, ys, "o", color=color, markersize=5, zorder=2)
    return list(zip(xs, ys, strict=True))


def draw_scatter(result: Result, x_measure: str, y_measure: str, path: str | Path) -> None:
    """Draws a point for each cell that has both measures, a colour for each arm and a marker for each combination of the other
    axes; large and hollow: the mean of the seeds.

    Raises:
        ValueError: no cells, two for one seed, a measure that is a number nowhere, no cell with both, too many combinations of
            axes.
    """
    check_columns(result, [x_measure, y_measure])
    points: dict[Variant, list[Point]] = {}
    for variant, cells in group_cells(result).items():
        xs, ys = (values_by_seed(cells, measure) for measure in (x_measure, y_measure))
        both = [(xs[seed], ys[seed]) for seed in xs if seed in ys]
        if both:
            points[variant] = both
    if not points:
        raise ValueError(f"x_measure={x_measure!r} and y_measure={y_measure!r} are in no cell together")
    look = Look(points, MARKERS)
    figure, panels = make_figure()
    axes = panels[""]
    for variant, own in points.items():
        style = {"color": look.colors[variant.arm], "marker": look.styles[variant], "linestyle": "none"}
        size = 4 if len(own) > 1 else 8
        axes.plot(*zip(*own, strict=True), **style, markersize=size, label=look.names[variant])
        if len(own) > 1:
            mean = ([fmean(point[i] for point in own)] for i in (0, 1))
            axes.plot(*mean, **style, markersize=11, fillstyle="none")
    axes.margins(0.1)
    axes.set_xlabel(axis_label(x_measure))
    axes.set_ylabel(axis_label(y_measure))
    clean(axes, grid="both")
    add_legend(figure, [axes])
    figure.savefig(path)


def draw_attention(result: Result, path: str | Path) -> None:
    """Draws the measure `attention`: its mass at a distance over the mass of an even spread over all visible tokens, averaged
    over layers, then over seeds. A panel for each combination of axes other than the seed, a colour for each arm and stream;
    solid by distance in the text, dashed by distance in the order of generation.

    Raises:
        ValueError: no cells, two for one seed, no cell with the measure.
    """
    ratios = {variant: _attention_ratios(cells) for variant, cells in group_cells(result).items()}
    ratios = {variant: lines for variant, lines in ratios.items() if lines}
    if not ratios:
        raise ValueError("attention is in no cell of the result")
    streams = dict.fromkeys((variant.arm, stream) for variant, lines in ratios.items() for stream, _ in lines)
    colors = dict(zip(streams, palette(len(streams)), strict=True))
    values = [value for lines in ratios.values() for line in lines.values() for value in line.values()]
    titles = Look([Variant("", variant.axes) for variant in ratios], range(len(ratios))).names
    figure, panels = make_figure(titles.values())
    for title, axes in panels.items():
        own = {variant: lines for variant, lines in ratios.items() if titles[Variant("", variant.axes)] == title}
        distances = sorted({distance for lines in own.values() for line in lines.values() for distance in line})
        axes.axhline(1, color="grey", linewidth=0.8)
        for variant, lines in own.items():
            for (stream, kind), line in lines.items():
                places = [distances.index(distance) for distance in sorted(line)]
                own_values = [line[distance] for distance in sorted(line)]
                style = {"color": colors[variant.arm, stream], "linestyle": KIND_STYLES[kind]}
                axes.plot(places, own_values, **style, marker="o", markersize=3)
        texts = [f"{start}" if start == end else f"{start}–{end}" for start, end in distances]
        axes.set_xticks(range(len(distances)), texts, rotation=45, ha="right")
        axes.set_xlabel("distance, tokens")
        if min(values) > 0:
            make_log(axes, "y", values)
        clean(axes, grid="y")
    next(iter(panels.values())).set_ylabel("attention mass / mass of an even spread")
    entries = [legend_entry(f"{arm}, {stream}", color=color, linestyle="-") for (arm, stream), color in colors.items()]
    entries += [
        legend_entry(f"by {kind} distance", color="grey", linestyle=style) for kind, style in KIND_STYLES.items()
    ]
    add_legend(figure, entries=entries)
    figure.savefig(path)


def _attention_ratios(cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[tuple, float]]:
    """For each stream and kind of distance, the ratio at each distance (from, to)."""
    by_seed: dict[tuple[str, str], dict[tuple, list[float]]] = {}
    for cell in cells:
        by_layer: dict[tuple[str, str], dict[tuple, list[float]]] = {}
        for row in cell["measures"].get("attention", ()):
            if row["kind"] not in KIND_STYLES:
                raise ValueError(f"attention has kind={row['kind']!r}: expected {', '.join(KIND_STYLES)}")
            if row["uniform"] > 0:
                distances = by_layer.setdefault((row["stream"], row["kind"]), {})
                distance = row["distance_from"], row["distance_to"]
                distances.setdefault(distance, []).append(row["mass"] / row["uniform"])
        for line, distances in by_layer.items():
            for distance, values in distances.items():
                by_seed.setdefault(line, {}).setdefault(distance, []).append(fmean(values))
    return {
        line: {distance: fmean(values) for distance, values in distances.items()} for line, distances in by_seed.items()
    }


def _points(result: Result, of: str, key: str, x: str, y: str) -> dict[Variant, dict[Any, list[Point]]]:
    """For each variant and each value of `key`, a point (x, y) for each seed."""
    points: dict[Variant, dict[Any, list[Point]]] = {}
    for variant, cells in group_cells(result).items():
        for cell in cells:
            entries = cell["measures"].get(of, ())
            if not isinstance(entries, Sequence):
                raise ValueError(f"of={of!r}: {entries!r} in a cell: expected a measure that is a list of dicts")
            for entry in entries:
                if key not in entry or not is_number(entry.get(x)) or not is_number(entry.get(y)):
                    raise ValueError(
                        f"of={of!r} has an entry without {key!r}, {x!r} or {y!r}; it has {', '.join(entry)}"
                    )
                points.setdefault(variant, {}).setdefault(entry[key], []).append((entry[x], entry[y]))
    if not points:
        raise ValueError(f"of={of!r} is in no cell of the result: expected a measure that is a list of dicts")
    return points


def _panels(variants: Iterable[Variant], panels: str | None) -> tuple[Any, list[tuple[Any, list[Variant]]]]:
    """A figure with a panel for each value of an axis (None: one panel); and each panel with the variants in it."""
    variants = list(variants)
    if panels is None:
        figure, spots = make_figure()
        return figure, [(spots[""], variants)]
    lacking = [variant for variant in variants if panels not in dict(variant.axes)]
    if lacking:
        raise ValueError(f"panels={panels!r} is no axis of arm {lacking[0].arm!r}; it has {dict(lacking[0].axes)}")
    values = dict.fromkeys(dict(variant.axes)[panels] for variant in variants)
    figure, spots = make_figure(f"{panels} {value}" for value in values)
    members = [[variant for variant in variants if dict(variant.axes)[panels] == value] for value in values]
    return figure, list(zip(spots.values(), members, strict=True))
