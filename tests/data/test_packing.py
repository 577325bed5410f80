import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import a3_hf.data.packing
from a3_hf.data.arguments import DataArguments
from a3_hf.data.collator import RowCollator
from a3_hf.data.packing import load_rows

WORDS = ["the", "dog", "ran", "home", "and", "slept", "cat", "sat", "on", "a", "mat"]
STORIES = [
    "the dog ran home",
    "a cat sat on a mat and slept",
    "the cat ran",
    "and the dog sat on the cat",
    "home",
    "a dog and a cat ran home and slept on the mat",
]


def build_tokenizer(*, bos="<s>", eos="</s>", pad=None):
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # As LLaMA's: BOS before each text, unless special tokens are declined.
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token=eos, pad_token=pad
    )


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def arguments(tmp_path):
    def arguments(train_file, **settings):
        return DataArguments(train_file=train_file, cache_dir=str(tmp_path / "cache"), **{"block_size": 5} | settings)

    return arguments


def separated(stories):
    return "<|endoftext|>\n".join(f"{story}\n" for story in stories)


def naive_rows(stories, tokenizer, *, boundary_id, block_size):
    """The slow and obvious packing: one token at a time into the open row."""
    rows = []
    for story in stories:
        for token in [*(tokenizer.convert_tokens_to_ids(word) for word in story.split()), boundary_id]:
            if not rows or len(rows[-1]) == block_size:
                rows.append([tokenizer.bos_token_id])
            rows[-1].append(token)
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    padded = []
    for row in rows:
        num_padding = block_size - len(row)
        padded.append(
            {
                "input_ids": row + [pad_id] * num_padding,
                "attention_mask": [1] * len(row) + [0] * num_padding,
                "labels": [-100] + row[1:] + [-100] * num_padding,
            }
        )
    return padded


def words_of(dataset, tokenizer):
    ids = [i for row in dataset for i, real in zip(row["input_ids"], row["attention_mask"], strict=True) if real]
    return [word for word in tokenizer.convert_ids_to_tokens(ids) if word not in ("<s>", "</s>")]


@pytest.mark.parametrize("boundary", ["bos", "eos"])
@pytest.mark.parametrize("block_size", [2, 5, 8, 64])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_rows_are_those_of_the_naive_packing(write, arguments, tmp_path, kind, block_size, boundary):
    tokenizer = build_tokenizer()
    settings = {}
    if kind == "txt":
        path = write("stories.txt", separated(STORIES))
        settings = {"document_separator": "<|endoftext|>"}
    elif kind == "parquet":
        path = str(tmp_path / "stories.parquet")
        Dataset.from_dict({"number": range(len(STORIES)), "text": STORIES}).to_parquet(path)
    else:
        path = write(f"stories.{kind}", "".join(json.dumps({"text": story, "n": 1}) + "\n" for story in STORIES))
    train, evaluation = load_rows(
        arguments(path, block_size=block_size, document_boundary=boundary, **settings), tokenizer, seed=0
    )
    boundary_id = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}[boundary]
    assert train.to_list() == naive_rows(STORIES, tokenizer, boundary_id=boundary_id, block_size=block_size)
    assert evaluation is None


def test_packing_goes_across_batches_of_documents(write, arguments):
    tokenizer = build_tokenizer()
    stories = [STORIES[i % 6] for i in range(2345)]
    path = write("stories.jsonl", "".join(json.dumps({"text": story}) + "\n" for story in stories))
    train, _ = load_rows(arguments(path, block_size=16), tokenizer, seed=0)
    assert train.to_list() == naive_rows(stories, tokenizer, boundary_id=2, block_size=16)


def test_without_a_separator_a_file_is_one_document(write, arguments):
    tokenizer = build_tokenizer()
    path = write("story.txt", "the dog ran\r\n\r\nhome and slept\n")
    train, _ = load_rows(arguments(path, block_size=64), tokenizer, seed=0)
    assert train.to_list() == naive_rows(["the dog ran home and slept"], tokenizer, boundary_id=2, block_size=64)


