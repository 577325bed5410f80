"""Texts mixed from several sources while training goes on, shared out among readers, and read on where a run stopped."""

import glob
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, load_dataset
from torch.utils.data import DataLoader, get_worker_info
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .arguments import DataArguments, SourceArguments
from .data import (
    BUILDERS,
    ISOLATED_ROW_FEATURES,
    ROW_FEATURES,
    RowCollator,
    check_tokens,
    load_rows,
    pack_rows,
    pad_id,
    split_text,
    tokenize,
)
from .trainer import A3Trainer

logger = logging.get_logger(__name__)

RETRY_WAITS = (1.0, 5.0, 25.0)  # seconds before each new try of a source that failed
POSITION_FILE = "stream_position.json"
# Columns of a batch that the trainer takes out before anything else sees it.
POSITION, FAILURE = "stream_position", "stream_failure"


class SourceError(OSError):
    """A source that can't be read on, although that was tried again, or that holds nothing to read."""


def open_mixture(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int, context_length: int | None = None
) -> tuple["TextMixture", Dataset | None]:
    """The mixture of the recipe's `sources`, and the rows to evaluate on (None: no validation asked for). Of each source
    so much is read here as shows that it holds text.

    To be evaluated on: `validation_file`; or `validation_documents` documents, of each source as many as its weight
    says, the first in the order of its files, which training never sees; or nothing.

    Args:
        seed: draws the source of each document.
        context_length: the most tokens that the model takes; None: not checked.

    Raises:
        ValueError: a path that fits no file or files of several kinds; a source with no document left to train on; a
            separator where no file is .txt; and what `check_tokens` refuses.
        SourceError: a source that can't be read or holds no text.
    """
    boundary_id = check_tokens(arguments, tokenizer, context_length=context_length)
    sources = [
        open_source(name, source, separator=arguments.document_separator) for name, source in arguments.sources.items()
    ]
    files = [*(file for source in sources for file in source.files), arguments.validation_file or ""]
    if arguments.document_separator is not None and not any(file.endswith(".txt") for file in files):
        raise ValueError(
            f"document_separator={arguments.document_separator!r} has no effect: it is for .txt files, and elsewhere a "
            "document is a row of the source"
        )
    texts, ends = _hold_out(sources, arguments.validation_documents)
    mixture = TextMixture(
        [replace(source, held_out=end) for source, end in zip(sources, ends, strict=True)],
        tokenizer,
        boundary_id=boundary_id,
        block_size=arguments.block_size,
        isolated=arguments.documents == "isolated",
        num_shards=arguments.num_shards,
        seed=seed,
    )
    if arguments.validation_file is not None:
        alone = replace(
            arguments,
            sources=None,
            num_shards=16,
            train_file=arguments.validation_file,
            validation_file=None,
            document_separator=arguments.document_separator if files[-1].endswith(".txt") else None,
            max_train_rows=arguments.max_eval_rows,
            max_eval_rows=None,
        )
        return mixture, load_rows(alone, tokenizer, seed=seed)[0]
    if not texts:
        return mixture, None
    rows = [row for row, _ in itertools.islice(mixture.pack(mixture.tokenize(texts)), arguments.max_eval_rows)]
    return mixture, Dataset.from_list(rows, features=ISOLATED_ROW_FEATURES if mixture.isolated else ROW_FEATURES)


