"""What the trainers have in common: draws by step and row, a stop before a bad step, an evaluation that leaves no trace."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from torch import nn
from transformers import EvalPrediction, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .even_rows import EvenRowsTrainer
from .throughput import Meter, peak_memory_mib

# Apart from the run's seed, so that the losses of two runs are taken under the same orders.
EVALUATION_SEED = 20_250_411


def row_generator(*seeds: int) -> torch.Generator:
    """A CPU generator for one row, seeded by the numbers given (the run's seed, the step, the row's index in the global
    batch), well mixed: neighbouring steps and rows get unrelated streams.
    """
    mixed = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)


def first_row_index(micro_batch: int, *, world_size: int, rank: int, rows_per_batch: int) -> int:
    """The index in the global batch of the first row of a rank's n-th micro-batch: a row keeps its index, and so its
    order, on any number of ranks.
    """
    return (micro_batch * world_size + rank) * rows_per_batch


class NonFiniteLossError(ValueError):
    """The loss of a step is NaN or infinite; the weights have not taken the step."""


class BeforeTheStepCallback(TrainerCallback):
    """Calls `check` before each update of the weights."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.check()


class BaseTrainer(EvenRowsTrainer):
    """A `Trainer` for losses whose labels stand where they are predicted, under draws that are its own.

    Identical to `Trainer` except:

    - The collator gives `input_ids`, `attention_mask` and `labels`, each (B, S), labels not shifted: a token whose label is
      −100 is given, and not scored. `document_ids` (B, S), where it gives them (1 or more at tokens, 0 at padding), keep the
      documents of a row apart.
    - The model divides the loss by the number of scored tokens of the update step, so that ragged rows weigh by their tokens.
    - Each row with a scored token has a given one (BOS), and so has each document of a row (its own BOS).
    - A subclass draws in `compute_loss`, which numbers its micro-batches by `count`, from (seed, step, the row's index in the
      global batch): a resumed run, or one on another number of ranks, draws the same.
    - A loss that is not finite stops training on all ranks before the weights take the step (`NonFiniteLossError`; with
      DeepSpeed, which steps by itself, right after it).
    - `evaluate` makes the same draws at every evaluation of every run, and training goes on after it as if there had been
      none.
    - The logs hold `tokens_per_second` over all ranks, evaluation apart, and `peak_memory_mib`.

    Raises:
        ValueError: an argument of `Trainer` that does not go with this: label smoothing, several devices in one process,
            Liger's kernels, metrics that are not made of whole sets.
    """

    instead_of_liger = ""  # what saves their memory here

    def __init__(self, model: nn.Module | None, args: TrainingArguments | None, *, callbacks=(), **kwargs: Any):
        name = type(self).__name__
        if args is not None and args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True: Liger's kernels know no model of this type and would be left out in silence"
                f"{self.instead_of_liger}"
            )
        super().__init__(model=model, args=args, callbacks=list(callbacks), **kwargs)
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}; {name} takes 0: it would smooth shifted labels"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process; start one process for each (torchrun or accelerate launch)"
            )
        if self.args.batch_eval_metrics or not self.args.eval_do_concat_batches:
            raise ValueError(f"{name} takes batch_eval_metrics=False and eval_do_concat_batches=True")
        # The model divides by the scored tokens of the step, and `Trainer` shall not divide again: said in its words, and
        # looked at in `training_step`.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._meter = Meter()
        self._micro_batch = 0
        self._sampled_step: int | None = None  # whose batches `get_batch_samples` gave
        self._step_losses: list[torch.Tensor] = []  # of the micro-batches of the current update step
        self._computed_loss: torch.Tensor | None = None  # what the last `compute_loss` gave to `Trainer`
        self._loss_was_checked = False
        self._evaluation_batch = 0
        self.add_callback(BeforeTheStepCallback(self.check_finite))

    def get_batch_samples(
        self, epoch_iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        # Called once for each update step, before its micro-batches. Identical to Trainer's except: it counts scored tokens as
        # `count_scored` says.
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
        """() how many tokens of an update step's micro-batches, on this rank, the loss is divided by."""
        return torch.stack([(batch["labels"] != -100).sum() for batch in batches]).sum()

    def count(self, inputs: dict[str, torch.Tensor]) -> int:
        """The number of this micro-batch in its update step, from 0; counts it, and its tokens. Called once for each.

        Raises:
            RuntimeError: the step began without `get_batch_samples`, so that draws would be those of other rows.
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
        # What is left of Trainer's where the model itself divides by `num_items_in_batch`. `check_finite` needs the loss, too.
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs["loss"]
        if num_items_in_batch is not None:
            loss = loss * self.ranks_averaged()
        self._computed_loss = loss.detach()
        self._step_losses.append(self._computed_loss)
        return (loss, outputs) if return_outputs else loss

    def ranks_averaged(self) -> int:
        """What a loss divided by the tokens of all ranks is multiplied by, for the gradients of ranks are averaged: their
        number, or 1 where each rank divides by its own tokens.
        """
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        # Identical to Trainer's except: in the first step the loss must come through it as it was.
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
        """The index in the global batch of the first row of this step's n-th micro-batch on this rank."""
        return first_row_index(
            micro_batch,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            rows_per_batch=self._train_batch_size,
        )

    def next_evaluation_row(self) -> int:
        """The index in the evaluation set of the first row of the batch that is due on this rank; counts the batches."""
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
            NonFiniteLossError: on all ranks alike; names the step and the rows of the global batch.
        """
        is_bad = ~torch.stack(self._step_losses).isfinite()
        if self.args.world_size > 1:
            anywhere = is_bad.any().long()
            torch.distributed.all_reduce(anywhere, op=torch.distributed.ReduceOp.MAX)
        else:
            anywhere = is_bad.any()
        if not anywhere.item():
            return
        firsts = [self.first_training_row(micro_batch) for micro_batch in is_bad.nonzero().flatten().tolist()]
        rows = gather_object([f"{first} to {first + self._train_batch_size - 1}" for first in firsts])
        raise NonFiniteLossError(
            f"step {self.state.global_step + 1}: the loss is not finite in rows {', '.join(rows)} of its batch (counted from "
            f"0); the weights have not taken the step, and the checkpoints in {self.args.output_dir} are as they were. Lower "
            "learning_rate or max_grad_norm, or look at these rows"
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The losses of a set in nats per token, as the class says. Training goes on after it as if there had been none."""
        was_training = self.model.training
        self._evaluation_batch = 0
        self._meter.pause()
        # A loader draws a seed for its workers from the global generator, which dropout uses too.
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.model.train(was_training)
        return metrics

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test"):
        # Identical to Trainer's except: the draws are those of `evaluate`.
        self._evaluation_batch = 0
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def costs(self) -> dict[str, float]:
        """What training costs, for the logs: tokens per second on all ranks (taken as equal) since the last log, and the most
        memory held by this process.
        """
        costs = {"peak_memory_mib": peak_memory_mib(self.args.device)}
        rate = self._meter.read()
        if rate is not None:
            costs["tokens_per_second"] = rate * self.args.world_size
        return costs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Identical to Trainer's except: the logs of training say what it costs.
        if "loss" in logs:
            logs.update(self.costs())
        super().log(logs, start_time)


def scored_tokens(prediction: EvalPrediction) -> int:
    """How many tokens of the evaluation set are scored, from the number of each row's.

    Raises:
        ValueError: none.
    """
    tokens = int(prediction.label_ids.sum())
    if tokens == 0:
        raise ValueError("the evaluation set has no token to score: every label is -100")
    return tokens


def given_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, S), True at tokens that are known from the start: real ones whose label is −100.

    Raises:
        ValueError: labels at padding; a row, or a document in it, that scores a token but gives none; documents that are
            not numbered from 1.
    """
    missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in inputs]
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}; it takes input_ids, attention_mask and labels")
    real, scored = inputs["attention_mask"].bool(), inputs["labels"] != -100
    given = real & ~scored
    at_padding = (scored & ~real).any(dim=1)
    blind = scored.any(dim=1) & ~given.any(dim=1)
    if (at_padding | blind).any():
        row = int((at_padding | blind).nonzero()[0])
        if at_padding[row]:
            raise ValueError(f"row {row} of the batch has labels at padding; they take -100 there")
        raise ValueError(
            f"row {row} of the batch has no given token, so that the first token it scores would see nothing; put -100 "
            "into labels at its first (BOS)"
        )
    if "document_ids" in inputs:
        _check_documents(inputs["document_ids"], real, scored, given)
    return given


def _check_documents(document_ids: torch.Tensor, real: torch.Tensor, scored: torch.Tensor, given: torch.Tensor) -> None:
    if document_ids.shape != real.shape or ((document_ids < 1) & real).any():
        raise ValueError(
            f"document_ids has shape {tuple(document_ids.shape)} and {int(document_ids.min())} as its least; it takes "
            f"{tuple(real.shape)}, with numbers from 1 at real tokens"
        )
    number_given = torch.zeros(real.shape[0], int(document_ids.max()) + 1, dtype=torch.long, device=real.device)
    number_given.scatter_add_(1, document_ids.clamp_min(0).long(), given.long())
    blind = scored & (number_given.gather(1, document_ids.clamp_min(0).long()) == 0)
    if blind.any():
        row, column = blind.nonzero()[0].tolist()
        raise ValueError(
            f"document {int(document_ids[row, column])} in row {row} of the batch has no given token, so that the first "
            "token it scores would see nothing; put -100 into labels at its first (BOS)"
        )
