"""Training: orders drawn on the main process as the curriculum says, evaluation under fixed orders."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import (
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .auxiliary import Pairs, content_loss, distillation_loss, next_token_pairs
from .configuration_decoupled_rope_llama import SINGLETONS_ONLY, DecoupledRopeLlamaConfig
from .curriculum import (
    AdaptiveCallback,
    AdaptiveSchedule,
    Curriculum,
    CurriculumCallback,
    Schedule,
    StageAtStep,
    draw_order,
)
from .masks import KeptViews, group_views, singleton_views
from .orders import GroupOrder, left_tokens
from .stages import Stage
from .throughput import Meter, peak_flops, peak_memory_mib, training_flops

# The orders of the evaluation, each as the stage that draws it.
EVALUATION_ORDERS = {
    "left_to_right": StageAtStep("ar", group_size=1, index=0),
    "contiguous_4": StageAtStep("expand", group_size=4, index=0),
    "scattered_1": StageAtStep("permute", group_size=1, index=0),
    "scattered_4": StageAtStep("permute", group_size=4, index=0),
}
# Apart from the run's seed, so that the losses of two runs are taken under the same orders.
EVALUATION_SEED = 20_250_411

LOSSES = ("plain", "chunked")


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


def model_inputs(
    order: GroupOrder,
    input_ids: torch.Tensor,
    *,
    group_size: int,
    implementation: str,
    document_ids: torch.Tensor | None = None,
    kept: KeptViews | None = None,
    one_stream: bool = False,
    slot_start: str = "query_embed",
) -> dict[str, Any]:
    """The arguments of `A3LlamaForCausalLM.forward`, `labels` (−100 where nothing is scored) among them, that score
    `input_ids` (B, S) under an order. In generation order singletons need plain causal masks alone, which any attention
    kernel takes; not so where a row holds several documents (`document_ids`, (B, S)), which are kept apart. Where the
    order leaves open tokens out of the loss, there are slots for the scored ones alone (and to fill up shorter rows).
    `kept` carries masks from one batch to the next, where groups allow it. With `one_stream` they are those of
    `DecoupledRopeLlamaForCausalLM.forward`, which has a mask of its own. `slot_start` is the model's.
    """
    layout = order.lay_out(input_ids, document_ids=document_ids)
    left = None
    if slot_start == "left_token":
        left = left_tokens(
            layout.input_ids,
            layout.position_ids,
            layout.group_ids,
            layout.position_ids,
            layout.group_ids,
            key_mask=layout.attention_mask,
            document_ids=layout.document_ids,
            target_document_ids=layout.document_ids,
        )
    if order.context_mask is not None:
        scored = layout.labels != -100
        width = max(int(scored.sum(dim=1).max()), 1)
        slots = scored.int().argsort(dim=1, descending=True, stable=True)[:, :width]
        documents = None if document_ids is None else layout.document_ids.gather(1, slots)
        return {
            **layout._asdict(),
            "target_position_ids": layout.position_ids.gather(1, slots),
            "target_group_ids": layout.group_ids.gather(1, slots),
            "target_document_ids": documents,
            **({} if left is None else {"target_input_ids": left.gather(1, slots)}),
            "labels": layout.labels.gather(1, slots),
            "use_cache": False,
        }
    if group_size == 1 and document_ids is None:
        length, device = input_ids.shape[1] - 1, input_ids.device
        return {
            "input_ids": layout.input_ids[:, :-1],
            "position_ids": layout.position_ids[:, :-1],
            "target_position_ids": layout.position_ids[:, 1:],
            "attention_mask": None if one_stream else singleton_views(implementation, length, device),
            **({} if left is None else {"target_input_ids": left[:, 1:]}),
            "labels": layout.labels[:, 1:].contiguous(),  # transformers' loss takes a view of them
            "use_cache": False,
        }
    views = None
    if kept is not None and document_ids is None:
        groups = {"group_ids": layout.group_ids, "target_group_ids": layout.group_ids}
        views = kept.views(implementation, **groups, key_mask=layout.attention_mask)
    if views is not None:
        return {
            "input_ids": layout.input_ids,
            "position_ids": layout.position_ids,
            "target_position_ids": layout.position_ids,
            "attention_mask": views,
            **({} if left is None else {"target_input_ids": left}),
            "labels": layout.labels,
            "use_cache": False,
        }
    return {**layout._asdict(), "use_cache": False}


def check_one_stream(
    stages: Sequence[Stage], *, content_loss_weight: float = 0.0, distillation_weight: float = 0.0
) -> None:
    """Whether a model of one stream, Decoupled RoPE, can be trained so.

    Raises:
        ValueError: a stage with groups of several tokens, or a loss between two streams.
    """
    for number, stage in enumerate(stages, start=1):
        if stage.group_sizes[-1] > 1:
            raise ValueError(
                f"stage {number} ({stage.name!r}) has group_size={stage.group_size!r}; it takes 1. {SINGLETONS_ONLY}"
            )
    weights = {"content_loss_weight": content_loss_weight, "distillation_weight": distillation_weight}
    for name, weight in weights.items():
        if weight:
            raise ValueError(f"{name}={weight}: it is a loss of two streams, and Decoupled RoPE has one; it takes 0")


class NonFiniteLossError(ValueError):
    """The loss of a step is NaN or infinite; the weights have not taken the step."""


class A3Trainer(Trainer):
    """A `Trainer` whose orders follow a curriculum.

    Identical to `Trainer` except:

    - The order of each row is drawn in `compute_loss`, on the main process: the stage is a function of the step, the
      generator one of (seed, step, the row's index in the global batch). A resumed run, or one on another number of
      ranks, draws the same orders.
    - The collator gives `input_ids`, `attention_mask` and `labels`, each (B, S), labels not shifted: a token whose
      label is −100 is given, and not scored. Each row with a scored token has a given one (BOS).
    - `document_ids` (B, S), where the collator gives them (1 or more at tokens, 0 at padding), keep the documents of a row
      apart in both streams. Each document with a scored token has a given one, its own BOS.
    - The loss is summed over the scored tokens of the update step and divided by their number, so that ragged rows
      weigh by their tokens.
    - A loss that is not finite stops training on all ranks before the weights take the step (`NonFiniteLossError`; with
      DeepSpeed, which steps by itself, right after it).
    - `evaluate` is that of four fixed orders, see there.
    - A `DecoupledRopeLlamaForCausalLM` is trained and evaluated under orders of single tokens.

    Args:
        curriculum: the stages; resolved in whole steps when the trainer is made (`.schedule`; None without a training
            set).
        tokens_per_row: tokens of a row, for a curriculum counted in tokens; by default the length of the first row of
            the training set.
        loss: `"plain"`, or `"chunked"`, which never holds the logits of a batch: see `a3_hf.chunked_loss`.
        peak_flops: what one device can do in a second, for the share that is put to use (`mfu` in the logs); None: as
            known for the device, and no `mfu` where it isn't.
        content_loss_weight: weight of the content stream's own next-token loss, in rows drawn left to right one token at
            a time (`a3_hf.auxiliary`); it is summed over their tokens and divided as the main loss is.
        distillation_weight: weight of KL(content ‖ query) in the same rows: the query stream learns what the content
            stream, which computes what the LLaMA does, forecasts. The content stream gets no gradient from it.

    Raises:
        ValueError: a curriculum that doesn't fit the run or the model, an attention implementation that can't express its
            groups, or an argument of `Trainer` that does not go with orders (label smoothing, other losses or metrics, several
            devices in one process, Liger's kernels).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        curriculum: Curriculum,
        data_collator: Callable | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple = (None, None),
        tokens_per_row: int | None = None,
        loss: str = "plain",
        peak_flops: float | None = None,
        content_loss_weight: float = 0.0,
        distillation_weight: float = 0.0,
    ):
        if loss not in LOSSES:
            raise ValueError(f"loss={loss!r}; it takes one of {', '.join(LOSSES)}")
        if args is not None and args.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel=True: Liger's kernels know no model of type a3_llama and would be left out in silence; "
                "loss='chunked' is the loss that holds no logits"
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
            compute_metrics=self._losses_by_order,
        )
        if self.args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}; A3Trainer takes 0: it would smooth "
                "shifted labels"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} devices in one process; start one process for each (torchrun or accelerate launch)"
            )
        if self.args.batch_eval_metrics or not self.args.eval_do_concat_batches:
            raise ValueError("A3Trainer takes batch_eval_metrics=False and eval_do_concat_batches=True")
        # The model divides by `num_items_in_batch`, the labels that are not −100 wherever they stand: none is shifted.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False
        self.curriculum = curriculum
        self.chunked_loss = loss == "chunked"
        self.peak_flops = peak_flops
        self._meter = Meter()
        self._kept_views = KeptViews()
        self._row_length = 0
        self.content_loss_weight = content_loss_weight
        self.distillation_weight = distillation_weight
        self.one_stream = self.model.config.model_type == DecoupledRopeLlamaConfig.model_type
        self.slot_start = "query_embed" if self.one_stream else self.model.config.slot_start
        self.evaluation_orders = {
            name: stage for name, stage in EVALUATION_ORDERS.items() if stage.group_size == 1 or not self.one_stream
        }
        # Since the last log, summed over tokens: content loss, distillation loss; and the number of tokens.
        self._auxiliary_sums = torch.zeros(3, device=self.args.device)
        self._micro_batch = 0
        self._step_losses: list[torch.Tensor] = []  # of the micro-batches of the current update step
        self._evaluation_batch = 0
        self.schedule = self._resolve(tokens_per_row) if train_dataset is not None else None
        self._check_implementation()
        self._check_auxiliary()
        self.add_callback(BeforeTheStepCallback(self.check_finite))
        has_callback = any(isinstance(each, CurriculumCallback) for each in callbacks)
        if isinstance(self.schedule, AdaptiveSchedule):
            if has_callback:
                raise ValueError(
                    "callbacks holds a CurriculumCallback; this curriculum has stages that end at a plateau, which only "
                    "the trainer's own callback can tell: leave it out"
                )
            self.add_callback(AdaptiveCallback(self.schedule, self.step_loss))
        elif self.schedule is not None and not has_callback:
            self.add_callback(CurriculumCallback(self.schedule))

    def _resolve(self, tokens_per_row: int | None) -> Schedule | AdaptiveSchedule:
        max_steps = self.args.max_steps
        if max_steps <= 0:
            max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        if self.curriculum.unit != "tokens":
            return self.curriculum.resolve(max_steps=max_steps)
        if tokens_per_row is None:
            tokens_per_row = len(next(iter(self.train_dataset))["input_ids"])
        tokens_per_step = self.get_total_train_batch_size(self.args) * tokens_per_row
        return self.curriculum.resolve(max_steps=max_steps, tokens_per_step=tokens_per_step)

    def _check_implementation(self) -> None:
        # Now, and not when the stage with groups begins, hours later.
        stages = self.schedule.stages if self.schedule is not None else ()
        if self.one_stream:
            weights = {"content_loss_weight": self.content_loss_weight, "distillation_weight": self.distillation_weight}
            check_one_stream(stages, **weights)
            return
        needs_groups = any(stage.group_sizes[-1] > 1 or stage.predict_last != 1 for stage in stages)
        if self.eval_dataset is not None or needs_groups:
            group = torch.zeros(1, 1, dtype=torch.long)
            group_views(self.model.config._attn_implementation, group_ids=group, target_group_ids=group)

    def _check_auxiliary(self) -> None:
        weights = {"content_loss_weight": self.content_loss_weight, "distillation_weight": self.distillation_weight}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}={weight!r}; it takes a number of at least 0")
            stages = self.schedule.stages if self.schedule is not None else ()
            if weight and not any(stage.name != "permute" and stage.group_sizes[0] == 1 for stage in stages):
                raise ValueError(
                    f"{name}={weight}, but no row is left to right, one token at a time: the curriculum has no stage ar, "
                    "nor expand with group_size 1"
                )
        if self.distillation_weight and self.chunked_loss:
            raise ValueError(
                f"distillation_weight={self.distillation_weight} with loss='chunked', which holds no logits to teach; "
                "use loss='plain'"
            )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        # Called once for each update step, before its micro-batches.
        self._meter.start()
        self._micro_batch = 0
        self._step_losses = []
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        # Identical to Trainer's except: where orders leave tokens out of the loss, only the others count.
        if not self.schedule.at(self.state.global_step).scores_everything:
            batch_samples = [
                {"labels": batch["labels"].masked_fill(~self._draw(batch, micro_batch).scored_mask, -100)}
                for micro_batch, batch in enumerate(batch_samples)
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _draw(self, inputs: dict[str, torch.Tensor], micro_batch: int) -> GroupOrder:
        """The orders of this step's n-th micro-batch on this rank, the same however often they are drawn."""
        first_row = first_row_index(
            micro_batch,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            rows_per_batch=self._train_batch_size,
        )
        generators = [
            row_generator(self.args.seed, self.state.global_step, first_row + row)
            for row in range(len(inputs["input_ids"]))
        ]
        return draw_order(
            self.schedule.at(self.state.global_step),
            inputs["attention_mask"].bool(),
            given_mask=given_tokens(inputs),
            generator=generators,
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
        rows = []
        for micro_batch in is_bad.nonzero().flatten().tolist():
            first = first_row_index(
                micro_batch,
                world_size=self.args.world_size,
                rank=self.args.process_index,
                rows_per_batch=self._train_batch_size,
            )
            rows.append(f"{first} to {first + self._train_batch_size - 1}")
        raise NonFiniteLossError(
            f"step {self.state.global_step + 1}: the loss is not finite in rows {', '.join(gather_object(rows))} of its batch "
            f"(counted from 0); the weights have not taken the step, and the checkpoints in {self.args.output_dir} are as "
            "they were. Lower learning_rate or max_grad_norm, or look at these rows"
        )

    def step_loss(self) -> float:
        """The loss of the step that has just been made, over all ranks and to the last bit the same on each: nats per
        scored token, without auxiliary losses.
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
        """The loss of a micro-batch (B, S) under the orders of this step; logits come in generation order.

        Raises:
            ValueError: labels at padding, or a row that scores a token but gives none, so that its first would see
                nothing.
        """
        order = self._draw(inputs, self._micro_batch)
        self._micro_batch += 1
        self._meter.add(inputs["attention_mask"].sum().detach())
        self._row_length = inputs["input_ids"].shape[1]
        arguments = model_inputs(
            order,
            inputs["input_ids"],
            group_size=self.schedule.at(self.state.global_step).largest_group,
            implementation=self.model.config._attn_implementation,
            document_ids=inputs.get("document_ids"),
            kept=self._kept_views,
            one_stream=self.one_stream,
            slot_start=self.slot_start,
        )
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
        self._step_losses.append(loss.detach())
        if pairs is not None and len(pairs.rows):
            loss = loss + self._auxiliary_loss(outputs, arguments["labels"], pairs, num_items_in_batch)
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
        # As `Trainer` does with the main loss: DDP will take the mean over the ranks, and the count is of all of them.
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return total / num_items_in_batch * scale

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Nats per token under four fixed orders, over all scored tokens of the set: `eval_loss_left_to_right`,
        `eval_loss_contiguous_4`, `eval_loss_scattered_1`, `eval_loss_scattered_4`; `eval_loss` is their mean. The
        random ones are the same at every evaluation of every run. Training goes on after it as if there had been none.
        With Decoupled RoPE the two orders of single tokens alone.
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
        """Each row's loss, summed over its scored tokens, under each of the `evaluation_orders` (B, orders), and
        their number (B,); `predict` returns the same.
        """
        inputs = self._prepare_inputs(inputs)
        given = given_tokens(inputs)
        first_row = first_row_index(
            self._evaluation_batch,
            world_size=self.args.world_size,
            rank=self.args.process_index,
            rows_per_batch=self.args.eval_batch_size,
        )
        self._evaluation_batch += 1
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
        return losses_by_order(prediction, self.evaluation_orders)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The logs of training carry the group size; the stage's name is a word, which not every logger takes.
        if "loss" in logs:
            stage = self.schedule.at(self.state.global_step - 1)
            logs["stage_index"] = stage.index
            logs["group_size"] = stage.group_size
            logs.update(self._costs())
            if self.content_loss_weight or self.distillation_weight:
                logs.update(self._auxiliary_logs())
        super().log(logs, start_time)

    def _costs(self) -> dict[str, float]:
        """Since the last log, evaluation apart: tokens per second on all ranks (taken as equal), the most memory held by
        this process, and where the device's peak is known the share of it that is put to use.
        """
        costs = {"peak_memory_mib": peak_memory_mib(self.args.device)}
        rate = self._meter.read()
        if rate is None:
            return costs
        costs["tokens_per_second"] = rate * self.args.world_size
        dtype = {(True, False): torch.bfloat16, (False, True): torch.float16}.get((self.args.bf16, self.args.fp16))
        peak = self.peak_flops or peak_flops(self.args.device, dtype or self.model.dtype)
        if peak is not None:
            flops = training_flops(self.model.config, length=self._row_length, slots=not self.one_stream)
            costs["mfu"] = rate * flops / peak
        return costs

    def _auxiliary_logs(self) -> dict[str, float]:
        """Nats per token of the rows that the auxiliary losses apply to, over all ranks, since the last log."""
        sums = self.accelerator.gather(self._auxiliary_sums[None]).sum(dim=0).tolist()
        self._auxiliary_sums.zero_()
        weights = {"content_loss": self.content_loss_weight, "distillation_loss": self.distillation_weight}
        return {
            name: total / sums[2]
            for (name, weight), total in zip(weights.items(), sums[:2], strict=True)
            if weight and sums[2]
        }


def given_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, S), True at tokens that are known from the start: real ones whose label is −100.

    Raises:
        ValueError: labels at padding; a row, or a document in it, that scores a token but gives none; documents that are
            not numbered from 1.
    """
    missing = [name for name in ("input_ids", "attention_mask", "labels") if name not in inputs]
    if missing:
        raise ValueError(f"the batch has no {', '.join(missing)}; A3Trainer takes input_ids, attention_mask and labels")
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


def losses_by_order(prediction: EvalPrediction, orders: Collection[str]) -> dict[str, float]:
    """Nats per token under each of the `orders` from the losses of rows (N, orders) and their scored tokens (N,), and
    `loss`, the mean over the orders.

    Raises:
        ValueError: no token is scored.
    """
    tokens = prediction.label_ids.sum()
    if tokens == 0:
        raise ValueError("the evaluation set has no token to score: every label is -100")
    losses = prediction.predictions.astype(np.float64).sum(axis=0) / tokens
    by_order = {f"loss_{name}": float(loss) for name, loss in zip(orders, losses, strict=True)}
    return {**by_order, "loss": float(losses.mean())}


class BeforeTheStepCallback(TrainerCallback):
    """Calls `check` before each update of the weights."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> None:
        self.check()


class MetricsFileCallback(TrainerCallback):
    """Writes what is logged to a file, one JSON object a line, with the step and, where there is a schedule, the stage's
    name; lines of steps that a resumed run is about to repeat are dropped first.
    """

    def __init__(self, path: str | os.PathLike, schedule: Schedule | AdaptiveSchedule | None):
        self.path = Path(path)
        self.schedule = schedule

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        kept = []
        if state.global_step > 0 and self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        if not state.is_world_process_zero:
            return
        stage = {}
        if self.schedule is not None:
            stage = {"stage": self.schedule.at(max(state.global_step - 1, 0)).name}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **stage, **logs}) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # cut off while it was written


class InterruptCallback(TrainerCallback):
    """Ctrl-C saves a checkpoint at the end of the step and stops; a second one stops at once. `stopped_at` is then the
    step, and None where training ran to its end.
    """

    def __init__(self):
        self.stopped_at: int | None = None
        self._pressed_at: float | None = None
        self._previous_handler = None
        self._process = os.getpid()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.stopped_at = self._pressed_at = None
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGINT, self._handle)

    def _handle(self, signum: int, frame) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker, which the terminal interrupts too: the main process will end it
        if self._pressed_at is not None:
            # torchrun hands a Ctrl-C on to processes that the terminal has already interrupted: not a second one.
            is_echo = "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._pressed_at < 1.0
            if is_echo:
                return
            raise KeyboardInterrupt
        self._pressed_at = time.monotonic()
        # Not print: the signal may come in the middle of another one.
        os.write(2, b"\ninterrupted: saving at the end of this step (Ctrl-C again stops at once)\n")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs
    ) -> TrainerControl:
        pressed = self._pressed_at is not None
        if args.world_size > 1:
            # All ranks stop at the same step, or the others would wait for this one forever.
            flag = torch.tensor(int(pressed), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            pressed = bool(flag.item())
        if pressed and state.global_step < state.max_steps:
            self.stopped_at = state.global_step
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.restore_handler()

    def restore_handler(self) -> None:
        """Gives Ctrl-C back to whom it belonged before; needed only where training ended by an exception."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None
