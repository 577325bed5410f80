"""One recipe = one complete run: its settings and their types."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from transformers import TrainingArguments

from .checking import check_keys, checked_value, shown_value
from .curriculum import Curriculum
from .training_fields import check_fields


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
            "help": "a3: what a slot starts as; left_token: as the token on its left where it sees it; query_embed: the "
            "paper's one vector. None: as stored, and left_token from a LLaMA."
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
        path: a file, or a pattern of files that are of one kind: .jsonl, .json or .txt, plain or as .gz or .zst; .parquet.
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


def _sources(config: Any) -> dict[str, SourceArguments]:
    hints = get_type_hints(SourceArguments)
    if not isinstance(config, Mapping) or not config:
        raise ValueError(f"sources: takes a mapping {{name: {{path: …, weight: …}}}}, got {shown_value(config)}")
    sources = {}
    for name, source in config.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"sources: a source's name is letters, digits, _ and -, got {shown_value(name)}")
        if isinstance(source, Mapping):
            check_keys(f"sources: {name}", source, hints)
            checked = {key: checked_value(key, value, hints[key], f"sources: {name}") for key, value in source.items()}
            try:
                source = SourceArguments(**checked)
            except ValueError as error:
                raise ValueError(f"sources: {name}: {error}") from error
        if not isinstance(source, SourceArguments):
            raise ValueError(f"sources: {name} takes a mapping of {', '.join(hints)}, got {shown_value(source)}")
        sources[name] = source
    return sources


@dataclass
class DataArguments:
    """Where text comes from and how it becomes rows; see `a3_hf.data.load_rows`, and `a3_hf.streaming` for `sources`.
    Relative paths start at the current directory.

    Raises:
        ValueError: no source, or two; two sources of validation; a number out of range; a setting that would have no
            effect beside the others.
    """

    train_file: str | None = field(
        default=None, metadata={"help": "A .txt, .jsonl, .json or .parquet file; the first three also as .gz or .zst."}
    )
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
    accept_changed_inputs: bool = field(
        default=False, metadata={"help": "Go on although files were changed since the run was started."}
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
    # Identical to TrainingArguments except: the defaults below, and what `a3_hf.training_fields` refuses.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays false: the trainer draws the orders from the rows' own columns."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report to; nowhere unless asked."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logs."}
    )
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
        check_fields(self)
        if isinstance(self.deepspeed, str) and not Path(self.deepspeed).is_file():
            raise ValueError(f"deepspeed={self.deepspeed!r}: there is no such file (relative to {Path.cwd()})")
        try:
            super().__post_init__()
        except ImportError as error:
            raise ValueError(f"a setting needs a package that is not installed: {error}") from error

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
