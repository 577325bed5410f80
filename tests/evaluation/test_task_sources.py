"""Items from the hub and from local files are the same; what can't be asked is refused, by name."""

import csv
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

import datasets
from datasets import Dataset
from lm_eval import tasks as stock_tasks
from lm_eval.tasks._yaml_loader import load_yaml

from a3_hf.evaluation.tasks import datasets as sources

COUNT = 10
NUMBERS = range(COUNT)
SENTENCES = ["Ann saw Sue since _ was near.", "_'s dog ran home to Ann.", 'He said "_ is here" to all.']

# Ten items of each data set as local files have them; PIQA's labels are written to a file of their own.
LOCAL = {
    "hellaswag": [
        {
            "activity_label": f"Running {n}",
            "ctx": f"Dog {n} sees a ball. it",
            "endings": ["runs home", f"runs home and barks {n}.", "sleeps.", "flies."],  # one is a prefix of the next
            "label": n % 4,
        }
        for n in NUMBERS
    ],
    "piqa": [
        {"goal": f"Open jar {n}.", "sol1": "Turn the lid.", "sol2": "Turn the lid. Pull.", "label": n % 2}
        for n in NUMBERS
    ],
    "social_iqa": [
        {
            "context": f"Tom gave {n} books away.",
            "question": "Why did Tom do this?",
            "answerA": "to help",
            "answerB": "to help a friend",
            "answerC": "to hurt",
            "label": str(n % 3 + 1),
        }
        for n in NUMBERS
    ],
    "winogrande": [
        {"sentence": SENTENCES[n % 3], "option1": "Ann", "option2": f"Sue {n}", "answer": str(n % 2 + 1)}
        for n in NUMBERS
    ],
    "triviaqa": [
        {
            "context": f"Question: Which fruit has number {n}?\nAnswer:",
            "answer": f"Apple {n}",
            "aliases": [f"Apple {n}", f"The apple number {n}", "(a"],
        }
        for n in NUMBERS
    ],
    "squad": [
        {
            "context": f"Tom was born in {1900 + n}.",
            "question": "When was Tom born?",
            "answers": [f"{1900 + n}", f"in {1900 + n}"],
        }
        for n in NUMBERS
    ],
    "lambada_openai": [{"text": f"Tom took {n} apples and ate them all , so Tom was full"} for n in NUMBERS],
    "nq_open": [{"question": f"who won in {1950 + n}", "answer": [f"Tom {n}", "Tom"]} for n in NUMBERS],
    "webqs": [{"question": f"where is house {n}?", "answers": ["London", f"London {n}", "Paris"]} for n in NUMBERS],
    "humaneval_infill": [
        {
            "task_id": f"SingleLineInfilling/HumanEval/{n}/L0",
            "prompt": f"def add_{n}(x):\n",
            "canonical_solution": f"    y = x + {n}",
            "suffix": "\n    return y\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
            "entry_point": f"add_{n}",
        }
        for n in NUMBERS
    ],
    "rocstories": [
        {
            "InputStoryid": f"story-{n}",
            "InputSentence1": f"Tom saw {n} cats.",
            "InputSentence2": "He fed them.",
            "InputSentence3": "They ate it all.",
            "InputSentence4": "Then they slept.",
            "RandomFifthSentenceQuiz1": "He was happy.",
            "RandomFifthSentenceQuiz2": "He was sad.",
            "AnswerRightEnding": str(n % 2 + 1),
        }
        for n in NUMBERS
    ],
}
FILES = {
    "hellaswag": "eval/hellaswag/val.jsonl",
    "piqa": "eval/piqa/valid.jsonl",
    "social_iqa": "eval/siqa/socialiqa_dev.jsonl",
    "winogrande": "eval/winogrande/dev.jsonl",
    "triviaqa": "eval/triviaqa/triviaqa_sm_sub.jsonl",
    "squad": "eval/squad/dev.jsonl",
    "lambada_openai": "eval/lambada/lambada_test.jsonl",
    "nq_open": "eval/nq_open/validation.jsonl",
    "webqs": "eval/webqs/test.jsonl",
    "humaneval_infill": "eval/humaneval_infill/single_line.jsonl",
    "rocstories": "rocstories/cloze_test_val__spring2016.csv",
}


