"""Results of experiments, drawn. matplotlib is an extra, imported only where something is drawn."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from a3_hf.evaluation.reporting.lm_eval_results import is_number
from a3_hf.evaluation.reporting.plots import MARKERS, make_log, put_labels, unbeaten

from .comparison import Variant, check_columns, decimals_for, group_cells, mean_and_spread, values_by_seed

LABELS = {
    "tokens": "tokens trained on",
    "train_seconds": "training, seconds",
    "tokens_per_forward": "tokens per forward pass",
    "coherence": "coherence, share of words in the word list",
    "diversity": "diversity, different words / words",
    "exact_match": "exact match, share",
}
STYLES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
KIND_STYLES = {"textual": "-", "generation": "--"}
DPI = 120
Result = Mapping[str, Any]


def axis_label(measure: str) -> str:
    """The measure in words, with its unit where its name tells it.

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


def draw_bars(result: Result, measure: str, path: str | Path, *, label: str | None = None) -> None:
    """A bar for each arm and axes other than the seed, as long as the mean over seeds, which stands at its end beside the
    standard deviation; a dot for each seed.

    Args:
        label: of the measure's axis; None: `axis_label`.

    Raises:
        ValueError: no cells, two for one seed, a measure that is a number nowhere.
    """
    from matplotlib.figure import Figure

    check_columns(result, [measure])
    groups = {variant: list(values_by_seed(cells, measure).values()) for variant, cells in group_cells(result).items()}
    groups = {variant: values for variant, values in groups.items() if values}
    decimals = decimals_for({number: value for number, value in enumerate(values)} for values in groups.values())
    names, colors = _names(groups), _colors(groups)
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(groups)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for place, (variant, values) in enumerate(groups.items()):
        axes.barh(place, fmean(values), height=0.7, color=colors[variant.arm], alpha=0.5)
        if len(values) > 1:
            # below each other, so that equal seeds are seen
            ys = [place + 0.4 * (number / (len(values) - 1) - 0.5) for number in range(len(values))]
            axes.plot(values, ys, "o", color=colors[variant.arm], markersize=3.5)
        end = max(*values, 0)
        text = mean_and_spread(values, decimals)
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(groups)), [names[variant] for variant in groups])
    axes.invert_yaxis()
    axes.margins(x=0.25)  # for the numbers at the ends
    axes.set_xlabel(label or axis_label(measure))
    _clean(axes, grid="x")
    figure.savefig(path)


def draw_curves(
    result: Result,
    measure: str,
    path: str | Path,
    *,
    panels: str | None = None,
    label: str | None = None,
    log: bool = False,
) -> None:
    """A loss over the tokens trained on: a colour for each arm, a line style for each combination of the other axes, thin
    for a seed, thick for the mean of the seeds at the tokens where all of them were measured.

    Args:
        measure: of the entries of `curve`, e.g. "eval_loss_scattered_1". Cells without it have no line.
        panels: an axis, for each value of which there is a panel of its own; None: one panel.
        label: of the measure's axis; None: `axis_label`.
        log: a logarithmic axis of the measure, whose values are above 0.

    Raises:
        ValueError: no cells, two for one seed, no entry of any curve with the measure, an axis that is not there, more line
            styles than there are.
    """
    from matplotlib.ticker import EngFormatter

    groups = group_cells(result)
    curves: dict[Variant, list[list[tuple[float, float]]]] = {}
    for variant, cells in groups.items():
        lines = [
            [(entry["tokens"], entry[measure]) for entry in cell.get("curve", ()) if is_number(entry.get(measure))]
            for cell in cells
        ]
        if any(lines):
            curves[variant] = [line for line in lines if line]
    if not curves:
        entries = (entry for cells in groups.values() for cell in cells for entry in cell.get("curve", ()))
        there = dict.fromkeys(name for entry in entries for name in entry if name != "tokens")
        raise ValueError(f"measure={measure!r} is in no curve of the result; there are {', '.join(there) or 'none'}")
    names, colors = _names(curves, without=panels), _colors(curves)
    styles = _styles(curves, without=panels)
    figure, spots = _panels(curves, panels)
    for value, axes in spots.items():
        for variant, lines in curves.items():
            if panels is not None and dict(variant.axes).get(panels) != value:
                continue
            style = {"color": colors[variant.arm], "linestyle": styles[variant]}
            if len(lines) > 1:
                for line in lines:
                    axes.plot(*zip(*line, strict=True), **style, linewidth=0.6, alpha=0.6)
            at = sorted(set.intersection(*({tokens for tokens, _ in line} for line in lines)))
            mean = [fmean(dict(line)[tokens] for line in lines) for tokens in at]
            axes.plot(at, mean, **style, linewidth=2, label=names[variant])
        axes.set_xlabel(LABELS["tokens"])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if log:
            make_log(axes, "y", [value for lines in curves.values() for line in lines for _, value in line])
        _clean(axes, grid="both")
    next(iter(spots.values())).set_ylabel(label or axis_label(measure))
    _legend(figure, spots.values())
    figure.savefig(path)


