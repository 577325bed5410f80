"""Files of documents: every kind plain and compressed, whole or cut off, damaged, or with something else in them."""

import gzip
import json
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import zstandard

from a3_hf.data.arguments import DataArguments
from a3_hf.data.documents import FileError, fingerprint, kind_of, read_documents
from a3_hf.data.packing import load_rows

TEXTS = [f"document {number} of them" for number in range(300)]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def lines(texts) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


def content(kind: str, texts) -> bytes:
    if kind == ".json":
        return json.dumps([{"text": text} for text in texts], indent=1).encode()
    return "|".join(texts).encode() if kind == ".txt" else lines(texts)


@pytest.fixture
def write(tmp_path):
    def write(name, data: bytes):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json"])
def test_every_kind_is_read_whole_and_from_any_document_on(write, kind, compression):
    path = write(f"a{kind}{compression}", COMPRESS[compression](content(kind, TEXTS)))
    assert kind_of(path) == kind
    for start in (0, 1, 150, 299, 300, 400):
        assert list(read_documents(path, separator="|", start=start)) == TEXTS[start:]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_c4s_form_is_lines_in_a_json_file_of_several_parts(write, compression):
    compress = COMPRESS[compression]
    parts = b"".join(compress(lines(TEXTS[at : at + 100])) for at in (0, 100, 200))
    path = write(f"c4-train.00000-of-01024.json{compression}", parts)
    assert list(read_documents(path)) == TEXTS