def test_the_last_row_is_padded_and_not_dropped(write, arguments):
    path = write("story.txt", "the dog ran home and slept")
    for pad, pad_id in ((None, 0), ("<pad>", 3)):
        train, _ = load_rows(arguments(path), build_tokenizer(pad=pad), seed=0)
        assert train[-1] == {
            "input_ids": [1, 8, 9, 2, pad_id],
            "attention_mask": [1, 1, 1, 1, 0],
            "labels": [-100, 8, 9, 2, -100],
        }


def test_blank_documents_and_a_byte_order_mark_leave_no_trace(write, arguments):
    tokenizer = build_tokenizer()
    text = "\ufeff" + "the dog<|endoftext|>\n\n<|endoftext|><|endoftext|>ran home<|endoftext|>\n"
    train, _ = load_rows(arguments(write("a.txt", text), document_separator="<|endoftext|>"), tokenizer, seed=0)
    assert train.to_list() == naive_rows(["the dog", "ran home"], tokenizer, boundary_id=2, block_size=5)
    lines = '{"text": "the dog"}\n{"text": null}\n{"text": " "}\n{"text": "ran home"}\n'
    train, _ = load_rows(arguments(write("a.jsonl", lines)), tokenizer, seed=0)
    assert train.to_list() == naive_rows(["the dog", "ran home"], tokenizer, boundary_id=2, block_size=5)


def test_held_out_documents_are_the_last_and_training_never_sees_them(write, arguments):
    tokenizer = build_tokenizer()
    path = write("stories.txt", separated(STORIES))
    for shuffle in (False, True):
        train, evaluation = load_rows(
            arguments(path, document_separator="<|endoftext|>", validation_documents=2, shuffle_documents=shuffle),
            tokenizer,
            seed=0,
        )
        assert evaluation.to_list() == naive_rows(STORIES[-2:], tokenizer, boundary_id=2, block_size=5)
        assert sorted(words_of(train, tokenizer)) == sorted(" ".join(STORIES[:-2]).split())


def test_held_out_documents_of_unique_words_do_not_overlap(write, arguments):
    tokenizer = build_tokenizer()
    path = write("words.jsonl", "".join(json.dumps({"text": word}) + "\n" for word in WORDS))
    train, evaluation = load_rows(arguments(path, validation_documents=4), tokenizer, seed=0)
    assert words_of(train, tokenizer) == WORDS[:-4]
    assert words_of(evaluation, tokenizer) == WORDS[-4:]


def test_a_validation_file_is_read_like_the_train_file(write, arguments):
    tokenizer = build_tokenizer()
    train, evaluation = load_rows(
        arguments(
            write("a.txt", separated(STORIES[:3])),
            validation_file=write("b.txt", separated(STORIES[3:])),
            document_separator="<|endoftext|>",
        ),
        tokenizer,
        seed=0,
    )
    assert train.to_list() == naive_rows(STORIES[:3], tokenizer, boundary_id=2, block_size=5)
    assert evaluation.to_list() == naive_rows(STORIES[3:], tokenizer, boundary_id=2, block_size=5)


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*names, split, cache_dir):
        asked.append((*names, split, cache_dir))
        return Dataset.from_dict({"id": range(len(STORIES)), "body": STORIES})

    monkeypatch.setattr(a3_hf.data.loading, "load_dataset", load_dataset)
    source = {"dataset_name": "some/stories", "dataset_config_name": "small", "dataset_split": "train[:6]"}
    source["cache_dir"] = str(tmp_path)
    tokenizer = build_tokenizer()
    arguments = DataArguments(**source, text_column="body", block_size=5, validation_documents=1)
    train, evaluation = load_rows(arguments, tokenizer, seed=0)
    assert train.to_list() == naive_rows(STORIES[:-1], tokenizer, boundary_id=2, block_size=5)
    assert evaluation.to_list() == naive_rows(STORIES[-1:], tokenizer, boundary_id=2, block_size=5)
    assert asked == [("some/stories", "small", "train[:6]", str(tmp_path))]
    with pytest.raises(ValueError, match="text_column='text': not in dataset_name='some/stories', which has id, body"):
        load_rows(DataArguments(**source), tokenizer, seed=0)


