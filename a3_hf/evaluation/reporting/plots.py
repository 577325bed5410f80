"""Parts that all figures share, and the figures of `a3 eval`. matplotlib is an extra, imported only to draw."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .lm_eval_results import SCALES, Column, Run, Score, Timing, unit
from .markdown import is_number

MARKERS = "osD^vPX"
LEGEND_WIDTH = 100  # characters
DPI = 120
Rows = Sequence[Mapping[str, Any]]

# Shared by all figures


def make_figure(
    titles: Iterable[str] = ("",), *, size: tuple[float, float] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A figure with a panel for each different title, at most three side by side, with one y axis; and the panels by title.

    Args:
        size: width and height in inches; None: by the number of panels.
    """
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(titles))
    width = min(len(titles), 3)
    height = math.ceil(len(titles) / width)
    size = size or (8 if width == 1 else 4.4 * width, 4.6 * height)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(height, width, sharey=True, squeeze=False).flatten()
    for axes, title in zip(panels, titles, strict=False):
        axes.set_title(title)
    for axes in panels[len(titles) :]:
        axes.remove()
    return figure, dict(zip(titles, panels, strict=False))


def clean(axes, *, grid: str) -> None:
    """Hides the upper and right spine, and draws a light grid along "x", "y" or "both"."""
    axes.grid(axis=grid, color="gainsboro", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def make_log(axes, name: str, values: Sequence[float]) -> None:
    """Makes an axis, "x" or "y", logarithmic around values, wide enough for a tick at 1, 2 or 5 times a power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{name}scale": "log", f"{name}lim": (min(values) / 1.6, max(values) * 1.6)})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def shorten_numbers(axes) -> None:
    """Writes the numbers of the x axis with a prefix, e.g. 20k."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def palette(number: int) -> list[Any]:
    """Returns `number` different colours.

    Raises:
        ValueError: more than 20.
    """
    from matplotlib import colormaps

    colors = colormaps["tab10" if number <= 10 else "tab20"].colors
    if number > len(colors):
        raise ValueError(f"the result has {number} arms: expected at most {len(colors)}, the number of colours")
    return list(colors[:number])


def legend_entry(label: str, **style: Any) -> Any:
    """An entry of a legend: a line, or a marker, or neither."""
    from matplotlib.lines import Line2D

    label = textwrap.fill(label, LEGEND_WIDTH, subsequent_indent="        ", drop_whitespace=False)
    return Line2D([], [], label=label, **({"linestyle": "none"} | style))


def add_legend(
    figure, panels: Iterable[Any] = (), *, notes: Sequence[str] = (), entries: Sequence[Any] = (), columns: int = 0
) -> None:
    """Adds a legend below the panels: entries, the labels in the panels (each once), and lines of text. The figure grows.

    Args:
        columns: number of columns of the legend; 0: as many as fit.
    """
    entries = list(entries)
    for axes in panels:
        own, labels = axes.get_legend_handles_labels()
        named = {one.get_label() for one in entries}
        entries += [one for one, label in zip(own, labels, strict=True) if label not in named]
    entries += [legend_entry(note) for note in notes]
    width, height = figure.get_size_inches()
    longest = max(len(one.get_label()) for one in entries)
    columns = columns or max(1, min(len(entries), int(width * 12 / (longest + 8))))
    lines = sum(one.get_label().count("\n") + 1 for one in entries)
    figure.set_size_inches(width, height + 0.2 * math.ceil(lines / columns))
    figure.legend(handles=entries, loc="outside lower left", ncols=columns, frameon=False, fontsize=9, handlelength=3)


def unbeaten(speeds: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices, by rising speed, of the points to which no other is superior in one and at least equal in the other.

    Example:
        >>> unbeaten([1.0, 2.0, 4.0], [5.0, 3.0, 4.0])
        [0, 2]
    """
    kept: list[int] = []
    for i in sorted(range(len(speeds)), key=lambda i: (-speeds[i], -qualities[i])):
        if not kept or qualities[i] > qualities[kept[-1]]:
            kept.append(i)
    return kept[::-1]


def put_labels(axes, points: Sequence[tuple[float, float]], texts: Sequence[str]) -> None:
    """Writes each text beside its point, at the nearest place that no point and no other text has taken. The size of the
    figure has to be final.
    """
    axes.figure.draw_without_rendering()  # determines the places of the points
    scale = axes.figure.dpi / 72
    taken = [tuple(axes.transData.transform(point)) for point in points]
    # each ring is turned a little, so that no leader line crosses a text of an inner ring
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
        arrow = {"arrowstyle": "-", "color": "grey", "linewidth": 0.5} if math.hypot(dx, dy) > 12 else None
        place = {"textcoords": "offset points", "ha": "center", "va": "center"}
        axes.annotate(text, point, (dx, dy), **place, fontsize=9, arrowprops=arrow)


# The figures of `a3 eval`


def draw_quality(
    title: str,
    points: Sequence[tuple[Timing, Score]],
    numbers: Mapping[Run, int],
    column: Column,
    path: Path,
    *,
    lower_is_better: bool,
) -> None:
    """Draws a numbered point with its standard error for each run, and for each device and batch a line through the runs
    that no other beats in both speed and quality.
    """
    times = SCALES.get(column.metric, 1)
    speeds = [timing.tokens_per_second for timing, _ in points]
    values = [times * score.value for _, score in points]
    models = [(timing.run.model, timing.run.pretrained) for timing, _ in points]
    places = [(timing.device, timing.batch) for timing, _ in points]
    colors = {model: f"C{number % 10}" for number, model in enumerate(dict.fromkeys(models))}
    markers = {place: MARKERS[number % len(MARKERS)] for number, place in enumerate(dict.fromkeys(places))}
    entries = [legend_entry("not beaten in both", color="silver", linestyle="-")]
    for model, color in colors.items():
        entries.append(legend_entry(" ".join(filter(None, model)), color=color, marker="o"))
        own = dict.fromkeys(timing.run for (timing, _), other in zip(points, models, strict=True) if other == model)
        entries += [legend_entry(f"   {numbers[run]}  {run.settings or 'defaults'}") for run in own]
    entries += [
        legend_entry(f"{device}, batch {batch}", color="grey", marker=marker)
        for (device, batch), marker in markers.items()
    ]
    figure, panels = make_figure([title], size=(8, 4.8))
    axes = panels[title]
    make_log(axes, "x", speeds)
    axes.margins(y=0.15)
    for place in markers:
        own = [i for i, other in enumerate(places) if other == place]
        best = unbeaten([speeds[i] for i in own], [-values[i] if lower_is_better else values[i] for i in own])
        axes.plot([speeds[own[i]] for i in best], [values[own[i]] for i in best], color="silver", zorder=1)
    for i, (_, score) in enumerate(points):
        if score.error is not None and math.isfinite(score.error):
            axes.errorbar(speeds[i], values[i], times * score.error, color="gainsboro", zorder=0)
        axes.plot(speeds[i], values[i], markers[places[i]], color=colors[models[i]], zorder=2)
    axes.set_xlabel("tokens per second, without the prompt")
    axes.set_ylabel(unit(column) + ("; lower is better" if lower_is_better else ""))
    add_legend(figure, entries=entries, columns=1)
    put_labels(axes, list(zip(speeds, values, strict=True)), [str(numbers[timing.run]) for timing, _ in points])
    figure.savefig(path)


def draw_losses(files: Sequence[tuple[str, Rows]], path: Path) -> None:
    """Draws a dot for each loss, orders below each other; hollow for the mean of the orders' own losses."""
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
    figure, panels = make_figure(["Losses per order"], size=(8, 1.8 + 0.45 * len(orders)))
    (axes,) = panels.values()
    for number, (name, dots) in enumerate(series.items()):
        # side by side within a line, so that equal values are visible
        shift = (0.5 - (number + 0.5) / len(series)) * 0.5
        style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)], "linestyle": "none"}
        xs, ys = [value for _, value, _ in dots], [rows_of[order] + shift for order, _, _ in dots]
        axes.plot(xs, ys, label=textwrap.fill(name, LEGEND_WIDTH), **style)
        hollow = [(mean, y) for (_, _, mean), y in zip(dots, ys, strict=True) if is_number(mean)]
        if hollow:
            axes.plot(*zip(*hollow, strict=True), fillstyle="none", **style)
    is_hollow = any(is_number(mean) for dots in series.values() for _, _, mean in dots)
    own = {"marker": "o", "color": "grey", "fillstyle": "none"}
    axes.set_yticks(list(rows_of.values()), list(rows_of))
    axes.set_ylim(-0.5, len(rows_of) - 0.5)
    clean(axes, grid="x")
    axes.set_xlabel("nats per token")
    add_legend(
        figure, [axes], columns=1, entries=[legend_entry("mean of the orders' own losses", **own)] if is_hollow else []
    )
    figure.savefig(path)


