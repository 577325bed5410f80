"""Documents of a recipe's train_file, validation_file or dataset_name, as cached datasets."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from .arguments import DataArguments
from .documents import CODE, TAKES, FileError, check_separator, fingerprint, kind_of, read_documents


def load_documents(arguments: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Returns the documents to train on and to evaluate on (None: no evaluation data), each with one column of text.

    Raises:
        ValueError: the errors of `load_rows` about files and text.
    """
    files = {"train_file": arguments.train_file, "validation_file": arguments.validation_file}
    files = {name: Path(file) for name, file in files.items() if file is not None}
    for name, file in files.items():
        _check_file(name, file)
    check_separator(arguments.document_separator, files.values())

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
        if not any(text.strip() for batch in documents.iter(1000) for text in texts_of(batch)):
            raise ValueError(f"{part_source}: no document holds text")
    return train, evaluation


def texts_of(batch: Mapping[str, list[str | None]]) -> list[str]:
    """Returns the texts of a batch of one column; an empty text where a record has none."""
    (column,) = batch.values()
    return [text or "" for text in column]


def _check_file(name: str, file: Path):
    """Raises ValueError unless `file` exists, is of a known kind, and holds something."""
    if not file.is_file():
        raise ValueError(f"{name}={str(file)!r}: no such file (relative paths start at {Path.cwd()})")
    if kind_of(file) is None:
        raise ValueError(f"{name}={str(file)!r}: expected a file that ends in {TAKES}")
    if file.stat().st_size == 0:
        raise ValueError(f"{name}={str(file)!r}: the file is empty")


def _read_documents(name: str, file: Path, arguments: DataArguments) -> Dataset:
    """Returns the documents of `file` as a dataset of one column; `name` is the argument in messages."""
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
                "version": f"{fingerprint(file)} {file.stat().st_mtime_ns} {CODE}",  # text: datasets takes lists for shards
            },
        )
    except (FileError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if not isinstance(cause, (FileError, OSError)):
            raise
        raise ValueError(f"{name}: {cause}") from error


def _documents(file: str, column: str, separator: str | None, version: str) -> Iterator[dict[str, str]]:
    """Yields the documents of a file. `version` is unused: datasets hashes the arguments as the key of its cache."""
    is_empty = True
    for text in read_documents(file, column=column, separator=separator):
        is_empty = False
        yield {column: text}
    if is_empty:  # datasets' own message would name no file
        raise FileError(f"{file}: holds no text")


def _text_column(dataset: Dataset, column: str, source: str) -> Dataset:
    if column not in dataset.column_names:
        raise ValueError(f"text_column={column!r}: not in {source}, which has {', '.join(dataset.column_names)}")
    feature = dataset.features[column]
    if feature not in (Value("string"), Value("large_string")):
        raise ValueError(f"text_column={column!r}: {source} holds {feature} there, not text")
    return dataset.select_columns([column])
