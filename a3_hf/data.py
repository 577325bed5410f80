"""From files to rows: text becomes rows of `block_size` tokens that start with BOS, and rows become batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from .arguments import DataArguments
from .files import CODE, TAKES, FileError, fingerprint, kind_of, read_documents

IGNORED_LABEL = -100
# 9 bytes per token on disk, where the widths that lists of Python integers get would make 24.
ROW_FEATURES = Features(
    {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8")), "labels": List(Value("int32"))}
)
ISOLATED_ROW_FEATURES = Features({**ROW_FEATURES, "document_ids": List(Value("int32"))})


def load_rows(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int, context_length: int | None = None
) -> tuple[Dataset, Dataset | None]:
    """Packs text into rows of `block_size` tokens.

    Documents are tokenised without special tokens; after each comes the boundary token (`document_boundary`); of the
    stream so made, each row takes the next block_size − 1 tokens, behind a BOS of its own. Nothing is dropped: the last
    row is padded. Documents that hold no text are skipped; white space around a document of a .txt file belongs to the
    separator and goes with it. Rows of documents that are isolated from each other: see `pack_rows`.

    To be evaluated on: `validation_file`, or the last `validation_documents` documents of the source, which training
    never sees (a text that comes twice in the source is two documents), or nothing.

    Args:
        arguments: where the text is and how it is packed. A .txt file is read as a whole, 2 GB at most.
        tokenizer: has a BOS token, and an EOS token where that is the boundary; needs no padding token.
        seed: orders the documents under `shuffle_documents`; without effect otherwise.
        context_length: the most tokens that the model takes; None: not checked.

    Returns:
        The rows to train on and to evaluate on (None: no validation asked for), with `input_ids`, `attention_mask` (0
        at padding) and `labels`: −100 at padding and at the first token, which is given and never scored, and the ids
        unshifted elsewhere. With block_size 4, the documents "a b" and "c d", and EOS as boundary:
            {"input_ids": [bos, a, b, eos], "attention_mask": [1, 1, 1, 1], "labels": [-100, a, b, eos]}
            {"input_ids": [bos, c, d, eos], "attention_mask": [1, 1, 1, 1], "labels": [-100, c, d, eos]}
        Isolated documents add `document_ids`.

    Raises:
        ValueError: a file that is missing, of an unknown kind, empty, not UTF-8 or not what its name says; no column
            `text_column`, or one that is not text; no text, or none left to train on; a separator where no file is
            .txt; block_size above `context_length`; a tokenizer without the token that rows start with or documents
            end with.
    """
    boundary_id = check_tokens(arguments, tokenizer, context_length=context_length)
    train, evaluation = load_documents(arguments)
    if arguments.shuffle_documents:
        train = train.shuffle(seed=seed)

    parts = [(train, arguments.max_train_rows)]
    if evaluation is not None:
        parts.append((evaluation, arguments.max_eval_rows))
    rows = [
        Dataset.from_generator(
            _packed_rows,
            features=ISOLATED_ROW_FEATURES if arguments.documents == "isolated" else ROW_FEATURES,
            cache_dir=arguments.cache_dir,
            gen_kwargs={
                "documents": documents,
                "tokenizer": tokenizer,
                "boundary_id": boundary_id,
                "block_size": arguments.block_size,
                "isolated": arguments.documents == "isolated",
                "max_rows": max_rows,
                "code": Path(__file__).read_text(encoding="utf-8"),
            },
        )
        for documents, max_rows in parts
    ]
    return rows[0], rows[1] if len(rows) == 2 else None


def load_documents(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """The documents to train on and to evaluate on (None: no validation asked for), in one column of text each, as
    `load_rows` packs them but for their order.

    Raises:
        ValueError: as `load_rows`, where it is about files and text.
    """
    files = {"train_file": arguments.train_file, "validation_file": arguments.validation_file}
    files = {name: Path(file) for name, file in files.items() if file is not None}
    for name, file in files.items():
        _check_file(name, file)
    if arguments.document_separator is not None and not any(kind_of(file) == ".txt" for file in files.values()):
        raise ValueError(
            f"document_separator={arguments.document_separator!r} has no effect: it is for .txt files, and elsewhere a "
            "document is a row of the source"
        )

    if arguments.dataset_name is not None:
        source = f"dataset_name={arguments.dataset_name!r}"
        train = load_dataset(
            arguments.dataset_name,
            arguments.dataset_config_name,
            split=arguments.dataset_split,
            cache_dir=arguments.cache_dir,
        )
        train = _text_column(train, arguments.text_column, source)
    else:
        source = f"train_file={arguments.train_file!r}"
        train = _read_documents("train_file", files["train_file"], arguments)

    evaluation, evaluation_source, held_out = None, source, arguments.validation_documents
    if arguments.validation_file is not None:
        evaluation_source = f"validation_file={arguments.validation_file!r}"
        evaluation = _read_documents("validation_file", files["validation_file"], arguments)
    elif held_out:
        num_train = len(train) - held_out
        if num_train < 1:
            raise ValueError(
                f"validation_documents={held_out}: {source} has {len(train)} documents, so none is left to train on"
            )
        evaluation = train.select(range(num_train, len(train)))
        train = train.select(range(num_train))
    parts = [(train, f"{source}, to train on")]
    if evaluation is not None:
        parts.append((evaluation, f"{evaluation_source}, to evaluate on"))
    for documents, part_source in parts:
        if not any(text.strip() for batch in documents.iter(1000) for text in _texts(batch)):
            raise ValueError(f"{part_source}: no document holds text")
    return train, evaluation


def check_tokens(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None = None
) -> int:
    """The id of the token after each document.

    Raises:
        ValueError: block_size above `context_length`; a tokenizer without the token that rows start with or documents
            end with.
    """
    if context_length is not None and arguments.block_size > context_length:
        raise ValueError(f"block_size={arguments.block_size}: more than the model's context of {context_length} tokens")
    tokens = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    if tokens["bos"] is None:
        raise ValueError(
            "the tokenizer has no BOS token, with which rows start: set tokenizer.bos_token, or tokenizer_name_or_path "
            "to a tokenizer that has one"
        )
    if tokens[arguments.document_boundary] is None:
        raise ValueError(
            f"document_boundary={arguments.document_boundary!r}: the tokenizer has no such token; set "
            f"tokenizer.{arguments.document_boundary}_token, or the other boundary"
        )
    return tokens[arguments.document_boundary]


def pack_rows(
    documents: Iterable[Sequence[int]], *, bos_id: int, pad_id: int, block_size: int, isolated: bool = False
) -> Iterator[tuple[dict[str, list[int]], int]]:
    """Packs documents, token ids each with its boundary at the end, into rows of `block_size` tokens.

    Joined, a row is BOS and the next block_size − 1 tokens of the stream of all documents. Isolated, every document of a
    row starts with a BOS of its own, which is given and never scored, and `document_ids` counts the documents of the row
    from 1, 0 at padding. A document that does not fit goes on in the next row, behind that row's BOS, where it no longer
    sees what the row before holds; where a row has room for a BOS alone, it is padded. Not specified in the paper.

    Yields:
        A row, and how many tokens of the document read last are in this row and those before it. A row is yielded as soon
        as it is full, before another document is read; the last one is padded. With block_size 6, isolated, of the
        documents [a, b, eos] and [c, d, eos]:
            {"input_ids": [bos, a, b, eos, bos, c], "attention_mask": [1, 1, 1, 1, 1, 1],
             "labels": [-100, a, b, eos, -100, c], "document_ids": [1, 1, 1, 1, 2, 2]}, 1
            {"input_ids": [bos, d, eos, pad, pad, pad], "attention_mask": [1, 1, 1, 0, 0, 0],
             "labels": [-100, d, eos, -100, -100, -100], "document_ids": [1, 1, 1, 0, 0, 0]}, 3
    """
    ids, labels, document_ids, used = [], [], [], 0

    def start(document_id: int) -> None:
        ids.append(bos_id)
        labels.append(IGNORED_LABEL)
        document_ids.append(document_id)

    def row() -> dict[str, list[int]]:
        padding = block_size - len(ids)
        full = {
            "input_ids": [*ids, *[pad_id] * padding],
            "attention_mask": [1] * len(ids) + [0] * padding,
            "labels": [*labels, *[IGNORED_LABEL] * padding],
        }
        if isolated:
            full["document_ids"] = [*document_ids, *[0] * padding]
        for column in (ids, labels, document_ids):
            column.clear()
        return full

    for tokens in documents:
        used = 0
        if ids and isolated:
            start(document_ids[-1] + 1)
        while used < len(tokens):
            if not ids:
                start(1)
            piece = tokens[used : used + block_size - len(ids)]
            ids += piece
            labels += piece
            document_ids += [document_ids[-1]] * len(piece)
            used += len(piece)
            # Where isolated, a BOS that nothing follows would be of no use.
            if len(ids) > block_size - (2 if isolated else 1):
                yield row(), used
    if ids:
        yield row(), used


class RowCollator:
    """Stacks rows to a batch of (B, S) LongTensors `input_ids`, `attention_mask` and `labels`, and `document_ids` where
    the rows have them; shorter rows are padded at the right.

    Args:
        pad_token_id: what stands under the mask; no model reads it.

    Raises:
        ValueError: no rows; columns of one row that differ in length; a label at padding; a scored token with no given
            token before it: its slot may come first in an order, and would then see nothing.

    Example:
        >>> RowCollator()([
        ...     {"input_ids": [1, 7, 8], "attention_mask": [1, 1, 1], "labels": [-100, 7, 8]},
        ...     {"input_ids": [1, 9], "attention_mask": [1, 1], "labels": [-100, 9]},
        ... ])["labels"]
        tensor([[-100,    7,    8],
                [-100,    9, -100]])
    """

    def __init__(self, *, pad_token_id: int = 0):
        self.fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORED_LABEL, "document_ids": 0}

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        if not rows:
            raise ValueError("no rows to make a batch of")
        names = [name for name in self.fill if name != "document_ids" or any(name in row for row in rows)]
        for index, row in enumerate(rows):
            if any(name not in row for name in names):
                raise ValueError(f"row {index} lacks {', '.join(name for name in names if name not in row)}")
            lengths = {name: len(row[name]) for name in names}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"row {index}: its columns differ in length: {lengths}")
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor(
                [[*row[name], *[self.fill[name]] * (width - len(row[name]))] for row in rows], dtype=torch.long
            )
            for name in names
        }
        real, scored = batch["attention_mask"] != 0, batch["labels"] != IGNORED_LABEL
        _raise_at((scored & ~real).any(dim=1), "has a label at padding")
        given_before = (real & ~scored).cumsum(dim=1) > 0
        _raise_at(
            (scored & ~given_before).any(dim=1),
            "has a scored token and no given token before it, so that its prediction may see nothing; "
            "set the label of the row's first token (BOS) to -100",
        )
        return batch


def _raise_at(wrong: torch.Tensor, what: str):
    if wrong.any():
        raise ValueError(f"row {wrong.nonzero()[0].item()} {what}")


def _packed_rows(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    boundary_id: int,
    block_size: int,
    isolated: bool,
    max_rows: int | None,
    code: str,
) -> Iterator[dict[str, list[int]]]:
    """Yields the rows of `documents`, as many as `max_rows` allows, and tokenises no further than they need.

    `code` is read by nobody: the rows are cached under a hash of these arguments and of this function, of which
    datasets takes no more than the name, so that a change in this file would go unnoticed.
    """
    rows = pack_rows(
        _tokenized(documents, tokenizer, boundary_id),
        bos_id=tokenizer.bos_token_id,
        pad_id=pad_id(tokenizer),
        block_size=block_size,
        isolated=isolated,
    )
    for row, _ in itertools.islice(rows, max_rows):
        yield row


def _tokenized(documents: Dataset, tokenizer: PreTrainedTokenizerBase, boundary_id: int) -> Iterator[list[int]]:
    for batch in documents.iter(1000):
        texts = [text for text in _texts(batch) if text.strip()]
        if texts:
            yield from tokenize(texts, tokenizer, boundary_id=boundary_id)


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, *, boundary_id: int) -> list[list[int]]:
    """The ids of each text, without special tokens, and its boundary."""
    return [[*ids, boundary_id] for ids in encode_documents(texts, tokenizer)]


def encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each text, without special tokens: where it spells one ("</s>" in HTML), those are letters like others.

    Raises:
        ValueError: a special token in a text, with a tokenizer that has no other way to write its letters.
    """
    # `verbose` would warn that a document is longer than the context, which is what packing is for.
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [ids if special.isdisjoint(ids) else _spelled(ids, special, tokenizer) for ids in encoded]


