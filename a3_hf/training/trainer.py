"""Trainer of A3 and Decoupled RoPE: orders drawn by the curriculum, evaluation under fixed orders."""

import math
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import EvalPrediction, TrainingArguments

from a3_hf.models.a3_llama.attention_masks import DENSE_IMPLEMENTATIONS, MaskCache
from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.models.decoupled_rope_llama.configuration_decoupled_rope_llama import DecoupledRopeLlamaConfig

from .auxiliary_losses import Pairs, content_loss, distillation_loss, next_token_pairs
from .base_trainer import EVALUATION_SEED, BaseTrainer, given_tokens, row_generator, scored_tokens
from .curriculum import Curriculum, draw_order
from .curriculum_callbacks import AdaptiveCallback, CurriculumCallback
from .model_inputs import model_inputs
from .schedule import AdaptiveSchedule, Schedule, StageAtStep
from .stage_checks import check_stages
from .throughput import AdapterWeights, peak_flops, training_flops

# The orders of the evaluation, each as the stage that draws it.
EVALUATION_ORDERS = {
    "left_to_right": StageAtStep("ar", group_size=1, index=0),
    "contiguous_4": StageAtStep("expand", group_size=4, index=0),
    "scattered_1": StageAtStep("permute", group_size=1, index=0),
    "scattered_4": StageAtStep("permute", group_size=4, index=0),
}
LOSSES = ("plain", "chunked")


