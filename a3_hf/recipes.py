"""From a YAML file and the command line to a recipe, each setting checked."""

import re
from argparse import ArgumentTypeError
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from .architectures import ARCHITECTURES
from .arguments import ARGUMENT_CLASSES, LoraArguments, Recipe, SourceArguments
from .checking import check_keys, checked_value, nearest, shown_value, types_of
from .curriculum import Curriculum


def parse_recipe(path: str | PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe: a YAML mapping of the fields of `ModelArguments`, `DataArguments` and `A3TrainingArguments`, all
    on one level, `curriculum: {unit: …, stages: […]}` as `Curriculum.from_config` takes them, and, where adapters are
    trained in place of all weights, `lora: {r: …}` as `LoraArguments` takes them.

    Relative paths inside a recipe start at the current directory, not at the recipe's folder.

    Args:
        path: the YAML file.
        overrides: settings of the command line, which win: `["--learning_rate", "1e-3", "--max_steps=20"]`. The
            curriculum is YAML on one line: `["--curriculum", "{unit: steps, stages: [{name: ar, until: 20}]}"]`; so is
            lora, `["--lora", "{r: 8}"]`, or `["--lora", "null"]` for none. A source's setting is named after it:
            `["--sources.fineweb.path", "local.jsonl"]`, which also drops the source's dataset.

    Raises:
        ValueError: no such file; not YAML; a key twice; an unknown key (the nearest known one is named); a value of
            another type than the field's, where `"3"` is not a number and `3.0` not an integer; a value that a field
            or the curriculum refuses; no model or no curriculum.
    """
    return build_recipe(read_settings(path), overrides, origin=path)


def known_settings() -> set[str]:
    """The keys of a recipe."""
    return {f.name for cls in ARGUMENT_CLASSES for f in fields(cls) if f.init} | {"curriculum", "lora"}


def build_recipe(settings: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str | PathLike) -> Recipe:
    """As `parse_recipe`, from the mapping that the YAML file `origin`, named in messages, holds or would hold."""
    values, path = dict(settings), origin
    hints = {name: hint for cls in ARGUMENT_CLASSES for name, hint in get_type_hints(cls).items()}
    known = known_settings()
    check_keys(path, values, known)
    curriculum, lora = values.pop("curriculum", None), values.pop("lora", None)
    values = {key: checked_value(key, value, hints[key], path) for key, value in values.items()}
    overrides = _override_sources(values, overrides)

    parser = _RecipeParser(ARGUMENT_CLASSES, add_help=False, allow_abbrev=False)
    parser.add_argument("--curriculum", type=_inline_yaml, default=curriculum)
    parser.add_argument("--lora", type=_inline_yaml, default=lora)
    for action in parser._actions:
        if action.dest == "sources":
            action.type = _inline_yaml
        if action.dest in values:
            action.default = values[action.dest]
            action.required = False
    _, unused = parser.parse_known_args(list(overrides))
    if unused:
        name = unused[0].split("=")[0]
        raise ValueError(f"unknown setting {name!r}{nearest(name.lstrip('-').replace('-', '_'), known)}")
    model, data, training, rest = parser.parse_args_into_dataclasses(list(overrides), look_for_args_file=False)
    architecture = ARCHITECTURES[model.architecture]
    if rest.curriculum is not None and not architecture.has_curriculum:
        raise ValueError(
            f"architecture={model.architecture!r} is trained without orders: curriculum has no effect; leave it out (on the "
            "command line: --curriculum null)"
        )
    return Recipe(
        model=model,
        data=data,
        training=training,
        curriculum=_curriculum(rest.curriculum, path) if architecture.has_curriculum else None,
        lora=_lora(rest.lora),
    )


class _RecipeParser(HfArgumentParser):
    # Identical to HfArgumentParser except: a wrong argument raises, where argparse would end the process.
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


class _RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader, which reads version 1.1, except for two kinds of words that version 1.2 changed: `1e-4` is a
    number, and `no` is text (`eval_strategy: no`). A key may not come twice.
    """

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
    """The mapping that a YAML file holds.

    Raises:
        ValueError: no such file; not YAML; a key twice; not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such recipe (relative to {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read as a recipe: {error}") from error
    try:
        values = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of settings, got {shown_value(values)}")
    return values


def _inline_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentTypeError(f"not YAML: {' '.join(str(error).split())}") from error


def _curriculum(config: Any, path: str | PathLike) -> Curriculum:
    expected = "takes a mapping {unit: fraction | steps | tokens, stages: [{name: ar, until: 0.2}, …]}"
    if config is None:
        raise ValueError(f"{path}: lacks curriculum, which {expected}")
    if not isinstance(config, Mapping):
        raise ValueError(f"curriculum: {expected}, got {shown_value(config)}")
    check_keys("curriculum", config, ("unit", "stages"))
    if "stages" not in config:
        raise ValueError(f"curriculum: lacks stages; it {expected}")
    return Curriculum.from_config(config["stages"], unit=config.get("unit", "fraction"))


def _override_sources(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Takes `--sources.NAME.KEY VALUE` out of the overrides and into `values["sources"]`; returns the other overrides.

    A path drops the dataset that stood there, and the other way round.
    """
    rest, given = [], list(overrides)
    hints = get_type_hints(SourceArguments)
    hub = ("dataset_name", "dataset_config_name", "dataset_split")
    while given:
        setting, equals, value = given.pop(0).partition("=")
        if not setting.startswith("--sources."):
            rest.append(setting + equals + value)
            continue
        name, _, key = setting.removeprefix("--sources.").partition(".")
        sources = values.get("sources") or {}
        if name not in sources or not isinstance(sources[name], Mapping):
            known = f"its sources are {', '.join(sources)}" if sources else "it has none"
            raise ValueError(f"unknown setting {setting!r}: the recipe has no such source; {known}")
        if key not in hints:
            raise ValueError(f"unknown setting {setting!r}{nearest(key, hints)}")
        if not equals and not given:
            raise ValueError(f"{setting}: expected one argument")
        text = value if equals else given.pop(0)
        if str not in types_of(hints[key]):
            text = checked_value(key, _inline_yaml(text), hints[key], f"sources: {name}")
        dropped = hub if key == "path" else ("path",) if key == "dataset_name" else ()
        kept = {other: old for other, old in sources[name].items() if other not in dropped}
        values["sources"] = {**sources, name: {**kept, key: text}}
    return rest


def _lora(config: Any) -> LoraArguments | None:
    if config is None:
        return None
    hints = get_type_hints(LoraArguments)
    if not isinstance(config, Mapping):
        raise ValueError(f"lora: takes a mapping of {', '.join(hints)}, got {shown_value(config)}")
    check_keys("lora", config, hints)
    return LoraArguments(**{key: checked_value(key, value, hints[key], "lora") for key, value in config.items()})
