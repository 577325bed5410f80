"""Data settings of a recipe."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from a3_hf.settings import check_keys, checked_value, shown_value

from .fim import FimArguments


@dataclass(frozen=True)
class SourceArguments:
    """One source of a mixture, which is read during training (see `a3_hf.data.mixture`). Entries of a recipe's `sources`:
    `fineweb: {dataset_name: HuggingFaceFW/fineweb, dataset_config_name: sample-10BT, weight: 0.5}`,
    `stories: {path: stories/*.jsonl.zst}`.

    Args:
        path: a file, or a pattern of files of one kind: .jsonl, .json or .txt, plain or as .gz or .zst; .parquet.
        dataset_name: a hub dataset, instead of `path`, with its configuration and split.
        text_column: column of the text; .txt files have 'text' only.
        weight: relative frequency of the source's documents.

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
            raise ValueError(f"path={self.path!r}, dataset_name={self.dataset_name!r}: expected exactly one of the two")
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(f"dataset_config_name={self.dataset_config_name!r} has no effect without dataset_name")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight={self.weight}: expected a number above 0")


def _sources(config: Any) -> dict[str, SourceArguments]:
    hints = get_type_hints(SourceArguments)
    if not isinstance(config, Mapping) or not config:
        raise ValueError(f"sources: expected a mapping {{name: {{path: …, weight: …}}}}, got {shown_value(config)}")
    sources = {}
    for name, source in config.items():
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"sources: expected names of letters, digits, _ and -, got {shown_value(name)}")
        if isinstance(source, Mapping):
            check_keys(f"sources: {name}", source, hints)
            checked = {key: checked_value(key, value, hints[key], f"sources: {name}") for key, value in source.items()}
            try:
                source = SourceArguments(**checked)
            except ValueError as error:
                raise ValueError(f"sources: {name}: {error}") from error
        if not isinstance(source, SourceArguments):
            raise ValueError(f"sources: {name}: expected a mapping of {', '.join(hints)}, got {shown_value(source)}")
        sources[name] = source
    return sources


@dataclass
class DataArguments:
    """Data sources and how their text is packed into rows; see `data.packing.load_rows`, and `data.mixture` for `sources`.
    Relative paths start at the current directory.

    Raises:
        ValueError: no source of text or several; several of validation; a number out of range; a setting without effect.
    """

    train_file: str | None = field(
        default=None, metadata={"help": "Training text: .txt, .jsonl or .json, also as .gz or .zst; .parquet."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset, instead of train_file."})
    sources: dict | None = field(
        default=None,
        metadata={"help": "Mixture read during training, instead of both: {name: {path: …, weight: …}}."},
    )
    num_shards: int = field(
        default=16, metadata={"help": "With sources: shards of the text, divided among the readers."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of dataset_name."})
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset_name; may be a slice."})
    text_column: str = field(default="text", metadata={"help": "Column of the text; .txt files have 'text' only."})
    document_separator: str | None = field(
        default=None, metadata={"help": "Separator of documents in .txt files. None: a file is one document."}
    )
    document_boundary: Literal["bos", "eos"] = field(
        default="eos", metadata={"help": "Token after each document, as in pretraining."}
    )
    documents: Literal["joined", "isolated"] = field(
        default="joined",
        metadata={
            "help": "joined: documents of a row see each other; isolated: they do not, and each starts with BOS."
        },
    )
    fim: dict | None = field(
        default=None, metadata={"help": "Rows of one blank each, in place of packed rows: {rate: …, psm: …, spm: …}."}
    )
    block_size: int = field(default=2048, metadata={"help": "Tokens per row, including the BOS at its start."})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation file, read as train_file."})
    validation_documents: int = field(
        default=0,
        metadata={"help": "Number of documents held out for evaluation: the source's last, or the first of sources."},
    )
    shuffle_documents: bool = field(
        default=False, metadata={"help": "Shuffle the training documents by the seed before packing."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Maximum number of training rows."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Maximum number of evaluation rows."})
    accept_changed_inputs: bool = field(
        default=False, metadata={"help": "Resume although input files changed since the run was started."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Cache folder of datasets."})

    def __post_init__(self):
        if self.fim is not None:
            self._check_fim()
        if self.sources is not None:
            self._check_sources()
        elif self.num_shards != 16:
            raise ValueError(f"num_shards={self.num_shards} has no effect without sources")
        elif (self.train_file is None) == (self.dataset_name is None):
            raise ValueError(
                f"train_file={self.train_file!r}, dataset_name={self.dataset_name!r}: expected exactly one of the two"
            )
        if self.dataset_name is None and self.dataset_config_name is not None:
            raise ValueError(f"dataset_config_name={self.dataset_config_name!r} has no effect without dataset_name")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size}: expected 2 or more, for BOS and at least one token")
        if self.document_boundary not in ("bos", "eos"):
            raise ValueError(f"document_boundary={self.document_boundary!r}: expected 'bos' or 'eos'")
        if self.documents not in ("joined", "isolated"):
            raise ValueError(f"documents={self.documents!r}: expected 'joined' or 'isolated'")
        if self.document_separator == "":
            raise ValueError("document_separator='': expected text, or null if a file is one document")
        if self.validation_documents < 0:
            raise ValueError(f"validation_documents={self.validation_documents}: expected 0 or more")
        if self.validation_documents and self.validation_file is not None:
            raise ValueError(
                f"validation_documents={self.validation_documents} and validation_file={self.validation_file!r}: "
                "expected at most one of the two"
            )
        for name, limit in (("max_train_rows", self.max_train_rows), ("max_eval_rows", self.max_eval_rows)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit}: expected 1 or more, or null for no limit")
        if self.max_eval_rows is not None and not self.validation_documents and self.validation_file is None:
            raise ValueError(
                f"max_eval_rows={self.max_eval_rows} has no effect without validation_file or validation_documents"
            )

    def _check_fim(self) -> None:
        if self.sources is not None:
            raise ValueError(
                "fim and sources: set one of the two; rows with blanks are made of train_file or dataset_name"
            )
        if self.documents != "joined":
            raise ValueError(f"documents={self.documents!r} has no effect with fim, whose rows hold one document each")
        if not isinstance(self.fim, FimArguments):
            hints = get_type_hints(FimArguments)
            if not isinstance(self.fim, Mapping):
                raise ValueError(f"fim: expected a mapping of {', '.join(hints)}, got {shown_value(self.fim)}")
            check_keys("fim", self.fim, hints)
            self.fim = FimArguments(
                **{key: checked_value(key, value, hints[key], "fim") for key, value in self.fim.items()}
            )

    def _check_sources(self) -> None:
        given = {"train_file": self.train_file, "dataset_name": self.dataset_name}
        for name, value in {**given, "dataset_config_name": self.dataset_config_name}.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} and sources: expected only one of the two")
        if self.max_train_rows is not None:
            raise ValueError(
                f"max_train_rows={self.max_train_rows} has no effect with sources, read until max_steps. Leave it out"
            )
        if self.shuffle_documents:
            raise ValueError(
                "shuffle_documents=True has no effect with sources, which are read in the order of their files. Leave it out"
            )
        if self.num_shards < 1:
            raise ValueError(f"num_shards={self.num_shards}: expected 1 or more")
        self.sources = _sources(self.sources)
