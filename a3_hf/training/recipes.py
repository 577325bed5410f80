"""Recipes read from a YAML file and the command line, with every setting checked."""

import re
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from a3_hf.adapters.arguments import DraftHeadArguments, LoraArguments
from a3_hf.data.arguments import SourceArguments
from a3_hf.models.auto import ARCHITECTURES
from a3_hf.settings import check_keys, checked_value, nearest, shown_value, types_of

from .arguments import ARGUMENT_CLASSES, Recipe
from .curriculum import Curriculum


def parse_recipe(path: str | PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe: a flat YAML mapping of the fields of `ModelArguments`, `DataArguments` and `A3TrainingArguments`, plus
    `curriculum: {unit: …, stages: […]}` (see `Curriculum.from_config`) and optionally `lora: {r: …}` (see `LoraArguments`)
    or `draft_head: {rank: …}` (see `DraftHeadArguments`).

    Relative paths in a recipe start at the current directory, not at the recipe's folder.

    Args:
        path: the YAML file.
        overrides: settings of the command line, which take precedence: `["--learning_rate", "1e-3", "--max_steps=20"]`.
            `curriculum`, `lora`, `draft_head` and `sources` are YAML on one line: `["--lora", "{r: 8}"]`. A setting
            inside lora, draft_head or a source: `["--lora.r", "8"]`, `["--sources.fineweb.path", "local.jsonl"]` (which
            removes the source's dataset). `null` unsets a setting. Hyphens count as underscores.

    Raises:
        ValueError: no such file; not YAML; a duplicate or unknown key; a value of another type than the field's (`"3"` is not
            a number, `3.0` not an integer) or out of range; no model or no curriculum.
    """
    return build_recipe(read_settings(path), overrides, origin=path)


MAPPINGS = {"lora": LoraArguments, "draft_head": DraftHeadArguments}
ON_ONE_LINE = ("curriculum", "sources", *MAPPINGS)  # YAML on the command line


def known_settings() -> set[str]:
    """Returns all keys of a recipe."""
    return {f.name for cls in ARGUMENT_CLASSES for f in fields(cls) if f.init} | {"curriculum", *MAPPINGS}


def build_recipe(settings: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str | PathLike) -> Recipe:
    """Builds a recipe from a mapping of settings; see `parse_recipe`. `origin` is its name in messages."""
    values, path = dict(settings), origin
    hints = {name: hint for cls in ARGUMENT_CLASSES for name, hint in get_type_hints(cls).items()}
    known = known_settings()
    check_keys(path, values, known)
    overrides = _override(values, overrides, known)
    curriculum = values.pop("curriculum", None)
    lora, draft_head = (_mapping(name, values.pop(name, None)) for name in MAPPINGS)
    values = {key: checked_value(key, value, hints[key], path) for key, value in values.items()}

    parser = _RecipeParser(ARGUMENT_CLASSES, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        if action.dest in values:
            action.default = values[action.dest]
            action.required = False
    _, unused = parser.parse_known_args(list(overrides))
    if unused:
        name = unused[0].split("=")[0]
        raise ValueError(f"unknown setting {name!r}{nearest(name.lstrip('-').replace('-', '_'), known)}")
    model, data, training = parser.parse_args_into_dataclasses(list(overrides), look_for_args_file=False)
    architecture = ARCHITECTURES[model.architecture]
    if curriculum is not None and not architecture.has_curriculum:
        raise ValueError(
            f"architecture={model.architecture!r} is trained without orders: curriculum has no effect. Leave it out (on the "
            "command line: --curriculum null)"
        )
    if model.architecture == "draft_head":
        draft_head = draft_head or DraftHeadArguments()
    elif draft_head is not None:
        raise ValueError(
            f"draft_head has no effect with architecture {model.architecture!r}: expected architecture 'draft_head', or no "
            "draft_head"
        )
    return Recipe(
        model=model,
        data=data,
        training=training,
        curriculum=_curriculum(curriculum, path) if architecture.has_curriculum else None,
        lora=lora,
        draft_head=draft_head,
    )


class _RecipeParser(HfArgumentParser):
    # Identical to HfArgumentParser except: a wrong argument raises ValueError; argparse would end the process.
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _RecipeLoader(yaml.SafeLoader):
    # Identical to yaml.SafeLoader (YAML 1.1) except, as in YAML 1.2: `1e-4` is a number, and `no` is text
    # (`eval_strategy: no`). Duplicate keys are refused.

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":bool"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
            seen.add(key if isinstance(key, Hashable) else None)
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), "tTfF"
)
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    "-+.0123456789",
)


def read_settings(path: str | PathLike) -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Raises:
        ValueError: no such file; not YAML; a duplicate key; not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe (relative paths start at {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read as a recipe: {error}") from error
    try:
        values = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a recipe, a mapping of settings, got {shown_value(values)}")
    return values


def _inline_yaml(name: str, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{name}: not YAML: {' '.join(str(error).split())}") from error


def _curriculum(config: Any, path: str | PathLike) -> Curriculum:
    expected = "expected a mapping {unit: fraction | steps | tokens, stages: [{name: ar, until: 0.2}, …]}"
    if config is None:
        raise ValueError(f"{path}: curriculum is missing: {expected}")
    if not isinstance(config, Mapping):
        raise ValueError(f"curriculum: {expected}, got {shown_value(config)}")
    check_keys("curriculum", config, ("unit", "stages"))
    if "stages" not in config:
        raise ValueError(f"curriculum: stages is missing: {expected}")
    return Curriculum.from_config(config["stages"], unit=config.get("unit", "fraction"))


def _override(values: dict[str, Any], overrides: Sequence[str], known: Collection[str]) -> list[str]:
    """Puts into `values` the overrides that the argument parser can't take: `--KEY null`, YAML on one line, `--lora.KEY VALUE`
    (or draft_head's) and `--sources.NAME.KEY VALUE`. Returns the others, names with underscores.
    """
    rest = []
    for name, text, words in _pairs(overrides):
        key = name.removeprefix("--")
        is_nested = key.startswith(tuple(f"{group}." for group in ("sources", *MAPPINGS)))
        if (is_nested or key in ON_ONE_LINE) and text is None:
            raise ValueError(f"{name}: expected one argument")
        if is_nested:
            _override_nested(values, name, text)
        elif key in ON_ONE_LINE:
            values[key] = _inline_yaml(name, text)
        elif text == "null" and key in known:
            values[key] = None
        else:
            rest += words
    return rest


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Yields each setting's name with underscores, its value (None: missing), and its command-line words."""
    given = list(overrides)
    while given:
        name, equals, value = given.pop(0).partition("=")
        if not name.startswith("--"):
            yield name, None, [name + equals + value]
            continue
        path, dot, key = name.removeprefix("--").rpartition(".")  # a source's name keeps its hyphens
        name = f"--{path}{dot}{key.replace('-', '_')}"
        if equals:
            yield name, value, [f"{name}={value}"]
        elif given and not given[0].startswith("--"):
            yield name, given[0], [name, given.pop(0)]
        else:
            yield name, None, [name]


def _override_nested(values: dict[str, Any], setting: str, text: str) -> None:
    """Puts `--lora.KEY` (or draft_head's) or `--sources.NAME.KEY` into `values`. A source's path replaces its dataset, and
    vice versa.
    """
    group, *path, key = setting.removeprefix("--").split(".")
    inside = values.get(group) or {}
    if group in MAPPINGS and not path:
        values[group] = _with(inside, setting, key, text, MAPPINGS[group], group)
        return
    name = ".".join(path)
    if group != "sources" or name not in inside or not isinstance(inside[name], Mapping):
        known = f"its sources are {', '.join(inside)}" if inside else "it has none"
        raise ValueError(f"unknown setting {setting!r}: the recipe has no such source; {known}")
    hub = ("dataset_name", "dataset_config_name", "dataset_split")
    dropped = hub if key == "path" else ("path",) if key == "dataset_name" else ()
    kept = {other: old for other, old in inside[name].items() if other not in dropped}
    values[group] = {**inside, name: _with(kept, setting, key, text, SourceArguments, f"sources: {name}")}


def _with(values: Any, setting: str, key: str, text: str, kind: type, where: str) -> dict[str, Any]:
    hints = get_type_hints(kind)
    if key not in hints:
        raise ValueError(f"unknown setting {setting!r}{nearest(key, hints)}")
    if not isinstance(values, Mapping):
        raise ValueError(f"{setting}: {where} is {shown_value(values)}, not a mapping")
    if text == "null":
        return {other: value for other, value in values.items() if other != key}
    value = text if str in types_of(hints[key]) else checked_value(key, _inline_yaml(setting, text), hints[key], where)
    return {**values, key: value}


def _mapping(name: str, config: Any) -> Any:
    """The settings of a mapping, in its class."""
    if config is None:
        return None
    hints = get_type_hints(MAPPINGS[name])
    if not isinstance(config, Mapping):
        raise ValueError(f"{name}: expected a mapping of {', '.join(hints)}, got {shown_value(config)}")
    check_keys(name, config, hints)
    return MAPPINGS[name](**{key: checked_value(key, value, hints[key], name) for key, value in config.items()})