def test_limits_take_the_first_rows(write, arguments):
    tokenizer = build_tokenizer()
    path = write("stories.jsonl", "".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    train, evaluation = load_rows(
        arguments(path, validation_documents=2, max_train_rows=3, max_eval_rows=1), tokenizer, seed=0
    )
    assert train.to_list() == naive_rows(STORIES[:-2], tokenizer, boundary_id=2, block_size=5)[:3]
    assert evaluation.to_list() == naive_rows(STORIES[-2:], tokenizer, boundary_id=2, block_size=5)[:1]


def test_rows_are_a_function_of_the_seed(write, arguments, tmp_path):
    tokenizer = build_tokenizer()
    path = write("words.jsonl", "".join(json.dumps({"text": word}) + "\n" for word in WORDS))

    def rows(seed, cache):
        settings = arguments(path, shuffle_documents=True)
        settings.cache_dir = str(tmp_path / cache)
        return load_rows(settings, tokenizer, seed=seed)[0].to_list()

    assert rows(0, "cache") == rows(0, "another")
    assert rows(0, "cache") != rows(1, "cache")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_nothing_stale_comes_out_of_the_cache(write, arguments, name):
    for word in ("dog", "cat"):
        content = json.dumps({"text": word}) if name == "a.jsonl" else word
        train, _ = load_rows(arguments(write(name, content)), build_tokenizer(), seed=0)
        assert words_of(train, build_tokenizer()) == [word]
    train, _ = load_rows(arguments(write(name, content)), build_tokenizer(pad="<pad>"), seed=0)
    assert train[0]["input_ids"] == [1, 10, 2, 3, 3]


def test_a_change_of_the_code_is_no_hit_in_the_cache(write, arguments, monkeypatch):
    settings = arguments(write("a.txt", "the dog"))
    files = []
    for code in ("before", "before", "after"):
        monkeypatch.setattr(a3_hf.data.packing, "CODE", code)
        files.append(load_rows(settings, build_tokenizer(), seed=0)[0].cache_files)
    assert files[0] == files[1] != files[2]


def test_a_file_name_is_not_a_pattern(write, arguments):
    write("ab.txt", "home")
    path = write("a*.txt", "the dog")
    train, _ = load_rows(arguments(path), build_tokenizer(), seed=0)
    assert words_of(train, build_tokenizer()) == ["the", "dog"]


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("empty.txt", "", {}, r"empty\.txt': the file is empty"),
        ("empty.parquet", "", {}, r"empty\.parquet': the file is empty"),
        ("blank.txt", "\ufeff \n\n", {}, r"blank\.txt: holds no text"),
        ("separators.txt", "||\n|", {"document_separator": "|"}, r"separators\.txt: holds no text"),
        ("blank.jsonl", '{"text": ""}\n', {}, r"blank\.jsonl', to train on: no document holds text"),
        ("latin.txt", "the d\xf6g".encode("latin-1"), {}, r"train_file: .*latin\.txt: not UTF-8: .* at byte 5"),
        ("cut.txt", "the d\xf6".encode()[:-1], {}, r"train_file: .*cut\.txt: not UTF-8: .* at byte 5"),
        (
            "latin.jsonl",
            '{"text": "\xf6"}'.encode("latin-1"),
            {},
            r"train_file: .*latin\.jsonl: not UTF-8: .* at byte 10",
        ),
        ("late.txt", b"\xef\xbb\xbf" + b"a " * (1 << 23) + b"\xff", {}, r"not UTF-8: .* at byte 16777219"),
        ("a.csv", "text\nhome\n", {}, r"a\.csv': expected a file that ends in \.txt, \.jsonl, \.json, \.parquet \("),
        ("a.jsonl", '{"body": "home", "n": 1}\n', {}, r"a\.jsonl: text_column='text': not in it, which has body, n"),
        ("b.txt", "home", {"text_column": "body"}, r"b\.txt: text_column='body': not in it, which has text"),
        ("n.jsonl", '{"text": 3}\n', {}, r"n\.jsonl: text_column='text': line 1 holds 3 there, not text"),
        ("broken.jsonl", '{"text": "home"}\n{"text": "ho', {}, r"broken\.jsonl: line 2 is not JSON"),
        ("broken.parquet", "PAR0", {}, r"broken\.parquet: can't be read as parquet"),
        ("s.jsonl", '{"text": "home"}\n', {"document_separator": "|"}, r"document_separator='\|' has no effect"),
        ("few.txt", "a|b", {"document_separator": "|", "validation_documents": 2}, "has 2 documents, so none is left"),
        (
            "void.jsonl",
            '{"text": "home"}\n{"text": " "}\n',
            {"validation_documents": 1},
            r"void\.jsonl', to evaluate on: no document holds text",
        ),
    ],
)
def test_bad_sources_are_named(write, arguments, name, content, settings, message):
    with pytest.raises(ValueError, match=message):
        load_rows(arguments(write(name, content), **settings), build_tokenizer(), seed=0)


