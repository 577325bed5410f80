"""Rows mixed from several sources during training, divided among readers; a resumed run continues at the next row."""

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

from .arguments import DataArguments
from .collator import RowCollator
from .documents import check_separator, kind_of
from .packing import ISOLATED_ROW_FEATURES, ROW_FEATURES, check_tokens, load_rows, pack_rows
from .sources import DocumentReader, Source, SourceError, check_shards, open_source
from .tokenization import pad_id, tokenize

POSITION_FILE = "stream_position.json"
# Keys of a batch that `StreamTrainer` removes before the model sees it.
POSITION, FAILURE = "stream_position", "stream_failure"


def open_mixture(
    arguments: DataArguments, tokenizer: PreTrainedTokenizerBase, *, seed: int, context_length: int | None = None
) -> tuple["TextMixture", Dataset | None]:
    """Returns the mixture of a recipe's `sources`, and the rows to evaluate on (None: no evaluation data). Reads the first
    documents of each source to check that it contains text.

    Evaluation data is `validation_file`; or `validation_documents` documents, divided among the sources by weight and taken
    from their beginning, which are not trained on; or none.

    Args:
        seed: seeds the choice of each document's source.
        context_length: the model's maximum number of tokens; None: not checked.

    Raises:
        ValueError: a path that matches no file or files of several kinds; a source with no document left to train on; a
            separator without a .txt file; the errors of `check_tokens`.
        SourceError: a source that can't be read, or has too few documents for its shards.
    """
    boundary_id = check_tokens(arguments, tokenizer, context_length=context_length)
    sources = [
        open_source(name, source, separator=arguments.document_separator) for name, source in arguments.sources.items()
    ]
    files = [*(file for source in sources for file in source.files), arguments.validation_file or ""]
    check_separator(arguments.document_separator, files)
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
    """Yields, without end, the index of the source of each next document, drawn by weight, from draw `start` on. The draws are
    those of `datasets.interleave_datasets` with these probabilities and this seed.
    """
    generator = np.random.default_rng(seed)
    probabilities = np.array(weights) / np.sum(weights)
    while True:
        choices = generator.choice(len(probabilities), size=1000, p=probabilities)
        yield from choices[start:].tolist()
        start = max(start - 1000, 0)


def _hold_out(sources: Sequence[Source], count: int) -> tuple[list[str], list[tuple[int, int]]]:
    """Returns the first `count` documents, divided among the sources by weight, and for each source the (file, document) after
    those taken from it.
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
                f"validation_documents={count}: source {source.name!r} has only the {number} documents held out for "
                "evaluation, so none is left to train on"
            )
    return texts, [(file, document) for _, file, document in ends]


class TextMixture:
    """Endless rows packed from documents of several sources, drawn by weight.

    The text is divided into `num_shards` shards, each with its own documents of every source in the order of the files. A
    shard draws its sources, packs its rows and repeats its documents independently of the others. Batch n of the run (over all
    steps, micro-batches and ranks) is the next rows of shard n mod num_shards. So the rows depend neither on the number of
    ranks nor on the loader's workers, and a shard's position is a few numbers.
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
        """Yields the ids of each text, followed by the boundary token."""
        for text in texts:
            yield tokenize([text], self.tokenizer, boundary_id=self.boundary_id)[0]

    def pack(self, documents: Iterator[list[int]]) -> Iterator[tuple[dict[str, list[int]], int]]:
        """Yields what `pack_rows` makes of tokenized documents."""
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
        """Yields the rows of a shard without end, each with the `position` from which the next row is read: the state before
        the last read document (documents drawn so far, each source's place) and the number of its tokens used so far.
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
        """Yields the rows of a run with batches of one row."""
        shards = [self.rows(shard) for shard in range(self.num_shards)]
        for rows in itertools.cycle(shards):
            yield next(rows)[0]

    def described(self) -> dict[str, Any]:
        """Returns the settings that a stored position depends on."""
        return {
            "num_shards": self.num_shards,
            "seed": self.seed,
            "weights": {source.name: source.arguments.weight for source in self.sources},
            "files": {source.name: len(source.files) for source in self.sources},
            "held_out": {source.name: list(source.held_out) for source in self.sources},
        }


def check_readers(num_shards: int, *, world_size: int, num_workers: int) -> None:
    """Raises ValueError unless the shards can be divided evenly among all readers."""
    readers = world_size * max(num_workers, 1)
    if num_shards % readers:
        raise ValueError(
            f"num_shards={num_shards}: expected a multiple of the {readers} readers ({world_size} processes, "
            f"dataloader_num_workers={num_workers}), so that no two share a shard"
        )


@dataclass
class StreamPosition:
    """How far a run has read: batches consumed by all ranks together, and each shard's position after them."""

    num_batches: int = 0
    shards: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, checkpoint: str | os.PathLike, mixture: TextMixture) -> "StreamPosition":
        """Reads a saved position.

        Raises:
            ValueError: no position in the checkpoint, or one of another mixture.
        """
        path = Path(checkpoint) / POSITION_FILE
        if not path.is_file():
            raise ValueError(f"{path}: is missing, so it is unknown where to resume the sources")
        saved = json.loads(path.read_text(encoding="utf-8"))
        for name, value in mixture.described().items():
            if saved["mixture"][name] != value:
                raise ValueError(
                    f"{path}: the checkpoint's run had {name} {saved['mixture'][name]}, and this one has {value}: documents "
                    "would be lost or read twice. Use the same mixture, or another output_dir"
                )
        return cls(saved["num_batches"], {int(shard): position for shard, position in saved["shards"].items()})

    def save(self, checkpoint: str | os.PathLike, mixture: TextMixture) -> None:
        path = Path(checkpoint) / POSITION_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"num_batches": self.num_batches, "mixture": mixture.described(), "shards": self.shards}
        path.write_text(json.dumps(content), encoding="utf-8")


class MixtureBatches(torch.utils.data.IterableDataset):
    """The batches of one rank, each with its shard's position after it. If a source can't be read, the message is yielded in
    place of a batch: an exception in a worker would reach its own rank only, and the others would wait.
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