@dataclass(frozen=True)
class Source:
    """One source, opened: texts in files, in the order of the files.

    Args:
        files: what its files are called; each is read alone.
        dataset: of the hub, one shard for each file; None for local files.
        held_out: the (file, document) at which training begins.
    """

    name: str
    arguments: SourceArguments
    files: Sequence[str]
    dataset: IterableDataset | None = None
    separator: str | None = None
    held_out: tuple[int, int] = (0, 0)

    def texts(self, file: int, *, start: int = 0) -> Iterator[str]:
        """The documents of the file of that number, from document `start` on; blank ones are empty texts.

        Raises:
            SourceError: no column `text_column`, or one that is not text. Others: whatever reading raises.
        """
        column = self.arguments.text_column
        dataset = self._open_local(self.files[file]) if self.dataset is None else self._open_hub(file)
        if dataset is None:
            return
        for table in dataset.with_format("arrow").iter(batch_size=100):
            if column not in table.column_names:
                has = ", ".join(table.column_names)
                raise SourceError(
                    f"text_column={column!r}: not in source {self.name!r}, whose {self.files[file]} has {has}"
                )
            values = table.column(column)
            if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                raise SourceError(f"text_column={column!r}: source {self.name!r} holds {values.type} there, not text")
            texts = values
            if self.files[file].endswith(".txt"):  # a file is one value, and may be many documents
                texts = [piece for text in values.to_pylist() for piece in split_text(text, self.separator)]
            skipped = min(start, len(texts))
            start -= skipped
            texts = texts[skipped:]
            yield from (text or "" for text in (texts.to_pylist() if isinstance(texts, pa.ChunkedArray) else texts))

    def _open_local(self, file: str) -> IterableDataset | None:
        builder, options = _builder(file), {}
        if builder == "text":
            options = {"sample_by": "document", "encoding": "utf-8-sig"}
        if builder == "parquet":
            options = {"columns": [self.arguments.text_column]}
        try:
            return load_dataset(
                builder, data_files={"train": glob.escape(file)}, split="train", streaming=True, **options
            )
        except StopIteration:  # datasets looks at the first line of a .jsonl file for its columns, and there is none
            return None

    def _open_hub(self, file: int) -> IterableDataset:
        return self.dataset.shard(len(self.files), file)


def open_source(name: str, arguments: SourceArguments, *, separator: str | None = None) -> Source:
    """Finds a source's files.

    Raises:
        ValueError: a path that fits no file, or files of an unknown kind or of several.
    """
    if arguments.dataset_name is not None:
        dataset = load_dataset(
            arguments.dataset_name, arguments.dataset_config_name, split=arguments.dataset_split, streaming=True
        )
        files = [f"{arguments.dataset_name}, file {number}" for number in range(dataset.num_shards)]
        return Source(name, arguments, files, dataset)
    pattern = arguments.path
    # A file's own name comes first, where it looks like a pattern.
    files = [pattern] if Path(pattern).is_file() else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        raise ValueError(f"sources: {name}: path={pattern!r}: there is no such file (relative to {Path.cwd()})")
    files = [str(Path(file).resolve()) for file in files]
    builders = {_builder(file) for file in files}
    if None in builders or len(builders) > 1:
        kinds = ", ".join([*BUILDERS, ".jsonl.zst"])
        raise ValueError(f"sources: {name}: path={pattern!r}: takes files of one kind, which end in one of {kinds}")
    return Source(name, arguments, files, separator=separator)


def _builder(file: str) -> str | None:
    return BUILDERS.get(Path(file.removesuffix(".zst") if file.endswith(".jsonl.zst") else file).suffix)


def source_choices(weights: Sequence[float], *, seed: Sequence[int], start: int = 0) -> Iterator[int]:
    """Which source each next document is of, drawn by the weights, from draw `start` on: without end, and the draws of
    `datasets.interleave_datasets` with these probabilities and this seed.
    """
    generator = np.random.default_rng(seed)
    shares = np.array(weights) / np.sum(weights)
    while True:
        choices = generator.choice(len(shares), size=1000, p=shares)
        yield from choices[start:].tolist()
        start = max(start - 1000, 0)


