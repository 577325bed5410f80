"""Grids: turns an experiment's YAML into cells, each a complete recipe with its own folder."""

import inspect
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3_hf.settings import check_keys, nearest
from a3_hf.training.arguments import Recipe
from a3_hf.training.recipes import build_recipe, known_settings, read_settings

from .report import check_report

FOLDER = Path("recipes/experiments")
KEYS = ("question", "recipe", "settings", "start", "arms", "axes", "measures", "report", "sizes")
RECORD_FILE = "grid.json"


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        arm: its variant.
        axes: the value of each axis, the seed among them.
        settings: the settings of its recipe, in plain values.
        recipe: its recipe, whose `output_dir` is the cell's own folder.
    """

    arm: str
    axes: Mapping[str, Any]
    settings: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """The name of its folder: the arm and the axes."""
        return _cell_name(self.arm, self.axes)


@dataclass(frozen=True)
class Experiment:
    """A question, the runs that answer it, their measures and the report.

    Attributes:
        measures: the settings of each measure.
        start: arguments of `make_start` for a model trained from scratch; None: the recipe's own model.
        report: the layout of the report, see `check_report`.
        folder: the folder in which its cells train.
    """

    name: str
    size: str
    question: str
    cells: Sequence[Cell]
    measures: Mapping[str, Mapping[str, Any]]
    start: Mapping[str, Any] | None
    report: Mapping[str, Any]
    folder: Path


def read_experiment(
    name: str, *, size: str, runs: Path, known_measures: Mapping[str, Callable[..., Any]]
) -> Experiment:
    """Reads an experiment from a YAML mapping with the keys

    - `question`: the question, in a sentence;
    - `recipe`: the recipe of all cells, and `settings`, changes to it for all of them;
    - `start`: optional, a model trained from scratch;
    - `arms`: the variants, each a mapping of settings;
    - `axes`: settings with the values that each arm is run with, every combination; `seed` is one of them. An axis of several
      settings has a name of its own and a mapping of settings for each value: `length: {128: {block_size: 128, …}, …}`;
    - `measures`: the measures of each trained model, each with its settings;
    - `report`: the layout of the report, see `check_report`;
    - `sizes`: for each size its changes to all of this, key by key (null removes a key).

    Args:
        name: name of a file in `recipes/experiments`, or a path.
        size: one of `sizes`.
        runs: the folder in which cells train, each in a folder of its own.
        known_measures: the functions of all measures, by name.

    Raises:
        ValueError: no such experiment or size; an unknown key, axis or measure; an axis without values, or with values that
            are not plain; a setting of both an arm and an axis; an invalid recipe (names the cell) or report.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    plan = _read_plan(path, name, size)
    measures = {key: value or {} for key, value in _mapping(path, "measures", plan["measures"]).items()}
    _check_measures(path, measures, known_measures)
    arms = _mapping(path, "arms", plan["arms"])
    report = _mapping(path, "report", plan.get("report") or {})
    try:
        check_report(report, [str(arm) for arm in arms])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    axes = _axes(path, plan.get("axes") or {})
    folder, start = runs / path.stem / size, plan.get("start")
    shared = {**read_settings(plan["recipe"]), **_mapping(path, "settings", plan.get("settings") or {})}
    cells: dict[str, Cell] = {}
    for arm, own in arms.items():
        own = _mapping(path, f"arms.{arm}", own or {})
        _check_set_once(path, arm, own, axes)
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            settings = {**shared, **own}
            for axis, value in point.items():
                settings |= axes[axis][value] if isinstance(axes[axis], Mapping) else {axis: value}
            cell = _make_cell(path, str(arm), point, settings, folder=folder, has_start=bool(start))
            if cell.name in cells:
                raise ValueError(f"{path}: two cells would train in one folder, {cell.name}; rename an arm")
            cells[cell.name] = cell
    question = " ".join(str(plan["question"]).split())
    return Experiment(path.stem, size, question, tuple(cells.values()), measures, start, report, folder)


def _read_plan(path: Path, name: str, size: str) -> dict[str, Any]:
    """The mapping of a YAML, changed for a size."""
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml"))) or f"none in {FOLDER}"
        raise ValueError(
            f"experiment={name!r}: no such file {path} (relative paths start at {Path.cwd()}). Experiments: {there}"
        )
    plan = read_settings(path)
    check_keys(path, plan, KEYS)
    sizes = _mapping(path, "sizes", plan.pop("sizes", {}))
    if size not in sizes:
        raise ValueError(f"size={size!r}: expected one of the sizes in {path}: {', '.join(sizes) or '(none)'}")
    plan = _merged(plan, _mapping(path, f"sizes.{size}", sizes[size] or {}))
    check_keys(path, plan, KEYS)
    for key in ("question", "recipe", "arms", "measures"):
        if not plan.get(key):
            raise ValueError(f"{path}: {key} is missing")
    return plan


