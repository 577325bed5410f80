"""Checks, before training, that the settings of a recipe are compatible with each other and with this machine."""

import copy
from typing import Any

from accelerate import init_empty_weights
from transformers import LlamaConfig, Trainer
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_bitsandbytes_available

from a3_hf.data.arguments import DataArguments
from a3_hf.data.mixture import check_readers
from a3_hf.models.a3_llama.configuration_a3_llama import check_suffix_template
from a3_hf.models.auto import ARCHITECTURES

from .arguments import A3TrainingArguments, Recipe
from .base_trainer import check_arguments
from .stage_checks import check_stages
from .trainer_fields import REFUSED_WITH_SOURCES

# Settings of the losses, by the architectures that have them.
LOSS_SETTINGS = {
    "loss": ("a3", "decoupled_rope"),
    "peak_flops": ("a3", "decoupled_rope"),
    "content_loss_weight": ("a3", "decoupled_rope"),
    "distillation_weight": ("a3", "decoupled_rope"),
    "masking": ("masked_diffusion",),
    "low_discrepancy": ("masked_diffusion",),
    "anneal_steps": ("masked_diffusion",),
}
WITHOUT_EFFECT_ON_DRAFT_HEADS = (
    "text_column", "document_separator", "document_boundary", "documents", "fim", "shuffle_documents",
)  # fmt: skip


def check_settings(recipe: Recipe) -> None:
    """Checks the settings of a recipe against each other, without its model.

    Raises:
        ValueError: settings that are incompatible or have no effect, or a missing package.
    """
    training = recipe.training
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError, RuntimeError) as error:
        if "model" not in str(error):  # some optimizers need the model, which is loaded later
            raise ValueError(f"optim={training.optim!s}: {error}") from error
    if training.save_only_model:
        raise ValueError("save_only_model=True: such checkpoints can't be resumed from; leave it out")
    if recipe.model.load_in_4bit and recipe.lora is None:
        raise ValueError("load_in_4bit=True: weights in 4 bits can't be trained. Set lora, to train adapters")
    if recipe.model.load_in_4bit and not is_bitsandbytes_available():
        raise ValueError("load_in_4bit=True needs bitsandbytes: pip install bitsandbytes")
    if training.content_loss_weight and recipe.lora is not None and recipe.lora.rows == "slots":
        raise ValueError(
            f"content_loss_weight={training.content_loss_weight}: with lora.rows 'slots' the content stream is not "
            "trained; leave it out"
        )
    _check_architecture(recipe)
    if recipe.data.sources is not None:
        _check_sources(recipe)
    if recipe.curriculum is not None:
        _check_curriculum(recipe)


def check_attention(recipe: Recipe, config: LlamaConfig) -> None:
    """Raises ValueError unless the model can be made with the recipe's `attn_implementation` on this machine."""
    implementation = recipe.model.attn_implementation
    model_class = ARCHITECTURES[recipe.model.architecture].model
    try:
        with init_empty_weights():
            model_class._from_config(copy.deepcopy(config), attn_implementation=implementation)
    except (ImportError, ValueError) as error:
        raise ValueError(f"attn_implementation={implementation!r}: {' '.join(str(error).split())}") from error


def _check_architecture(recipe: Recipe) -> None:
    """Refuses settings without effect on the recipe's architecture."""
    training, architecture = recipe.training, recipe.model.architecture
    if architecture != "llama":
        check_arguments(training)
    for name, architectures in LOSS_SETTINGS.items():
        value = getattr(training, name)
        if architecture not in architectures and value != _default(name):
            raise ValueError(f"{name}={value!r} has no effect with architecture {architecture!r}; leave it out")
    for name in ("slot_start", "suffix_template"):
        value = getattr(recipe.model, name)
        if architecture != "a3" and value is not None:
            raise ValueError(f"{name}={value!r} has no effect with architecture {architecture!r}; leave it out")
    if recipe.draft_head is not None:
        _check_draft_head(recipe)
    check_suffix_template(recipe.model.suffix_template)
    if architecture in ("decoupled_rope", "llama") and recipe.data.documents == "isolated":
        raise ValueError(
            f"documents='isolated': expected 'joined' with architecture {architecture!r}, which can't isolate documents"
        )
    if recipe.curriculum is None and recipe.data.sources is not None:
        raise ValueError(
            f"sources: expected train_file or dataset_name with architecture {architecture!r}; mixtures are for architectures "
            "with a curriculum"
        )


def _check_draft_head(recipe: Recipe) -> None:
    """Refuses settings without effect on a draft head, whose documents are read as they are."""
    if recipe.lora is not None:
        raise ValueError("lora has no effect with architecture 'draft_head', whose base stays as it is; leave it out")
    data = recipe.data
    if data.train_file is None:
        raise ValueError(
            f"train_file={data.train_file!r}: expected a .jsonl file of scripts/write_text.py with architecture 'draft_head'"
        )
    for name in WITHOUT_EFFECT_ON_DRAFT_HEADS:
        value = getattr(data, name)
        if value != DataArguments.__dataclass_fields__[name].default:
            raise ValueError(f"{name}={value!r} has no effect with architecture 'draft_head'; leave it out")


def _check_sources(recipe: Recipe) -> None:
    training = recipe.training
    if training.max_steps <= 0:
        raise ValueError(f"max_steps={training.max_steps}: sources have no end; set the number of steps")
    check_readers(recipe.data.num_shards, world_size=training.world_size, num_workers=training.dataloader_num_workers)
    for name in REFUSED_WITH_SOURCES:
        value = getattr(training, name)
        if value != _default(name):
            raise ValueError(
                f"{name}={value!r} has no effect with sources, which are read in their order; leave it out"
            )


def _check_curriculum(recipe: Recipe) -> None:
    training = recipe.training
    check_stages(
        recipe.curriculum.stages,
        one_stream=recipe.model.architecture == "decoupled_rope",
        implementation=recipe.model.attn_implementation,
        is_evaluated=training.eval_strategy != IntervalStrategy.NO,
        chunked_loss=training.loss == "chunked",
        content_loss_weight=training.content_loss_weight,
        distillation_weight=training.distillation_weight,
    )
    if training.max_steps > 0:
        tokens_per_step = training.rows_per_step * recipe.data.block_size
        recipe.curriculum.resolve(max_steps=training.max_steps, tokens_per_step=tokens_per_step)


def _default(name: str) -> Any:
    return A3TrainingArguments.__dataclass_fields__[name].default
