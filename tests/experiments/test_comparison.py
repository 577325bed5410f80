"""Tables of experiments: means, spreads and verdicts against numbers worked out by hand."""

import math

import pytest

from a3_hf.evaluation.reporting.markdown import ABSENT
from a3_hf.experiments.comparison import (
    group_cells,
    list_table,
    scalar_columns,
    summary_table,
    verdict_table,
    verdicts,
)
from a3_hf.experiments.report import write_report


def cell(arm: str, seed: int | None, measures: dict, **axes) -> dict:
    axes = axes if seed is None else {"seed": seed, **axes}
    return {"arm": arm, "axes": axes, "tokens": 2500, "train_seconds": 1.5, "parameters": 7, "measures": measures}


def result(*cells: dict) -> dict:
    return {
        "experiment": "toy",
        "question": "Which is better?",
        "command": "a3 experiment toy --size smoke",
        "size": "smoke",
        "date": "2025-01-02",
        "environment": {
            "versions": {"torch": "9.9", "a3-hf": None},
            "git_commit": "0123456789",
            "device": "CPU, 1 threads",
        },
        "cells": list(cells),
    }


def losses(**arms: list[float | None]) -> dict:
    """A cell for each arm and seed, from 1, with `loss`; without it where it is None."""
    return result(
        *(
            cell(arm, seed, {} if value is None else {"loss": value})
            for arm, values in arms.items()
            for seed, value in enumerate(values, start=1)
        )
    )


def parsed(table: str) -> list[dict[str, str]]:
    headings, ruler, *lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in table.split("\n"))
    assert len(ruler[0].split("|")) == len(headings)
    return [dict(zip(headings, line, strict=True)) for line in lines]


def test_means_and_sample_standard_deviations():
    # 1, 2, 6: mean 3, deviations −2, −1, 3, so the variance is 14 / 2
    (line,) = parsed(summary_table(losses(a3=[1.0, 2.0, 6.0])))
    assert line == {"arm": "a3", "seeds": "3", "loss": f"3.000 ± {math.sqrt(7):.3f}"}


def test_one_seed_has_no_spread_and_a_missing_value_is_told():
    shown = result(cell("a", 1, {"loss": 1.5}), cell("b", 1, {"rouge": 20.0}), cell("b", 2, {"rouge": None}))
    first, second = parsed(summary_table(shown))
    assert first == {"arm": "a", "seeds": "1", "loss": "1.500", "rouge": ABSENT}
    assert second == {"arm": "b", "seeds": "2", "loss": ABSENT, "rouge": "20.00, 1 of 2 seeds"}


def test_a_line_for_each_axes_but_the_seed():
    cells = [
        cell("a", seed, {"loss": steps / 100 + seed}, steps=steps, shape={"x": 1})
        for seed in (1, 3)
        for steps in (100, 200)
    ]
    first, second = parsed(summary_table(result(*cells, cell("b", 1, {"loss": 9.0}))))[:2]
    assert (first["steps"], first["seeds"], first["shape"]) == ("100", "2", '{"x": 1}')
    assert first["loss"].startswith("3.000") and second["loss"].startswith("4.000")
    assert parsed(summary_table(result(*cells, cell("b", 1, {"loss": 9.0}))))[2]["steps"] == ABSENT


def test_columns_are_the_numbers_in_order_of_first_appearance():
    shown = result(
        cell("a", 1, {"loss": 1, "curve": [{"x": 1}], "ready": True, "name": "x"}),
        cell("b", 1, {"rouge": 2.0, "loss": 3.0}),
    )
    assert scalar_columns(shown) == ["loss", "rouge"]
    assert list(parsed(summary_table(shown))[0]) == ["arm", "seeds", "loss", "rouge"]
    chosen = parsed(summary_table(shown, columns=["rouge", "tokens", "parameters"]))
    assert chosen[1] == {"arm": "b", "seeds": "1", "rouge": "2.000", "tokens": "2,500", "parameters": "7.000"}


def test_a_column_has_as_many_decimals_in_all_lines():
    assert [line["loss"] for line in parsed(summary_table(losses(a=[0.01], b=[12.5])))] == ["0.01", "12.50"]
    assert [
        line["loss"] for line in parsed(summary_table(losses(a=[0.0]))) + parsed(summary_table(losses(a=[-0.0123])))
    ] == [
        "0.000",
        "−0.01230",
    ]