def test_missing_files_are_named(write, arguments):
    with pytest.raises(ValueError, match=r"train_file='.*absent\.txt': no such file"):
        load_rows(arguments("somewhere/absent.txt"), build_tokenizer(), seed=0)
    with pytest.raises(ValueError, match=r"validation_file='absent\.txt': no such file"):
        load_rows(arguments(write("a.txt", "home"), validation_file="absent.txt"), build_tokenizer(), seed=0)


def test_a_block_is_no_longer_than_the_context(write, arguments):
    path = write("a.txt", "home")
    load_rows(arguments(path, block_size=8), build_tokenizer(), seed=0, context_length=8)
    with pytest.raises(ValueError, match="block_size=9: expected at most the model's context of 8"):
        load_rows(arguments(path, block_size=9), build_tokenizer(), seed=0, context_length=8)


def test_a_tokenizer_needs_bos_and_the_boundary(write, arguments):
    path = write("a.txt", "home")
    with pytest.raises(ValueError, match=r"no BOS token.*Set tokenizer\.bos_token, or tokenizer_name_or_path"):
        load_rows(arguments(path), build_tokenizer(bos=None), seed=0)
    with pytest.raises(ValueError, match=r"document_boundary='eos'.*Set tokenizer\.eos_token"):
        load_rows(arguments(path), build_tokenizer(eos=None), seed=0)
    train, _ = load_rows(arguments(path, document_boundary="bos"), build_tokenizer(eos=None), seed=0)
    assert train[0]["labels"] == [-100, 7, 1, -100, -100]


def test_collator_stacks_and_pads():
    rows = [
        {"input_ids": [1, 7, 8], "attention_mask": [1, 1, 1], "labels": [-100, 7, 8]},
        {"input_ids": [1, 9], "attention_mask": [1, 1], "labels": [-100, 9]},
    ]
    batch = RowCollator(pad_token_id=4)(rows)
    expected = {
        "input_ids": [[1, 7, 8], [1, 9, 4]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 7, 8], [-100, 9, -100]],
    }
    assert {name: column.tolist() for name, column in batch.items()} == expected
    assert all(column.dtype == torch.long for column in batch.values())


def test_collator_takes_the_rows_of_load_rows(write, arguments):
    train, _ = load_rows(arguments(write("a.txt", STORIES[1])), build_tokenizer(), seed=0)
    batch = RowCollator()([train[i] for i in range(len(train))])
    assert {name: column.tolist() for name, column in batch.items()} == train[:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([1, 7], [1, 1], [1, 7]), "row 1 has a scored token without a given token before it"),
        (([0, 7, 8], [0, 1, 1], [-100, 7, 8]), "row 1 has a scored token without a given token before it"),
        (([1, 7, 8], [1, 1, 1], [1, -100, 8]), "row 1 has a scored token without a given token before it"),
        (([1, 7], [1, 0], [-100, 7]), "row 1 has a label at padding"),
        (([1, 7], [1, 1], [-100]), "row 1: expected columns of equal length"),
    ],
)
def test_collator_refuses_rows_that_cannot_be_scored(row, message):
    good = {"input_ids": [1, 7], "attention_mask": [1, 1], "labels": [-100, 7]}
    bad = dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True))
    with pytest.raises(ValueError, match=message):
        RowCollator()([good, bad])


def test_collator_takes_rows_without_a_score_but_not_without_rows():
    row = {"input_ids": [1, 7], "attention_mask": [1, 1], "labels": [-100, -100]}
    assert RowCollator()([row])["labels"].tolist() == [[-100, -100]]
    with pytest.raises(ValueError, match="rows is empty"):
        RowCollator()([])