def test_parquet_is_read_by_its_column_alone(tmp_path):
    table = pa.table({"text": pa.array([*TEXTS, None]), "other": pa.array([[1]] * 301)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70)
    for start in (0, 69, 130, 300):
        assert list(read_documents(tmp_path / "a.parquet", start=start)) == [*TEXTS, ""][start:]


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_anywhere_is_named(write, compression):
    """Each cut of a file of two frames but the one between them, which no file tells: before, the rest was lost silently."""
    compress = COMPRESS[compression]
    first = compress(lines(TEXTS[:100]))
    whole = first + compress(lines(TEXTS[100:]))
    cuts = [at for at in random.Random(0).sample(range(1, len(whole)), 150) if at != len(first)]
    for cut in [*cuts, len(first) + 1, len(whole) - 1, len(first) - 1]:
        path = write(f"a.jsonl{compression}", whole[:cut])
        with pytest.raises(
            FileError, match=rf"a\.jsonl{compression}: (is cut off: its compressed|.*Not a gzipped file)"
        ):
            list(read_documents(path))


def test_a_frame_cut_at_a_flush_that_ends_a_line_is_named(write):
    compressor = zstandard.ZstdCompressor().compressobj()
    flushed = compressor.compress(lines(TEXTS[:100])) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = write("a.jsonl.zst", flushed)
    read = read_documents(path)
    assert [next(read) for _ in range(100)] == TEXTS[:100]
    with pytest.raises(FileError, match="is cut off"):
        next(read)


def test_frames_that_are_to_be_skipped_are_skipped(write):
    note = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    path = write(
        "a.jsonl.zst", note + zstandard.compress(lines(TEXTS[:5])) + note + zstandard.compress(lines(TEXTS[5:9]))
    )
    assert list(read_documents(path)) == TEXTS[:9]


def test_only_the_column_of_the_text_matters(write):
    """Other columns come late, change their type or are nested; texts are null for a long time, or left out."""
    records = [{"text": None, "n": 1}] * 2000 + [{"n": "one"}, {"text": "a", "new": {"deep": [1, "x"]}}, {"text": "b"}]
    path = write("a.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    assert [text for text in read_documents(path) if text] == ["a", "b"]
    assert list(read_documents(path, start=2001)) == ["a", "b"]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_file_of_an_url_is_read_as_a_local_one(compression):
    filesystem = fsspec.filesystem("memory")
    whole = COMPRESS[compression](lines(TEXTS))
    filesystem.pipe("/repository/a.jsonl" + compression, whole)
    assert list(read_documents(f"memory://repository/a.jsonl{compression}", start=7)) == TEXTS[7:]
    filesystem.pipe("/repository/a.jsonl" + compression, whole[:-20])
    with pytest.raises(FileError, match="^memory://repository/a.jsonl"):
        list(read_documents(f"memory://repository/a.jsonl{compression}"))


ODD_FILES = {
    "a.jsonl": [
        (b'{"text": "a"}\n{"text": "b', "line 2 is not JSON: Unterminated string"),
        (b'{"text": "a"}\n[1]\n', r"line 2 is \[1\]: expected a record"),
        (b'{"text": "a"}\n\n3\n', "line 3 is 3: expected a record"),
        (b'{"text": "a"}\n{"text": ["b"]}\n', r"text_column='text': line 2 holds \[\"b\"\] there, not text"),
        (b'{"text": "a"}\n{"text": 1.5}\n', "line 2 holds 1.5 there, not text"),
        (b'{"text": "a\\ud800"}\n', "line 1 holds half a character"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "not UTF-8: invalid start byte at byte 24"),
        (b"\xef\xbb\xbf" + b'{"text": "\xff"}\n', "not UTF-8: invalid start byte at byte 13"),
        (b'{"body": "a"}\n{"n": 1}\n', "text_column='text': not in it, which has body, n"),
        (b'{"text": "a", "n": ' + b"[" * 200_000, "line 1 can't be read as JSON"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "line 1 can't be read as JSON"),
        (b"\x28\xb5\x2f\xfd\x00", "not UTF-8"),
    ],
    "a.json": [
        (b'[{"text": "a"}, {"text": "b"', "it is not JSON: Expecting ',' delimiter"),
        (b'[{"text": "a"}, 3]', "record 1 is 3: expected a record"),
        (b'[{"text": "a"}, {"text": 3}]', "record 1 holds 3 there, not text"),
        (b'[{"body": "a"}]', "text_column='text': not in it, which has body"),
        (b'{\n "text": "a"\n}', "line 1 is not JSON"),
    ],
    "a.jsonl.zst": [
        (lines(TEXTS), "can't be read as jsonl"),
        (zstandard.compress(lines(TEXTS)) + b"junk", "can't be read as jsonl"),
    ],
    "a.jsonl.gz": [
        (lines(TEXTS), "can't be read as jsonl: Not a gzipped file"),
        (gzip.compress(lines(TEXTS)) + b"junk", "can't be read as jsonl: Not a gzipped file"),
        (gzip.compress(lines(TEXTS))[:-8] + b"\0" * 8, "can't be read as jsonl: CRC check failed"),
    ],
    "a.txt": [(b"a \xf6", "not UTF-8: .* at byte 2"), (b"\xef\xbb\xbf" + b"a\xff", "not UTF-8: .* at byte 4")],
    "a.txt.gz": [(gzip.compress(b"a \xf6"), "not UTF-8: .* at byte 2")],
    "a.parquet": [(b"PAR1", "can't be read as parquet"), (b"PAR1" + b"\0" * 100 + b"PAR1", "can't be read as parquet")],
}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [(name, *odd) for name, odds in ODD_FILES.items() for odd in odds],
    ids=lambda value: "",
)
def test_an_odd_file_is_named(write, name, data, message):
    path = write(name, data)
    with pytest.raises(FileError, match=f"^{path}: .*{message}") as raised:
        list(read_documents(path))
    assert "\n" not in str(raised.value)


def test_a_damaged_page_of_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": TEXTS}), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[40:80] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"a\.parquet: can't be read as parquet"):
        list(read_documents(path))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet.gz", "a.gz", "a.zst", "a", "a.jsonl.bz2", "a.txt.zip"])
def test_other_kinds_are_none(name):
    assert kind_of(name) is None


def test_a_fingerprint_sees_the_size_and_both_ends(write):
    first = fingerprint(write("a.txt", b"a" * 200_000))
    assert first == fingerprint(write("b.txt", b"a" * 200_000)) and first[0] == 200_000
    for other in (b"a" * 200_001, b"b" + b"a" * 199_999, b"a" * 199_999 + b"b", b""):
        assert fingerprint(write("c.txt", other)) != first


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.txt.gz", "a.txt.zst"])
def test_compressed_files_are_trained_on_as_plain_ones(write, tokenizer, tmp_path, name):
    kind = kind_of(name)
    text = (lambda: content(".jsonl", TEXTS)) if kind != ".txt" else (lambda: content(kind, TEXTS))
    rows = []
    for path in (write(f"plain{kind}", text()), write(name, COMPRESS[name[name.rindex(".") :]](text()))):
        settings = {"document_separator": "|"} if kind == ".txt" else {}
        arguments = DataArguments(train_file=str(path), block_size=16, cache_dir=str(tmp_path / "cache"), **settings)
        rows.append(load_rows(arguments, tokenizer, seed=0)[0].to_list())
    assert rows[0] == rows[1] and len(rows[0]) > 100
