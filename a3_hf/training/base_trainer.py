"""Base of the trainers: random draws by step and row, a stop before non-finite updates, evaluations without side effects."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from torch import nn
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from a3_hf.devices import leave_out_cudnn_attention
from a3_hf.models.a3_llama.compiling import raise_recompile_limit

from .even_rows import EvenRowsTrainer
from .throughput import Meter, peak_memory_mib

# Not the run's seed, so that the losses of two runs are measured under the same orders.
EVALUATION_SEED = 20_250_411


def row_generator(*seeds: int) -> torch.Generator:
    """Returns a CPU generator for one row, seeded by the given numbers (the run's seed, the step, the row's index in the
    global batch). Neighbouring steps and rows get unrelated streams.
    """
    mixed = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def first_row_index(micro_batch: int, *, world_size: int, rank: int, rows_per_batch: int) -> int:
    """Returns the index in the global batch of the first row of a rank's n-th micro-batch. A row has the same index, and so
    the same order, on any number of ranks.
    """
    return (micro_batch * world_size + rank) * rows_per_batch


def check_arguments(args: TrainingArguments) -> None:
    """Raises ValueError for training arguments that `BaseTrainer` does not support: label smoothing, Liger's kernels, several
    devices in one process, metrics of parts of the evaluation set.
    """
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True: Liger's kernels do not support this model and would silently do nothing; leave it out"
        )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: expected 0, because it would smooth shifted labels"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} devices in one process: expected one. Start a process for each (torchrun, accelerate launch)"
        )
    if args.batch_eval_metrics or not args.eval_do_concat_batches:
        raise ValueError(
            f"batch_eval_metrics={args.batch_eval_metrics}, eval_do_concat_batches={args.eval_do_concat_batches}: expected "
            "False and True, because the metrics are those of the whole set"
        )


class NonFiniteLossError(ValueError):
    """The loss of a step is NaN or infinite; the weights are those before the step."""


class BeforeTheStepCallback(TrainerCallback):
    """Calls `check` before each update of the weights."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.check()


