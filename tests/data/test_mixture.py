import collections
import itertools
import json
import random

import pytest
import zstandard
from datasets import Dataset, interleave_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import a3_hf.data.mixture
from a3_hf import Curriculum
from a3_hf.data.arguments import DataArguments, SourceArguments
from a3_hf.data.collator import RowCollator
from a3_hf.data.mixture import (
    FAILURE,
    POSITION,
    MixtureBatches,
    StreamPosition,
    check_readers,
    open_mixture,
    source_choices,
)
from a3_hf.data.packing import load_rows, pack_rows
from a3_hf.data.sources import DocumentReader, Source, SourceError
from a3_hf.training.arguments import A3TrainingArguments
from a3_hf.training.stream_trainer import StreamTrainer
from tests.conftest import tiny_model

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def words():
    """A tokenizer of which each word is one token: a0…a399 and b0…b399, so that a row tells which documents it holds."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [f"{source}{number}" for source in "ab" for number in range(400)]
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "x", *names])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def documents(source: str, count: int) -> list[str]:
    """Document number n starts with the word that names it, and has 0 to 8 more."""
    lengths = random.Random(source)
    return [" ".join([f"{source}{number}", *["x"] * lengths.randrange(9)]) for number in range(count)]


def write(path, texts) -> str:
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".parquet":
        Dataset.from_dict({"number": range(len(texts)), "text": texts}).to_parquet(str(path), batch_size=7)
    elif path.suffix == ".txt":
        path.write_text("|".join(texts))
    else:
        path.write_bytes(zstandard.compress(lines) if path.suffix == ".zst" else lines)
    return str(path)


@pytest.fixture
def mixture_of(tmp_path, words):
    def mixture_of(sources=None, *, seed=0, **settings):
        if sources is None:
            a, b = documents("a", 200), documents("b", 90)
            for number in range(5):
                write(tmp_path / "a" / f"{number}.jsonl.zst", a[number * 40 : (number + 1) * 40])
            write(tmp_path / "b" / "0.parquet", b)
            sources = {
                "a": {"path": str(tmp_path / "a" / "*.jsonl.zst"), "weight": 0.7},
                "b": {"path": str(tmp_path / "b" / "0.parquet"), "weight": 0.3},
            }
        arguments = DataArguments(sources=sources, **{"block_size": 8, "num_shards": 4} | settings)
        return open_mixture(arguments, words, seed=seed)

    return mixture_of


def take(rows, count):
    return list(itertools.islice(rows, count))


def names_in(rows, words) -> list[str]:
    """The documents that begin in these rows, in order."""
    ids = [token for row in rows for token in row["input_ids"]]
    return [word for word in words.convert_ids_to_tokens(ids) if word[0] in "ab"]


def naive_rows(token_documents, *, block_size, isolated):
    """The slow and obvious packing: one token at a time into the open row."""
    rows, number = [], 0
    for tokens in token_documents:
        number += 1
        fresh = True
        for token in tokens:
            room = block_size - len(rows[-1]) if rows else 0
            if room == 0 or (isolated and fresh and room == 1):
                rows.append([(BOS, -100, number)])
            elif isolated and fresh:
                rows[-1].append((BOS, -100, number))
            fresh = False
            rows[-1].append((token, token, number))
    for row in rows:
        first = row[0][2]
        padding = block_size - len(row)
        columns = {
            "input_ids": [token for token, _, _ in row] + [0] * padding,
            "attention_mask": [1] * len(row) + [0] * padding,
            "labels": [label for _, label, _ in row] + [-100] * padding,
        }
        if isolated:
            columns["document_ids"] = [number - first + 1 for _, _, number in row] + [0] * padding
        yield columns


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("block_size", [2, 3, 8, 50])
def test_packing_equals_the_naive_packing(block_size, isolated):
    lengths = random.Random(block_size)
    given = [[*range(10, 10 + lengths.randrange(9)), EOS] for _ in range(60)]
    given[7] = [*range(10, 500), EOS]  # longer than any row
    settings = {"block_size": block_size, "isolated": isolated}
    packed = list(pack_rows(given, bos_id=BOS, pad_id=0, **settings))
    assert [row for row, _ in packed] == list(naive_rows(given, **settings))
    # A row is yielded before another document is read, and the count says where to go on.
    read = []

    def remembered():
        for tokens in given:
            read.append(tokens)
            yield tokens

    for place, (_, used) in enumerate(pack_rows(remembered(), bos_id=BOS, pad_id=0, **settings)):
        if place % 5 == 0:
            rest = pack_rows([read[-1][used:], *given[len(read) :]], bos_id=BOS, pad_id=0, **settings)
            assert [row for row, _ in rest] == [row for row, _ in packed[place + 1 :]]


def test_isolated_documents_in_rows_of_a_file(tmp_path, words):
    path = write(tmp_path / "a.jsonl", documents("a", 30))
    arguments = DataArguments(train_file=path, block_size=8, documents="isolated", cache_dir=str(tmp_path / "cache"))
    rows, _ = load_rows(arguments, words, seed=0)
    tokens = [[*ids, EOS] for ids in words(documents("a", 30), add_special_tokens=False)["input_ids"]]
    assert rows.to_list() == list(naive_rows(tokens, block_size=8, isolated=True))
    batch = RowCollator()(rows.to_list()[:3])
    assert batch["document_ids"].tolist() == [row["document_ids"] for row in rows.to_list()[:3]]


def test_the_collator_wants_document_ids_of_all_rows_or_none():
    rows = [{"input_ids": [1, 5], "attention_mask": [1, 1], "labels": [-100, 5]} for _ in range(2)]
    assert "document_ids" not in RowCollator()(rows)
    with pytest.raises(ValueError, match="row 1 lacks document_ids"):
        RowCollator()([{**rows[0], "document_ids": [1, 1]}, rows[1]])


def test_sources_are_drawn_as_interleave_datasets_draws_them():
    weights, seed = [0.6, 0.1, 1.3], (3, 5)
    streams = [Dataset.from_dict({"source": [index] * 4000}).to_iterable_dataset() for index in range(3)]
    mixed = interleave_datasets(streams, probabilities=[weight / 2 for weight in weights], seed=seed)
    expected = [example["source"] for example in itertools.islice(mixed, 2500)]
    assert take(source_choices(weights, seed=seed), 2500) == expected
    for start in (1, 999, 1000, 1001, 2345):
        assert take(source_choices(weights, seed=seed, start=start), 100) == expected[start:][:100]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "json", "parquet", "txt"])
def test_every_kind_of_file_is_read(tmp_path, mixture_of, words, kind):
    path = write(tmp_path / f"a.{kind}", documents("a", 250))
    settings = {"document_separator": "|"} if kind == "txt" else {}
    mixture, _ = mixture_of({"a": {"path": path}}, num_shards=1, **settings)
    rows = [row for row, _ in take(mixture.rows(0), 100)]
    expected = take(
        naive_rows(
            [[*ids, EOS] for ids in words(documents("a", 250), add_special_tokens=False)["input_ids"]],
            block_size=8,
            isolated=False,
        ),
        100,
    )
    assert rows == expected


@pytest.mark.parametrize("num_shards", [1, 2, 4, 5, 7, 12])
def test_shards_have_each_document_once(mixture_of, words, num_shards):
    """Of 5 files and of 1: more files than shards, and fewer."""
    mixture, _ = mixture_of(num_shards=num_shards)
    for source in mixture.sources:
        found = []
        for shard in range(num_shards):
            reader = DocumentReader(source, shard=shard, num_shards=num_shards)
            while True:
                text = reader.next_document()
                if reader.place[0]:
                    break
                found.append(text)
        assert sorted(found) == sorted(documents(source.name, 200 if source.name == "a" else 90))


@pytest.mark.parametrize("isolated", ["joined", "isolated"])
def test_a_shard_is_read_on_from_any_of_its_rows(mixture_of, isolated):
    mixture, _ = mixture_of(num_shards=3, documents=isolated)
    for shard in range(3):
        rows = take(mixture.rows(shard), 150)  # several times through the shard
        for index in range(0, 130, 3):
            position = json.loads(json.dumps(rows[index][1]))
            assert take(mixture.rows(shard, position), 15) == rows[index + 1 : index + 16]


def all_batches(mixture, *, world_size, num_workers, count, position=None, batch_size=2):
    """`count` batches of a run in their order, and the position behind them."""
    position = position or StreamPosition()
    loaders = [
        iter(
            DataLoader(
                MixtureBatches(
                    mixture,
                    batch_size=batch_size,
                    collator=RowCollator(),
                    rank=rank,
                    world_size=world_size,
                    position=position,
                ),
                batch_size=None,
                num_workers=num_workers,
            )
        )
        for rank in range(world_size)
    ]
    batches = [next(loader) for _ in range(count // world_size) for loader in loaders]
    shards = dict(position.shards)
    shards.update(batch.pop(POSITION) for batch in batches)
    rows = [ids for batch in batches for ids in batch["input_ids"].tolist()]
    return rows, StreamPosition(position.num_batches + count, shards)


def test_rows_depend_neither_on_ranks_nor_on_workers_and_go_on_with_others(mixture_of, tmp_path):
    mixture, _ = mixture_of()
    expected, _ = all_batches(mixture, world_size=1, num_workers=0, count=28)
    for world_size, num_workers in ((1, 2), (2, 0), (2, 2), (4, 0)):
        count = 12 if world_size == 4 else 10  # 10: not with all shards equally far
        rows, position = all_batches(mixture, world_size=world_size, num_workers=num_workers, count=count)
        assert rows == expected[: 2 * count]
        position.save(tmp_path, mixture)
        position = StreamPosition.load(tmp_path, mixture)
        for other in ((1, 0), (2, 2)):
            more, _ = all_batches(mixture, world_size=other[0], num_workers=other[1], count=16, position=position)
            assert more == expected[2 * count :][:32]


def test_documents_are_mixed_by_weight(mixture_of, words):
    mixture, _ = mixture_of()
    rows = [row for shard in range(4) for row, _ in take(mixture.rows(shard), 150)]
    counts = collections.Counter(name[0] for name in names_in(rows, words))
    assert 0.62 < counts["a"] / counts.total() < 0.78


def test_training_never_sees_what_is_evaluated_on(mixture_of, words):
    mixture, evaluation = mixture_of(validation_documents=60)
    held_out = names_in(evaluation, words)
    assert sorted(held_out) == sorted([f"a{n}" for n in range(42)] + [f"b{n}" for n in range(18)])
    assert {name[0] for name in held_out[:6]} == {"a", "b"}  # mixed, so that max_eval_rows takes of each
    trained = {
        name for shard in range(4) for name in names_in([row for row, _ in take(mixture.rows(shard), 250)], words)
    }
    assert trained == {f"a{n}" for n in range(42, 200)} | {f"b{n}" for n in range(18, 90)}
    assert len(mixture_of(validation_documents=60, max_eval_rows=5)[1]) == 5
    with pytest.raises(
        ValueError, match="validation_documents=400: source 'a' has only the 280 documents.*none is left"
    ):
        mixture_of(validation_documents=400)


def test_a_validation_file_beside_sources(mixture_of, tmp_path, words):
    path = write(tmp_path / "v.jsonl", documents("b", 20))
    _, evaluation = mixture_of(validation_file=path, max_eval_rows=6, cache_dir=str(tmp_path / "cache"))
    assert names_in(evaluation, words)[0] == "b0" and len(evaluation) == 6


def test_an_empty_file_is_passed_over_and_named(mixture_of, tmp_path, words, monkeypatch):
    said = []
    monkeypatch.setattr(a3_hf.data.sources.logger, "warning", said.append)
    for name, texts in (
        ("0.jsonl", []),
        ("1.jsonl", documents("a", 20)),
        ("2.jsonl", []),
        ("3.jsonl", ["b1", " ", "b2"]),
    ):
        write(tmp_path / "c" / name, texts)
    mixture, _ = mixture_of({"c": {"path": str(tmp_path / "c/*")}}, num_shards=1)
    names = names_in([row for row, _ in take(mixture.rows(0), 40)], words)
    assert names[:23] == [*(f"a{n}" for n in range(20)), "b1", "b2", "a0"]
    assert any("0.jsonl is empty" in line for line in said) and any("2.jsonl is empty" in line for line in said)
    assert any("read to its end 1 times" in line for line in said)


@pytest.mark.parametrize("texts", [[], [" ", ""]])
def test_no_text_at_all(mixture_of, tmp_path, texts):
    path = write(tmp_path / "none.jsonl.zst", texts)
    with pytest.raises(SourceError, match="source 'none': no document to train on holds text"):
        mixture_of({"none": {"path": path}})


def test_fewer_documents_than_shards_are_named(mixture_of, tmp_path, words):
    few = {"few": {"path": write(tmp_path / "few.jsonl", documents("a", 3))}}
    with pytest.raises(SourceError, match="few.jsonl has 3 documents.*the 4 shards.*Set num_shards to 3 at most"):
        mixture_of(few)
    with pytest.raises(SourceError, match="has 2 documents to train on.*Set num_shards to 2 at most"):
        mixture_of(few, num_shards=3, validation_documents=1)
    names = names_in(
        [row for shard in range(3) for row, _ in take(mixture_of(few, num_shards=3)[0].rows(shard), 2)], words
    )
    assert {"a0", "a1", "a2"} <= set(names)


def test_a_file_of_no_text_for_a_whole_shard_is_named(mixture_of, tmp_path):
    for number, texts in enumerate([["a1"], [" "], ["a2"]]):
        write(tmp_path / "c" / f"{number}.jsonl", texts)
    with pytest.raises(SourceError, match="source 'c', shard 1 of 3: no document to train on holds text"):
        mixture_of({"c": {"path": str(tmp_path / "c/*")}}, num_shards=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": {"a": {"path": "nowhere/*.jsonl"}}}, "sources: a: path='nowhere/.*no such file"),
        ({"document_separator": "|"}, "document_separator='|' has no effect"),
        ({"block_size": 300}, "block_size=300: expected at most the model's context"),
    ],
)
def test_bad_settings_are_named(mixture_of, tmp_path, words, settings, message):
    path = write(tmp_path / "a.jsonl", documents("a", 3))
    arguments = DataArguments(**{"sources": {"a": {"path": path}}, "block_size": 8} | settings)
    with pytest.raises(ValueError, match=message):
        open_mixture(arguments, words, seed=0, context_length=256)


def test_files_of_a_source_are_of_one_kind(mixture_of, tmp_path):
    write(tmp_path / "d" / "a.jsonl", ["a1"])
    for other in ("b.txt", "b.csv"):
        write(tmp_path / "d" / other, ["a1"])
        with pytest.raises(ValueError, match="expected files of one kind"):
            mixture_of({"d": {"path": str(tmp_path / "d/*")}})


@pytest.mark.parametrize(
    ("column", "message"), [("body", "not in it, which has text, number"), ("number", "line 1 holds 3 there, not text")]
)
def test_a_column_that_is_not_text(mixture_of, tmp_path, column, message):
    path = write(tmp_path / "a.jsonl", [])
    with open(path, "w") as file:
        file.write('{"text": "a1", "number": 3}\n')
    with pytest.raises(SourceError, match=f"source 'a': .*a.jsonl: text_column='{column}': .*{message}"):
        mixture_of({"a": {"path": path, "text_column": column}})


def test_readers_share_shards_evenly_or_are_refused():
    check_readers(16, world_size=4, num_workers=2)
    check_readers(16, world_size=8, num_workers=0)
    with pytest.raises(ValueError, match="num_shards=16: expected a multiple of the 24 readers"):
        check_readers(16, world_size=8, num_workers=3)


def test_a_position_of_another_mixture_is_refused(mixture_of, tmp_path):
    StreamPosition().save(tmp_path, mixture_of()[0])
    with pytest.raises(ValueError, match="num_shards 4, and this one has 8"):
        StreamPosition.load(tmp_path, mixture_of(num_shards=8)[0])
    with pytest.raises(ValueError, match="seed 0, and this one has 1"):
        StreamPosition.load(tmp_path, mixture_of(seed=1)[0])
    with pytest.raises(ValueError, match="stream_position.json: is missing"):
        StreamPosition.load(tmp_path / "elsewhere", mixture_of()[0])


class Failing:
    """In place of `Source.texts`: the n-th document of a file fails, `times` times."""

    def __init__(self, *, name: str, document: int, times: int):
        self.name, self.document, self.times = name, document, times
        self.texts = Source.texts

    def __call__(self, source, file, *, start=0):
        for index, text in enumerate(self.texts(source, file, start=start), start=start):
            if source.name == self.name and index == self.document and self.times:
                self.times -= 1
                raise ConnectionError("the line is dead")
            yield text


def test_a_source_that_fails_is_read_on_from_the_last_row_and_loses_nothing(mixture_of, monkeypatch):
    mixture, _ = mixture_of(num_shards=1)
    expected = take(mixture.rows(0), 60)
    failing = Failing(name="a", document=23, times=1)
    monkeypatch.setattr(Source, "texts", lambda *args, **kwargs: failing(*args, **kwargs))
    rows = []
    with pytest.raises(SourceError, match="source 'a': can't be read at or after document 23 of .*: ConnectionError"):
        rows.extend(mixture.rows(0))
    assert 10 < len(rows) < 60
    assert rows + take(mixture.rows(0, rows[-1][1]), 60 - len(rows)) == expected


def test_a_damaged_file_is_named(mixture_of, tmp_path):
    path = write(tmp_path / "a.jsonl", documents("a", 50))
    with open(path, "a") as file:
        file.write("{nonsense\n")
    mixture, _ = mixture_of({"a": {"path": path}}, num_shards=1)
    with pytest.raises(SourceError, match=r"source 'a': .*a\.jsonl: line 51 is not JSON"):
        take(mixture.rows(0), 100)


def trainer_of(mixture, output_dir, words, **settings) -> StreamTrainer:
    return StreamTrainer(
        tiny_model(vocab_size=len(words), num_hidden_layers=1, attention_dropout=0.1),
        A3TrainingArguments(
            str(output_dir),
            **{
                "max_steps": 10,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 3,
                "save_steps": 4,
                "logging_steps": 1,
                "use_cpu": True,
                "disable_tqdm": True,
            }
            | settings,
        ),
        curriculum=Curriculum.from_config([{"name": "permute", "group_size": 2}], unit="steps"),
        data_collator=RowCollator(),
        train_dataset=mixture,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_that_stays_dead_stops_the_run_with_a_checkpoint(
    mixture_of, tmp_path, words, monkeypatch, num_workers
):
    mixture, _ = mixture_of()
    whole = trainer_of(mixture, tmp_path / "whole", words)
    whole.train()
    with monkeypatch.context() as patch:
        failing = Failing(name="a", document=7, times=1000)
        patch.setattr(Source, "texts", lambda *args, **kwargs: failing(*args, **kwargs))
        trainer = trainer_of(mixture, tmp_path / "out", words, dataloader_num_workers=num_workers)
        with pytest.raises(
            SourceError, match="source 'a'.*the line is dead.*Stopped after step (\\d+), whose checkpoint"
        ):
            trainer.train()
    step = trainer.state.global_step
    assert 0 < step < 10
    resumed = trainer_of(mixture, tmp_path / "out", words, dataloader_num_workers=num_workers)
    resumed.train(resume_from_checkpoint=True)
    keys = ("step", "loss", "grad_norm", "epoch")

    def logged(state):
        return [[entry[key] for key in keys] for entry in state.log_history if "loss" in entry]

    assert logged(resumed.state) == logged(whole.state)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert one.equal(other)


def test_a_failure_reaches_the_trainer_in_place_of_a_batch(mixture_of, monkeypatch):
    mixture, _ = mixture_of()
    failing = Failing(name="a", document=0, times=1000)
    monkeypatch.setattr(Source, "texts", lambda *args, **kwargs: failing(*args, **kwargs))
    batches = list(MixtureBatches(mixture, batch_size=2, collator=RowCollator()))
    assert "the line is dead" in batches[-1][FAILURE] and not any(FAILURE in batch for batch in batches[:-1])


def test_sources_of_the_hub_are_opened_as_streams(monkeypatch, tmp_path):
    from datasets import load_dataset_builder

    for number in range(3):
        write(tmp_path / f"{number}.jsonl", documents("a", 90)[number * 30 : (number + 1) * 30])

    def hub(name, config):
        assert (name, config) == ("some/data", "part")
        return load_dataset_builder("json", data_files=str(tmp_path / "*.jsonl"))

    monkeypatch.setattr(a3_hf.data.sources, "load_dataset_builder", hub)
    arguments = SourceArguments(dataset_name="some/data", dataset_config_name="part")
    source = a3_hf.data.sources.open_source("hub", arguments)
    assert [text for file in range(3) for text in source.texts(file)] == documents("a", 90)
    assert list(source.texts(1, start=25)) == documents("a", 90)[55:60]
    before = source.versions
    write(tmp_path / "1.jsonl", documents("b", 30))
    assert [
        one == other
        for one, other in zip(before, a3_hf.data.sources.open_source("hub", arguments).versions, strict=True)
    ] == [
        True,
        False,
        True,
    ]


def test_a_source_of_the_hub_is_read_by_its_column_alone(monkeypatch, tmp_path):
    """Another column comes, or changes its type, behind datasets' first block, and texts are null before."""
    from datasets import load_dataset_builder

    records = [{"text": None, "n": 1}] * 400 + [{"text": f"a{n}", "n": "one", "new": [n]} for n in range(50)]
    (tmp_path / "0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(
        a3_hf.data.sources,
        "load_dataset_builder",
        lambda name, config: load_dataset_builder("json", data_files=str(tmp_path / "*.jsonl"), chunksize=1 << 10),
    )
    source = a3_hf.data.sources.open_source("hub", SourceArguments(dataset_name="some/data"))
    assert [text for text in source.texts(0) if text] == [f"a{n}" for n in range(50)]
