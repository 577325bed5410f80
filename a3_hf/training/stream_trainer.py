"""Trainer over a mixture of text sources: batches from readers, the position saved with each checkpoint."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from a3_hf.data.mixture import FAILURE, POSITION, MixtureBatches, StreamPosition, check_readers
from a3_hf.data.sources import SourceError

from .trainer import A3Trainer


class _PositionSavedCallback(TrainerCallback):
    """Calls `check` after each checkpoint is written."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.check()


class StreamTrainer(A3Trainer):
    """An `A3Trainer` whose `train_dataset` is a `TextMixture`.

    Identical to `A3Trainer` except:

    - Batches come from `MixtureBatches`: each rank and each of its workers reads its own shards.
    - A checkpoint stores how far all ranks have read, and a resumed run continues exactly at the next row, on any number of
      ranks and workers that divides the shards. For each source and shard only the file in which it stopped is read again, up
      to that place. Nothing is shuffled.
    - When a source can't be read further, all ranks stop after the same step and save a checkpoint.
    """

    _checks_positions = False

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        """See `Trainer.train`.

        Raises:
            SourceError: a source can't be read further; a checkpoint of the last step was written.
            ValueError: shards that can't be divided evenly, or a checkpoint of another mixture.
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
            # Its own generator: drawing from the global one would change dropout in a resumed run.
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
        """If any rank has a failure, saves a checkpoint of the last step on all ranks and raises SourceError."""
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
        raise SourceError(
            f"{failures[0]}. {kept}; once the source can be read, the same command resumes from there (with "
            "--accept_changed_inputs true, if a file had to change)"
        )

    def _save_rng_state(self, output_dir: str) -> None:
        # Not in a callback: a checkpoint counts as whole once `Trainer` has written its state, which comes next.
        shards = dict(self._start.shards)
        for read in gather_object([self._read.shards]):
            shards.update(read)
        if self.args.should_save:
            StreamPosition(self._read.num_batches, shards).save(output_dir, self.train_dataset)
        self._saved_step = self.state.global_step
        super()._save_rng_state(output_dir)

    def check_position_saved(self) -> None:
        """Called after a checkpoint is written.

        Raises:
            RuntimeError: `Trainer` did not call `_save_rng_state`, so the checkpoint lacks the sources' positions.
        """
        if self._saved_step != self.state.global_step:
            raise RuntimeError(
                f"the Trainer of transformers {transformers.__version__} wrote the checkpoint of step "
                f"{self.state.global_step} without the position in the sources, so a resumed run would read rows again. "
                "Delete that checkpoint"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # `Trainer` would count epochs from the resumed step on, since it skips no data.
        self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
