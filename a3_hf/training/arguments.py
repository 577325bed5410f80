"""Settings of a recipe, which describes one complete run."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import TrainingArguments

from a3_hf.adapters.arguments import DraftHeadArguments, LoraArguments
from a3_hf.data.arguments import DataArguments
from a3_hf.devices import has_bf16_products

from .curriculum import Curriculum
from .trainer_fields import check_fields


@dataclass
class ModelArguments:
    """The model to start from and the architecture to train."""

    model_name_or_path: str = field(metadata={"help": "LLaMA or A3 checkpoint: a folder or a hub id."})
    architecture: Literal["a3", "decoupled_rope", "masked_diffusion", "llama", "draft_head"] = field(
        default="a3",
        metadata={
            "help": "a3: two streams; decoupled_rope: one stream, single tokens; masked_diffusion: no order; llama: next "
            "tokens, the control; draft_head: guesses of the tokens after the next one, on a frozen LLaMA. lora is for a3 "
            "only; the last three have no curriculum."
        },
    )
    slot_start: Literal["query_embed", "left_token"] | None = field(
        default=None,
        metadata={
            "help": "a3: start of a slot. left_token: the embedding of the token on its left, if visible; query_embed: the "
            "paper's single vector. None: as in the checkpoint; left_token for a LLaMA."
        },
    )
    suffix_template: str | None = field(
        default=None,
        metadata={
            "help": "a3: words that bring the text after a blank to the front, {suffix} in them; stored with the model, for "
            "infilling, and used by rows of fim. None: as stored."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the tokenizer, if not the model's."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Data type of the weights in memory (mixed precision: --bf16)."}
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Attention implementation: sdpa, flex_attention or eager."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen base of lora in 4 bits; needs bitsandbytes."}
    )


@dataclass
class A3TrainingArguments(TrainingArguments):
    # Identical to TrainingArguments except: the fields below, and those refused by `a3_hf.training.trainer_fields`.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be false: orders are drawn from the rows' columns."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Loggers to report to (wandb, tensorboard, …)."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Omit non-finite losses from the logs."})
    eval_on_start: bool | None = field(
        default=None, metadata={"help": "Evaluate before training. None: in `a3 adapt`, if there are evaluations."}
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Passes in bfloat16 by autocast. None: if the device has bfloat16 products, and neither fp16, deepspeed "
            "nor accelerate sets a precision."
        },
    )
    loss: Literal["plain", "chunked"] = field(
        default="plain",
        metadata={"help": "plain, or chunked: never holds all logits of a batch; less memory, the same values."},
    )
    peak_flops: float | None = field(
        default=None,
        metadata={"help": "Peak FLOP/s of a device, for the MFU in the logs; None: that of a known device."},
    )
    content_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the content stream's next-token loss, in left-to-right rows."}
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of distillation from the content stream to the slots, in left-to-right rows."},
    )
    masking: Literal["rate", "count"] = field(
        default="rate",
        metadata={"help": "masked_diffusion: draw a masking rate, or a number of masked tokens, per row."},
    )
    low_discrepancy: bool = field(
        default=False,
        metadata={"help": "masked_diffusion: spread the masking rates of a step's rows evenly over (0, 1]."},
    )
    anneal_steps: int = field(
        default=0, metadata={"help": "masked_diffusion: number of steps from causal to bidirectional attention."}
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True: expected False, because orders are drawn from columns that it would drop"
            )
        check_fields(self)
        if isinstance(self.deepspeed, str) and not Path(self.deepspeed).is_file():
            raise ValueError(f"deepspeed={self.deepspeed!r}: no such file (relative paths start at {Path.cwd()})")
        self.bf16_by_default = self.bf16 is None and self._runs_well_in_bf16()
        self.bf16 = bool(self.bf16) or self.bf16_by_default
        try:
            super().__post_init__()
        except ImportError as error:
            raise ValueError(f"a setting needs a package that is not installed: {error}") from error

    def _runs_well_in_bf16(self) -> bool:
        if self.fp16 or self.deepspeed or "ACCELERATE_MIXED_PRECISION" in os.environ:
            return False
        on_cpu = self.use_cpu or not torch.accelerator.is_available()
        return has_bf16_products(torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator())

    @property
    def rows_per_step(self) -> int:
        """Rows of an update step over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


ARGUMENT_CLASSES = (ModelArguments, DataArguments, A3TrainingArguments)


@dataclass(frozen=True)
class Recipe:
    """One complete run. `curriculum` is None for architectures without one; `draft_head` is set for that architecture."""

    model: ModelArguments
    data: DataArguments
    training: A3TrainingArguments
    curriculum: Curriculum | None
    lora: LoraArguments | None = None
    draft_head: DraftHeadArguments | None = None

    @property
    def keeps_base(self) -> bool:
        """Whether its checkpoints hold a part beside the frozen model that it starts from."""
        return self.lora is not None or self.draft_head is not None
