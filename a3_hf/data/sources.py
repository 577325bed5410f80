"""Text sources of a streamed run: local files or hub datasets, read shard by shard, with retries."""

import glob
import os
import time
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

RETRY_WAITS = (1.0, 5.0, 25.0)  # seconds before each new try of a source that failed


PERMANENT = (FileError, FileNotFoundError, PermissionError, IsADirectoryError)  # trying again would not help


class SourceError(OSError):
    """A source that can't be read on, although that was tried again, or that holds nothing to read."""


@dataclass(frozen=True)
class Source:
    """One source, opened: texts in files, in the order of the files.

    Args:
        files: what its files are called; each is read alone.
        versions: what tells each file from another of its name; see `_versions`.
        dataset: of the hub, one shard for each file; None for local files.
        held_out: the (file, document) at which training begins.
    """

    name: str
    arguments: SourceArguments
    files: Sequence[str]
    versions: Sequence[list]
    dataset: IterableDataset | None = None
    separator: str | None = None
    held_out: tuple[int, int] = (0, 0)

    def texts(self, file: int, *, start: int = 0) -> Iterator[str]:
        """The documents of the file of that number, from document `start` on; blank ones are empty texts.

        Raises:
            FileError: reading it again would not help; see `read_documents`. Others: whatever reading raises.
        """
        column = self.arguments.text_column
        if self.dataset is None:
            yield from read_documents(self.files[file], column=column, separator=self.separator, start=start)
            return
        # Example by example: tables of a stream may differ in columns and types, which nobody asks for.
        dataset = self.dataset.shard(len(self.files), file).skip(start)
        for example in dataset:
            if column not in example:
                raise FileError(f"text_column={column!r}: not in {self.files[file]}, which has {', '.join(example)}")
            text = example[column]
            if not isinstance(text, str | None):
                raise FileError(f"text_column={column!r}: {self.files[file]} holds {shown_value(text)} there, not text")
            yield text or ""


def open_source(name: str, arguments: SourceArguments, *, separator: str | None = None) -> Source:
    """Finds a source's files.

    Raises:
        ValueError: a path that fits no file, or files of an unknown kind or of several.
    """
    if arguments.dataset_name is not None:
        builder = load_dataset_builder(arguments.dataset_name, arguments.dataset_config_name)
        own = (builder.config.data_files or {}).get(arguments.dataset_split, [])
        if isinstance(builder, Json) and own and all(kind_of(path) and "::" not in path for path in own):
            # Not through datasets, which takes the columns and their types from the first block of the first file.
            return Source(name, arguments, list(own), _versions(own))
        dataset = builder.as_streaming_dataset(split=arguments.dataset_split)
        files = [f"{arguments.dataset_name}, file {number}" for number in range(dataset.num_shards)]
        paths = [path for split in (builder.config.data_files or {}).values() for path in split]
        return Source(name, arguments, files, _versions(paths), dataset=dataset)
    pattern = arguments.path
    # A file's own name comes first, where it looks like a pattern.
    files = [pattern] if Path(pattern).is_file() else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        raise ValueError(f"sources: {name}: path={pattern!r}: there is no such file (relative to {Path.cwd()})")
    files = [str(Path(file).resolve()) for file in files]
    kinds = {kind_of(file) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(f"sources: {name}: path={pattern!r}: takes files of one kind, which end in one of {TAKES}")
    return Source(name, arguments, files, _versions(files), separator=separator)


def _versions(paths: Sequence[str]) -> list[list]:
    """Of each local file its name, size and the hash of its ends; of each of the hub's, its path, which has the revision."""
    return [[path] if is_remote(path) else [Path(path).name, *fingerprint(path)] for path in paths]


class DocumentReader:
    """The documents of a source that fall to one shard, without end: from its last the shard goes on at its first.

    With as many files as shards or more, a shard has whole files; with fewer, several shards share a file, of which each
    takes every so-many-th document. Either way, all shards together have each document once.

    Args:
        place: (times read through, the file's place among the shard's, documents of the file behind).
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
        """The next text that is not blank. What fails is tried again after each of `RETRY_WAITS`, unless that can't help.

        Raises:
            SourceError: it failed each time, or no document of the shard holds text.
        """
        for tries, wait in enumerate((*RETRY_WAITS, None), start=1):
            try:
                text, self.place = next(self._texts)
                return text
            except SourceError:
                raise
            except Exception as error:  # the network, a disk: any library's error
                _, number, document = self.place
                file = self.source.files[self.files[min(number, len(self.files) - 1)]]
                what = f"{self.whose} can't be read on at or after document {document} of {file}: "
                if isinstance(error, PERMANENT):
                    raise SourceError(f"{self.whose}: {error}") from error
                if wait is None:
                    raise SourceError(f"{what}{error!r} (tried {tries} times)") from error
                logger.warning(f"{what}{error!r}; trying again in {wait:g} s")
                time.sleep(wait)
                self._texts = self._read(*self.place)

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
            logger.warning(f"{self.whose}: read to its end {passes + 1} times; goes on at its first document")
            passes, number, found = passes + 1, 0, False


def check_shards(source: Source, num_shards: int) -> None:
    """Raises SourceError unless each shard has a document to train on. Of the hub's files, those are opened that shards
    share; a file for each takes too many requests.
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
                f"{len(shards)} shards that share it: num_shards={num_shards} takes less, {max(found, 1) * num_files} at most"
            )