def draw_judge(rows: Rows, path: Path) -> None:
    """Draws perplexity over steps, a line for each criterion, and the perplexity of the true texts as a level."""
    figure, panels = make_figure(size=(7, 5))
    axes = panels[""]
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
    if steps:
        make_log(axes, "x", steps)
        axes.set_xticks(steps, [str(step) for step in steps])
    make_log(axes, "y", [row["judge_perplexity"] for row in rows])
    axes.set_xlabel("steps")
    axes.set_ylabel("perplexity under the judge")
    add_legend(figure, [axes])
    figure.savefig(path)


def draw_needle(rows: Rows, path: Path) -> None:
    """Draws accuracy as a field of lengths and depths, with its value in each cell."""
    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})
    found = {(row["depth"], row["length"]): row["accuracy"] for row in rows}
    field = [[found.get((depth, length), math.nan) for length in lengths] for depth in depths]
    figure, panels = make_figure(size=(2.5 + 0.8 * len(lengths), 2 + 0.5 * len(depths)))
    axes = panels[""]
    image = axes.imshow(field, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(field):
        for x, accuracy in enumerate(line):
            if math.isfinite(accuracy):
                color = "black" if accuracy > 0.6 else "white"
                axes.text(x, y, f"{accuracy:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth (1: before the question)")
    chance = {row.get("choices") for row in rows}
    bar = figure.colorbar(image, label="accuracy")
    if len(chance) == 1 and None not in chance:
        bar.ax.axhline(1 / chance.pop(), color="red")
        bar.set_label("accuracy (red: by chance)")
    figure.savefig(path)


def plot_reliability(rows: Rows, path: Path) -> None:
    """Draws the rows of `reliability`: accuracy over confidence beside the diagonal where the two agree, and below it the
    number of tokens per bin.
    """
    from matplotlib.figure import Figure

    *parts, whole = rows
    figure = Figure(figsize=(6, 7), dpi=DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [row for row in parts if row["count"]]

    def bars(axes, shown: Rows, name: str, **style: Any) -> None:
        widths = [row["up_to"] - row["above"] for row in shown]
        left, heights = ([row[key] for row in shown] for key in ("above", name))
        axes.bar(left, heights, width=widths, align="edge", edgecolor="white", **style)

    upper.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    bars(upper, filled, "accuracy", alpha=0.5)
    sure, right = ([row[name] for row in filled] for name in ("mean_confidence", "accuracy"))
    upper.plot(sure, right, marker="o", markersize=4, label="written")
    upper.set_title(
        f"{whole['count']} tokens, {whole['accuracy']:.1%} right, "
        f"expected calibration error {whole['expected_calibration_error']:.3f}"
    )
    upper.set_ylim(0, 1)
    upper.set_ylabel("accuracy")
    upper.legend()
    bars(lower, parts, "count")
    lower.set_xlim(0, 1)
    lower.set_xlabel("confidence at commit")
    lower.set_ylabel("tokens")
    figure.savefig(path)
