"""Results, drawn. matplotlib is an extra, imported only where something is drawn."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .lm_eval_results import SCALES, Column, Run, Score, Timing, is_number, unit

MARKERS = "osD^vPX"
LEGEND_WIDTH = 100


def draw_quality(
    title: str,
    points: Sequence[tuple[Timing, Score]],
    numbers: Mapping[Run, int],
    column: Column,
    path: Path,
    *,
    lower_is_better: bool,
) -> None:
    """A point with its standard error for each run, by its number, and for each device and batch a line through the runs
    that no other beats in both.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    times = SCALES.get(column.metric, 1)
    speeds = [timing.tokens_per_second for timing, _ in points]
    values = [times * score.value for _, score in points]
    models = list(dict.fromkeys((timing.run.model, timing.run.pretrained) for timing, _ in points))
    devices = list(dict.fromkeys((timing.device, timing.batch) for timing, _ in points))
    handles = [Line2D([], [], color="silver", label="not beaten in both")]
    for number, model in enumerate(models):
        handles.append(_entry(" ".join(filter(None, model)), color=f"C{number % 10}", marker="o"))
        own = dict.fromkeys(timing.run for timing, _ in points if (timing.run.model, timing.run.pretrained) == model)
        handles += [_entry(f"   {numbers[run]}  {run.settings or 'defaults'}") for run in own]
    for number, (device, batch) in enumerate(devices):
        marker = MARKERS[number % len(MARKERS)]
        handles.append(_entry(f"{device}, batch {batch}", color="grey", marker=marker))
    lines = sum(handle.get_label().count("\n") + 1 for handle in handles)
    figure = Figure(figsize=(8, 4.8 + 0.19 * lines), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    make_log(axes, "x", speeds)
    axes.margins(y=0.15)
    for device in devices:
        own = [i for i, (timing, _) in enumerate(points) if (timing.device, timing.batch) == device]
        best = unbeaten([speeds[i] for i in own], [-values[i] if lower_is_better else values[i] for i in own])
        axes.plot([speeds[own[i]] for i in best], [values[own[i]] for i in best], color="silver", zorder=1)
    for i, (timing, score) in enumerate(points):
        if score.error is not None and math.isfinite(score.error):
            axes.errorbar(speeds[i], values[i], times * score.error, color="gainsboro", zorder=0)
        color = f"C{models.index((timing.run.model, timing.run.pretrained)) % 10}"
        marker = MARKERS[devices.index((timing.device, timing.batch)) % len(MARKERS)]
        axes.plot(speeds[i], values[i], marker, color=color, zorder=2)
    axes.set_title(title)
    axes.set_xlabel("tokens per second, without the prompt")
    better = "; lower is better" if lower_is_better else ""
    axes.set_ylabel(unit(column) + better)
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=9)
    figure.draw_without_rendering()
    put_labels(axes, list(zip(speeds, values, strict=True)), [str(numbers[timing.run]) for timing, _ in points])
    figure.savefig(path)


def _entry(label: str, **style: Any):
    """A line of a legend: a marker, or none."""
    from matplotlib.lines import Line2D

    label = textwrap.fill(label, LEGEND_WIDTH, subsequent_indent="        ", drop_whitespace=False)
    return Line2D([], [], linestyle="none", label=label, **style)


def make_log(axes, name: str, values: Sequence[float]) -> None:
    """A logarithmic axis, "x" or "y", around values, wide enough to have a tick at 1, 2 or 5 of some power."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{name}scale": "log", f"{name}lim": (min(values) / 1.6, max(values) * 1.6)})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_locator(NullLocator())


def unbeaten(speeds: Sequence[float], qualities: Sequence[float]) -> list[int]:
    """Indices, by rising speed, of the points than which no other is better in one and at least as good in the other.

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
    """Writes each text beside its point, at the nearest place that no point and no other text has taken."""
    scale = axes.figure.dpi / 72
    taken = [tuple(axes.transData.transform(point)) for point in points]
    # each ring turned a little, so that no leader runs through a text of the ring within
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
        axes.annotate(
            text,
            point,
            (dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5} if math.hypot(dx, dy) > 12 else None,
        )


def draw_losses(files: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """A dot for each measurement, orders below each other; hollow where it is the mean of orders, not of likelihoods."""
    from matplotlib.figure import Figure

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
    figure = Figure(figsize=(8, 1.8 + 0.45 * len(orders) + 0.22 * len(series)), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, dots) in enumerate(series.items()):
        # beside each other within a line, so that equal values are seen
        shift = (0.5 - (number + 0.5) / len(series)) * 0.5
        style = {"color": f"C{number % 10}", "marker": MARKERS[number // 10 % len(MARKERS)], "linestyle": "none"}
        xs, ys = [value for _, value, _ in dots], [rows_of[order] + shift for order, _, _ in dots]
        axes.plot(xs, ys, label=textwrap.fill(name, LEGEND_WIDTH), **style)
        hollow = [(mean, y) for (_, _, mean), y in zip(dots, ys, strict=True) if is_number(mean)]
        if hollow:
            axes.plot(*zip(*hollow, strict=True), fillstyle="none", **style)
    if any(is_number(mean) for dots in series.values() for _, _, mean in dots):
        axes.plot([], [], "o", color="grey", fillstyle="none", label="mean of the orders' own losses")
    axes.set_yticks(list(rows_of.values()), list(rows_of))
    axes.set_ylim(-0.5, len(rows_of) - 0.5)
    axes.grid(axis="x", color="lightgrey", linewidth=0.5)
    axes.set_title("Losses per order")
    axes.set_xlabel("nats per token")
    figure.legend(loc="outside lower left", frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


def draw_judge(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line for each criterion over the steps; the texts' own perplexity as a level."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
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
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    make_log(axes, "y", [row["judge_perplexity"] for row in rows])
    axes.set_xlabel("steps")
    axes.set_ylabel("perplexity under the judge")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_needle(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A field for each length and depth, its share of right answers written in it."""
    from matplotlib.figure import Figure

    lengths, depths = sorted({row["length"] for row in rows}), sorted({row["depth"] for row in rows})
    found = {(row["depth"], row["length"]): row["accuracy"] for row in rows}
    field = [[found.get((depth, length), math.nan) for length in lengths] for depth in depths]
    figure = Figure(figsize=(2.5 + 0.8 * len(lengths), 2 + 0.5 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(field, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for y, line in enumerate(field):
        for x, share in enumerate(line):
            if math.isfinite(share):
                axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="black" if share > 0.6 else "white")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
    axes.set_xlabel("length, tokens")
    axes.set_ylabel("depth (1: before the question)")
    chance = {row.get("choices") for row in rows}
    bar = figure.colorbar(image, label="accuracy")
    if len(chance) == 1 and None not in chance:
        bar.ax.axhline(1 / chance.pop(), color="red")
        bar.set_label("accuracy (red: by chance)")
    figure.savefig(path, dpi=120)