class A3Trainer(BaseTrainer):
    """A `Trainer` whose orders follow a curriculum.

    Identical to `BaseTrainer` except:

    - Each row's order is drawn in the main process, not in data loader workers, in the stage of the step.
    - `evaluate` measures nats per token under four fixed orders, over all scored tokens of the set: `eval_loss_left_to_right`,
      `eval_loss_contiguous_4`, `eval_loss_scattered_1`, `eval_loss_scattered_4`; `eval_loss` is their mean. Decoupled RoPE is
      trained and evaluated under the orders of single tokens only.
    - The logs hold the stage's `stage_index` and `group_size`, and `mfu` (model FLOPs utilization) on a known device, if all
      weights are trained or adapters alone, without auxiliary losses. It counts the slots that passes had.

    Args:
        curriculum: the stages; `.schedule` has them in whole steps (None without a training set).
        tokens_per_row: tokens of a row, for a curriculum counted in tokens; by default the length of the first training row.
        loss: `"plain"`, or `"chunked"`, which never holds the logits of a batch (see `chunked_cross_entropy`).
        peak_flops: peak FLOP/s of a device, for `mfu`; None: that of a known device.
        content_loss_weight: weight of the content stream's next-token loss in left-to-right rows of single tokens
            (`a3_hf.training.auxiliary_losses`), summed over their tokens and divided as the main loss is.
        distillation_weight: weight of KL(content ‖ query) in the same rows. The content stream, which is the LLaMA's, teaches
            the query stream and gets no gradient from it.
        **trainer: other arguments of `BaseTrainer`.

    Raises:
        ValueError: a curriculum that doesn't fit the run or the model (see `check_stages`); the errors of `BaseTrainer`.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        curriculum: Curriculum,
        tokens_per_row: int | None = None,
        loss: str = "plain",
        peak_flops: float | None = None,
        content_loss_weight: float = 0.0,
        distillation_weight: float = 0.0,
        **trainer: Any,
    ):
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}: expected one of {', '.join(LOSSES)}")
        super().__init__(model, args, compute_metrics=self._losses_by_order, **trainer)
        self.curriculum = curriculum
        self.chunked_loss = loss == "chunked"
        self.peak_flops = peak_flops
        self._mask_cache = MaskCache()
        self._row_length = 0
        self._adapter_weights = AdapterWeights.of(self.model)
        self._content_rows = self._slots = 0  # since the last log
        self.content_loss_weight = content_loss_weight
        self.distillation_weight = distillation_weight
        self.one_stream = self.model.config.model_type == DecoupledRopeLlamaConfig.model_type
        self.slot_start = "query_embed" if self.one_stream else self.model.config.slot_start
        # Auxiliary losses compare the slots of all tokens; a plain causal kernel has no masks of groups.
        self.scored_only = (
            not (self.one_stream or content_loss_weight or distillation_weight)
            and self.model.config._attn_implementation in DENSE_IMPLEMENTATIONS
        )
        self.evaluation_orders = {
            name: stage for name, stage in EVALUATION_ORDERS.items() if stage.group_size == 1 or not self.one_stream
        }
        # Sums over tokens since the last log: content loss, distillation loss; and the number of tokens.
        self._auxiliary_sums = torch.zeros(3, device=self.args.device)
        self.schedule = self._resolve(tokens_per_row) if self.train_dataset is not None else None
        check_stages(
            self.schedule.stages if self.schedule is not None else (),
            one_stream=self.one_stream,
            implementation=self.model.config._attn_implementation,
            is_evaluated=self.eval_dataset is not None,
            chunked_loss=self.chunked_loss,
            content_loss_weight=content_loss_weight,
            distillation_weight=distillation_weight,
        )
        self._add_curriculum_callback()

    def _add_curriculum_callback(self) -> None:
        has_callback = any(isinstance(each, CurriculumCallback) for each in self.callback_handler.callbacks)
        if isinstance(self.schedule, AdaptiveSchedule):
            if has_callback:
                raise ValueError(
                    "callbacks has a CurriculumCallback, but stages that end at a plateau need the trainer's own callback. "
                    "Leave it out"
                )
            self.add_callback(AdaptiveCallback(self.schedule, self.step_loss))
        elif self.schedule is not None and not has_callback:
            self.add_callback(CurriculumCallback(self.schedule))

    def _resolve(self, tokens_per_row: int | None) -> Schedule | AdaptiveSchedule:
        max_steps = self.args.max_steps
        if max_steps <= 0:  # counted as `Trainer` will; `count_scored` checks it
            steps_per_epoch = math.ceil(len(self.get_train_dataloader()) / self.args.gradient_accumulation_steps)
            max_steps = math.ceil(max(steps_per_epoch, 1) * self.args.num_train_epochs)
        self._planned_steps = max_steps
        if self.curriculum.unit != "tokens":
            return self.curriculum.resolve(max_steps=max_steps)
        if tokens_per_row is None:
            tokens_per_row = len(next(iter(self.train_dataset))["input_ids"])
        tokens_per_step = self.get_total_train_batch_size(self.args) * tokens_per_row
        return self.curriculum.resolve(max_steps=max_steps, tokens_per_step=tokens_per_step)

    def count_scored(self, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Returns the number of scored tokens, (), of an update step on this rank, without those that orders leave out.

        Raises:
            RuntimeError: `Trainer` makes another number of steps than the curriculum was planned for.
        """
        if self.state.max_steps != self._planned_steps:
            raise RuntimeError(
                f"the Trainer of transformers {transformers.__version__} makes {self.state.max_steps} steps; the curriculum "
                f"was planned for {self._planned_steps}. Set max_steps instead of num_train_epochs"
            )
        if self.schedule.at(self.state.global_step).scores_everything:
            return super().count_scored(batches)
        return torch.stack(
            [self._draw(batch, micro_batch).scored_mask.sum() for micro_batch, batch in enumerate(batches)]
        ).sum()

    def _draw(self, inputs: dict[str, torch.Tensor], micro_batch: int) -> GroupOrder:
        """Draws the orders of this step's n-th micro-batch on this rank; repeated calls draw the same."""
        return draw_order(
            self.schedule.at(self.state.global_step),
            inputs["attention_mask"].bool(),
            given_mask=given_tokens(inputs),
            generator=self.training_generators(micro_batch, len(inputs["input_ids"])),
        )

    def step_loss(self) -> float:
        """Returns the loss of the last step in nats per scored token over all ranks, without auxiliary losses; bitwise equal
        on all ranks.
        """
        of_ranks = self.accelerator.gather(torch.stack(self._step_losses).sum()[None]).tolist()
        return math.fsum(of_ranks) / len(of_ranks)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ):
        """Returns the loss of a micro-batch (B, S) under the orders of this step; logits are in generation order.

        Raises:
            ValueError: the errors of `given_tokens`.
        """
        order = self._draw(inputs, self.count(inputs))
        self._row_length = inputs["input_ids"].shape[1]
        arguments = model_inputs(
            order,
            inputs["input_ids"],
            group_size=self.schedule.at(self.state.global_step).largest_group,
            implementation=self.model.config._attn_implementation,
            document_ids=inputs.get("document_ids"),
            kept=self._mask_cache,
            one_stream=self.one_stream,
            slot_start=self.slot_start,
            scored_only=self.scored_only,
        )
        self._content_rows += arguments["input_ids"].numel()
        self._slots += arguments["labels"].numel()
        if self.chunked_loss:
            arguments["chunked_loss"] = True
        pairs = None
        if self.content_loss_weight or self.distillation_weight:
            pairs = next_token_pairs(order, arguments["labels"], inputs.get("document_ids"))
            if len(pairs.rows):
                arguments["content_logits_at"] = (pairs.rows, pairs.content)
        loss, outputs = super().compute_loss(
            model, arguments, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if pairs is not None and len(pairs.rows):
            loss = loss + self._auxiliary_loss(outputs, arguments["labels"], pairs, num_items_in_batch)
            self._computed_loss = loss.detach()
        return (loss, outputs) if return_outputs else loss

    def _auxiliary_loss(
        self, outputs, labels: torch.Tensor, pairs: Pairs, num_items_in_batch: torch.Tensor | int
    ) -> torch.Tensor:
        of_content = of_slots = torch.zeros((), device=labels.device)
        if self.content_loss_weight:
            of_content = content_loss(outputs.content_logits, labels[pairs.rows, pairs.slots])
        if self.distillation_weight:
            of_slots = distillation_loss(outputs.logits[pairs.rows, pairs.slots], outputs.content_logits)
        tokens = torch.full_like(of_content, len(pairs.rows))
        self._auxiliary_sums += torch.stack([of_content, of_slots, tokens]).detach()
        total = self.content_loss_weight * of_content + self.distillation_weight * of_slots
        return total / num_items_in_batch * self.ranks_averaged()

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Returns each row's loss, summed over its scored tokens, under each of the `evaluation_orders` (B, orders), and the
        number of these tokens (B,); `predict` returns them too.
        """
        inputs = self._prepare_inputs(inputs)
        given = given_tokens(inputs)
        first_row = self.next_evaluation_row()
        losses = []
        for index, (name, stage) in enumerate(EVALUATION_ORDERS.items()):
            if name not in self.evaluation_orders:
                continue
            generators = [
                row_generator(EVALUATION_SEED, index, first_row + row) for row in range(len(inputs["input_ids"]))
            ]
            order = draw_order(stage, inputs["attention_mask"].bool(), given_mask=given, generator=generators)
            arguments = model_inputs(
                order,
                inputs["input_ids"],
                group_size=stage.group_size,
                implementation=self.model.config._attn_implementation,
                document_ids=inputs.get("document_ids"),
                one_stream=self.one_stream,
                slot_start=self.slot_start,
                scored_only=self.scored_only,
            )
            with torch.no_grad(), self.compute_loss_context_manager():
                if self.chunked_loss:
                    token_losses = model(**arguments, chunked_loss=True).token_losses
                else:
                    labels = arguments.pop("labels")
                    logits = model(**arguments).logits.float()
                    token_losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            losses.append(token_losses.sum(dim=1))
        return None, torch.stack(losses, dim=1), (inputs["labels"] != -100).sum(dim=1)

    def _losses_by_order(self, prediction: EvalPrediction) -> dict[str, float]:
        """Returns nats per token under each of the `evaluation_orders`, and `loss`, their mean.

        Raises:
            ValueError: no token is scored.
        """
        losses = prediction.predictions.astype(np.float64).sum(axis=0) / scored_tokens(prediction)
        by_order = {f"loss_{name}": float(loss) for name, loss in zip(self.evaluation_orders, losses, strict=True)}
        return {**by_order, "loss": float(losses.mean())}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The stage by its index: not every logger supports text.
        if "loss" in logs:
            stage = self.schedule.at(self.state.global_step - 1)
            logs["stage_index"] = stage.index
            logs["group_size"] = stage.group_size
            if self.content_loss_weight or self.distillation_weight:
                self._meter.pause()  # the ranks wait for each other
                logs.update(self._auxiliary_logs())
        super().log(logs, start_time)

    def costs(self) -> dict[str, float]:
        """Returns the costs of `BaseTrainer.costs`, and `mfu` if the device's peak and the pass's FLOPs are known."""
        costs = super().costs()
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        peak = self.peak_flops or peak_flops(self.args.device, dtype or self.model.dtype)
        slots = 0 if self.one_stream else self._slots / max(self._content_rows, 1)
        self._content_rows = self._slots = 0
        if peak is not None and "tokens_per_second" in costs and self._has_known_flops():
            flops = training_flops(
                self.model.config, length=self._row_length, slots=slots, adapters=self._adapter_weights
            )
            costs["mfu"] = costs["tokens_per_second"] / self.args.world_size * flops / peak
        return costs

    def _has_known_flops(self) -> bool:
        """Whether `training_flops` holds: no auxiliary loss, and all weights are trained, or adapters alone."""
        trained = {
            weight.requires_grad
            for name, weight in self.model.named_parameters()
            if not ("lora_" in name or "query_embed" in name)
        }
        has_one_loss = not (self.content_loss_weight or self.distillation_weight)
        return has_one_loss and trained == {not any(self._adapter_weights)}

    def _auxiliary_logs(self) -> dict[str, float]:
        """Returns the auxiliary losses since the last log, in nats per token of the rows that have them, over all ranks."""
        sums = self.accelerator.gather(self._auxiliary_sums[None]).sum(dim=0).tolist()
        self._auxiliary_sums.zero_()
        weights = {"content_loss": self.content_loss_weight, "distillation_loss": self.distillation_weight}
        return {
            name: total / sums[2]
            for (name, weight), total in zip(weights.items(), sums[:2], strict=True)
            if weight and sums[2]
        }