def write_items(folder: Path, name: str, rows: list[dict]) -> Path:
    """Writes the local file of a data set under `folder`; returns its path."""
    path = folder / FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "rocstories":
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        return path
    if name == "piqa":
        labels = [str(row["label"]) for row in rows]
        path.with_name("valid-labels.lst").write_text("\n".join(labels) + "\n", encoding="utf-8")
        rows = [without(row, "label") for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_all(folder: Path) -> Path:
    """Ten items of every data set."""
    for name, rows in LOCAL.items():
        write_items(folder, name, rows)
    return folder


def without(row: dict, column: str) -> dict:
    return {name: value for name, value in row.items() if name != column}


def load(name: str, data_dir: Path | str | None, **more) -> Dataset:
    # what else the metadata hold comes along, as lm-eval has it
    metadata = {"version": 1.0, "config_source": "task.yaml", "pretrained": "model", **more}
    (split,) = getattr(sources, name)(data_dir=data_dir, **metadata).values()
    return split


def on_the_hub(name: str) -> list[dict]:
    """The same items with the hub's columns, and one that no task uses."""
    rows = LOCAL[name]
    if name == "hellaswag":
        rows = [{**without(row, "ctx"), "ctx_a": row["ctx"], "ctx_b": "", "label": str(row["label"])} for row in rows]
    if name == "triviaqa":
        rows = [
            {
                "question": row["context"].split(": ")[1].split("\n")[0],
                "answer": {"aliases": row["aliases"], "type": "FreeForm", "value": row["answer"]},
            }
            for row in rows
        ]
    if name == "squad":
        rows = [{**row, "answers": {"text": row["answers"], "answer_start": [0, 0]}} for row in rows]
    return [{**row, "unused": 1} for row in rows]


@pytest.fixture
def hub(monkeypatch):
    """Makes the hub hold a data set; a list of what it was asked for."""

    def hold(name: str) -> list[tuple]:
        asked = []

        def load_dataset(path, config=None, *, split):
            asked.append((path, config, split))
            return Dataset.from_list(on_the_hub(name))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return hold


@pytest.mark.parametrize("name", [name for name in FILES if name != "rocstories"])
def test_the_hub_and_a_file_give_the_same_items(name, tmp_path, hub):
    write_items(tmp_path, name, LOCAL[name])
    local = load(name, tmp_path)
    hub(name)
    assert load(name, None).to_list() == local.to_list() and load(name, None).features == local.features
    assert len(local) == COUNT and "unused" not in local.column_names
    assert load(name, None, first=3).to_list() == load(name, tmp_path, first=3).to_list() == local.to_list()[:3]


STOCK = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "nq_open": "nq_open/nq_open.yaml",
    "webqs": "webqs/webqs.yaml",
    "humaneval_infill": "humaneval_infilling/single_line_infilling.yaml",
}


@pytest.mark.parametrize("name", STOCK)
def test_the_hubs_data_set_is_that_of_the_stock_task(name, hub):
    asked = hub(name)
    (split,) = getattr(sources, name)()
    stock = load_yaml(Path(stock_tasks.__file__).parent / STOCK[name], resolve_func=False)
    evaluated = stock.get("test_split") or stock["validation_split"]
    assert asked == [(stock["dataset_path"], stock.get("dataset_name"), evaluated)] and split == evaluated


def test_stories_have_five_sentences_with_the_right_ending(tmp_path):
    write_items(tmp_path, "rocstories", LOCAL["rocstories"])
    stories = load("rocstories", tmp_path)
    assert stories["story_id"] == [f"story-{n}" for n in NUMBERS]
    told = ["Tom saw 1 cats.", "He fed them.", "They ate it all.", "Then they slept."]
    assert stories[0]["sentences"][4] == "He was happy." and stories[1]["sentences"] == [*told, "He was sad."]
    assert len(load("rocstories", tmp_path, first=4)) == 4


def test_both_parts_of_a_hellaswag_context_are_kept_where_the_file_has_them(tmp_path):
    whole = LOCAL["hellaswag"]
    write_items(tmp_path, "hellaswag", whole)
    assert (load("hellaswag", tmp_path)[0]["ctx_a"], load("hellaswag", tmp_path)[0]["ctx_b"]) == (whole[0]["ctx"], "")
    write_items(tmp_path, "hellaswag", [{**row, "ctx_a": "Dog sees a ball.", "ctx_b": "it"} for row in whole])
    assert (load("hellaswag", tmp_path)[0]["ctx_a"], load("hellaswag", tmp_path)[0]["ctx_b"]) == (
        "Dog sees a ball.",
        "it",
    )


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *((name, next(iter(rows[0]))) for name, rows in LOCAL.items()),
        ("hellaswag", "ctx"),
        ("piqa", "sol2"),
        ("triviaqa", "aliases"),
        ("rocstories", "RandomFifthSentenceQuiz2"),
    ],
)
def test_a_missing_column_is_named_with_the_file_and_the_columns_it_has(name, missing, tmp_path):
    rows = [without(row, missing) for row in LOCAL[name]]
    path = write_items(tmp_path, name, rows)
    has = list(rows[0]) if name != "piqa" else list(without(rows[0], "label"))
    message = f"{re.escape(str(path))}.*column '{missing}' is missing; its columns are {re.escape(str(has))}"
    with pytest.raises(ValueError, match=message):
        load(name, tmp_path)


