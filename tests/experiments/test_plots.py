"""Figures of experiments: the numbers that the lines, bars and points stand at, read back from matplotlib."""

import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from a3_hf.experiments.plots import axis_label, draw_attention, draw_bars, draw_curves, draw_frontier, draw_scatter


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Calls a drawing with a path behind its arguments and returns the figure, which it has written as a PNG."""
    figures, save = [], Figure.savefig

    def keep(figure, path, **settings):
        figures.append(figure)
        save(figure, path, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(function, *arguments, **settings) -> Figure:
        path = tmp_path / "figure.png"
        function(*arguments, path, **settings)
        assert path.read_bytes().startswith(b"\x89PNG")
        return figures[-1]

    return draw


def cell(arm: str, seed: int, measures: dict | None = None, *, curve=(), **axes) -> dict:
    return {"arm": arm, "axes": {"seed": seed, **axes}, "curve": list(curve), "measures": measures or {}}


def result(*cells: dict) -> dict:
    return {"experiment": "toy", "cells": list(cells)}


def curve(*losses: float) -> list[dict]:
    return [{"tokens": 100 * number, "eval_loss": loss, "other": 0} for number, loss in enumerate(losses)]


def points_of(line) -> list[tuple[float, float]]:
    return [(pytest.approx(x), pytest.approx(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def lines_with(figure: Figure, **wanted) -> list:
    """Lines of all panels whose properties are as wanted."""
    return [
        line
        for axes in figure.axes
        for line in axes.get_lines()
        if all(getattr(line, f"get_{name}")() == value for name, value in wanted.items())
    ]


def legend(figure: Figure) -> list[str]:
    (one,) = figure.legends
    return [text.get_text() for text in one.get_texts()]


def test_labels_tell_the_unit():
    assert axis_label("nll_scattered_4") == "nll scattered 4, nats per token"
    assert axis_label("eval_loss_scattered_1") == "eval loss scattered 1, nats per token"
    assert axis_label("nll_bits_per_byte") == "nll bits per byte"
    assert axis_label("rocstories_rougeL") == "rocstories rougeL, F × 100"
    assert axis_label("tokens_per_forward") == "tokens per forward pass"


def test_bars_are_means_and_dots_are_seeds(drawn):
    shown = result(
        *(cell("a", seed, {"loss": loss}, steps=steps) for seed, loss in ((1, 1.0), (2, 3.0)) for steps in (10, 20)),
        cell("b", 1, {"loss": 5.0}, steps=10),
        cell("b", 1, {"other": 5.0}, steps=20),
    )
    figure = drawn(draw_bars, shown, "loss")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [2.0, 2.0, 5.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a, steps 10", "a, steps 20", "b, steps 10"]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[1.0, 3.0]] * 2
    assert [text.get_text() for text in axes.texts] == ["2.000 ± 1.414"] * 2 + ["5.000"]
    assert axes.get_xlabel() == "loss, nats per token"


def test_axes_that_are_the_same_everywhere_are_not_named(drawn):
    figure = drawn(
        draw_bars, result(cell("a", 1, {"loss": 1.0}, steps=10), cell("b", 1, {"loss": 1.0}, steps=10)), "loss"
    )
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]


def test_curves_thin_for_a_seed_and_thick_for_their_mean(drawn):
    shown = result(
        cell("a", 1, curve=curve(4.0, 2.0, 1.0), size=1),
        cell("a", 2, curve=curve(6.0, 3.0), size=1),  # stopped earlier
        cell("a", 1, curve=curve(9.0, 8.0), size=2),
        cell("b", 1, curve=curve(5.0, 5.0), size=1),
        cell("c", 1, size=1),
    )
    figure = drawn(draw_curves, shown, "eval_loss")
    thick = lines_with(figure, linewidth=2.0)
    assert points_of(thick[0]) == [(0, 5.0), (100, 2.5)]
    assert [line.get_label() for line in thick] == legend(figure) == ["a, size 1", "a, size 2", "b, size 1"]
    assert [line.get_linestyle() for line in thick] == ["-", "--", "-"]
    assert thick[0].get_color() == thick[1].get_color() != thick[2].get_color()
    thin = lines_with(figure, linewidth=0.6)
    assert [points_of(line) for line in thin] == [[(0, 4.0), (100, 2.0), (200, 1.0)], [(0, 6.0), (100, 3.0)]]
    assert figure.axes[0].get_ylabel() == "eval loss, nats per token"

    figure = drawn(draw_curves, shown, "eval_loss", panels="size")
    assert [axes.get_title() for axes in figure.axes] == ["size 1", "size 2"]
    assert [len([line for line in axes.get_lines() if line.get_linewidth() == 2]) for axes in figure.axes] == [2, 1]
    assert legend(figure) == ["a", "b"]
    assert {line.get_linestyle() for line in lines_with(figure)} == {"-"}


def samples(*shift: float) -> dict:
    rows = [{"temperature": t, "diversity": t, "coherence": 1 - t + sum(shift)} for t in (0.8, 0.2, 0.5)]
    return {"samples": rows}


def test_frontier_in_order_of_temperature(drawn):
    shown = result(cell("a", 1, samples()), cell("a", 2, samples(0.2)), cell("b", 1, samples(0.5)), cell("c", 1))
    figure = drawn(draw_frontier, shown, "samples", "diversity", "coherence")
    joined = lines_with(figure, linestyle="-")
    assert points_of(joined[0]) == [(0.2, 0.9), (0.5, 0.6), (0.8, 0.3)]
    assert [line.get_label() for line in joined] == ["a", "b"]
    assert legend(figure) == ["a", "b", "temperature: 0.2 (hollow) to 0.8"]
    hollow = lines_with(figure, markerfacecolor="white")
    assert points_of(hollow[0]) == [(0.2, 0.9)]
    assert sum(len(line.get_xdata()) for line in lines_with(figure, marker=".")) == 6
    other = {"samples": [row for row in samples()["samples"] if row["temperature"] > 0.2]}
    figure = drawn(draw_frontier, result(*shown["cells"], cell("d", 1, other)), "samples", "diversity", "coherence")
    assert legend(figure)[-1] == "hollow: the lowest temperature"


def decoding(**points: tuple[float, float]) -> dict:
    return {"decoding": [{"strategy": name, "speed": x, "loss": y} for name, (x, y) in points.items()]}


@pytest.mark.parametrize("better, best", [("lower", ["slow", "mid", "fast"]), ("higher", ["worse", "fast"])])
def test_frontier_of_labelled_points_joins_the_unbeaten(drawn, better, best):
    points = {"slow": (1.0, 1.0), "fast": (4.0, 4.0), "worse": (1.5, 5.0), "mid": (2.0, 2.0)}
    shown = result(cell("a", 1, decoding(**points)))
    figure = drawn(draw_frontier, shown, "decoding", "speed", "loss", label="strategy", better=better)
    (axes,) = figure.axes
    (joined,) = lines_with(figure, linestyle="-")
    assert points_of(joined) == [points[name] for name in best]
    assert {text.get_text(): text.xy for text in axes.texts} == {
        str(number): pytest.approx(point) for number, point in enumerate(points.values(), start=1)
    }
    assert legend(figure) == ["a", "1  slow", "2  fast", "3  worse", "4  mid"]
    assert axes.get_ylabel() == f"loss, nats per token; {better} is better" and axes.get_xscale() == "log"


def test_labels_of_a_frontier_do_not_overlap(drawn):
    near = {f"s{number}": (1 + number / 500, 2 + number % 3 / 300) for number in range(8)}
    shown = result(cell("a", 1, decoding(**near, far=(8.0, 4.0))))
    figure = drawn(draw_frontier, shown, "decoding", "speed", "loss", label="strategy", better="lower")
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert len(boxes) == 9
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_scatter_of_one_measure_against_another(drawn):
    shown = result(
        cell("a", 1, {"x": 1.0, "y": 2.0}, size=1),
        cell("a", 2, {"y": 6.0, "x": 3.0}, size=1),
        cell("a", 1, {"x": 5.0, "y": 5.0}, size=2),
        cell("b", 1, {"x": 7.0}, size=1),
    )
    figure = drawn(draw_scatter, shown, "x", "y")
    (mean,) = lines_with(figure, fillstyle="none")
    assert points_of(mean) == [(2.0, 4.0)]
    dots = [line for line in lines_with(figure) if line is not mean]
    assert [points_of(line) for line in dots] == [[(1.0, 2.0), (3.0, 6.0)], [(5.0, 5.0)]]
    assert dots[0].get_marker() == mean.get_marker() != dots[1].get_marker()
    assert legend(figure) == ["a, size 1", "a, size 2"]


def attention(stream: str, masses: dict[tuple[str, int, int, int], float]) -> list[dict]:
    return [
        {
            "stream": stream,
            "layer": layer,
            "kind": kind,
            "distance_from": start,
            "distance_to": end,
            "mass": mass,
            "uniform": 0.1 if end < 64 else 0.0,
        }
        for (kind, layer, start, end), mass in masses.items()
    ]


def test_attention_is_mass_over_even_spread_on_average_of_layers(drawn):
    far = {("textual", 0, 64, 99): 0.0}  # nothing is so far away
    rows = attention("query", {("textual", 0, 1, 1): 0.3, ("textual", 1, 1, 1): 0.1, ("textual", 0, 2, 3): 0.1} | far)
    rows += attention("content", {("generation", 0, 2, 3): 0.2})
    shown = result(
        cell("a", 1, {"attention": rows}, block_size=64),
        cell("a", 2, {"attention": attention("query", {("textual", 0, 1, 1): 0.6})}, block_size=64),
        cell("b", 1, {"attention": attention("single", {("textual", 0, 1, 1): 0.5})}, block_size=128),
        cell("c", 1, block_size=128),
    )
    figure = drawn(draw_attention, shown)
    assert [axes.get_title() for axes in figure.axes] == ["block_size 64", "block_size 128"]
    left, right = ([line for line in axes.get_lines() if line.get_marker() == "o"] for axes in figure.axes)
    # layers 3 and 1 make 2, the second seed is 6
    assert [points_of(line) for line in left] == [[(0, 4.0), (1, 1.0)], [(1, 2.0)]]
    assert [line.get_linestyle() for line in left] == ["-", "--"]
    assert [points_of(line) for line in right] == [[(0, 5.0)]]
    assert len({to_rgba(line.get_color()) for line in (*left, *right)}) == 3
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "2–3"]
    assert legend(figure) == ["a, query", "a, content", "b, single", "by textual distance", "by generation distance"]


def test_what_is_refused(tmp_path):
    path = tmp_path / "figure.png"
    shown = result(
        cell("a", 1, {**samples(), "loss": 1.0, "x": 1.0}, curve=curve(1.0), size=1), cell("b", 1, {"y": 1.0})
    )
    with pytest.raises(ValueError, match="column 'los' is a number in no cell"):
        draw_bars(shown, "los", path)
    with pytest.raises(
        ValueError, match="measure='eval_los' is in no curve of the result: expected one of eval_loss, other"
    ):
        draw_curves(shown, "eval_los", path)
    with pytest.raises(ValueError, match="panels='length' is no axis of arm 'a'; it has {'size': '1'}"):
        draw_curves(shown, "eval_loss", path, panels="length")
    many = result(*(cell("a", 1, curve=curve(1.0), size=size) for size in range(7)))
    with pytest.raises(ValueError, match="7 combinations of axes in one panel: expected at most 6"):
        draw_curves(many, "eval_loss", path)
    with pytest.raises(ValueError, match="21 arms"):
        draw_bars(result(*(cell(f"arm {number}", 1, {"loss": 1.0}) for number in range(21))), "loss", path)
    with pytest.raises(ValueError, match="expected better='lower' or 'higher'"):
        draw_frontier(shown, "samples", "diversity", "coherence", path, label="temperature")
    with pytest.raises(ValueError, match="an entry without 'temperature', 'diversity' or 'loss'; it has temperature"):
        draw_frontier(shown, "samples", "diversity", "loss", path)
    with pytest.raises(ValueError, match="of='loss': 1.0 in a cell"):
        draw_frontier(shown, "loss", "diversity", "coherence", path)
    with pytest.raises(ValueError, match="of='decoding' is in no cell"):
        draw_frontier(shown, "decoding", "diversity", "coherence", path)
    with pytest.raises(ValueError, match="in no cell together"):
        draw_scatter(shown, "x", "y", path)
    with pytest.raises(ValueError, match="attention is in no cell"):
        draw_attention(shown, path)
    with pytest.raises(ValueError, match="kind='temporal': expected textual, generation"):
        draw_attention(result(cell("a", 1, {"attention": attention("query", {("temporal", 0, 1, 1): 1.0})})), path)
    assert not path.exists()