def draw_frontier(
    result: Result,
    of: str,
    x: str,
    y: str,
    path: str | Path,
    *,
    label: str | None = None,
    order: str = "temperature",
    better: Literal["lower", "higher"] | None = None,
    panels: str | None = None,
) -> None:
    """Two figures of a measure that is a list of dicts against each other, a colour for each arm; means over seeds, the
    seeds themselves as small dots.

    Without `label`, points of an arm and axes are joined in order of `order`, from its least value, which is hollow: how one
    is traded for the other. With it, points are numbered, the names stand below, and a line joins those that no other point
    of the same arm and axes beats in both; a greater x is better, and the axis of x is logarithmic where all are above 0.

    Args:
        of: the measure, e.g. "samples" or "decoding".
        x, y: keys of its dicts.
        label: the key that names a point, e.g. "strategy"; None: points are told by `order`.
        order: the key that tells points apart and orders them where there is no `label`.
        better: with `label`, whether a lower or a higher y is better.
        panels: an axis, for each value of which there is a panel of its own; None: one panel.

    Raises:
        ValueError: no cells, two for one seed, a measure that is nowhere a list of dicts with these keys, `label` without
            `better` or the reverse, an axis that is not there, too many combinations of axes to tell apart.
    """
    if (label is None) != (better is None) or better not in (None, "lower", "higher"):
        raise ValueError(f"label={label!r} and better={better!r}; with a label it takes better='lower' or 'higher'")
    key = order if label is None else label
    points = _points(result, of, key, x, y)
    if label is None:
        points = {variant: dict(sorted(own.items())) for variant, own in points.items()}
    names, colors = _names(points, without=panels), _colors(points)
    styles = _styles(points, without=panels)
    numbers = dict.fromkeys(name for own in points.values() for name in own) if label is not None else {}
    numbers = {name: number for number, name in enumerate(numbers, start=1)}
    figure, spots = _panels(points, panels)
    labelled: dict[Any, dict[tuple[Variant, Any], tuple[float, float]]] = {}
    all_xs = [a for own in points.values() for seeds in own.values() for a, _ in seeds]
    for value, axes in spots.items():
        for variant, own in points.items():
            if panels is not None and dict(variant.axes).get(panels) != value:
                continue
            color = colors[variant.arm]
            for seeds in own.values():
                if len(seeds) > 1:
                    axes.plot(*zip(*seeds, strict=True), ".", color=color, markersize=3, alpha=0.5)
            xs, ys = ([fmean(point[i] for point in seeds) for seeds in own.values()] for i in (0, 1))
            best = range(len(xs)) if label is None else unbeaten(xs, [-b if better == "lower" else b for b in ys])
            style = {"color": color, "linestyle": styles[variant], "label": names[variant]}
            axes.plot([xs[i] for i in best], [ys[i] for i in best], **style, linewidth=1.5, zorder=1)
            if label is None:
                axes.plot(xs[0], ys[0], "o", color=color, markerfacecolor="white", markersize=5, zorder=3)
            axes.plot(xs, ys, "o", color=color, markersize=5, zorder=2)
            if label is not None:
                labelled.setdefault(axes, {}).update(
                    {(variant, name): point for name, point in zip(own, zip(xs, ys, strict=True), strict=True)}
                )
        axes.margins(0.1)
        axes.set_xlabel(axis_label(x))
        _clean(axes, grid="both")
        if label is not None and min(all_xs) > 0:
            make_log(axes, "x", all_xs)
    next(iter(spots.values())).set_ylabel(axis_label(y) + (f"; {better} is better" if better else ""))
    note = [f"{number}  {name}" for name, number in numbers.items()]
    if label is None:
        ends = {(min(own), max(own)) for own in points.values()}
        note = ["{}: {} (hollow) to {}".format(order, *ends.pop()) if len(ends) == 1 else f"hollow: the least {order}"]
    _legend(figure, spots.values(), note)
    figure.draw_without_rendering()  # where points are is known from here on
    for axes, own in labelled.items():
        put_labels(axes, list(own.values()), [str(numbers[name]) for _, name in own])
    figure.savefig(path)


