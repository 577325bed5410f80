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

from .architectures import ARCHITECTURES
from .curriculum import Curriculum


@dataclass
class ModelArguments:
    """Which model is adapted, and to what. `model_name_or_path` is a LLaMA or a checkpoint of the architecture, a folder or
    a hub id.
    """

    model_name_or_path: str = field(metadata={"help": "LLaMA or A3 checkpoint: a folder or a hub id."})
    architecture: Literal["a3", "decoupled_rope", "masked_diffusion", "llama"] = field(
        default="a3",
        metadata={
            "help": "a3: two streams; decoupled_rope: one stream, one token at a time; masked_diffusion: no order at all; "
            "llama: next tokens, the control. lora is for a3, and the last two have no curriculum."
        },
    )
    slot_start: Literal["query_embed", "left_token"] | None = field(
        default=None,
        metadata={
            "help": "a3: what a slot starts as; left_token: as the token on its left where it sees it. None: as stored."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Where the tokenizer is, if not with the model."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the weights in memory (mixed precision is --bf16)."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flex_attention or eager."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen base in 4 bits, beside a recipe's lora; needs bitsandbytes."}
    )


@dataclass(frozen=True)
class SourceArguments:
    """One source of a mixture that is read while training goes on, as an entry of the recipe's `sources` says it:
    `fineweb: {dataset_name: HuggingFaceFW/fineweb, dataset_config_name: sample-10BT, weight: 0.5}`, or
    `stories: {path: stories/*.jsonl.zst}`; see `a3_hf.streaming`.

    Args:
        path: a file, or a pattern of files that are of one kind: .jsonl, .jsonl.zst, .json, .parquet or .txt.
        dataset_name: a dataset of the hub, in place of `path`; with its configuration and split.
        text_column: column of the text; .txt files have 'text' only.
        weight: the share of its documents among those drawn; weights need not sum to 1.

    Raises:
        ValueError: neither `path` nor `dataset_name`, or both; a weight that is not above 0.
    """

    path: str | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    text_column: str = "text"
    weight: float = 1.0

    def __post_init__(self):
        if (self.path is None) == (self.dataset_name is None):
            raise ValueError(
                f"path={self.path!r}, dataset_name={self.dataset_name!r}: set one of the two, and one only"
            )
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(f"dataset_config_name={self.dataset_config_name!r} has no effect without dataset_name")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}: takes a number above 0")