def test_what_is_not_finite_is_told():
    assert parsed(summary_table(losses(a=[1.0, math.nan])))[0]["loss"] == "not finite"
    assert parsed(summary_table(losses(a=[1.0, math.inf], b=[1.0, 1.0])))[1]["loss"] == "1.000 ± 0.000"


def test_pipes_do_not_break_the_table():
    assert "| a\\|b |" in summary_table(losses(**{"a|b": [1.0]}))


# Verdicts


def verdict(ours, theirs, better="lower") -> dict:
    (row,) = verdicts(losses(ours=ours, theirs=theirs), columns={"loss": better}, of="ours", against="theirs")
    return row


def test_paired_differences():
    row = verdict([1.0, 2.0, 3.0], [2.0, 3.5, 4.5])
    # −1, −1.5, −1.5: mean −4/3, deviations 1/3, −1/6, −1/6, so the variance is (4 + 1 + 1) / 36 / 2
    assert row["difference"] == pytest.approx(-4 / 3) and row["spread"] == pytest.approx(math.sqrt(1 / 12))
    assert row["standard_error"] == pytest.approx(1 / 6)
    assert (row["of"], row["against"], row["seeds"], row["unpaired"]) == (2.0, pytest.approx(10 / 3), 3, 0)
    assert row["verdict"] == "wins"


@pytest.mark.parametrize(
    "ours, theirs, expected",
    [
        ([1.0, 5.0, 9.0], [2.0, 6.1, 10.2], "wins"),  # seeds differ more than the arms, which pairing sees through
        ([2.0, 6.1, 10.2], [1.0, 5.0, 9.0], "loses"),
        # all of one sign, yet 5 / 4 is below 2 · 1.02: one seed has most of it
        ([1.1, 1.2, 1.2, 5.5], [1.0, 1.0, 1.0, 1.0], "ties"),
        # far from zero in standard errors, yet one seed disagrees
        ([2.0] * 9 + [0.9], [1.0] * 10, "ties"),
        ([1.0, 1.0], [1.0, 1.0], "ties"),
        ([1.0, 2.0], [1.5, 2.5], "wins"),  # no spread at all
        ([1.0], [2.0], "one seed"),
        ([1.0, math.nan], [2.0, 2.0], "not finite"),
        ([math.inf], [2.0], "not finite"),
        ([1.0, None], [None, 1.0], "not measured"),
    ],
)
def test_verdicts(ours, theirs, expected):
    assert verdict(ours, theirs)["verdict"] == expected
    opposite = {"wins": "loses", "loses": "wins"}.get(expected, expected)
    assert verdict(ours, theirs, "higher")["verdict"] == opposite
    assert verdict(theirs, ours)["verdict"] == opposite


def test_seeds_that_one_arm_lacks_are_counted():
    row = verdict([1.0, 2.0, 3.0], [2.0, 3.0, None])
    assert (row["seeds"], row["unpaired"], row["of"]) == (2, 1, 1.5)
    row = verdict([1.0, None], [None, 1.0])
    assert (row["seeds"], row["unpaired"], row["difference"], row["spread"]) == (0, 2, None, None)


def test_verdicts_for_each_of_the_other_axes():
    cells = [
        cell(arm, seed, {"loss": base + (arm == "a") * sign, "rouge": 1.0}, length=length)
        for length, base, sign in ((128, 1.0, -0.5), (1024, 2.0, 0.5))
        for arm in "ab"
        for seed in (1, 2)
    ]
    only = cell("a", 1, {"loss": 1.0}, length=4)
    rows = verdicts(result(*cells, only), columns={"loss": "lower", "rouge": "higher"}, of="a", against="b")
    assert [(row["axes"]["length"], row["column"], row["verdict"]) for row in rows] == [
        ("128", "loss", "wins"),
        ("128", "rouge", "ties"),
        ("1024", "loss", "loses"),
        ("1024", "rouge", "ties"),
    ]
    shown = parsed(verdict_table(rows, of="a", against="b"))
    assert shown[0] == {
        "length": "128",
        "column": "loss",
        "better": "lower",
        "a": "0.500",
        "b": "1.000",
        "difference ± spread": "−0.500 ± 0.000",
        "seeds": "2",
        "a against b": "wins",
    }
    unpaired = verdicts(losses(a=[1.0, None], b=[None, 1.0]), columns={"loss": "lower"}, of="a", against="b")
    (line,) = parsed(verdict_table(unpaired, of="a", against="b"))
    assert line["seeds"] == "0 (and 2 unpaired)" and line["a"] == line["difference ± spread"] == ABSENT


