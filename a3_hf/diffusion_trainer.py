"""Training of masked diffusion: tokens masked at random, losses weighted so that they bound the nats per token."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from .corruption import (
    check_mask_token,
    check_text,
    mask_by_count,
    mask_by_rate,
    required_mask_token,
    spread_counts,
)
from .modeling_masked_diffusion_llama import PATTERNED
from .throughput import Meter, peak_memory_mib
from .trainer import (
    EVALUATION_SEED,
    BeforeTheStepCallback,
    NonFiniteLossError,
    first_row_index,
    given_tokens,
    row_generator,
)

MASKINGS = {"rate": mask_by_rate, "count": mask_by_count}
# What a step draws beside its rows, told apart by the last of its seeds: (seed, step, 0, one of these). Rows have three.
SPREAD, VISIBLE = 1, 2


class DiffusionTrainer(Trainer):
    """A `Trainer` of `MaskedDiffusionLlamaForCausalLM` (paper §3, as DiffuLLaMA and Dream train).

    Identical to `Trainer` except:

    - Each row's share t to mask is drawn from U(0, 1], each of its tokens is masked with probability t, and the loss is
      Σ 1/t · −log p(token) over masked tokens, divided by the number of scored tokens of the update step, masked or not: in
      expectation an upper bound on the nats per token.
    - The draws come from (seed, step, the row's index in the global batch), in `compute_loss`: a resumed run, or one on
      another number of ranks, draws the same.
    - The collator gives `input_ids`, `attention_mask` and `labels`, each (B, S), labels not shifted: a token whose label is
      −100 is given, never masked and never scored. The first token of a row (BOS) is given. `document_ids` (B, S), where it
      gives them, keep the documents of a row apart.
    - A loss that is not finite stops training on all ranks before the weights take the step (`NonFiniteLossError`).
    - `evaluate` measures `eval_loss`, the bound by Monte Carlo, in nats per token over all scored tokens of the set, from
      draws that are the same at every evaluation of every run.
    - The logs hold `tokens_per_second` over all ranks, evaluation apart, and `peak_memory_mib`.

    Args:
        masking: `"rate"`, as above, or `"count"` (not in the paper: LLaDA's estimator of likelihood): exactly l of a row's L
            tokens, l uniform in 1..L, weighted L/l. The same in expectation, and it varies less.
        low_discrepancy: spread the shares of a step's rows evenly over (0, 1], each by itself still uniform (not in the paper;
            MDLM does so).
        anneal_steps: from causal to bidirectional attention, as DiffuLLaMA does: at step n of so many each token sees those
            before it, and each of those after it with probability n / anneal_steps, drawn anew at every step. 0: none.
        eval_samples: masks per row of the evaluation.

    Raises:
        ValueError: no mask token, or one that is a real word of `processing_class`; an unknown masking; an attention
            implementation that can't be annealed; an argument of `Trainer` that does not go with this loss (label smoothing,
            several devices in one process, Liger's kernels, other metrics).
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple = (None, None),
        masking: str = "rate",
        low_discrepancy: bool = False,
        anneal_steps: int = 0,
        eval_samples: int = 8,
    ):
        if masking not in MASKINGS:
            raise ValueError(f"masking={masking!r}; it takes one of {', '.join(MASKINGS)}")
        if anneal_steps < 0:
            raise ValueError(f"anneal_steps={anneal_steps}; it takes at least 0")
        if eval_samples < 1:
            raise ValueError(f"eval_samples={eval_samples}; it takes at least 1: the bound is a mean")
        self.mask_token_id = required_mask_token(model.config)
        if processing_class is not None:
            check_mask_token(processing_class, self.mask_token_id, vocab_size=model.config.vocab_size)
        if anneal_steps and model.config._attn_implementation not in PATTERNED:
            raise ValueError(
                f"anneal_steps={anneal_steps} needs an attention implementation that takes any mask, "
                f"{' or '.join(PATTERNED)}; got {model.config._attn_implementation!r}"
            )
        if args is not None and args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True: Liger's kernels know no such model and would be left out in silence"
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            optimizers=optimizers,
            compute_metrics=_nats_per_token,
        )
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}; DiffusionTrainer takes 0: it would smooth "
                "shifted labels"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process; start one process for each (torchrun or accelerate launch)"
            )
        if self.args.batch_eval_metrics or not self.args.eval_do_concat_batches:
            raise ValueError("DiffusionTrainer takes batch_eval_metrics=False and eval_do_concat_batches=True")
        # The model divides by `num_items_in_batch`, the labels that are not −100 before any is masked: none is shifted.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self.masking, self.low_discrepancy = masking, low_discrepancy
        self.anneal_steps, self.eval_samples = anneal_steps, eval_samples
        self._meter = Meter()
        self._micro_batch = 0
        self._evaluation_batch = 0
        self._step_losses: list[torch.Tensor] = []  # of the micro-batches of the current update step
        self.add_callback(BeforeTheStepCallback(self.check_finite))

    def get_batch_samples(
        self, epoch_iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int]:
        # Called once for each update step, before its micro-batches.
        self._meter.start()
        self._micro_batch = 0
        self._step_losses = []
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def draw(self, is_open: torch.Tensor, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is masked of the `is_open` (B, S) tokens of this step's n-th micro-batch on this rank, and the weights (B, 1):
        the same however often they are drawn.
        """
        seed, step = self.args.seed, self.state.global_step
        first_row = first_row_index(
            micro_batch,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            rows_per_batch=self._train_batch_size,
        )
        level, noise = _draw_rows(is_open, [row_generator(seed, step, first_row + row) for row in range(len(is_open))])
        if self.low_discrepancy:
            rows_per_step = self.get_total_train_batch_size(self.args)
            place = (first_row + torch.arange(len(is_open))) / rows_per_step
            shift = torch.rand((), generator=row_generator(seed, step, 0, SPREAD))
            level = ((shift + place) % 1.0)[:, None].to(is_open.device)
        if self.masking == "rate":
            return mask_by_rate(is_open, 1.0 - level, noise)  # `level` is in [0, 1)
        return mask_by_count(is_open, spread_counts(is_open.sum(dim=1), level[:, 0], 1), noise)

    def visible_mask(self, length: int) -> torch.Tensor | None:
        """(S, S) bool, what each token sees at this step of the annealing; None: everything."""
        step = self.state.global_step
        if step >= self.anneal_steps:
            return None
        noise = torch.rand(length, length, generator=row_generator(self.args.seed, step, 0, VISIBLE))
        return (torch.ones(length, length).tril().bool() | (noise < step / self.anneal_steps)).to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """The loss of a micro-batch (B, S) with the tokens of this step masked.

        Raises:
            ValueError: labels at padding or at a row's first token, or the mask token in the text.
        """
        is_open = self._open_tokens(inputs)
        masked, weights = self.draw(is_open, self._micro_batch)
        self._micro_batch += 1
        self._meter.add(inputs["attention_mask"].sum().detach())
        arguments = self._arguments(inputs, masked, self.visible_mask(is_open.shape[1]))
        if num_items_in_batch is None:
            num_items_in_batch = is_open.sum()
        loss, outputs = super().compute_loss(
            model, {**arguments, "loss_weights": weights}, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        self._step_losses.append(loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _open_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        real = inputs["attention_mask"].bool()
        is_open = real & ~given_tokens(inputs)
        check_text(inputs["input_ids"], real, self.mask_token_id)
        if (is_open & (real.long().cumsum(dim=1) == 1)).any():
            row = int((is_open & (real.long().cumsum(dim=1) == 1)).any(dim=1).nonzero()[0])
            raise ValueError(
                f"row {row} of the batch scores its first token, which nothing predicts; put -100 into labels there (BOS)"
            )
        return is_open

    def _arguments(self, inputs, masked, visible_mask) -> dict[str, torch.Tensor | None]:
        return {
            "input_ids": inputs["input_ids"].masked_fill(masked, self.mask_token_id),
            "attention_mask": inputs["attention_mask"],
            "labels": inputs["labels"].masked_fill(~masked, -100),
            "document_ids": inputs.get("document_ids"),
            "visible_mask": visible_mask,
        }

    def check_finite(self) -> None:
        """Called before each update.

        Raises:
            NonFiniteLossError: on all ranks alike; names the step.
        """
        is_bad = (~torch.stack(self._step_losses).isfinite()).any().long()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(is_bad, op=torch.distributed.ReduceOp.MAX)
        if is_bad.item():
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1}: the loss is not finite; the weights have not taken the step, and the "
                f"checkpoints in {self.args.output_dir} are as they were. Lower learning_rate or max_grad_norm"
            )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """`eval_loss`: the bound in nats per token, from `eval_samples` masks a row, by `mask_by_count` with numbers spread
        evenly over each row's. Training goes on after it as if there had been none.
        """
        was_training = self.model.training
        self._meter.pause()
        # A loader draws a seed for its workers from the global generator, which dropout uses too.
        with torch.random.fork_rng(devices=[]):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.model.train(was_training)
        return metrics

    def evaluation_loop(self, *args, **kwargs):
        self._evaluation_batch = 0
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Each row's bound in nats (B,), and the number of its scored tokens (B,); `predict` returns the same."""
        inputs = self._prepare_inputs(inputs)
        is_open = self._open_tokens(inputs)
        first_row = first_row_index(
            self._evaluation_batch,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            rows_per_batch=self.args.eval_batch_size,
        )
        self._evaluation_batch += 1
        draws = [
            _draw_rows(
                is_open, [row_generator(EVALUATION_SEED, first_row + row, sample) for row in range(len(is_open))]
            )
            for sample in range(1, self.eval_samples + 1)
        ]
        counts = spread_counts(is_open.sum(dim=1), draws[0][0][:, 0], self.eval_samples)
        totals = torch.zeros(len(is_open), dtype=torch.float64, device=is_open.device)
        for (_, noise), count in zip(draws, counts.unbind(dim=1), strict=True):
            masked, weights = mask_by_count(is_open, count[:, None], noise)
            with torch.no_grad(), self.compute_loss_context_manager():
                token_losses = model(**self._arguments(inputs, masked, None)).token_losses
            totals += (token_losses.double() * weights).sum(dim=1)
        return None, totals / self.eval_samples, is_open.sum(dim=1)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Identical to Trainer's except: the logs of training say what it costs.
        if "loss" in logs:
            logs["peak_memory_mib"] = peak_memory_mib(self.args.device)
            rate = self._meter.read()
            if rate is not None:
                logs["tokens_per_second"] = rate * self.args.world_size
        super().log(logs, start_time)


def _draw_rows(is_open: torch.Tensor, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform numbers in [0, 1) from each row's own generator: (B, 1), and (B, S)."""
    draws = [
        (torch.rand(1, generator=generator), torch.rand(is_open.shape[1], generator=generator))
        for generator in generators
    ]
    return tuple(torch.stack(numbers).to(is_open.device) for numbers in zip(*draws, strict=True))


def _nats_per_token(prediction: EvalPrediction) -> dict[str, float]:
    tokens = prediction.label_ids.sum()
    if tokens == 0:
        raise ValueError("the evaluation set has no token to score: every label is -100")
    loss = math.fsum(prediction.predictions.astype(np.float64)) / int(tokens)
    return {"loss": float(loss)}
