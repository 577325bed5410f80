"""Data sets of the tasks, from the hub or from local files: one function per data set, for `custom_dataset` in a task's YAML.
lm-eval calls it with the task's metadata, to which `--metadata` and the model's arguments are added, and its `dataset_kwargs`.

Args:
    data_dir: folder of local files (README.md beside this file lists them); None: the data set of lm-eval's own task, on the
        hub.
    first: number of items from the start; None: all.

Returns:
    {split: data set}, with the columns that the tasks use, named as on the hub.

Raises:
    ValueError: an absent or unreadable file, an unreachable hub, a missing column, an item that is not a valid question.
"""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset

SET_DATA_DIR = "`--metadata data_dir=FOLDER` names a folder of local files to read instead"
Row = dict[str, Any]
Loader = Callable[..., dict[str, Dataset]]


class Item(NamedTuple):
    """A row of a data set, and its place for messages."""

    where: str
    row: Row


def _source(
    path: str,
    name: str | None = None,
    *,
    split: str = "validation",
    file: str,
    columns: Sequence[str],
    hub_columns: Sequence[str] | None = None,
) -> Callable[[Callable[[str, Row], Row | None]], Loader]:
    """Makes a loader from a function that checks a row and returns its final form (None: its columns as they are).

    Args:
        path, name: those of the data set on the hub.
        file: the local file, a JSON object per line.
        columns: columns of a row.
        hub_columns: its columns on the hub, if they differ.
    """

    def decorate(check: Callable[[str, Row], Row | None]) -> Loader:
        def load(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
            if data_dir is None:
                items = _from_hub(path, name, split=split, columns=hub_columns or columns, first=first)
            else:
                items = _from_lines(data_dir, file, columns=columns, first=first)
            rows = [check(where, row) or {name: row[name] for name in columns} for where, row in items]
            return {split: Dataset.from_list(rows)}

        load.__name__ = load.__qualname__ = check.__name__
        load.__doc__ = check.__doc__
        return load

    return decorate


@_source(
    "Rowan/hellaswag",
    file="eval/hellaswag/val.jsonl",
    columns=("activity_label", "endings", "label"),
    hub_columns=("activity_label", "endings", "label", "ctx_a", "ctx_b"),
)
def hellaswag(where: str, row: Row) -> Row:
    """HellaSwag, validation. A local item has `ctx_a` and `ctx_b` as on the hub, or `ctx` alone, which becomes `ctx_a`."""
    _check_choices(where, "endings", row["endings"])
    _check_label(where, "label", row["label"], range(len(row["endings"])))
    if "ctx_a" not in row:
        _check_columns(where, ["ctx"], row)
        row = {**row, "ctx_a": row["ctx"], "ctx_b": ""}
    _check_columns(where, ["ctx_b"], row)
    kept = {name: row[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings")}
    return {**kept, "label": str(row["label"])}


def piqa(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """PIQA, validation. Local labels are in a file of their own, one per line."""
    columns = ("goal", "sol1", "sol2")
    if data_dir is None:
        items = _from_hub("baber/piqa", split="validation", columns=(*columns, "label"), first=first)
    else:
        items = _from_lines(data_dir, "eval/piqa/valid.jsonl", columns=columns)
        path = _local_file(data_dir, "eval/piqa/valid-labels.lst")
        labels = path.read_text(encoding="utf-8").split()
        if len(labels) != len(items):
            raise ValueError(f"{path} has {len(labels)} labels: expected {len(items)}, one per item")
        labelled = zip(items, labels, strict=True)
        items = [Item(where, {**row, "label": label}) for (where, row), label in labelled][:first]
    rows = []
    for where, row in items:
        _check_texts(where, row, ["goal"])
        _check_choices(where, "sol1 and sol2", [row["sol1"], row["sol2"]])
        label = _check_label(where, "label", row["label"], range(2))
        rows.append({**{name: row[name] for name in columns}, "label": label})
    return {"validation": Dataset.from_list(rows)}


@_source(
    "lighteval/siqa",
    file="eval/siqa/socialiqa_dev.jsonl",
    columns=("context", "question", "answerA", "answerB", "answerC", "label"),
)
def social_iqa(where: str, row: Row) -> None:
    """Social IQa, validation; `label` is "1", "2" or "3"."""
    _check_texts(where, row, ["context", "question"])
    _check_choices(where, "answerA, answerB and answerC", [row["answerA"], row["answerB"], row["answerC"]])
    row["label"] = str(_check_label(where, "label", row["label"], range(1, 4)))


@_source(
    "allenai/winogrande",
    "winogrande_xl",
    file="eval/winogrande/dev.jsonl",
    columns=("sentence", "option1", "option2", "answer"),
)
def winogrande(where: str, row: Row) -> None:
    """WinoGrande, validation; the options replace the first `_` of `sentence`, and `answer` is "1" or "2"."""
    _check_texts(where, row, ["sentence"])
    if "_" not in row["sentence"]:
        raise ValueError(f"{where}: sentence {row['sentence']!r} has no `_`, where an option goes")
    _check_choices(where, "option1 and option2", [row["option1"], row["option2"]])
    row["answer"] = str(_check_label(where, "answer", row["answer"], range(1, 3)))


@_source(
    "mandarjoshi/trivia_qa",
    "rc.nocontext",
    file="eval/triviaqa/triviaqa_sm_sub.jsonl",
    columns=("context", "answer", "aliases"),
    hub_columns=("question", "answer"),
)
def triviaqa(where: str, row: Row) -> Row:
    """TriviaQA without documents, validation; `answer` holds `value` and `aliases`."""
    if "context" in row:  # a local file
        question = row["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
        row = {"question": question, "answer": {"value": row["answer"], "aliases": row["aliases"]}}
    _check_texts(where, row, ["question"])
    answer = {name: row["answer"][name] for name in ("value", "aliases")}
    _check_answers(where, "aliases", answer["aliases"])
    return {"question": row["question"], "answer": answer}


@_source("rajpurkar/squad", file="eval/squad/dev.jsonl", columns=("context", "question", "answers"))
def squad(where: str, row: Row) -> None:
    """SQuAD 1.1, validation; `answers` holds a list in `text`, and is that list in a local file."""
    _check_texts(where, row, ["context", "question"])
    texts = row["answers"].get("text") if isinstance(row["answers"], dict) else row["answers"]
    _check_answers(where, "answers", texts)
    row["answers"] = {"text": texts}


def rocstories(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """ROCStories: the validation file of the story cloze test (spring 2016), with the right ending of each story. `sentences`
    are five. It is not on the hub.
    """
    if data_dir is None:
        raise ValueError(f"data_dir is not set, and ROCStories is not on the hub; {SET_DATA_DIR}")
    starts = [f"InputSentence{number}" for number in range(1, 5)]
    endings = [f"RandomFifthSentenceQuiz{number}" for number in (1, 2)]
    columns = ["InputStoryid", *starts, *endings, "AnswerRightEnding"]
    path = _local_file(data_dir, "rocstories/cloze_test_val__spring2016.csv")
    with path.open(newline="", encoding="utf-8") as file:
        stories = csv.DictReader(file)
        _check_columns(str(path), columns, stories.fieldnames or ())
        items = _numbered(path, stories)[:first]
    rows = []
    for where, row in items:
        ending = _check_label(where, "AnswerRightEnding", row["AnswerRightEnding"], range(1, 3))
        names = [*starts, endings[ending - 1]]
        _check_texts(where, row, names)
        rows.append({"story_id": row["InputStoryid"], "sentences": [row[name].strip() for name in names]})
    return {"validation": Dataset.from_list(rows)}


@_source(
    "EleutherAI/lambada_openai", "default", split="test", file="eval/lambada/lambada_test.jsonl", columns=("text",)
)
def lambada_openai(where: str, row: Row) -> None:
    """LAMBADA as OpenAI prepared it, test; the answer is the last word of `text`."""
    _check_texts(where, row, ["text"])
    context, _space, word = row["text"].rpartition(" ")
    if not context.strip() or not word.strip():
        raise ValueError(f"{where}: text {row['text']!r} does not end in a word that comes after others")


@_source("google-research-datasets/nq_open", file="eval/nq_open/validation.jsonl", columns=("question", "answer"))
def nq_open(where: str, row: Row) -> None:
    """Natural Questions without documents, validation; `answer` is a list."""
    _check_texts(where, row, ["question"])
    _check_answers(where, "answer", row["answer"])


@_source("stanfordnlp/web_questions", split="test", file="eval/webqs/test.jsonl", columns=("question", "answers"))
def webqs(where: str, row: Row) -> None:
    """WebQuestions, test; `answers` is a list."""
    _check_texts(where, row, ["question"])
    _check_answers(where, "answers", row["answers"])


@_source(
    "loubnabnl/humaneval_infilling",
    "HumanEval-SingleLineInfilling",
    split="test",
    file="eval/humaneval_infill/single_line.jsonl",
    columns=("task_id", "prompt", "canonical_solution", "suffix", "test", "entry_point"),
)
def humaneval_infill(where: str, row: Row) -> None:
    """HumanEval with one line of a solution taken out, test; `canonical_solution` is that line."""
    _check_texts(where, row, ["prompt", "canonical_solution", "test", "entry_point"])


# Reading


def _from_hub(
    path: str, name: str | None = None, *, split: str, columns: Sequence[str], first: int | None
) -> list[Item]:
    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except OSError as error:  # unreachable, or no such data set
        raise ValueError(f"{path} can't be read from the hub ({error}); {SET_DATA_DIR}") from error
    _check_columns(path, columns, dataset.column_names)
    dataset = dataset.select_columns(list(columns))
    return _numbered(path, dataset if first is None else dataset.take(min(first, len(dataset))))


def _local_file(data_dir: str, file: str) -> Path:
    path = Path(str(data_dir)) / file  # lm-eval's command line reads a folder named 2024 as a number
    if not path.is_file():
        raise ValueError(f"no such file: {path}. `--metadata data_dir=FOLDER` sets the folder that holds {file}")
    return path


def _from_lines(data_dir: str, file: str, *, columns: Sequence[str], first: int | None = None) -> list[Item]:
    """One JSON object per line."""
    path = _local_file(data_dir, file)
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} can't be read: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} holds {line.strip()[:40]!r}: expected an object with columns")
            rows.append(row)
    items = _numbered(path, rows)[:first]
    for where, row in items:
        _check_columns(where, columns, row)
    return items


def _numbered(source: Path | str, rows: Iterable[dict[str, Any]]) -> list[Item]:
    items = [Item(f"{source}, item {number}", row) for number, row in enumerate(rows, start=1)]
    if not items:
        raise ValueError(f"{source} holds no item")
    return items


# Checks of items


def _check_columns(where: str, columns: Sequence[str], present: Iterable[str]) -> None:
    present = list(present)
    for name in columns:
        if name not in present:
            raise ValueError(f"{where}: column {name!r} is missing; its columns are {present}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_texts(where: str, row: dict[str, Any], columns: Sequence[str]) -> None:
    for name in columns:
        if not _is_text(row[name]):
            raise ValueError(f"{where}: {name} is {row[name]!r}: expected a text that is not empty")


def _check_choices(where: str, name: str, choices: Any) -> None:
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError(f"{where}: {name} are {choices!r}: expected two texts or more, none of them empty")


def _check_answers(where: str, name: str, answers: Any) -> None:
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise ValueError(f"{where}: {name} is {answers!r}: expected one text or more, none of them empty")


def _check_label(where: str, name: str, label: Any, known: range) -> int:
    if str(label) not in map(str, known):
        raise ValueError(f"{where}: {name} is {label!r}: expected one of {', '.join(map(str, known))}")
    return int(label)