def _spelled(ids: list[int], special: set[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with special tokens, which the tokenizer's own merges may make of their letters, letter by letter."""
    pieces = [tokenizer.convert_ids_to_tokens(token) if token in special else None for token in ids]
    letters = tokenizer.backend_tokenizer.model.tokenize if tokenizer.is_fast else None
    spelled = [
        [token] if piece is None else [part.id for letter in piece for part in letters(letter)] if letters else [token]
        for token, piece in zip(ids, pieces, strict=True)
    ]
    flat = [token for part in spelled for token in part]
    if not special.isdisjoint(flat):
        found = next(piece for piece in pieces if piece is not None)
        raise ValueError(
            f"a document holds {found!r}, which the tokenizer of {tokenizer.name_or_path!r} takes for a special token "
            "whatever it is told: take it out of the text, or take another tokenizer"
        )
    return flat


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands at padding."""
    # Any id will do, since nothing reads it; LLaMA's tokenizers have no padding token.
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _texts(batch: Mapping[str, list[str | None]]) -> list[str]:
    (column,) = batch.values()
    return [text or "" for text in column]


def _check_file(name: str, file: Path):
    """Raises ValueError unless `file` exists, is of a known kind, and holds something."""
    if not file.is_file():
        raise ValueError(f"{name}={str(file)!r}: there is no such file (relative paths start at {Path.cwd()})")
    if kind_of(file) is None:
        raise ValueError(f"{name}={str(file)!r}: takes a file that ends in {TAKES}")
    if file.stat().st_size == 0:
        raise ValueError(f"{name}={str(file)!r}: the file is empty")


def _read_documents(name: str, file: Path, arguments: DataArguments) -> Dataset:
    """The documents of `file`, a dataset of one column; `name` is the argument's."""
    separator = arguments.document_separator if kind_of(file) == ".txt" else None
    try:
        return Dataset.from_generator(
            _documents,
            features=Features({arguments.text_column: Value("large_string")}),
            cache_dir=arguments.cache_dir,
            gen_kwargs={
                "file": str(file.resolve()),
                "column": arguments.text_column,
                "separator": separator,
                "version": f"{fingerprint(file)} {file.stat().st_mtime_ns} {CODE}",  # a list would be taken for shards
            },
        )
    except (FileError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if not isinstance(cause, (FileError, OSError)):
            raise
        raise ValueError(f"{name}: {cause}") from error


def _documents(file: str, column: str, separator: str | None, version: str) -> Iterator[dict[str, str]]:
    """Yields the documents of a file. `version` is read by nobody: the documents are cached under a hash of these."""
    is_empty = True
    for text in read_documents(file, column=column, separator=separator):
        is_empty = False
        yield {column: text}
    if is_empty:  # of which datasets would say: Instruction "train" corresponds to no data
        raise FileError(f"{file}: holds no text")


def _text_column(dataset: Dataset, column: str, source: str) -> Dataset:
    if column not in dataset.column_names:
        raise ValueError(f"text_column={column!r}: not in {source}, which has {', '.join(dataset.column_names)}")
    feature = dataset.features[column]
    if feature not in (Value("string"), Value("large_string")):
        raise ValueError(f"text_column={column!r}: {source} holds {feature} there, not text")
    return dataset.select_columns([column])
