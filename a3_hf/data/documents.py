"""Documents of a file: text, JSON lines, JSON (all also compressed) or parquet, with damage detected."""

import codecs
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import zstandard

KINDS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSED = (".gz", ".zst")
TAKES = f"{', '.join(KINDS)} (all but .parquet also with {' or '.join(COMPRESSED)} after it)"
LOOKED_AT = 1000  # first records, one of which must have the column
BLOCK = 1 << 16
CODE = Path(__file__).read_text(encoding="utf-8")  # part of the key of cached documents


class FileError(ValueError):
    """A file that is damaged, truncated, or of another kind than its name says. The message names it."""


def kind_of(file: str | os.PathLike) -> str | None:
    """Returns a file's kind, one of `KINDS`, by its name; None for others."""
    path = Path(file)
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
        return path.suffix if path.suffix in KINDS and path.suffix != ".parquet" else None
    return path.suffix if path.suffix in KINDS else None


def read_documents(
    file: str | os.PathLike, *, column: str = "text", separator: str | None = None, start: int = 0
) -> Iterator[str]:
    """Yields the documents of a file from number `start` on: the values of `column`, an empty text where a record has none. A
    .txt file, whose only column is 'text', is one document, or is split at `separator`, stripped, without blank pieces.

    Raises:
        FileError: damaged or truncated (compression, format or UTF-8); no such column, or one that is not text.
        OSError: the file can't be opened or read.
    """
    kind = kind_of(file)
    read = {".txt": _text_documents, ".parquet": _parquet_documents}.get(kind, _json_documents)
    with _naming(file, kind):
        yield from read(file, column, separator, start)


def fingerprint(file: str | os.PathLike) -> list[int | str]:
    """Returns a file's size in bytes and a hash of its first and last 64 KiB."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        ends = stream.read(BLOCK)
        stream.seek(max(size - BLOCK, 0))
        ends += stream.read(BLOCK)
    return [size, hashlib.sha256(ends).hexdigest()]


def check_separator(separator: str | None, files: Iterable[str | os.PathLike]) -> None:
    """Raises ValueError for a document separator without a .txt file."""
    if separator is not None and not any(kind_of(file) == ".txt" for file in files):
        raise ValueError(
            f"document_separator={separator!r} has no effect: it is for .txt files; elsewhere each record is a document"
        )


def split_text(text: str, separator: str | None) -> list[str]:
    """Splits the text of a .txt file into documents, stripped, without blank ones."""
    pieces = text.split(separator) if separator is not None else [text]
    return [piece.strip() for piece in pieces if piece.strip()]


@contextmanager
def _naming(file: str | os.PathLike, kind: str | None) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise FileError(f"{file}: {error}") from error
    except EOFError as error:
        raise FileError(f"{file}: is cut off: its compressed data ends too early") from error
    except (zlib.error, zstandard.ZstdError, pa.ArrowInvalid, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the system's; damaged gzip data and parquet pages have no errno
        raise FileError(f"{file}: can't be read as {kind.lstrip('.')}: {' '.join(str(error).split())}") from error


class _Frames(io.RawIOBase):
    """The content of a .zst file of one or more frames. Identical to zstandard's reader except: a truncated last frame raises
    EOFError.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.frame, self.packed, self.text = file, None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.text:
            self.packed = self.packed or self.file.read(BLOCK)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError
                return 0
            if self.frame is None:
                self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self.text = memoryview(self.frame.decompress(self.packed))
            self.packed = self.frame.unused_data if self.frame.eof else b""
            self.frame = None if self.frame.eof else self.frame
        count = min(len(buffer), len(self.text))
        buffer[:count] = self.text[:count]
        self.text = self.text[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


def is_remote(file: str | os.PathLike) -> bool:
    """Returns whether a file is a URL (hf://… or another that fsspec opens)."""
    return "://" in str(file)


def _open(file: str | os.PathLike) -> BinaryIO:
    stream = io.BufferedReader(fsspec.open(str(file), "rb").open()) if is_remote(file) else open(file, "rb")
    suffix = Path(file).suffix
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=stream)
    return io.BufferedReader(_Frames(stream)) if suffix == ".zst" else stream


def _decoded(content: bytes, at: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise FileError(f"not UTF-8: {error.reason} at byte {at + error.start}") from error


def _text_documents(file, column: str, separator: str | None, start: int) -> Iterator[str]:
    if column != "text":
        raise FileError(f"text_column={column!r}: not in it, which has text")
    with _open(file) as stream:
        text = _decoded(stream.read()).removeprefix("\ufeff")
    yield from split_text(text.replace("\r\n", "\n").replace("\r", "\n"), separator)[start:]


def _json_documents(file, column: str, separator: None, start: int) -> Iterator[str]:
    others = {}
    for _, record in itertools.islice(_records(file), LOOKED_AT):
        if column in record:
            break
        others.update(record)
    else:
        if others:
            raise FileError(f"text_column={column!r}: not in it, which has {', '.join(others)}")
    for where, record in _records(file, start):
        yield _text(record.get(column), column, where)


def _records(file, start: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place and content of each record of JSON lines, or of the list in a .json file."""
    with _open(file) as stream:
        if kind_of(file) == ".json" and stream.peek(BLOCK)[:BLOCK].removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
            content = _parsed(_decoded(stream.read()), "it")
            yield from ((f"record {at}", _record(content[at], f"record {at}")) for at in range(start, len(content)))
            return
        number, at = 0, 0
        for line_number, line in enumerate(stream, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if line_number == 1 else line
            if content.strip():
                if number >= start:
                    where = f"line {line_number}"
                    yield where, _record(_parsed(_decoded(content, at + len(line) - len(content)), where), where)
                number += 1
            at += len(line)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FileError(f"{where} is not JSON: {error.msg} at its column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands
        raise FileError(f"{where} can't be read as JSON: {error}") from error


def _record(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FileError(f"{where} is {json.dumps(value)[:40]}: expected a record {{…}}")
    return value


def _parquet_documents(file, column: str, separator: None, start: int) -> Iterator[str]:
    table = parquet.ParquetFile(file)
    if column not in table.schema_arrow.names:
        raise FileError(f"text_column={column!r}: not in it, which has {', '.join(table.schema_arrow.names)}")
    kind = table.schema_arrow.field(column).type
    if str(kind) not in ("string", "large_string", "string_view", "null"):
        raise FileError(f"text_column={column!r}: it holds {kind} there, not text")
    for batch in table.iter_batches(batch_size=100, columns=[column]):
        skipped = min(start, len(batch))
        start -= skipped
        yield from (text or "" for text in batch.column(0)[skipped:].to_pylist())


def _text(value: Any, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise FileError(f"text_column={column!r}: {where} holds {json.dumps(value)[:40]} there, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise FileError(f"text_column={column!r}: {where} holds half a character (a lone surrogate) there") from None
    return value
