"""Texts mixed from several sources while training goes on, shared out among readers, and read on where a run stopped."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .arguments import DataArguments
from .collator import RowCollator
from .documents import kind_of
from .packing import ISOLATED_ROW_FEATURES, ROW_FEATURES, check_tokens, load_rows, pack_rows
from .sources import DocumentReader, Source, SourceError, check_shards, open_source
from .tokenization import pad_id, tokenize

logger = logging.get_logger(__name__)


POSITION_FILE = "stream_position.json"


# Columns of a batch that the trainer takes out before anything else sees it.
POSITION, FAILURE = "stream_position", "stream_failure"


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
        SourceError: a source that can't be read or holds no text, or too little for a document in each shard.
    """
    boundary_id = check_tokens(arguments, tokenizer, context_length=context_length)
    sources = [
        open_source(name, source, separator=arguments.document_separator) for name, source in arguments.sources.items()
    ]
    files = [*(file for source in sources for file in source.files), arguments.validation_file or ""]
    if arguments.document_separator is not None and not any(kind_of(file) == ".txt" for file in files):
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
    for source in mixture.sources:
        check_shards(source, arguments.num_shards)
    if arguments.validation_file is not None:
        alone = replace(
            arguments,
            sources=None,
            num_shards=16,
            train_file=arguments.validation_file,
            validation_file=None,
            document_separator=arguments.document_separator if kind_of(files[-1]) == ".txt" else None,
            max_train_rows=arguments.max_eval_rows,
            max_eval_rows=None,
        )
        return mixture, load_rows(alone, tokenizer, seed=seed)[0]
    if not texts:
        return mixture, None
    rows = [row for row, _ in itertools.islice(mixture.pack(mixture.tokenize(texts)), arguments.max_eval_rows)]
    return mixture, Dataset.from_list(rows, features=ISOLATED_ROW_FEATURES if mixture.isolated else ROW_FEATURES)


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


def _hold_out(sources: Sequence[Source], count: int) -> tuple[list[str], list[tuple[int, int]]]:
    """The first `count` documents of the mixture, each source in turn as its weight says, and where each source goes on
    (file, document) behind those that were taken of it.
    """
    readers = [DocumentReader(source) for source in sources]
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
            DocumentReader(
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