class _Documents:
    """The documents of a source that fall to one shard, without end: from its last the shard goes on at its first.

    With as many files as shards or more, a shard has whole files; with fewer, several shards share a file, of which each
    takes every so-many-th document. Either way, all shards together have each document once.

    Args:
        place: (times read through, the file's place among the shard's, documents of the file behind).
    """

    def __init__(self, source: Source, *, shard: int = 0, num_shards: int = 1, place: Sequence[int] = (0, 0, 0)):
        self.source = source
        num_files = len(source.files)
        self.files = range(shard, num_files, num_shards) or range(shard % num_files, shard % num_files + 1)
        self.stride = len(range(self.files[0], num_shards, num_files)) if num_files < num_shards else 1
        self.offset = shard // num_files if num_files < num_shards else 0
        self.whose = f"source {source.name!r}" + (f", shard {shard} of {num_shards}" if num_shards > 1 else "")
        self.place = tuple(place)
        self._texts = self._read(*self.place)

    def next_document(self) -> str:
        """The next text that is not blank. What fails is tried again after each of `RETRY_WAITS`.

        Raises:
            SourceError: it failed each time, or no document of the shard holds text.
        """
        for tries, wait in enumerate((*RETRY_WAITS, None), start=1):
            try:
                text, self.place = next(self._texts)
                return text
            except SourceError:
                raise
            except Exception as error:  # the network, a damaged file, a column that is not there: any library's error
                _, number, document = self.place
                file = self.source.files[self.files[min(number, len(self.files) - 1)]]
                what = f"{self.whose} can't be read on at or after document {document} of {file}: {error!r}"
                if wait is None:
                    raise SourceError(f"{what} (tried {tries} times)") from error
                logger.warning(f"{what}; trying again in {wait:g} s")
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
                advice = "; with so few documents, set num_shards lower" if self.stride > 1 else ""
                raise SourceError(f"{self.whose}: no document to train on holds text{advice}")
            logger.warning(f"{self.whose}: read to its end {passes + 1} times; goes on at its first document")
            passes, number, found = passes + 1, 0, False


def _hold_out(sources: Sequence[Source], count: int) -> tuple[list[str], list[tuple[int, int]]]:
    """The first `count` documents of the mixture, each source in turn as its weight says, and where each source goes on
    (file, document) behind those that were taken of it.
    """
    readers = [_Documents(source) for source in sources]
    taken = [0] * len(sources)
    texts = []
    for _ in range(count):
        turn = max(range(len(sources)), key=lambda index: sources[index].arguments.weight / (taken[index] + 1))
        taken[turn] += 1
        texts.append(readers[turn].next_document())
    ends = [reader.place for reader in readers]
    for source, reader, number in zip(sources, readers, taken, strict=True):
        reader.next_document()
        if reader.place[0] > 0:
            raise ValueError(
                f"validation_documents={count}: {number} of them are of the source {source.name!r}, which has no more, so "
                "that none is left to train on"
            )
    return texts, [(file, document) for _, file, document in ends]


class TextMixture:
    """Rows without end, packed from documents that are drawn from several sources by weight.

    The text is cut into `num_shards` shards, each with documents of its own of every source, in the order of the files;
    a shard draws its sources, packs its rows and goes on at its first document behind its last, whatever the others do.
    Batch number n of the run (over all steps, micro-batches and ranks) is the next rows of shard n mod num_shards. So the
    rows depend neither on the number of ranks nor on the loader's workers, and where a shard stands is a few numbers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        boundary_id: int,
        block_size: int,
        isolated: bool = False,
        num_shards: int = 16,
        seed: int = 0,
    ):
        self.sources = list(sources)
        self.tokenizer = tokenizer
        self.boundary_id = boundary_id
        self.block_size = block_size
        self.isolated = isolated
        self.num_shards = num_shards
        self.seed = seed

    def tokenize(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text, its boundary at the end."""
        for text in texts:
            yield tokenize([text], self.tokenizer, boundary_id=self.boundary_id)[0]

    def pack(self, documents: Iterator[list[int]]) -> Iterator[tuple[dict[str, list[int]], int]]:
        """Rows of tokenised documents; see `pack_rows`."""
        return pack_rows(
            documents,
            bos_id=self.tokenizer.bos_token_id,
            pad_id=pad_id(self.tokenizer),
            block_size=self.block_size,
            isolated=self.isolated,
        )

    def rows(
        self, shard: int, position: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, list[int]], dict]]:
        """The rows of a shard without end, and behind each where the shard then stands: the `position` from which the
        next row is read on. It is that before the document read last (documents drawn so far, and each source's place)
        and the tokens of that document which rows have.
        """
        position = position or {"drawn": 0, "used": 0, "places": {}}
        readers = [
            _Documents(
                source,
                shard=shard,
                num_shards=self.num_shards,
                place=position["places"].get(source.name, (0, 0, 0)),
            )
            for source in self.sources
        ]
        weights = [source.arguments.weight for source in self.sources]
        choices = source_choices(weights, seed=(self.seed, shard), start=position["drawn"])
        before, skipped = position, position["used"]

        def documents() -> Iterator[list[int]]:
            nonlocal before, skipped
            for drawn, choice in enumerate(choices, start=position["drawn"]):
                places = {reader.source.name: list(reader.place) for reader in readers}
                text = readers[choice].next_document()
                before = {"drawn": drawn, "places": places}
                skipped = position["used"] if drawn == position["drawn"] else 0
                yield from (ids[skipped:] for ids in self.tokenize([text]))

        for row, used in self.pack(documents()):
            yield row, {**before, "used": skipped + used}

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        """The rows of a run whose batches are single rows."""
        shards = [self.rows(shard) for shard in range(self.num_shards)]
        for rows in itertools.cycle(shards):
            yield next(rows)[0]

    def described(self) -> dict[str, Any]:
        """What must be the same where a position is to be read on from."""
        return {
            "num_shards": self.num_shards,
            "seed": self.seed,
            "weights": {source.name: source.arguments.weight for source in self.sources},
            "files": {source.name: len(source.files) for source in self.sources},
            "held_out": {source.name: list(source.held_out) for source in self.sources},
        }


