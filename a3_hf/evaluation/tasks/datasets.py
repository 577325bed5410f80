"""Where the tasks' items come from: the hub, or local files.

One function per data set, for `custom_dataset` in a task's YAML. lm-eval calls it with the task's metadata, to which
`--metadata` and the model's arguments are added, and with its `dataset_kwargs`. What they have in common:

Args:
    data_dir: folder of local files (their places are in README.md beside this file); without it, the data set of the hub that
        lm-eval's own task reads.
    first: how many items from the start; all of them by default.

Returns:
    {split: data set}, with those columns of the hub's data set that the tasks use, wherever it was read from.

Raises:
    ValueError: a file is absent or can't be read, the hub can't be reached, a column is missing, an item can't be asked.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import Dataset

SET_DATA_DIR = "`--metadata data_dir=FOLDER` names a folder of local files to read instead"


class Item(NamedTuple):
    """One row of a data set; `where` it stands is for messages."""

    where: str
    row: dict[str, Any]


def hellaswag(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """HellaSwag, validation. An item of a local file has `ctx_a` and `ctx_b` as on the hub, or `ctx` alone, which then
    stands in `ctx_a`.
    """
    columns = ("activity_label", "endings", "label")
    if data_dir is None:
        items = _from_hub("Rowan/hellaswag", split="validation", columns=(*columns, "ctx_a", "ctx_b"), first=first)
    else:
        items = _from_lines(data_dir, "eval/hellaswag/val.jsonl", columns=columns, first=first)
    rows = []
    for where, row in items:
        _check_choices(where, "endings", row["endings"])
        _check_label(where, "label", row["label"], range(len(row["endings"])))
        if "ctx_a" not in row:
            _check_columns(where, ["ctx"], row)
            row = {**row, "ctx_a": row["ctx"], "ctx_b": ""}
        _check_columns(where, ["ctx_b"], row)
        kept = {name: row[name] for name in ("activity_label", "ctx_a", "ctx_b", "endings")}
        rows.append({**kept, "label": str(row["label"])})
    return {"validation": Dataset.from_list(rows)}


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
            raise ValueError(f"{path} has {len(labels)} labels; it takes one for each of the {len(items)} items")
        labelled = zip(items, labels, strict=True)
        items = [Item(where, {**row, "label": label}) for (where, row), label in labelled][:first]
    rows = []
    for where, row in items:
        _check_texts(where, row, ["goal"])
        _check_choices(where, "sol1 and sol2", [row["sol1"], row["sol2"]])
        label = _check_label(where, "label", row["label"], range(2))
        rows.append({**{name: row[name] for name in columns}, "label": label})
    return {"validation": Dataset.from_list(rows)}


def social_iqa(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """Social IQa, validation; `label` is "1", "2" or "3"."""
    answers = ("answerA", "answerB", "answerC")
    columns = ("context", "question", *answers, "label")
    rows = []
    for where, row in _read(
        ("lighteval/siqa", None, "validation"), "eval/siqa/socialiqa_dev.jsonl", columns, data_dir, first
    ):
        _check_texts(where, row, ["context", "question"])
        _check_choices(where, "answerA, answerB and answerC", [row[name] for name in answers])
        label = _check_label(where, "label", row["label"], range(1, 4))
        rows.append({**row, "label": str(label)})
    return {"validation": Dataset.from_list(rows)}


def winogrande(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """WinoGrande, validation; an option goes where `sentence` has its first `_`, and `answer` is "1" or "2"."""
    columns = ("sentence", "option1", "option2", "answer")
    rows = []
    for where, row in _read(
        ("allenai/winogrande", "winogrande_xl", "validation"), "eval/winogrande/dev.jsonl", columns, data_dir, first
    ):
        _check_texts(where, row, ["sentence"])
        if "_" not in row["sentence"]:
            raise ValueError(f"{where}: sentence {row['sentence']!r} has no `_`, where an option goes")
        _check_choices(where, "option1 and option2", [row["option1"], row["option2"]])
        answer = _check_label(where, "answer", row["answer"], range(1, 3))
        rows.append({**row, "answer": str(answer)})
    return {"validation": Dataset.from_list(rows)}


def triviaqa(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """TriviaQA without documents, validation; `answer` holds `value` and `aliases`."""
    if data_dir is None:
        columns = ("question", "answer")
        items = _from_hub("mandarjoshi/trivia_qa", "rc.nocontext", split="validation", columns=columns, first=first)
    else:
        columns = ("context", "answer", "aliases")
        items = [
            Item(
                where,
                {
                    "question": row["context"].removeprefix("Question: ").removesuffix("\nAnswer:"),
                    "answer": {"value": row["answer"], "aliases": row["aliases"]},
                },
            )
            for where, row in _from_lines(data_dir, "eval/triviaqa/triviaqa_sm_sub.jsonl", columns=columns, first=first)
        ]
    rows = []
    for where, row in items:
        _check_texts(where, row, ["question"])
        answer = {name: row["answer"][name] for name in ("value", "aliases")}
        _check_answers(where, "aliases", answer["aliases"])
        rows.append({"question": row["question"], "answer": answer})
    return {"validation": Dataset.from_list(rows)}


def squad(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """SQuAD 1.1, validation; `answers` holds a list in `text`, and is that list in a local file."""
    columns = ("context", "question", "answers")
    rows = []
    for where, row in _read(("rajpurkar/squad", None, "validation"), "eval/squad/dev.jsonl", columns, data_dir, first):
        _check_texts(where, row, ["context", "question"])
        texts = row["answers"]["text"] if data_dir is None else row["answers"]
        _check_answers(where, "answers", texts)
        rows.append({**row, "answers": {"text": texts}})
    return {"validation": Dataset.from_list(rows)}


def rocstories(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """ROCStories: the validation file of the story cloze test (spring 2016), the right ending appended to each story.
    `sentences` are five. No task of lm-eval reads it from the hub.
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
        told = [*starts, endings[ending - 1]]
        _check_texts(where, row, told)
        rows.append({"story_id": row["InputStoryid"], "sentences": [row[name].strip() for name in told]})
    return {"validation": Dataset.from_list(rows)}