# The page


def test_the_report(tmp_path):
    shown = losses(a=[1.0, 1.1], b=[2.0, 2.1])
    (tmp_path / "bars.png").write_bytes(b"")
    write_report(
        shown, tmp_path / "toy.md", [("Losses", "bars.png")], better={"loss": "lower"}, compare=[("a", "b"), ("b", "a")]
    )
    page = (tmp_path / "toy.md").read_text()
    assert page.startswith(
        "# toy\n\nWhich is better?\n\n```bash\na3 experiment toy --size smoke\n```\n\n2025-01-02, size smoke; "
    )
    assert "CPU, 1 threads; torch 9.9; commit 0123456." in page
    assert summary_table(shown) in page and "![Losses](bars.png)" in page
    for of, against in ("ab", "ba"):
        assert (
            verdict_table(verdicts(shown, columns={"loss": "lower"}, of=of, against=against), of=of, against=against)
            in page
        )
    assert page.count("paired by seed") == 1


def test_what_is_refused(tmp_path):
    shown = losses(a=[1.0], b=[2.0])
    with pytest.raises(ValueError, match="'toy' has no cells"):
        group_cells(result())
    with pytest.raises(ValueError, match="two cells with arm='a'"):
        group_cells(result(cell("a", 1, {}, x=1), cell("a", 1, {}, x=1)))
    with pytest.raises(
        ValueError, match=r"column 'los' is a number in no cell of the result: expected one of loss, tokens"
    ):
        summary_table(shown, columns=["los"])
    with pytest.raises(ValueError, match="against='c': expected an arm of the result: a, b"):
        verdicts(shown, columns={"loss": "lower"}, of="a", against="c")
    with pytest.raises(ValueError, match="'loss' has 'down': expected 'lower' or 'higher'"):
        verdicts(shown, columns={"loss": "down"}, of="a", against="b")
    with pytest.raises(ValueError, match="of='c': expected an arm of the result"):
        verdicts(shown, columns={"loss": "lower"}, of="c", against="b")
    with pytest.raises(ValueError, match="the same arm"):
        verdicts(shown, columns={"loss": "lower"}, of="a", against="a")
    with pytest.raises(ValueError, match="no cells with the same axes"):
        apart = result(cell("a", 1, {"loss": 1.0}, x=1), cell("b", 1, {"loss": 1.0}, x=2))
        verdicts(apart, columns={"loss": "lower"}, of="a", against="b")
    with pytest.raises(ValueError, match="expected both"):
        write_report(shown, tmp_path / "toy.md", better={"loss": "lower"})
    with pytest.raises(ValueError, match="no 'bars.png'"):
        write_report(shown, tmp_path / "toy.md", [("Losses", "bars.png")])
    assert not (tmp_path / "toy.md").exists()


def test_a_list_is_a_table_of_its_own():
    def entries(*qualities):
        return {"way": [{"name": name, "quality": one} for name, one in zip("ab", qualities, strict=True)]}

    told = result(
        cell("a3", 1, entries(1.0, 4.0)),
        cell("a3", 2, entries(2.0, 4.0)),
        cell("ar", 1, {}),
        cell("b", 1, entries(9.0, 8.0)),
    )
    lines = parsed(list_table(told, "way", ["name", "quality"]))
    assert [list(line.values()) for line in lines] == [
        ["a3", "a", f"1.500 ± {math.sqrt(0.5):.3f}"],
        ["a3", "b", "4.000 ± 0.000"],
        ["b", "a", "9.000"],
        ["b", "b", "8.000"],
    ]
    with pytest.raises(ValueError, match="'speed': expected one of name, quality"):
        list_table(told, "way", ["speed"])
    with pytest.raises(ValueError, match="of='ways' is a list of entries in no cell"):
        list_table(told, "ways", ["name"])


def test_a_page_has_the_tables_of_lists(tmp_path):
    told = result(cell("a3", 1, {"loss": 1.0, "way": [{"name": "first", "quality": 2.0}]}))
    write_report(told, tmp_path / "report.md", lists={"way": ["name", "quality"]})
    text = (tmp_path / "report.md").read_text()
    assert "## way" in text and "| a3 | first | 2.000 |" in text
