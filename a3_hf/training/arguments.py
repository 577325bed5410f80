"""One recipe = one complete run: its settings and their types."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import TrainingArguments

from a3_hf.adapters.arguments import LoraArguments
from a3_hf.data.arguments import DataArguments

from .curriculum import Curriculum
from .trainer_fields import check_fields


@dataclass
class ModelArguments:
    """Which model is adapted, and to what. `model_name_or_path` is a LLaMA or a checkpoint of the architecture, a folder or
    a hub id.
    """

    model_name_or_path: str = field(metadata={"help": "LLaMA or A3 checkpoint: a folder or a hub id."})
    architecture: Literal["a3", "decoupled_rope", "masked_diffusion", "llama"] = field(
        default="a3",
        metadata={
            "help": "a3: two streams; decoupled_rope: one stream, one token at a time; masked_diffusion: no order at all; "
            "llama: next tokens, the control. lora is for a3, and the last two have no curriculum."
        },
    )
    slot_start: Literal["query_embed", "left_token"] | None = field(
        default=None,
        metadata={
            "help": "a3: what a slot starts as; left_token: as the token on its left where it sees it; query_embed: the "
            "paper's one vector. None: as stored, and left_token from a LLaMA."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Where the tokenizer is, if not with the model."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the weights in memory (mixed precision is --bf16)."}
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, flex_attention or eager."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen base in 4 bits, beside a recipe's lora; needs bitsandbytes."}
    )


@dataclass
class A3TrainingArguments(TrainingArguments):
    # Identical to TrainingArguments except: the defaults below, and what `a3_hf.training.trainer_fields` refuses.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Stays false: the trainer draws the orders from the rows' own columns."}
    )
    report_to: None | str | list[str] = field(
        default="none", metadata={"help": "Where to report to; nowhere unless asked."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave losses that are not finite out of the logs."}
    )
    loss: Literal["plain", "chunked"] = field(
        default="plain", metadata={"help": "chunked never holds all logits of a batch: less memory, the same values."}
    )
    peak_flops: float | None = field(
        default=None,
        metadata={
            "help": "Operations a second that a device can do, for the MFU in the logs, if it is not a known one."
        },
    )
    content_loss_weight: float = field(
        default=0.0, metadata={"help": "Weight of the content stream's next-token loss in left-to-right rows; 0: none."}
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of teaching slots the content stream's forecasts in left-to-right rows; 0: none."},
    )
    masking: Literal["rate", "count"] = field(
        default="rate", metadata={"help": "masked_diffusion: mask each token with a drawn chance, or a drawn number."}
    )
    low_discrepancy: bool = field(
        default=False, metadata={"help": "masked_diffusion: spread the shares of a step's rows evenly over (0, 1]."}
    )
    anneal_steps: int = field(
        default=0, metadata={"help": "masked_diffusion: from causal to bidirectional attention in so many steps."}
    )

    def __post_init__(self):
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True: would silently drop what the trainer draws orders from; leave it false"
            )
        check_fields(self)
        if isinstance(self.deepspeed, str) and not Path(self.deepspeed).is_file():
            raise ValueError(f"deepspeed={self.deepspeed!r}: there is no such file (relative to {Path.cwd()})")
        try:
            super().__post_init__()
        except ImportError as error:
            raise ValueError(f"a setting needs a package that is not installed: {error}") from error

    @property
    def rows_per_step(self) -> int:
        """Rows of an update step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size


ARGUMENT_CLASSES = (ModelArguments, DataArguments, A3TrainingArguments)


@dataclass(frozen=True)
class Recipe:
    """One complete run. The architectures `masked_diffusion` and `llama` have no curriculum."""

    model: ModelArguments
    data: DataArguments
    training: A3TrainingArguments
    curriculum: Curriculum | None
    lora: LoraArguments | None = None