class BaseTrainer(EvenRowsTrainer):
    """A `Trainer` for losses on unshifted labels under reproducible random draws.

    Identical to `Trainer` except:

    - The collator gives `input_ids`, `attention_mask` and `labels`, each (B, S), labels unshifted: −100 marks a given token,
      which is not scored. Optional `document_ids` (B, S), from 1 at tokens and 0 at padding, keep documents of a row apart.
    - The model divides the loss by the number of scored tokens of the update step, so every scored token has equal weight.
    - Each row and each document with a scored token must have a given token (BOS).
    - A subclass draws in `compute_loss`, which numbers its micro-batches by `count`, from (seed, step, the row's index in the
      global batch): a resumed run, or one on another number of ranks, draws the same.
    - A loss that is not finite stops training on all ranks before the weights are updated (`NonFiniteLossError`; with
      DeepSpeed, which steps by itself, right after).
    - `evaluate` makes the same draws at every evaluation of every run and changes nothing in the training after it.
    - The logs hold `tokens_per_second` over all ranks, without evaluations, and `peak_memory_mib`.

    Args:
        compute_metrics: see `Trainer`, also for the arguments after it.

    Raises:
        ValueError: the errors of `check_arguments`.
    """

    def __init__(
        self,
        model: nn.Module | None,
        args: TrainingArguments | None,
        *,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]],
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple = (None, None),
    ):
        args = TrainingArguments() if args is None else args
        check_arguments(args)
        leave_out_cudnn_attention()
        if args.torch_compile:
            raise_recompile_limit()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=list(callbacks),
            optimizers=optimizers,
        )
        # The model divides by the scored tokens of the step; `Trainer` must not divide again, which `training_step` checks.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._meter = Meter()
        self._micro_batch = 0
        self._sampled_step: int | None = None  # the step of the last `get_batch_samples`
        self._step_losses: list[torch.Tensor] = []  # of the micro-batches of the current update step
        self._computed_loss: torch.Tensor | None = None  # returned by the last `compute_loss`
        self._loss_was_checked = False
        self._evaluation_batch = 0
        self.add_callback(BeforeTheStepCallback(self.check_finite))

    def get_batch_samples(
        self, epoch_iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        # Called once for each update step, before its micro-batches. Identical to Trainer's except: tokens are counted by
        # `count_scored`.
        self._meter.start()
        self._micro_batch = 0
        self._step_losses = []
        self._sampled_step = self.state.global_step
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        scored = self.count_scored(batches).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            scored = self.accelerator.gather(scored).sum()
        return batches, scored

    def count_scored(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Returns the number of scored tokens, (), of an update step on this rank, by which the loss is divided."""
        return torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum()

    def count(self, inputs: dict[str, torch.Tensor]) -> int:
        """Counts a micro-batch and its tokens, and returns its number in the update step, from 0. Call it once for each.

        Raises:
            RuntimeError: the step began without `get_batch_samples`, so rows have no number.
        """
        if self.is_in_train and self._sampled_step != self.state.global_step:
            raise RuntimeError(
                f"the Trainer of transformers {transformers.__version__} did not call get_batch_samples before step "
                f"{self.state.global_step + 1}: rows can't be numbered"
            )
        self._meter.add(inputs["attention_mask"].sum().detach())
        self._micro_batch += 1
        return self._micro_batch - 1

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        # Identical to Trainer's except: the model divides by `num_items_in_batch`, and the loss is kept for `check_finite`.
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            loss = loss * self.ranks_averaged()
        self._computed_loss = loss.detach()
        self._step_losses.append(self._computed_loss)
        return (loss, outputs) if return_outputs else loss

    def ranks_averaged(self) -> int:
        """Returns the factor that undoes the averaging of gradients over ranks: the number of ranks, or 1 if each rank divides
        its loss by its own tokens.
        """
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        # Identical to Trainer's except: the first step checks that Trainer does not rescale the loss.
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._loss_was_checked:
            self._loss_was_checked = True
            if not torch.equal(loss.nan_to_num(), self._computed_loss.nan_to_num()):
                raise RuntimeError(
                    f"the Trainer of transformers {transformers.__version__} changes the loss that it is given, from "
                    f"{float(self._computed_loss)} to {float(loss)}: gradients would be scaled wrongly"
                )
        return loss

    def first_training_row(self, micro_batch: int) -> int:
        """Returns the index in the global batch of the first row of this step's n-th micro-batch on this rank."""
        return first_row_index(
            micro_batch,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            rows_per_batch=self._train_batch_size,
        )

    def training_generators(self, micro_batch: int, num_rows: int) -> list[torch.Generator]:
        """Returns a generator for each row of this step's n-th micro-batch on this rank."""
        first_row = self.first_training_row(micro_batch)
        return [row_generator(self.args.seed, self.state.global_step, first_row + row) for row in range(num_rows)]

    def next_evaluation_row(self) -> int:
        """Counts an evaluation batch, and returns the index in the evaluation set of its first row on this rank."""
        self._evaluation_batch += 1
        return first_row_index(
            self._evaluation_batch - 1,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            rows_per_batch=self.args.eval_batch_size,
        )

    def check_finite(self) -> None:
        """Called before each update.

        Raises:
            NonFiniteLossError: on all ranks; names the step and the rows of the global batch.
        """
        is_bad = ~torch.stack(self._step_losses).isfinite()
        anywhere = is_bad.any().long()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
        if not anywhere.item():
            return
        firsts = [self.first_training_row(micro_batch) for micro_batch in is_bad.nonzero().flatten().tolist()]
        rows = gather_object([f"{first} to {first + self._train_batch_size - 1}" for first in firsts])
        raise NonFiniteLossError(
            f"step {self.state.global_step + 1}: the loss is not finite in rows {', '.join(rows)} of its batch (counted from "
            f"0); the weights are those before the step, and the checkpoints in {self.args.output_dir} are unchanged. Lower "
            "learning_rate or max_grad_norm, or look at these rows"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Returns the losses of a set in nats per token (see the class). Does not affect the training that follows."""
        was_training = self.model.training
        self._evaluation_batch = 0
        self._meter.pause()
        # A loader seeds its workers from the global generator, which dropout uses too.
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.model.train(was_training)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        # Identical to Trainer's except: the draws are those of `evaluate`.
        self._evaluation_batch = 0
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def costs(self) -> dict[str, float]:
        """Returns the costs for the logs: tokens per second since the last log, this rank's times the number of ranks, and
        this process's peak memory in MiB.
        """
        costs = {"peak_memory_mib": peak_memory_mib(self.args.device)}
        rate = self._meter.read()
        if rate is not None:
            costs["tokens_per_second"] = rate * self.args.world_size
        return costs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Identical to Trainer's except: logs of training have the costs.
        if "loss" in logs:
            logs.update(self.costs())
        super().log(logs, start_time)


def scored_tokens(prediction: EvalPrediction) -> int:
    """Returns the number of scored tokens of the evaluation set, the sum over its rows.

    Raises:
        ValueError: no token is scored.
    """
    tokens = int(prediction.label_ids.sum())
    if tokens == 0:
        raise ValueError("the evaluation set has no token to score: every label is -100")
    return tokens


def given_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns (B, S) bool, True at given tokens: real ones whose label is −100.

    Raises:
        ValueError: labels at padding; a row or a document with scored tokens and no given one; documents not numbered from 1.
    """
    missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in inputs]
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}: expected input_ids, attention_mask and labels")
    real, scored = inputs["attention_mask"].bool(), inputs["labels"] != -100
    given = real & ~scored
    at_padding = (scored & ~real).any(dim=1)
    blind = scored.any(dim=1) & ~given.any(dim=1)
    if (at_padding | blind).any():
        row = int((at_padding | blind).nonzero()[0])
        if at_padding[row]:
            raise ValueError(f"row {row} of the batch has labels at padding: expected -100 there")
        raise ValueError(
            f"row {row} of the batch has no given token, so its first scored token would see nothing. Set the label of its "
            "first token (BOS) to -100"
        )
    if "document_ids" in inputs:
        _check_documents(inputs["document_ids"], real, scored, given)
    return given


def _check_documents(document_ids: torch.Tensor, real: torch.Tensor, scored: torch.Tensor, given: torch.Tensor) -> None:
    if document_ids.shape != real.shape or ((document_ids < 1) & real).any():
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)} and {int(document_ids.min())} as its least: expected "
            f"{tuple(real.shape)}, with numbers from 1 at real tokens"
        )
    number_given = torch.zeros(real.shape[0], int(document_ids.max()) + 1, dtype=torch.long, device=real.device)
    number_given.scatter_add_(1, document_ids.clamp_min(0).long(), given.long())
    blind = scored & (number_given.gather(1, document_ids.clamp_min(0).long()) == 0)
    if blind.any():
        row, column = blind.nonzero()[0].tolist()
        raise ValueError(
            f"document {int(document_ids[row, column])} in row {row} of the batch has no given token, so its first "
            "scored token would see nothing. Set the label of its first token (BOS) to -100"
        )