def lambada_openai(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """LAMBADA as OpenAI prepared it, test; the last word of `text` is asked for."""
    hub = ("EleutherAI/lambada_openai", "default", "test")
    items = _read(hub, "eval/lambada/lambada_test.jsonl", ("text",), data_dir, first)
    for where, row in items:
        _check_texts(where, row, ["text"])
        context, _space, word = row["text"].rpartition(" ")
        if not context.strip() or not word.strip():
            raise ValueError(f"{where}: text {row['text']!r} does not end in a word that comes after others")
    return {"test": Dataset.from_list([row for _, row in items])}


def nq_open(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """Natural Questions without documents, validation; `answer` is a list."""
    hub = ("google-research-datasets/nq_open", None, "validation")
    items = _read(hub, "eval/nq_open/validation.jsonl", ("question", "answer"), data_dir, first)
    for where, row in items:
        _check_texts(where, row, ["question"])
        _check_answers(where, "answer", row["answer"])
    return {"validation": Dataset.from_list([row for _, row in items])}


def webqs(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """WebQuestions, test; `answers` is a list."""
    hub = ("stanfordnlp/web_questions", None, "test")
    items = _read(hub, "eval/webqs/test.jsonl", ("question", "answers"), data_dir, first)
    for where, row in items:
        _check_texts(where, row, ["question"])
        _check_answers(where, "answers", row["answers"])
    return {"test": Dataset.from_list([row for _, row in items])}


def humaneval_infill(*, data_dir: str | None = None, first: int | None = None, **_: Any) -> dict[str, Dataset]:
    """HumanEval with one line of a solution taken out, test; `canonical_solution` is that line."""
    columns = ("task_id", "prompt", "canonical_solution", "suffix", "test", "entry_point")
    hub = ("loubnabnl/humaneval_infilling", "HumanEval-SingleLineInfilling", "test")
    items = _read(hub, "eval/humaneval_infill/single_line.jsonl", columns, data_dir, first)
    for where, row in items:
        _check_texts(where, row, ["prompt", "canonical_solution", "test", "entry_point"])
    return {"test": Dataset.from_list([row for _, row in items])}


# Reading


def _read(
    hub: tuple[str, str | None, str], file: str, columns: Sequence[str], data_dir: str | None, first: int | None
) -> list[Item]:
    """Items with the same columns on the hub (path, name, split) and in a local file."""
    if data_dir is None:
        path, name, split = hub
        return _from_hub(path, name, split=split, columns=columns, first=first)
    items = _from_lines(data_dir, file, columns=columns, first=first)
    return [Item(where, {name: row[name] for name in columns}) for where, row in items]


def _from_hub(
    path: str, name: str | None = None, *, split: str, columns: Sequence[str], first: int | None
) -> list[Item]:
    try:
        dataset = datasets.load_dataset(path, name, split=split)
    except OSError as error:  # not reached, or not there
        raise ValueError(f"{path} can't be read from the hub ({error}); {SET_DATA_DIR}") from error
    _check_columns(path, columns, dataset.column_names)
    dataset = dataset.select_columns(list(columns))
    return _numbered(path, dataset if first is None else dataset.take(min(first, len(dataset))))


def _local_file(data_dir: str, file: str) -> Path:
    path = Path(str(data_dir)) / file  # lm-eval's command line takes a folder called 2024 for a number
    if not path.is_file():
        raise ValueError(f"there is no file {path}; `--metadata data_dir=FOLDER` sets the folder that holds {file}")
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
                raise ValueError(f"{path}, line {number} holds {line.strip()[:40]!r}; it takes an object with columns")
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


# Items that can't be asked


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
            raise ValueError(f"{where}: {name} is {row[name]!r}; it takes a text that is not empty")


def _check_choices(where: str, name: str, choices: Any) -> None:
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise ValueError(f"{where}: {name} are {choices!r}; they take two texts or more, none of them empty")


def _check_answers(where: str, name: str, answers: Any) -> None:
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise ValueError(f"{where}: {name} is {answers!r}; it takes one text or more, none of them empty")


def _check_label(where: str, name: str, label: Any, known: range) -> int:
    if str(label) not in map(str, known):
        raise ValueError(f"{where}: {name} is {label!r}; it takes one of {', '.join(map(str, known))}")
    return int(label)
