"""Text sources of a mixture: local files or hub datasets, read shard by shard."""

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import IterableDataset, load_dataset_builder
from datasets.packaged_modules.json.json import Json
from transformers.utils import logging

from a3_hf.settings import shown_value

from .arguments import SourceArguments
from .documents import TAKES, FileError, fingerprint, is_remote, kind_of, read_documents

logger = logging.get_logger(__name__)


class SourceError(OSError):
    """A source that can't be read further, or has no text. (`datasets` and the hub's client retry remote reads themselves:
    `datasets.config.STREAMING_READ_MAX_RETRIES`.)
    """


@dataclass(frozen=True)
class Source:
    """An opened source: documents in files, read in the order of the files.

    Args:
        files: names of the files.
        versions: for each file its name, its size and a hash, or its URL; see `_versions`.
        dataset: a streamed dataset with one shard per file; None where files are read directly.
        held_out: (file, document) of the first document to train on.
    """

    name: str
    arguments: SourceArguments
    files: Sequence[str]
    versions: Sequence[list]
    dataset: IterableDataset | None = None
    separator: str | None = None
    held_out: tuple[int, int] = (0, 0)

    def texts(self, file: int, *, start: int = 0) -> Iterator[str]:
        """Yields the documents of a file from number `start` on; an empty text where a record has none.

        Raises:
            FileError: a damaged file, or no such column of text. Other errors come from the reading library.
        """
        column = self.arguments.text_column
        if self.dataset is None:
            yield from read_documents(self.files[file], column=column, separator=self.separator, start=start)
            return
        # Example by example: the other columns of a stream's tables may differ from file to file.
        for example in self.dataset.shard(len(self.files), file).skip(start):
            if column not in example:
                raise FileError(f"text_column={column!r}: not in {self.files[file]}, which has {', '.join(example)}")
            text = example[column]
            if not isinstance(text, str | None):
                raise FileError(f"text_column={column!r}: {self.files[file]} holds {shown_value(text)} there, not text")
            yield text or ""


def open_source(name: str, arguments: SourceArguments, *, separator: str | None = None) -> Source:
    """Finds a source's files.

    Raises:
        ValueError: a path that matches no file, or files of an unknown kind or of several kinds.
    """
    if arguments.dataset_name is not None:
        builder = load_dataset_builder(arguments.dataset_name, arguments.dataset_config_name)
        own = (builder.config.data_files or {}).get(arguments.dataset_split, [])
        if isinstance(builder, Json) and own and all(kind_of(path) and "::" not in path for path in own):
            # Not through datasets: it infers the columns and types from the first block of the first file.
            return Source(name, arguments, list(own), _versions(own))
        dataset = builder.as_streaming_dataset(split=arguments.dataset_split)
        files = [f"{arguments.dataset_name}, file {number}" for number in range(dataset.num_shards)]
        paths = [path for split in (builder.config.data_files or {}).values() for path in split]
        return Source(name, arguments, files, _versions(paths), dataset=dataset)
    pattern = arguments.path
    # An existing file's name may look like a pattern.
    files = [pattern] if Path(pattern).is_file() else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        raise ValueError(f"sources: {name}: path={pattern!r}: no such file (relative paths start at {Path.cwd()})")
    files = [str(Path(file).resolve()) for file in files]
    kinds = {kind_of(file) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(f"sources: {name}: path={pattern!r}: expected files of one kind, ending in one of {TAKES}")
    return Source(name, arguments, files, _versions(files), separator=separator)


def _versions(paths: Sequence[str]) -> list[list]:
    """Returns [name, size, hash] of each local file and [URL] of each remote one, which contains the revision on the hub."""
    return [[path] if is_remote(path) else [Path(path).name, *fingerprint(path)] for path in paths]


class DocumentReader:
    """Endless reader of one shard of a source: after the last document it starts again at the first.

    With at least as many files as shards, a shard has whole files. With fewer, k shards share a file and each takes every k-th
    document. Together the shards have each document once.

    Args:
        place: where to start: (passes over the shard so far, index of the file in the shard, documents read of it).
    """

    def __init__(self, source: Source, *, shard: int = 0, num_shards: int = 1, place: Sequence[int] = (0, 0, 0)):
        self.source, self.num_shards = source, num_shards
        num_files = len(source.files)
        self.files = range(shard, num_files, num_shards) or range(shard % num_files, shard % num_files + 1)
        self.stride = len(range(self.files[0], num_shards, num_files)) if num_files < num_shards else 1
        self.offset = shard // num_files if num_files < num_shards else 0
        self.whose = f"source {source.name!r}" + (f", shard {shard} of {num_shards}" if num_shards > 1 else "")
        self.place = tuple(place)
        self._texts = self._read(*self.place)

    def next_document(self) -> str:
        """Returns the next document that is not blank.

        Raises:
            SourceError: reading failed, or no document of the shard has text.
        """
        try:
            text, self.place = next(self._texts)
        except SourceError:
            raise
        except FileError as error:
            raise SourceError(f"{self.whose}: {error}") from error
        except Exception as error:  # the network, a disk: any library's error
            _, number, document = self.place
            file = self.source.files[self.files[min(number, len(self.files) - 1)]]
            raise SourceError(
                f"{self.whose}: can't be read at or after document {document} of {file}: {error!r}"
            ) from error
        return text

    def _read(self, passes: int, number: int, start: int) -> Iterator[tuple[str, tuple[int, int, int]]]:
        found = number > 0 or start > 0
        while True:
            for place in range(number, len(self.files)):
                file, seen = self.files[place], start
                for index, text in enumerate(self.source.texts(file, start=start), start=start):
                    seen = index + 1
                    is_ours = index % self.stride == self.offset and (file, index) >= self.source.held_out
                    if is_ours and text.strip():
                        found = True
                        yield text, (passes, place, seen)
                if seen == 0:
                    logger.warning(f"{self.whose}: {self.source.files[file]} is empty")
                start = 0
            if not found:
                advice = "; with so few documents, set num_shards lower" if self.num_shards > 1 else ""
                raise SourceError(f"{self.whose}: no document to train on holds text{advice}")
            logger.warning(f"{self.whose}: read to its end {passes + 1} times; starting again at its first document")
            passes, number, found = passes + 1, 0, False


def check_shards(source: Source, num_shards: int) -> None:
    """Raises SourceError unless each shard has a document to train on. Remote files are opened only where shards share
    them: one request per file of a large dataset is too many.
    """
    num_files = len(source.files)
    if num_files >= num_shards:
        is_local = source.dataset is None and not is_remote(source.files[0])
        for shard in range(num_shards if is_local else 0):
            DocumentReader(source, shard=shard, num_shards=num_shards).next_document()
        return
    for file in range(num_files):
        shards = range(file, num_shards, num_files)
        missing, found = set(range(len(shards))), 0
        for index, text in enumerate(source.texts(file)):
            if (file, index) >= source.held_out and text.strip():
                missing.discard(index % len(shards))
                found += 1
            if not missing:
                break
        if missing:
            raise SourceError(
                f"source {source.name!r}: {source.files[file]} has {found} documents to train on, too few for the "
                f"{len(shards)} shards that share it. Set num_shards to {max(found, 1) * num_files} at most"
            )