def check_readers(num_shards: int, *, world_size: int, num_workers: int) -> None:
    """Raises ValueError unless the shards can be shared out evenly among all readers."""
    readers = world_size * max(num_workers, 1)
    if num_shards % readers:
        raise ValueError(
            f"num_shards={num_shards}: takes a multiple of the {readers} readers ({world_size} processes, "
            f"dataloader_num_workers={num_workers}), so that no two share a shard"
        )


@dataclass
class StreamPosition:
    """How far a run has read: batches consumed by all ranks together, and each shard's position behind them."""

    num_batches: int = 0
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, checkpoint: str | os.PathLike, mixture: TextMixture) -> "StreamPosition":
        """Reads what `save` wrote.

        Raises:
            ValueError: no position in the checkpoint, or one of another mixture.
        """
        path = Path(checkpoint) / POSITION_FILE
        if not path.is_file():
            raise ValueError(f"{path}: is missing, so that the run's sources can't be read on where it stopped")
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in mixture.described().items():
            if saved["mixture"][name] != value:
                raise ValueError(
                    f"{path}: the checkpoint's run had {name} {saved['mixture'][name]}, and this one has {value}: documents "
                    "would be lost or read twice; a run with another mixture takes another output_dir"
                )
        return cls(saved["num_batches"], {int(shard): position for shard, position in saved["shards"].items()})

    def save(self, checkpoint: str | os.PathLike, mixture: TextMixture) -> None:
        path = Path(checkpoint) / POSITION_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"num_batches": self.num_batches, "mixture": mixture.described(), "shards": self.shards}
        path.write_text(json.dumps(content), encoding="utf-8")


class MixtureBatches(torch.utils.data.IterableDataset):
    """The batches of one rank, each with its shard's position behind it; of a source that can't be read on, its failure
    in place of a batch: in a worker an exception would reach its own rank alone, and the others would wait.
    """

    def __init__(
        self,
        mixture: TextMixture,
        *,
        batch_size: int,
        collator: RowCollator,
        rank: int = 0,
        world_size: int = 1,
        position: StreamPosition | None = None,
    ):
        self.mixture = mixture
        self.batch_size = batch_size
        self.collator = collator
        self.rank = rank
        self.world_size = world_size
        self.position = position or StreamPosition()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, num_workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        check_readers(self.mixture.num_shards, world_size=self.world_size, num_workers=num_workers)
        first = self.position.num_batches + number * self.world_size + self.rank
        rows = {}
        for batch in itertools.count(first, num_workers * self.world_size):
            shard = batch % self.mixture.num_shards
            if shard not in rows:
                rows[shard] = self.mixture.rows(shard, self.position.shards.get(shard))
            try:
                taken = list(itertools.islice(rows[shard], self.batch_size))
            except SourceError as error:
                yield {FAILURE: str(error)}
                return
            yield {**self.collator([row for row, _ in taken]), POSITION: (shard, taken[-1][1])}