def _check_measures(path: Path, measures: Mapping[str, Any], known: Mapping[str, Callable[..., Any]]) -> None:
    for name, settings in measures.items():
        if name not in known:
            raise ValueError(f"{path}: unknown measure {name!r}{nearest(name, known)}. Known: {', '.join(known)}")
        settable = list(inspect.signature(known[name]).parameters)[1:]
        check_keys(f"{path}: {name}", settings, settable)


def _make_cell(
    path: Path, arm: str, axes: Mapping[str, Any], settings: dict[str, Any], *, folder: Path, has_start: bool
) -> Cell:
    name = _cell_name(arm, axes)
    settings["output_dir"] = str(folder / name)
    if has_start:
        settings["model_name_or_path"] = str(folder / f"start-{settings.get('seed', 42)}")
    settings = {key: value for key, value in settings.items() if value is not None}
    try:
        recipe = build_recipe(settings, origin=path)
    except ValueError as error:
        raise ValueError(f"{path}: cell {name}: {error}") from error
    if recipe.data.sources is not None:
        raise ValueError(f"{path}: cell {name}: sources: expected train_file or dataset_name, which measures need")
    return Cell(arm, axes, settings, recipe)


def _cell_name(arm: str, axes: Mapping[str, Any]) -> str:
    return re.sub(r"[^\w.-]", "_", "-".join([arm, *(f"{axis}_{value}" for axis, value in axes.items())]))


def check_record(experiment: Experiment) -> None:
    """Compares the cells with the folder's record of earlier ones, and updates it. Cells may be added or removed.

    Raises:
        ValueError: a cell's recipe or the start has changed; lists the changes.
    """
    path = experiment.folder / RECORD_FILE
    # The places of a run and of its start depend on the grid's folder, which may be moved.
    places = {"output_dir"} if experiment.start is None else {"output_dir", "model_name_or_path"}
    cells = {
        cell.name: {key: value for key, value in cell.settings.items() if key not in places}
        for cell in experiment.cells
    }
    now = {"start": experiment.start, "cells": cells}
    now = json.loads(json.dumps(now, default=str))
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"start": now["start"], "cells": {}}
    changes = []
    if before["start"] != now["start"]:
        changes.append(f"start was {before['start']!r} and is {now['start']!r}")
    for name, settings in now["cells"].items():
        old = before["cells"].get(name, settings)
        changes += [
            f"{name}: {key} was {old.get(key)!r} and is {settings.get(key)!r}"
            for key in sorted(old.keys() | settings.keys())
            if old.get(key) != settings.get(key)
        ]
    if changes:
        more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise ValueError(
            f"{path}: the experiment was begun with other recipes: {'; '.join(changes[:5])}{more}. Its runs would not be "
            "comparable: put them back, or give another --runs folder"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"start": now["start"], "cells": {**before["cells"], **now["cells"]}}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _check_set_once(path: Path, arm: str, own: Mapping[str, Any], axes: Mapping[str, Any]) -> None:
    """Raises ValueError for a setting of an axis that an arm or another axis sets too."""
    seen = {name: f"the arm {arm!r}" for name in own}
    for axis, values in axes.items():
        names = {name for one in values.values() for name in one} if isinstance(values, Mapping) else {axis}
        for name in sorted(names):
            if name in seen:
                raise ValueError(f"{path}: {name} is set by the axis {axis}, and {seen[name]} sets it as well")
        seen |= {name: f"the axis {axis}" for name in names}
    if "output_dir" in seen:
        raise ValueError(
            f"{path}: output_dir is set by {seen['output_dir']}; each cell has its own folder: leave it out"
        )


def _axes(path: Path, axes: Any) -> dict[str, list | Mapping[Any, Mapping[str, Any]]]:
    known = known_settings()
    axes = _mapping(path, "axes", axes)
    for axis, values in axes.items():
        if isinstance(values, Mapping) and values and axis not in known:
            for value, settings in values.items():
                _mapping(path, f"axes.{axis}.{value}", settings)
            continue
        if axis not in known:
            raise ValueError(
                f"{path}: unknown axis {axis!r}{nearest(str(axis), known)}: expected a setting of recipes, or a new name with "
                "a mapping of settings for each value"
            )
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: axis {axis}: expected a list of values, got {values!r}")
        if any(isinstance(value, Mapping | list) for value in values):
            raise ValueError(f"{path}: axis {axis}: expected plain values, got {values!r}. Use arms for mappings")
        if len(set(map(str, values))) < len(values):
            raise ValueError(f"{path}: the axis {axis} has a value twice: {values!r}")
    return dict(axes)


def _merged(plan: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`plan` with `changes` merged into its mappings, key by key; null removes a key."""
    merged = dict(plan)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        else:
            merged[key] = value
    return merged


def _mapping(path: Path, key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: {key}: expected a mapping, got {value!r}")
    return value
