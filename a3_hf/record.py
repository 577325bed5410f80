"""What a run was started with, and whether it may go on with other settings."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .arguments import Recipe

RECORD_FILE = "run.json"
# Settings that may change between a run and its resume: they decide how it goes, not what comes out. How the batch is divided
# among processes and passes may change as well, as long as its rows stay as many (`rows_per_step`).
FREE = {
    "attn_implementation",
    "cache_dir",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_timeout",
    "deepspeed",
    "disable_tqdm",
    "eval_accumulation_steps",
    "eval_delay",
    "eval_on_start",
    "eval_steps",
    "eval_strategy",
    "fsdp",
    "fsdp_config",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
    "hub_token",
    "log_level",
    "logging_first_step",
    "logging_steps",
    "logging_strategy",
    "loss",
    "max_eval_rows",
    "model_name_or_path",
    "output_dir",
    "peak_flops",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "project",
    "push_to_hub",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "tokenizer_name_or_path",
    "torch_compile",
    "use_cpu",
}
# Settings that older runs did not have, with what they did.
ADDED = {"architecture": "a3", "slot_start": None, "masking": "rate", "low_discrepancy": False, "anneal_steps": 0}


def describe(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A recipe and its tokenizer in plain values."""
    training = recipe.training
    settings = {
        **asdict(recipe.model),
        **asdict(recipe.data),
        **{name: value for name, value in training.to_dict().items() if not name.startswith("_")},
        "curriculum": None if recipe.curriculum is None else asdict(recipe.curriculum),
        "lora": None if recipe.lora is None else asdict(recipe.lora),
        "rows_per_step": training.rows_per_step,
        "tokenizer": hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
    }
    return json.loads(json.dumps(settings, default=str))


def check_resume(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Compares a recipe with what the run in its `output_dir` was started with, if that is on record.

    Returns:
        The changes that make no difference to the result, in words.

    Raises:
        ValueError: changes that do; says which.
    """
    path = Path(recipe.training.output_dir) / RECORD_FILE
    if not path.is_file():
        return []
    before, now = json.loads(path.read_text(encoding="utf-8")), describe(recipe, tokenizer)
    for name, value in ADDED.items():
        before.setdefault(name, value)
    changes = {
        name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    if "tokenizer" in changes:
        changes["tokenizer"] = "the tokenizer has another vocabulary"
    # A checkpoint holds the model, but an adapter's leaves its base where it was.
    free = FREE if recipe.lora is None else FREE - {"model_name_or_path"}
    refused = [text for name, text in changes.items() if name not in free]
    if refused:
        raise ValueError(
            f"{path}: the run was started with other settings: {'; '.join(refused)}. It would not go on to the same "
            "result: put them back, or give another output_dir (where the same text now lies elsewhere, correct "
            f"{RECORD_FILE})"
        )
    return list(changes.values())


def write_record(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Leaves in `output_dir` what a run is started with."""
    path = Path(recipe.training.output_dir) / RECORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(describe(recipe, tokenizer), indent=2, sort_keys=True) + "\n", encoding="utf-8")