def draw_scatter(result: Result, x_measure: str, y_measure: str, path: str | Path) -> None:
    """A point for each cell that has both measures, a colour for each arm and a marker for each combination of the other axes;
    large and hollow: the mean of the seeds.

    Raises:
        ValueError: no cells, two for one seed, a measure that is a number nowhere, or no cell with both; too many combinations
            of axes to tell apart.
    """
    check_columns(result, [x_measure, y_measure])
    points: dict[Variant, list[tuple[float, float]]] = {}
    for variant, cells in group_cells(result).items():
        xs, ys = (values_by_seed(cells, measure) for measure in (x_measure, y_measure))
        both = [(xs[seed], ys[seed]) for seed in xs if seed in ys]
        if both:
            points[variant] = both
    if not points:
        raise ValueError(f"x_measure={x_measure!r} and y_measure={y_measure!r} are in no cell together")
    names, colors, markers = _names(points), _colors(points), _styles(points, MARKERS)
    figure, spots = _panels(points, None)
    axes = spots[None]
    for variant, own in points.items():
        style = {"color": colors[variant.arm], "marker": markers[variant], "linestyle": "none"}
        axes.plot(*zip(*own, strict=True), **style, markersize=4 if len(own) > 1 else 8, label=names[variant])
        if len(own) > 1:
            mean = [fmean(point[i] for point in own) for i in (0, 1)]
            axes.plot(*([value] for value in mean), **style, markersize=11, fillstyle="none")
    axes.margins(0.1)
    axes.set_xlabel(axis_label(x_measure))
    axes.set_ylabel(axis_label(y_measure))
    _clean(axes, grid="both")
    _legend(figure, [axes])
    figure.savefig(path)


def draw_attention(result: Result, path: str | Path, *, of: str = "attention") -> None:
    """Attention by distance: the mass that falls on tokens at a distance against what an even spread over all visible tokens
    would put there, averaged over layers, then over seeds. A panel for each combination of axes other than the seed, a
    colour for each arm and stream; solid by distance in the text, dashed in the order of generation.

    Args:
        of: the measure, a list of dicts with `stream`, `layer`, `kind` ("textual" or "generation"), `distance_from` and
            `distance_to` (both included), `mass` and `uniform`. Where `uniform` is 0 there is nothing to see, and no point.

    Raises:
        ValueError: no cells, two for one seed, a measure that is nowhere such a list.
    """
    from matplotlib.lines import Line2D

    ratios = {variant: _attention_ratios(cells, of) for variant, cells in group_cells(result).items()}
    ratios = {variant: lines for variant, lines in ratios.items() if lines}
    if not ratios:
        raise ValueError(f"of={of!r} is in no cell of the result; it takes a list of dicts of attention by distance")
    streams = dict.fromkeys((variant.arm, stream) for variant, lines in ratios.items() for stream, _ in lines)
    colors = dict(zip(streams, _palette(len(streams)), strict=True))
    values = [value for lines in ratios.values() for line in lines.values() for value in line.values()]
    titles = _names([Variant("", variant.axes) for variant in ratios])
    figure, spots = _grid(titles.values())
    for title, axes in spots.items():
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
        _clean(axes, grid="y")
    next(iter(spots.values())).set_ylabel("attention mass / mass of an even spread")
    handles = [Line2D([], [], color=color, label=f"{arm}, {stream}") for (arm, stream), color in colors.items()]
    handles += [
        Line2D([], [], color="grey", linestyle=style, label=f"by {kind} distance")
        for kind, style in KIND_STYLES.items()
    ]
    _legend(figure, [], handles=handles)
    figure.savefig(path)


def _attention_ratios(cells: Sequence[Mapping[str, Any]], of: str) -> dict[tuple[str, str], dict[tuple, float]]:
    """For each stream and kind of distance, the ratio at each distance (from, to)."""
    by_seed: dict[tuple[str, str], dict[tuple, list[float]]] = {}
    for cell in cells:
        by_layer: dict[tuple[str, str], dict[tuple, list[float]]] = {}
        for row in cell["measures"].get(of, ()):
            if row["kind"] not in KIND_STYLES:
                raise ValueError(f"of={of!r} has kind={row['kind']!r}; it takes {', '.join(KIND_STYLES)}")
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