@dataclass
class DataArguments:
    """Where text comes from and how it becomes rows; see `a3_hf.data.load_rows`, and `a3_hf.streaming` for `sources`.
    Relative paths start at the current directory.

    Raises:
        ValueError: no source, or two; two sources of validation; a number out of range; a setting that would have no
            effect beside the others.
    """

    train_file: str | None = field(default=None, metadata={"help": "A .txt, .jsonl, .json or .parquet file."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the hub, in place of train_file."})
    sources: dict | None = field(
        default=None,
        metadata={"help": "In place of both, a mixture that is read during training: {name: {path: …, weight: …}}."},
    )
    num_shards: int = field(
        default=16, metadata={"help": "With sources: parts that the text is cut into, for the readers to share out."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of dataset_name."})
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset_name, slices included."})
    text_column: str = field(default="text", metadata={"help": "Column of the text; .txt files have 'text' only."})
    document_separator: str | None = field(
        default=None, metadata={"help": "What separates documents in a .txt file. None: a file is one document."}
    )
    document_boundary: Literal["bos", "eos"] = field(
        default="eos", metadata={"help": "The token after each document, as the model was pretrained."}
    )
    documents: Literal["joined", "isolated"] = field(
        default="joined",
        metadata={"help": "Whether documents of a row see each other; isolated: each starts with a BOS of its own."},
    )
    block_size: int = field(default=2048, metadata={"help": "Tokens per row, the first of which is BOS."})
    validation_file: str | None = field(default=None, metadata={"help": "A file to evaluate on, read as train_file."})
    validation_documents: int = field(
        default=0,
        metadata={"help": "Hold out that many documents to evaluate on: the last of the source, the first of sources."},
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
        if self.sources is not None:
            self._check_sources()
        elif self.num_shards != 16:
            raise ValueError(f"num_shards={self.num_shards} has no effect without sources")
        elif (self.train_file is None) == (self.dataset_name is None):
            raise ValueError(
                f"train_file={self.train_file!r}, dataset_name={self.dataset_name!r}: set one of the two, and one only"
            )
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(f"dataset_config_name={self.dataset_config_name!r} has no effect without dataset_name")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: a row holds BOS and at least one token, so 2 or more")
        if self.document_boundary not in ("bos", "eos"):
            raise ValueError(f"document_boundary={self.document_boundary!r}: takes 'bos' or 'eos'")
        if self.documents not in ("joined", "isolated"):
            raise ValueError(f"documents={self.documents!r}: takes 'joined' or 'isolated'")
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

    def _check_sources(self) -> None:
        given = {"train_file": self.train_file, "dataset_name": self.dataset_name}
        for name, value in {**given, "dataset_config_name": self.dataset_config_name}.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} and sources: set one of the two, and one only")
        if self.max_train_rows is not None:
            raise ValueError(f"max_train_rows={self.max_train_rows}: of sources, as much is read as max_steps needs")
        if self.shuffle_documents:
            raise ValueError("shuffle_documents=True: sources are read in the order of their files; leave it out")
        if self.num_shards < 1:
            raise ValueError(f"num_shards={self.num_shards}: takes 1 or more")
        self.sources = _sources(self.sources)


@dataclass(frozen=True)
class LoraArguments:
    """Low-rank adapters in place of the whole model's weights: the recipe's `lora: {r: 16, …}`; see `a3_hf.adapters`. The
    paper trains all weights; none of this is in it.

    Args:
        r: the rank.
        alpha: the adapters' product is added times alpha / r.
        dropout: on what goes into an adapter, in training.
        target: linear layers of the decoder, by the ends of their names (`q_proj`, `layers.3.mlp.up_proj`), or
            `"all-linear"`, all that `rows` allows.
        rows: `"all"` adapts both streams; `"slots"` adapts the query slots alone, so that the content stream stays the
            LLaMA it was, bit for bit.

    Raises:
        ValueError: a number out of range, no target, or one that comes twice.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target: list[str] | Literal["all-linear"] = "all-linear"
    rows: Literal["all", "slots"] = "all"

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"lora.r={self.r}: takes 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha={self.alpha}: takes a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout={self.dropout}: takes 0 or more, and less than 1")
        if self.rows not in ("all", "slots"):
            raise ValueError(f"lora.rows={self.rows!r}: takes 'all' or 'slots'")
        if self.target != "all-linear" and (isinstance(self.target, str) or not self.target):
            raise ValueError(f"lora.target={self.target!r}: takes a list of names, or 'all-linear'")
        if self.target != "all-linear" and len(set(self.target)) < len(self.target):
            raise ValueError(f"lora.target={self.target!r}: a name comes twice")


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
    loss: Literal["plain", "chunked"] = field(
        default="plain", metadata={"help": "chunked never holds all logits of a batch: less memory, the same values."}
    )
    peak_flops: float | None = field(
        default=None,
        metadata={
            "help": "Operations a second that a device can do, for the MFU in the logs, if it is not a known one."
        },
    )
    content_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the content stream's next-token loss in left-to-right rows; 0: none."}
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of teaching slots the content stream's forecasts in left-to-right rows; 0: none."},
    )
    masking: Literal["rate", "count"] = field(
        default="rate", metadata={"help": "masked_diffusion: mask each token with a drawn chance, or a drawn number."}
    )
    low_discrepancy: bool = field(
        default=False, metadata={"help": "masked_diffusion: spread the shares of a step's rows evenly over (0, 1]."}
    )
    anneal_steps: int = field(
        default=0, metadata={"help": "masked_diffusion: from causal to bidirectional attention in so many steps."}
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True: would silently drop what the trainer draws orders from; leave it false"
            )
        if self.loss not in ("plain", "chunked"):
            raise ValueError(f"loss={self.loss!r}: takes 'plain' or 'chunked'")
        if self.peak_flops is not None and not self.peak_flops > 0:
            raise ValueError(f"peak_flops={self.peak_flops}: takes a number above 0")
        super().__post_init__()

    @property
    def rows_per_step(self) -> int:
        """Rows of an update step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


ARGUMENT_CLASSES = (ModelArguments, DataArguments, A3TrainingArguments)


@dataclass(frozen=True)
class Recipe:
    """One complete run. The architectures `masked_diffusion` and `llama` have no curriculum."""

    model: ModelArguments
    data: DataArguments
    training: A3TrainingArguments
    curriculum: Curriculum | None
    lora: LoraArguments | None = None


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
    for key in values:
        if key not in known:
            raise ValueError(f"{path}: unknown key {key!r}{nearest(str(key), known)}")
    curriculum, lora = values.pop("curriculum", None), values.pop("lora", None)
    values = {key: _checked(key, value, hints[key], path) for key, value in values.items()}
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
            raise ValueError(f"curriculum: unknown key {key!r}{nearest(str(key), known)}")
    if "stages" not in config:
        raise ValueError(f"curriculum: lacks stages; it {expected}")
    return Curriculum.from_config(config["stages"], unit=config.get("unit", "fraction"))


def _sources(config: Any) -> dict[str, SourceArguments]:
    hints = get_type_hints(SourceArguments)
    if not isinstance(config, Mapping) or not config:
        raise ValueError(f"sources: takes a mapping {{name: {{path: …, weight: …}}}}, got {_shown(config)}")
    sources = {}
    for name, source in config.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"sources: a source's name is letters, digits, _ and -, got {_shown(name)}")
        if isinstance(source, Mapping):
            for key in source:
                if key not in hints:
                    raise ValueError(f"sources: {name}: unknown key {key!r}{nearest(str(key), hints)}")
            checked = {key: _checked(key, value, hints[key], f"sources: {name}") for key, value in source.items()}
            try:
                source = SourceArguments(**checked)
            except ValueError as error:
                raise ValueError(f"sources: {name}: {error}") from error
        if not isinstance(source, SourceArguments):
            raise ValueError(f"sources: {name} takes a mapping of {', '.join(hints)}, got {_shown(source)}")
        sources[name] = source
    return sources


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
        if str not in _members(hints[key]):
            text = _checked(key, _inline_yaml(text), hints[key], f"sources: {name}")
        dropped = hub if key == "path" else ("path",) if key == "dataset_name" else ()
        kept = {other: old for other, old in sources[name].items() if other not in dropped}
        values["sources"] = {**sources, name: {**kept, key: text}}
    return rest


def _lora(config: Any) -> LoraArguments | None:
    if config is None:
        return None
    hints = get_type_hints(LoraArguments)
    if not isinstance(config, Mapping):
        raise ValueError(f"lora: takes a mapping of {', '.join(hints)}, got {_shown(config)}")
    for key in config:
        if key not in hints:
            raise ValueError(f"lora: unknown key {key!r}{nearest(str(key), hints)}")
    return LoraArguments(**{key: _checked(key, value, hints[key], "lora") for key, value in config.items()})


def nearest(name: str, known: Collection[str]) -> str:
    """What a message adds where a name is unknown: the nearest known one, if there is one."""
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
