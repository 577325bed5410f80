"""Whether the settings of a recipe go together, and whether they can be followed here, before anything is trained."""

import copy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, Trainer
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import is_bitsandbytes_available

from a3_hf.data.mixture import check_readers
from a3_hf.models.a3_llama.attention_masks import group_attention_mask, groups_of
from a3_hf.models.auto import ARCHITECTURES

from .arguments import A3TrainingArguments, Recipe
from .stage_checks import check_one_stream, check_two_streams
from .trainer_fields import REFUSED_WITH_SOURCES


def check_settings(recipe: Recipe) -> None:
    """Whether the settings of a recipe go together, as far as that can be told without its model.

    Raises:
        ValueError: they don't, or a file or a package that they need is missing.
    """
    training = recipe.training
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError, RuntimeError) as error:
        if "model" not in str(error):  # some ask for the model, which there is later
            raise ValueError(f"optim={training.optim!s}: {error}") from error
    if training.save_only_model:
        raise ValueError("save_only_model=True: such checkpoints can't be resumed from; leave it out")
    if recipe.model.load_in_4bit and recipe.lora is None:
        raise ValueError("load_in_4bit=True: weights in 4 bits can't be trained; set lora, whose adapters can")
    if recipe.model.load_in_4bit and not is_bitsandbytes_available():
        raise ValueError("load_in_4bit=True needs bitsandbytes: pip install bitsandbytes")
    if recipe.model.architecture != "llama":
        for name in ("label_smoothing_factor", "use_liger_kernel"):
            if getattr(training, name):
                raise ValueError(f"{name}={getattr(training, name)}: is for architecture 'llama' alone; leave it out")
    if recipe.data.sources is not None:
        if training.max_steps <= 0:
            raise ValueError(f"max_steps={training.max_steps}: sources have no end; set how many steps the run has")
        check_readers(
            recipe.data.num_shards, world_size=training.world_size, num_workers=training.dataloader_num_workers
        )
        for name in REFUSED_WITH_SOURCES:
            value, default = getattr(training, name), A3TrainingArguments.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value!r} has no effect with sources, which are read in their order; leave it out"
                )
    if training.content_loss_weight and recipe.lora is not None and recipe.lora.rows == "slots":
        raise ValueError(
            f"content_loss_weight={training.content_loss_weight}: with lora.rows 'slots' the content stream is not "
            "trained; leave it out"
        )
    _check_architecture(recipe)
    for name, path in (("train_file", recipe.data.train_file), ("validation_file", recipe.data.validation_file)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{name}={path!r}: there is no such file (relative paths start at {Path.cwd()})")
    if training.max_steps > 0 and recipe.curriculum is not None:
        recipe.curriculum.resolve(
            max_steps=training.max_steps, tokens_per_step=training.rows_per_step * recipe.data.block_size
        )


def _check_architecture(recipe: Recipe) -> None:
    """Refuses settings that would have no effect on a model of the recipe's architecture, or that it can't follow."""
    training, architecture = recipe.training, recipe.model.architecture
    weights = {
        "content_loss_weight": training.content_loss_weight,
        "distillation_weight": training.distillation_weight,
    }
    if architecture == "decoupled_rope":
        check_one_stream(recipe.curriculum.stages, **weights)
    if architecture == "a3":
        check_two_streams(recipe.curriculum.stages, chunked_loss=training.loss == "chunked", **weights)
    own = {
        "a3": {**weights, "loss": training.loss, "peak_flops": training.peak_flops},
        "decoupled_rope": {**weights, "loss": training.loss, "peak_flops": training.peak_flops},
        "masked_diffusion": {
            "masking": training.masking,
            "low_discrepancy": training.low_discrepancy,
            "anneal_steps": training.anneal_steps,
        },
        "llama": {},
    }
    for name in dict.fromkeys(name for settings in own.values() for name in settings):
        value = getattr(training, name)
        if name not in own[architecture] and value != A3TrainingArguments.__dataclass_fields__[name].default:
            raise ValueError(f"{name}={value!r} has no effect with architecture {architecture!r}; leave it out")
    if architecture != "a3" and recipe.model.slot_start is not None:
        raise ValueError(
            f"slot_start={recipe.model.slot_start!r} has no effect with architecture {architecture!r}; leave it out"
        )
    if architecture in ("decoupled_rope", "llama") and recipe.data.documents == "isolated":
        raise ValueError(
            f"documents='isolated': architecture {architecture!r} keeps no documents of one row apart; it takes 'joined'"
        )
    if recipe.curriculum is None and recipe.data.sources is not None:
        raise ValueError(
            f"sources: architecture {architecture!r} is trained on train_file or dataset_name; mixtures are for those with a "
            "curriculum"
        )


def check_attention(recipe: Recipe, config: LlamaConfig) -> None:
    """Raises ValueError unless the model can be made with the recipe's `attn_implementation` where this runs, and trained
    with it.
    """
    implementation, architecture = recipe.model.attn_implementation, recipe.model.architecture
    try:
        with init_empty_weights():
            ARCHITECTURES[architecture].model._from_config(copy.deepcopy(config), attn_implementation=implementation)
    except (ImportError, ValueError) as error:
        raise ValueError(f"attn_implementation={implementation!r}: {' '.join(str(error).split())}") from error
    stages = recipe.curriculum.stages if recipe.curriculum is not None else ()
    needs_groups = any(stage.group_sizes[-1] > 1 or stage.predict_last != 1 for stage in stages)
    if architecture == "a3" and (needs_groups or recipe.training.eval_strategy != IntervalStrategy.NO):
        group = torch.zeros(1, 1, dtype=torch.long)
        group_attention_mask(implementation, *groups_of(group, group))