def test_a_missing_column_of_the_hub_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Dataset.from_list([{"question": "who"}]))
    with pytest.raises(ValueError, match=r"nq_open: column 'answer' is missing; its columns are \['question'\]"):
        load("nq_open", None)


@pytest.mark.parametrize("name", FILES)
def test_local_data_that_is_absent(name, tmp_path):
    with pytest.raises(
        ValueError, match=f"no such file: {re.escape(str(tmp_path / FILES[name]))}.*--metadata data_dir=FOLDER"
    ):
        load(name, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_hub_that_is_not_reached_says_how_to_do_without(name, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ValueError, match="hub.*--metadata data_dir=FOLDER"):
        load(name, None)


def test_labels_that_are_absent_or_too_few(tmp_path):
    labels = write_items(tmp_path, "piqa", LOCAL["piqa"]).with_name("valid-labels.lst")
    labels.write_text("0\n1\n")
    with pytest.raises(ValueError, match="valid-labels.lst has 2 labels: expected 10, one per item"):
        load("piqa", tmp_path)
    labels.unlink()
    with pytest.raises(ValueError, match=r"no such file: .*valid-labels.lst"):
        load("piqa", tmp_path)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        (
            "hellaswag",
            {"endings": ["only one"], "label": 0},
            r"endings are \['only one'\]: expected two texts or more",
        ),
        ("hellaswag", {"endings": ["runs", " "]}, "none of them empty"),
        ("hellaswag", {"label": 4}, "label is 4: expected one of 0, 1, 2, 3"),
        ("hellaswag", {"label": ""}, "label is ''"),
        ("piqa", {"goal": ""}, "goal is ''"),
        ("piqa", {"sol2": ""}, "none of them empty"),
        ("piqa", {"label": 2}, "label is '2': expected one of 0, 1"),
        ("social_iqa", {"answerC": " "}, "answerA, answerB and answerC are"),
        ("social_iqa", {"label": "0"}, "label is '0': expected one of 1, 2, 3"),
        ("winogrande", {"sentence": "Ann saw Sue."}, "sentence 'Ann saw Sue.' has no `_`"),
        ("winogrande", {"option1": ""}, "option1 and option2 are"),
        ("winogrande", {"answer": "3"}, "answer is '3': expected one of 1, 2"),
        ("triviaqa", {"aliases": []}, r"aliases is \[\]"),
        ("triviaqa", {"aliases": ["Apple", ""]}, "aliases is .*none of them empty"),
        ("triviaqa", {"context": "Question: \nAnswer:"}, "question is ''"),
        ("squad", {"answers": []}, r"answers is \[\]"),
        ("lambada_openai", {"text": "word"}, "'word' does not end in a word that comes after others"),
        ("lambada_openai", {"text": "a text that ends in a space "}, "does not end in a word"),
        ("nq_open", {"answer": "Tom"}, "answer is 'Tom'"),
        ("webqs", {"answers": [""]}, r"answers is \[''\]"),
        ("humaneval_infill", {"canonical_solution": "\n"}, "canonical_solution is"),
        ("rocstories", {"InputSentence3": ""}, "InputSentence3 is ''"),
        ("rocstories", {"AnswerRightEnding": "0"}, "AnswerRightEnding is '0': expected one of 1, 2"),
    ],
)
def test_an_item_that_cannot_be_asked_is_named(name, changed, message, tmp_path):
    rows = LOCAL[name]
    path = write_items(tmp_path, name, [*rows[:6], {**rows[6], **changed}, *rows[7:]])
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, item 7: .*{message}"):
        load(name, tmp_path)


def test_lines_that_hold_no_item(tmp_path):
    path = write_items(tmp_path, "nq_open", LOCAL["nq_open"])
    text = path.read_text()
    path.write_text(text.replace("\n", "\n\n"))
    assert len(load("nq_open", tmp_path)) == COUNT
    path.write_text(text + '{"question": "who')
    with pytest.raises(ValueError, match="validation.jsonl, line 11 can't be read"):
        load("nq_open", tmp_path)
    path.write_text(text + "[1]\n")
    with pytest.raises(ValueError, match=r"validation.jsonl, line 11 holds '\[1\]'"):
        load("nq_open", tmp_path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="validation.jsonl holds no item"):
        load("nq_open", tmp_path)


def test_a_folder_that_the_command_line_takes_for_a_number(tmp_path, monkeypatch):
    write_items(tmp_path / "2024", "nq_open", LOCAL["nq_open"])
    monkeypatch.chdir(tmp_path)
    assert len(load("nq_open", 2024)) == COUNT
