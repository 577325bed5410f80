"""Rows shared out evenly among processes: the last batches of an epoch are filled with rows that count nothing."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers import Trainer

IGNORED_LABEL = -100


class RowsAndBlank(Dataset):
    """Rows, and behind the last a blank one: the first, without anything to score."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.rows):
            return self.rows[index]
        first = self.rows[0]
        return {**first, "labels": [IGNORED_LABEL] * len(first["labels"])}


class FilledBatches(BatchSampler):
    """Batches of indices, all of `batch_size` and a multiple of `multiple` in number: what lacks at the end is `filler`.

    Example:
        >>> list(FilledBatches(range(5), batch_size=2, multiple=2, filler=99))
        [[0, 1], [2, 3], [4, 99], [99, 99]]
    """

    def __init__(self, sampler: Sampler | Sequence[int], *, batch_size: int, multiple: int, filler: int):
        super().__init__(sampler, batch_size, drop_last=False)
        self.multiple, self.filler = multiple, filler

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch + [self.filler] * (self.batch_size - len(batch))
        for _ in range(super().__len__(), len(self)):
            yield [self.filler] * self.batch_size

    def __len__(self) -> int:
        number = super().__len__()
        return number + -number % self.multiple


class EvenRowsTrainer(Trainer):
    """Identical to `Trainer` except: where rows do not divide by the processes, an epoch has each row once all the same. (By
    accelerate's default, `even_batches`, rows of its beginning would come twice, and the result would depend on the number of
    processes.)
    """

    def get_train_dataloader(self) -> DataLoader:
        rows = self.train_dataset
        if self.args.world_size == 1 or self.args.dataloader_drop_last:
            return super().get_train_dataloader()
        self.train_dataset = RowsAndBlank(rows)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = rows
        shard = loader.batch_sampler  # every so-many-th of the batches of all processes
        shard.batch_sampler = FilledBatches(
            shard.batch_sampler.sampler,
            batch_size=shard.batch_sampler.batch_size,
            multiple=self.args.world_size,
            filler=len(rows),
        )
        return loader
