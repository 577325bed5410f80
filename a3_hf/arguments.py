"""One YAML = one complete run: the settings, their types, and how a recipe and the command line become them."""

import difflib
import re
import types
from argparse import ArgumentTypeError
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .curriculum import Curriculum


@dataclass
class ModelArguments:
    """Which model is adapted. `model_name_or_path` is a LLaMA or an A3 checkpoint, a folder or a hub id."""

    model_name_or_path: str = field(metadata={"help": "LLaMA or A3 checkpoint: a folder or a hub id."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Where the tokenizer is, if not with the model."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the weights in memory (mixed precision is --bf16)."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flex_attention or eager."})


@dataclass
class DataArguments:
    """Where text comes from and how it becomes rows; see `a3_hf.data.load_rows`. Relative paths start at the current
    directory.

    Raises:
        ValueError: no source, or two; two sources of validation; a number out of range; a setting that would have no
            effect beside the others.
    """

    train_file: str | None = field(default=None, metadata={"help": "A .txt, .jsonl, .json or .parquet file."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the hub, in place of train_file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of dataset_name."})
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset_name, slices included."})
    text_column: str = field(default="text", metadata={"help": "Column of the text; .txt files have 'text' only."})
    document_separator: str | None = field(
        default=None, metadata={"help": "What separates documents in a .txt file. None: a file is one document."}
    )
    document_boundary: Literal["bos", "eos"] = field(
        default="eos", metadata={"help": "The token after each document, as the model was pretrained."}
    )
    block_size: int = field(default=2048, metadata={"help": "Tokens per row, the first of which is BOS."})
    validation_file: str | None = field(default=None, metadata={"help": "A file to evaluate on, read as train_file."})
    validation_documents: int = field(
        default=0, metadata={"help": "Hold out that many documents, the last of the source, to evaluate on."}
    )
    shuffle_documents: bool = field(
        default=False, metadata={"help": "Shuffle the documents of training, by the seed, before they are packed."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Pack no more than that many rows to train on."})
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Pack no more than that many rows to evaluate on."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where datasets keeps its files, if not as usual."})

    def __post_init__(self):
        if (self.train_file is None) == (self.dataset_name is None):
            raise ValueError(
                f"train_file={self.train_file!r}, dataset_name={self.dataset_name!r}: set one of the two, and one only"
            )
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(f"dataset_config_name={self.dataset_config_name!r} has no effect without dataset_name")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: a row holds BOS and at least one token, so 2 or more")
        if self.document_boundary not in ("bos", "eos"):
            raise ValueError(f"document_boundary={self.document_boundary!r}: takes 'bos' or 'eos'")
        if self.document_separator == "":
            raise ValueError("document_separator='': takes some text, or null where a file is one document")
        if self.validation_documents < 0:
            raise ValueError(f"validation_documents={self.validation_documents}: takes 0 or more")
        if self.validation_documents and self.validation_file is not None:
            raise ValueError(
                f"validation_documents={self.validation_documents} and validation_file={self.validation_file!r}: "
                "set one of the two, and one only"
            )
        for name, limit in (("max_train_rows", self.max_train_rows), ("max_eval_rows", self.max_eval_rows)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit}: takes 1 or more, or null for no limit")
        if self.max_eval_rows is not None and not self.validation_documents and self.validation_file is None:
            raise ValueError(
                f"max_eval_rows={self.max_eval_rows} has no effect without validation_file or validation_documents"
            )


@dataclass
class A3TrainingArguments(TrainingArguments):
    # Identical to TrainingArguments except: the defaults below, and a setting that would lose columns is refused.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays false: the trainer draws the orders from the rows' own columns."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report to; nowhere unless asked."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True: would silently drop what the trainer draws orders from; leave it false"
            )
        super().__post_init__()


ARGUMENT_CLASSES = (ModelArguments, DataArguments, A3TrainingArguments)


@dataclass(frozen=True)
class Recipe:
    """One complete run."""

    model: ModelArguments
    data: DataArguments
    training: A3TrainingArguments
    curriculum: Curriculum


def parse_recipe(path: str | PathLike, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe: a YAML mapping of the fields of `ModelArguments`, `DataArguments` and `A3TrainingArguments`, all
    on one level, and `curriculum: {unit: …, stages: […]}` as `Curriculum.from_config` takes them.

    Relative paths inside a recipe start at the current directory, not at the recipe's folder.

    Args:
        path: the YAML file.
        overrides: settings of the command line, which win: `["--learning_rate", "1e-3", "--max_steps=20"]`. The
            curriculum is YAML on one line: `["--curriculum", "{unit: steps, stages: [{name: ar, until: 20}]}"]`.

    Raises:
        ValueError: no such file; not YAML; a key twice; an unknown key (the nearest known one is named); a value of
            another type than the field's, where `"3"` is not a number and `3.0` not an integer; a value that a field
            or the curriculum refuses; no model or no curriculum.
    """
    values = _read_yaml(path)
    hints = {name: hint for cls in ARGUMENT_CLASSES for name, hint in get_type_hints(cls).items()}
    known = {f.name for cls in ARGUMENT_CLASSES for f in fields(cls) if f.init} | {"curriculum"}
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{_nearest(str(key), known)}")
    curriculum = values.pop("curriculum", None)
    values = {key: _checked(key, value, hints[key], path) for key, value in values.items()}

    parser = _RecipeParser(ARGUMENT_CLASSES, add_help=False, allow_abbrev=False)
    parser.add_argument("--curriculum", type=_inline_yaml, default=curriculum)
    for action in parser._actions:
        if action.dest in values:
            action.default = values[action.dest]
            action.required = False
    _, unused = parser.parse_known_args(list(overrides))
    if unused:
        name = unused[0].split("=")[0]
        raise ValueError(f"unknown setting {name!r}{_nearest(name.lstrip('-').replace('-', '_'), known)}")
    model, data, training, rest = parser.parse_args_into_dataclasses(list(overrides), look_for_args_file=False)
    return Recipe(model=model, data=data, training=training, curriculum=_curriculum(rest.curriculum, path))


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


def _read_yaml(path: str | PathLike) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such recipe (relative to {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read as a recipe: {error}") from error
    try:
        values = yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not a recipe: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of settings, got {_shown(values)}")
    return values


def _inline_yaml(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ArgumentTypeError(f"not YAML: {error}") from error


def _curriculum(config: Any, path: str | PathLike) -> Curriculum:
    expected = "takes a mapping {unit: fraction | steps | tokens, stages: [{name: ar, until: 0.2}, …]}"
    if config is None:
        raise ValueError(f"{path}: lacks curriculum, which {expected}")
    if not isinstance(config, Mapping):
        raise ValueError(f"curriculum: {expected}, got {_shown(config)}")
    known = ("unit", "stages")
    for key in config:
        if key not in known:
            raise ValueError(f"curriculum: unknown key {key!r}{_nearest(str(key), known)}")
    if "stages" not in config:
        raise ValueError(f"curriculum: lacks stages; it {expected}")
    return Curriculum.from_config(config["stages"], unit=config.get("unit", "fraction"))


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def _checked(key: str, value: Any, hint: Any, path: str | PathLike) -> Any:
    """`value` as a field of type `hint` holds it: an integer where a number is asked for becomes a float."""
    members = _members(hint)
    if not any(_is_a(value, member) for member in members):
        takes = " or ".join(dict.fromkeys(_described(member) for member in members))
        raise ValueError(f"{path}: {key} takes {takes}, got {_shown(value)}")
    if isinstance(value, int) and not isinstance(value, bool) and float in members and int not in members:
        return float(value)
    return value


def _members(hint: Any) -> tuple:
    """The types that a hint stands for. An enumeration beside text (`SchedulerType | str`) means the texts it lists."""
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    members = get_args(hint)
    has_enum = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    return tuple(member for member in members if not (has_enum and member is str))


def _is_a(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, get_args(hint)[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    if issubclass(hint, Enum):
        return value in [choice.value for choice in hint]
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _described(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if origin is list:
        return "a list"
    if origin is not None:
        return "a mapping"
    if issubclass(hint, Enum):
        return "one of " + ", ".join(repr(choice.value) for choice in hint)
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
    return plain.get(hint, "null" if hint is type(None) else hint.__name__)
