"""Grids: an experiment's YAML becomes cells, each a complete recipe with a place for its run."""

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
        arm: which variant it is.
        axes: the value of each axis, the seed among them.
        settings: those of its recipe, in plain values.
        recipe: the same, read; its `output_dir` is the cell's own folder.
    """

    arm: str
    axes: Mapping[str, Any]
    settings: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """The name of its folder: the arm and the axes."""
        parts = [self.arm, *(f"{axis}_{value}" for axis, value in self.axes.items())]
        return re.sub(r"[^\w.-]", "_", "-".join(parts))


@dataclass(frozen=True)
class Experiment:
    """What is asked, the runs that answer it, and how they are measured and told.

    Attributes:
        measures: for each measurement its settings.
        start: what a model trained from scratch starts as, the arguments of `make_start`; None: the recipe's own model.
        report: how the result is told.
        folder: where its cells train.
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
    """Reads an experiment: a YAML mapping of

    - `question`: what is asked, in a sentence;
    - `recipe`: the recipe that all cells start from, and `settings`, what all of them change in it;
    - `start`: optional, what is trained from scratch;
    - `arms`: the variants, each a mapping of settings;
    - `axes`: settings with the values that each arm is run with, every combination; `seed` is one of them. Where several
      settings go together, an axis has a name of its own and a mapping of settings for each value:
      `length: {128: {block_size: 128, …}, 1024: {…}}`;
    - `measures`: what is measured of each trained model, each with its settings;
    - `report`: how the result is told, see `check_report`;
    - `sizes`: for each size what it changes in all of this, key by key (null takes a key away).

    Args:
        name: of a file in `recipes/experiments`, or a path.
        size: one of `sizes`.
        runs: the folder in which cells train, each in a folder of its own.
        known_measures: the measurements that there are, with the functions that take their settings.

    Raises:
        ValueError: no such experiment or size; an unknown key, axis or measurement; an axis without values, or one whose
            values are no plain ones; an arm's setting that is an axis as well; what a recipe refuses, with the cell's name;
            what `check_report` refuses.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(found.stem for found in FOLDER.glob("*.yaml"))) or f"none in {FOLDER}"
        raise ValueError(f"experiment={name!r}: there is no {path} (relative to {Path.cwd()}); there are {there}")
    plan = read_settings(path)
    check_keys(path, plan, KEYS)
    sizes = _mapping(path, "sizes", plan.pop("sizes", {}))
    if size not in sizes:
        raise ValueError(f"size={size!r}: {path} has the sizes {', '.join(sizes) or '(none)'}")
    plan = _merged(plan, _mapping(path, f"sizes.{size}", sizes[size] or {}))
    check_keys(path, plan, KEYS)
    for key in ("question", "recipe", "arms", "measures"):
        if not plan.get(key):
            raise ValueError(f"{path}: lacks {key}")
    measures = {key: value or {} for key, value in _mapping(path, "measures", plan["measures"]).items()}
    for measure in measures:
        if measure not in known_measures:
            known = ", ".join(known_measures)
            raise ValueError(
                f"{path}: unknown measure {measure!r}{nearest(measure, known_measures)}; there are {known}"
            )
        takes = list(inspect.signature(known_measures[measure]).parameters)[1:]
        for setting in measures[measure]:
            if setting not in takes:
                raise ValueError(f"{path}: {measure} has an unknown setting {setting!r}{nearest(str(setting), takes)}")
    folder = runs / path.stem / size
    axes = _axes(path, plan.get("axes") or {})
    base = read_settings(plan["recipe"])
    shared = _mapping(path, "settings", plan.get("settings") or {})
    arms = _mapping(path, "arms", plan["arms"])
    report = _mapping(path, "report", plan.get("report") or {})
    try:
        check_report(report, [str(arm) for arm in arms])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    cells = []
    for arm, own in arms.items():
        own = _mapping(path, f"arms.{arm}", own or {})
        _check_set_once(path, arm, own, axes)
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            settings = {**base, **shared, **own}
            for axis, value in point.items():
                settings |= axes[axis][value] if isinstance(axes[axis], Mapping) else {axis: value}
            cell = Cell(str(arm), point, settings, recipe=None)
            settings["output_dir"] = str(folder / cell.name)
            if plan.get("start"):
                settings["model_name_or_path"] = str(folder / f"start-{settings.get('seed', 42)}")
            settings = {key: value for key, value in settings.items() if value is not None}
            try:
                recipe = build_recipe(settings, origin=path)
            except ValueError as error:
                raise ValueError(f"{path}: cell {cell.name}: {error}") from error
            if recipe.data.sources is not None:
                raise ValueError(f"{path}: cell {cell.name}: sources: measurements take train_file or dataset_name")
            if any(other.name == cell.name for other in cells):
                raise ValueError(f"{path}: two cells would train in one folder, {cell.name}; rename an arm")
            cells.append(Cell(str(arm), point, settings, recipe))
    return Experiment(
        name=path.stem,
        size=size,
        question=" ".join(str(plan["question"]).split()),
        cells=tuple(cells),
        measures=measures,
        start=plan.get("start"),
        report=report,
        folder=folder,
    )


def check_record(experiment: Experiment) -> None:
    """Compares the cells with those that the folder was begun with, and leaves a record of them. Cells may be added or left
    out; one that was there has the settings that it had.

    Raises:
        ValueError: a cell whose recipe, or a start, that changed; says in what.
    """
    path = experiment.folder / RECORD_FILE
    # Where a run lies, and a model made for it, follows from where the grid lies, which may be moved.
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
    """Refuses a setting that an axis would silently replace, in an arm or in another axis."""
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
                f"{path}: unknown axis {axis!r}{nearest(str(axis), known)}; it takes a setting of recipes, or for a name of "
                "its own a mapping of settings for each value"
            )
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: the axis {axis} takes a list of values, got {values!r}")
        if any(isinstance(value, Mapping | list) for value in values):
            raise ValueError(f"{path}: the axis {axis} takes plain values, got {values!r}; mappings make arms")
        if len(set(map(str, values))) < len(values):
            raise ValueError(f"{path}: the axis {axis} has a value twice: {values!r}")
    return dict(axes)


def _merged(plan: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`plan` with `changes` put into its mappings, key by key; null takes a key away."""
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
        raise ValueError(f"{path}: {key} takes a mapping, got {value!r}")
    return value