class _PositionSavedCallback(TrainerCallback):
    """Looks at each checkpoint when it has been written."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.check()


class StreamTrainer(A3Trainer):
    """An `A3Trainer` whose `train_dataset` is a `TextMixture`.

    Identical to `A3Trainer` except:

    - Batches come from `MixtureBatches`: each rank and each of its workers reads shards of its own.
    - A checkpoint holds how far all ranks have read, and a resumed run reads on at the next row, on any number of ranks
      and workers that the shards can be shared out among. That is exact; what is read again is, of each source and shard,
      the one file it stopped in, up to the place. Nothing is shuffled.
    - When a source can't be read on, all ranks stop after the same step, with a checkpoint of it.
    """

    _checks_positions = False

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """See `Trainer.train`.

        Raises:
            SourceError: a source can't be read on; a checkpoint of the last step has been written.
            ValueError: shards that can't be shared out evenly, or a checkpoint of another mixture.
        """
        check_readers(
            self.train_dataset.num_shards,
            world_size=self.args.world_size,
            num_workers=self.args.dataloader_num_workers,
        )
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._start = StreamPosition.load(checkpoint, self.train_dataset) if checkpoint else StreamPosition()
        self._read = StreamPosition(self._start.num_batches)
        self._saved_step = 0
        self.args.ignore_data_skip = True  # the loader begins where the checkpoint ends
        if not self._checks_positions:
            self._checks_positions = True
            self.add_callback(_PositionSavedCallback(self.check_position_saved))
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_train_dataloader(self) -> DataLoader:
        batches = MixtureBatches(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collator=self.data_collator,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            position=self._start,
        )
        num_workers = self.args.dataloader_num_workers
        return DataLoader(
            batches,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            # Of its own, or the loader would draw from the global one when it starts: dropout in a resumed run would
            # differ.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches = list(itertools.islice(epoch_iterator, num_batches))
        self._stop_if_any([batch[FAILURE] for batch in batches if FAILURE in batch])
        for batch in batches:
            shard, self._read.shards[shard] = batch.pop(POSITION)
        self._read.num_batches += len(batches) * self.args.world_size
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _stop_if_any(self, failures: list[str]) -> None:
        """Stops all ranks if any has a failure: they save what the last step left, and raise."""
        if self.args.world_size > 1:
            flag = torch.tensor(len(failures), device=self.args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            if flag.item():
                failures = gather_object(failures)
        if not failures:
            return
        step = self.state.global_step
        if step > 0 and self._saved_step != step:
            self._save_checkpoint(self.model, trial=None)
            self.check_position_saved()
        kept = (
            f"Stopped after step {step}, whose checkpoint is in {self.args.output_dir}"
            if step
            else "Nothing is trained"
        )
        raise SourceError(f"{failures[0]}. {kept}; the same command goes on from there.")

    def _save_rng_state(self, output_dir: str) -> None:
        # Here and not in a callback: a checkpoint counts as whole once `Trainer` has written its state, which comes next.
        shards = dict(self._start.shards)
        for read in gather_object([self._read.shards]):
            shards.update(read)
        if self.args.should_save:
            StreamPosition(self._read.num_batches, shards).save(output_dir, self.train_dataset)
        self._saved_step = self.state.global_step
        super()._save_rng_state(output_dir)

    def check_position_saved(self) -> None:
        """Called when a checkpoint has been written.

        Raises:
            RuntimeError: `_save_rng_state` had no part in it, so that it lacks how far the sources were read.
        """
        if self._saved_step != self.state.global_step:
            raise RuntimeError(
                f"the Trainer of transformers {transformers.__version__} wrote the checkpoint of step "
                f"{self.state.global_step} without asking where the stream is, so that a resumed run would read rows again. "
                "Delete that checkpoint"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # `Trainer` counts it from the resumed step on when it skips nothing.
        self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
