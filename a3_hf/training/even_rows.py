"""Divides rows evenly among processes: the last batches of an epoch are filled with rows that are not scored."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from transformers import Trainer

from a3_hf.data.collator import IGNORED_LABEL


class RowsAndBlank(Dataset):
    """Rows followed by a blank row: a copy of the first with all labels ignored."""

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
    """Batches of `batch_size` indices, filled up with `filler` to a multiple of `multiple` batches.

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
    """Identical to `Trainer` except: an epoch has each row once on any number of processes. (Accelerate's `even_batches`
    repeats rows from the epoch's beginning, so that the result depends on the number of processes.)
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
        shard = loader.batch_sampler  # this process's batches of all
        shard.batch_sampler = FilledBatches(
            shard.batch_sampler.sampler,
            batch_size=shard.batch_sampler.batch_size,
            multiple=self.args.world_size,
            filler=len(rows),
        )
        return loader