def _points(result: Result, of: str, key: str, x: str, y: str) -> dict[Variant, dict[Any, list[tuple[float, float]]]]:
    """For each variant and each value of `key`, a point (x, y) for each seed."""
    points: dict[Variant, dict[Any, list[tuple[float, float]]]] = {}
    for variant, cells in group_cells(result).items():
        for cell in cells:
            entries = cell["measures"].get(of, ())
            if not isinstance(entries, Sequence):
                raise ValueError(f"of={of!r} is {entries!r} in a cell; it takes a measure that is a list of dicts")
            for entry in entries:
                if key not in entry or not is_number(entry.get(x)) or not is_number(entry.get(y)):
                    raise ValueError(
                        f"of={of!r} has an entry without {key!r}, {x!r} or {y!r}; it has {', '.join(entry)}"
                    )
                points.setdefault(variant, {}).setdefault(entry[key], []).append((entry[x], entry[y]))
    if not points:
        raise ValueError(f"of={of!r} is in no cell of the result; it takes a measure that is a list of dicts")
    return points


# What the figures share


def _names(variants: Iterable[Variant], *, without: str | None = None) -> dict[Variant, str]:
    """Arms, with the axes that are not the same everywhere."""
    variants = list(variants)
    names = dict.fromkeys(name for variant in variants for name, _ in variant.axes)
    differing = [name for name in names if len({dict(variant.axes).get(name) for variant in variants}) > 1]
    return {
        variant: ", ".join(
            filter(
                None,
                [
                    variant.arm,
                    *(f"{name} {value}" for name, value in variant.axes if name in differing and name != without),
                ],
            )
        )
        for variant in variants
    }


def _colors(variants: Iterable[Variant]) -> dict[str, Any]:
    arms = dict.fromkeys(variant.arm for variant in variants)
    return dict(zip(arms, _palette(len(arms)), strict=True))


def _palette(number: int) -> list[Any]:
    from matplotlib import colormaps

    colors = colormaps["tab10" if number <= 10 else "tab20"].colors
    if number > len(colors):
        raise ValueError(f"the result has {number} arms to be told apart by colour; a figure takes {len(colors)}")
    return list(colors[:number])


def _styles(
    variants: Iterable[Variant], styles: Sequence[Any] = STYLES, *, without: str | None = None
) -> dict[Variant, Any]:
    """A style for each combination of axes."""
    variants = list(variants)
    kept = {variant: tuple(axis for axis in variant.axes if axis[0] != without) for variant in variants}
    combinations = list(dict.fromkeys(kept.values()))
    if len(combinations) > len(styles):
        raise ValueError(
            f"the result has {len(combinations)} combinations of axes in one panel; a figure tells {len(styles)} apart: draw "
            "a part of it, or give an axis panels of its own"
        )
    return {variant: styles[combinations.index(axes)] for variant, axes in kept.items()}


def _panels(variants: Iterable[Variant], panels: str | None) -> tuple[Any, dict[str | None, Any]]:
    """A figure with a panel for each value of an axis, by the value."""
    if panels is None:
        figure, spots = _grid([""])
        return figure, {None: spots[""]}
    variants = list(variants)
    lacking = [variant for variant in variants if panels not in dict(variant.axes)]
    if lacking:
        raise ValueError(f"panels={panels!r} is no axis of arm {lacking[0].arm!r}; it has {dict(lacking[0].axes)}")
    values = dict.fromkeys(dict(variant.axes)[panels] for variant in variants)
    figure, spots = _grid([f"{panels} {value}" for value in values])
    return figure, dict(zip(values, spots.values(), strict=True))


def _grid(titles: Iterable[str]) -> tuple[Any, dict[str, Any]]:
    """A figure with a panel for each different title, all with the same y axis."""
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(titles))
    width = min(len(titles), 3)
    height = math.ceil(len(titles) / width)
    figure = Figure(figsize=(8 if width == 1 else 4.4 * width, 4.6 * height), dpi=DPI, layout="constrained")
    spots = figure.subplots(height, width, sharey=True, squeeze=False).flatten()
    for axes, title in zip(spots, titles, strict=False):
        axes.set_title(title)
    for axes in spots[len(titles) :]:
        axes.remove()
    return figure, dict(zip(titles, spots, strict=False))


def _clean(axes, *, grid: str) -> None:
    axes.grid(axis=grid, color="gainsboro", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure, spots: Iterable[Any], notes: Sequence[str] = (), handles: Sequence[Any] = ()) -> None:
    """Below the panels: what has a label in them, each label once, and lines of text; the figure grows by it."""
    from matplotlib.lines import Line2D

    handles = list(handles)
    for axes in spots:
        own, labels = axes.get_legend_handles_labels()
        told = {handle.get_label() for handle in handles}
        handles += [handle for handle, label in zip(own, labels, strict=True) if label not in told]
    handles += [Line2D([], [], linestyle="none", label=note) for note in notes]
    width, height = figure.get_size_inches()
    longest = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(len(handles), int(width * 12 / (longest + 8))))
    figure.set_size_inches(width, height + 0.2 * math.ceil(len(handles) / columns))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False, fontsize=9, handlelength=3)
