"""Trainer of masked diffusion: tokens masked at random, losses weighted to bound the nats per token."""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, TrainingArguments

from a3_hf.models.masked_diffusion_llama.corruption import (
    check_mask_token,
    check_text,
    mask_by_count,
    mask_by_rate,
    required_mask_token,
    spread_counts,
)
from a3_hf.models.masked_diffusion_llama.modeling_masked_diffusion_llama import PATTERNED

from .base_trainer import EVALUATION_SEED, BaseTrainer, given_tokens, row_generator, scored_tokens

MASKINGS = {"rate": mask_by_rate, "count": mask_by_count}
# Last seed of a step's own draws, (seed, step, 0, one of these); draws of rows have three seeds.
SPREAD, VISIBLE = 1, 2


class DiffusionTrainer(BaseTrainer):
    """A `Trainer` of `MaskedDiffusionLlamaForCausalLM` (paper §3; trained as DiffuLLaMA and Dream are).

    Identical to `BaseTrainer` except:

    - A masking rate t is drawn from U(0, 1] for each row, each of its tokens is masked with probability t, and the loss is
      Σ 1/t · −log p(token) over masked tokens, divided by the number of scored tokens of the update step, masked or not: in
      expectation an upper bound on the nats per token.
    - The first token of a row (BOS) is given. A given token is never masked.
    - `evaluate` measures `eval_loss`, a Monte Carlo estimate of the bound in nats per token over all scored tokens of the set,
      from `eval_samples` masks a row, by `mask_by_count` with counts spread evenly over the row.

    Args:
        masking: `"rate"`, as above, or `"count"` (not in the paper: LLaDA's estimator of likelihood): exactly l of a row's L
            tokens, l uniform in 1..L, weighted L/l: the same expectation with less variance.
        low_discrepancy: spread the rates of a step's rows evenly over (0, 1], each still uniform (not in the paper; MDLM does
            so).
        anneal_steps: steps from causal to bidirectional attention, as in DiffuLLaMA: at step n each token sees earlier ones,
            and each later one with probability n / anneal_steps, drawn anew at every step. 0: none.
        eval_samples: masks per row of the evaluation.
        **trainer: other arguments of `BaseTrainer`.

    Raises:
        ValueError: no mask token, or one that is a real word of `processing_class`; an unknown masking; an attention
            implementation that can't be annealed; the errors of `BaseTrainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        masking: str = "rate",
        low_discrepancy: bool = False,
        anneal_steps: int = 0,
        eval_samples: int = 8,
        **trainer: Any,
    ):
        if masking not in MASKINGS:
            raise ValueError(f"masking={masking!r}: expected one of {', '.join(MASKINGS)}")
        if anneal_steps < 0:
            raise ValueError(f"anneal_steps={anneal_steps}: expected at least 0")
        if eval_samples < 1:
            raise ValueError(f"eval_samples={eval_samples}: expected at least 1")
        self.mask_token_id = required_mask_token(model.config)
        tokenizer = trainer.get("processing_class")
        if tokenizer is not None:
            check_mask_token(tokenizer, self.mask_token_id, vocab_size=model.config.vocab_size)
        if anneal_steps and model.config._attn_implementation not in PATTERNED:
            raise ValueError(
                f"anneal_steps={anneal_steps} needs an attention implementation that supports any mask, "
                f"{' or '.join(PATTERNED)}; got {model.config._attn_implementation!r}"
            )
        super().__init__(model, args, compute_metrics=_nats_per_token, **trainer)
        self.masking, self.low_discrepancy = masking, low_discrepancy
        self.anneal_steps, self.eval_samples = anneal_steps, eval_samples

    def draw(self, is_open: torch.Tensor, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws which of the `is_open` tokens (B, S) to mask (B, S) in this step's n-th micro-batch on this rank, and the
        weights (B, 1). Repeated calls draw the same.
        """
        level, noise = _draw_rows(is_open, self.training_generators(micro_batch, len(is_open)))
        if self.low_discrepancy:
            rows_per_step = self.get_total_train_batch_size(self.args)
            place = (self.first_training_row(micro_batch) + torch.arange(len(is_open))) / rows_per_step
            shift = torch.rand((), generator=row_generator(self.args.seed, self.state.global_step, 0, SPREAD))
            level = ((shift + place) % 1.0)[:, None].to(is_open.device)
        if self.masking == "rate":
            return mask_by_rate(is_open, 1.0 - level, noise)  # `level` is in [0, 1)
        return mask_by_count(is_open, spread_counts(is_open.sum(dim=1), level[:, 0], 1), noise)

    def visible_mask(self, length: int) -> torch.Tensor | None:
        """Returns (S, S) bool, True where a token (row) sees another (column) at this step of annealing; None: everywhere."""
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
        """Returns the loss of a micro-batch (B, S) with the tokens of this step masked.

        Raises:
            ValueError: labels at padding or at a row's first token, or the mask token in the text.
        """
        is_open = self._open_tokens(inputs)
        masked, weights = self.draw(is_open, self.count(inputs))
        arguments = self._arguments(inputs, masked, self.visible_mask(is_open.shape[1]))
        if num_items_in_batch is None:
            num_items_in_batch = is_open.sum()
        return super().compute_loss(
            model, {**arguments, "loss_weights": weights}, return_outputs, num_items_in_batch=num_items_in_batch
        )

    def _open_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        real = inputs["attention_mask"].bool()
        is_open = real & ~given_tokens(inputs)
        check_text(inputs["input_ids"], real, self.mask_token_id)
        scores_first = (is_open & (real.long().cumsum(dim=1) == 1)).any(dim=1)
        if scores_first.any():
            row = int(scores_first.nonzero()[0])
            raise ValueError(
                f"row {row} of the batch scores its first token, which nothing predicts. Set its label (BOS) to -100"
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

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Returns each row's bound in nats (B,) and number of scored tokens (B,), which `predict` returns too."""
        inputs = self._prepare_inputs(inputs)
        is_open = self._open_tokens(inputs)
        first_row = self.next_evaluation_row()
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


def _draw_rows(is_open: torch.Tensor, generators: list[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws uniform numbers in [0, 1), (B, 1) and (B, S), each row from its own generator."""
    draws = [
        (torch.rand(1, generator=generator), torch.rand(is_open.shape[1], generator=generator))
        for generator in generators
    ]
    return tuple(torch.stack(numbers).to(is_open.device) for numbers in zip(*draws, strict=True))


def _nats_per_token(prediction: EvalPrediction) -> dict[str, float]:
    loss = math.fsum(prediction.predictions.astype(np.float64)) / scored_tokens(prediction)
    return {"loss": float(loss)}
