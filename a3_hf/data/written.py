"""Documents that a model wrote (`scripts/write_text.py`), as rows whose written tokens alone are scored."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from .arguments import DataArguments
from .collator import IGNORED_LABEL

LEAST_WRITTEN = 3  # behind a document's last two tokens, nothing is guessed


def load_written(data: DataArguments, *, vocab_size: int) -> tuple[Dataset, Dataset | None]:
    """Returns the rows to train on and to evaluate on (None: no evaluation data): `input_ids`, `attention_mask` and `labels`,
    which are −100 at the tokens of a document's opening. Documents are cut to `block_size` tokens; those with fewer than 3
    written tokens are left out.

    Raises:
        ValueError: a file that can't be read; a line that is no such document; no document left to train or evaluate on.
    """
    train, evaluation = _read("train_file", data.train_file, data.block_size, vocab_size), None
    if data.validation_file is not None:
        evaluation = _read("validation_file", data.validation_file, data.block_size, vocab_size)
    elif data.validation_documents:
        if data.validation_documents >= len(train):
            raise ValueError(
                f"validation_documents={data.validation_documents}: expected fewer than the {len(train)} documents of "
                f"{data.train_file} with {LEAST_WRITTEN} written tokens or more"
            )
        train, evaluation = train[: -data.validation_documents], train[-data.validation_documents :]
    train = Dataset.from_list(train[: data.max_train_rows])
    return train, None if evaluation is None else Dataset.from_list(evaluation[: data.max_eval_rows])


def _read(name: str, path: str, length: int, vocab_size: int) -> list[dict[str, list[int]]]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={path!r}: can't be read: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        ids, given = _checked(line, f"{name}={path!r}, line {number}", vocab_size)
        ids = ids[:length]
        if len(ids) >= given + LEAST_WRITTEN:
            labels = [IGNORED_LABEL] * given + ids[given:]
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    if not rows:
        raise ValueError(f"{name}={path!r}: no document has {LEAST_WRITTEN} written tokens in its first {length}")
    return rows


def _checked(line: str, where: str, vocab_size: int) -> tuple[list[int], int]:
    expected = (
        "expected {input_ids: […], prompt_length: …}, as scripts/write_text.py writes to a file that ends in .jsonl"
    )
    try:
        document: Any = json.loads(line)
        ids, given = document["input_ids"], document["prompt_length"]
        is_right = all(type(one) is int for one in (given, *ids)) and 1 <= given <= len(ids)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{where}: {expected}") from error
    if not is_right:
        raise ValueError(f"{where}: {expected}")
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ValueError(f"{where}: token {max(ids)}: expected ids below {vocab_size}, the model's vocab_size")
    return ids, given
