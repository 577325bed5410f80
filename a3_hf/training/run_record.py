"""Record of the settings and input files of a run, and the check that a resumed run has the same."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from a3_hf.data.documents import fingerprint

from .arguments import Recipe

RECORD_FILE = "run.json"
NO_RECORD = "remove it to resume without comparing settings with those of the start"
# Settings that may differ in a resumed run, because they don't change its result. Batch sizes and accumulation steps may
# differ as long as `rows_per_step` is the same.
RESULT_NEUTRAL_SETTINGS = set(
    """
    accept_changed_inputs activation_checkpointing activation_checkpointing_kwargs attn_implementation cache_dir
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    ddp_backend ddp_timeout deepspeed disable_tqdm eval_accumulation_steps eval_delay eval_on_start eval_steps
    eval_strategy fsdp fsdp_config gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    hub_model_id hub_private_repo hub_strategy hub_token log_level logging_nan_inf_filter logging_first_step
    logging_steps logging_strategy loss max_eval_rows model_name_or_path output_dir peak_flops
    per_device_eval_batch_size per_device_train_batch_size project push_to_hub report_to run_name save_steps
    save_strategy save_total_limit tokenizer_name_or_path torch_compile use_cpu
    """.split()
)
# Settings that older records lack, with the values that were in effect.
OLD_RUN_DEFAULTS = {
    "architecture": "a3",
    "slot_start": None,
    "suffix_template": None,
    "fim": None,
    "draft_head": None,
    "masking": "rate",
    "low_discrepancy": False,
    "anneal_steps": 0,
}
FLAGS = ("bf16", "fp16")  # recorded as the mixed precision that they and accelerate's settings result in


def describe(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns a recipe and its tokenizer as plain values."""
    training = recipe.training
    arguments = training.to_dict()
    for name in FLAGS:
        del arguments[name]
    settings = {
        **asdict(recipe.model),
        **asdict(recipe.data),
        **{name: value for name, value in arguments.items() if not name.startswith("_")},
        "mixed_precision": training.mixed_precision,
        "curriculum": None if recipe.curriculum is None else asdict(recipe.curriculum),
        "lora": None if recipe.lora is None else asdict(recipe.lora),
        "draft_head": None if recipe.draft_head is None else asdict(recipe.draft_head),
        "rows_per_step": training.rows_per_step,
        "tokenizer": hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest(),
        "tokenizer_rules": _tokenizer_rules(tokenizer),
    }
    return json.loads(json.dumps(settings, default=str))


def describe_inputs(recipe: Recipe, train_rows: Any) -> dict[str, list]:
    """Returns the versions of a run's input files: for each input a list of [name, size, hash], or of URLs of hub files (which
    contain the revision); for a packed hub dataset the number of rows and a hash.
    """
    data = recipe.data
    paths = {name: [Path(path)] for name in ("train_file", "validation_file") if (path := getattr(data, name))}
    if recipe.keeps_base:  # checkpoints of whole weights don't need their start
        paths["model_name_or_path"] = sorted(Path(recipe.model.model_name_or_path).glob("*.safetensors"))
    inputs = {name: [[file.name, *fingerprint(file)] for file in files] for name, files in paths.items()}
    if data.sources is not None:
        inputs |= {f"sources.{source.name}": source.versions for source in train_rows.sources}
    if data.dataset_name is not None:
        ends = json.dumps([train_rows[0], train_rows[len(train_rows) - 1]])
        inputs["dataset_name"] = [["rows", len(train_rows), hashlib.sha256(ends.encode()).hexdigest()]]
    return json.loads(json.dumps(inputs))


def check_inputs(recipe: Recipe, inputs: dict[str, list]) -> list[str]:
    """Compares a resumed run's input files with the recorded ones, if there is a record.

    Returns:
        Descriptions of the changes, which the recipe accepts; the record is then updated.

    Raises:
        ValueError: changes without `accept_changed_inputs`.
    """
    record = _read_record(recipe)
    before = (record or {}).get("inputs")
    if before is None:
        return []
    changes = [
        f"{name}: {change}" for name, files in inputs.items() if (change := _file_changes(before.get(name), files))
    ]
    if changes and not recipe.data.accept_changed_inputs:
        raise ValueError(
            f"output_dir={recipe.training.output_dir!r}: input files changed since the run was started, so documents "
            f"would be lost or read twice: {'; '.join(changes)}. Put them back, or set accept_changed_inputs: true"
        )
    if changes:
        _write(recipe, {**record, "inputs": inputs})
    return changes


def _file_changes(before: list[list] | None, now: list[list]) -> str | None:
    if before is None or before == now:
        return None
    old, new = {file[0]: file[1:] for file in before}, {file[0]: file[1:] for file in now}
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    changed = [name for name in old if name in new and old[name] != new[name]]
    parts = [f"{', '.join(gone[:3])} is gone"] if gone else []
    parts += [f"{', '.join(added[:3])} is new"] if added else []
    for name in changed[:3]:
        sizes = f"had {old[name][0]} bytes and has {new[name][0]}"
        parts.append(f"{name} {sizes if old[name][0] != new[name][0] else 'holds something else'}")
    return ", ".join(parts) or "its files are in another order"


def _read_record(recipe: Recipe) -> dict[str, Any] | None:
    """Returns the record in `output_dir`; None if there is none.

    Raises:
        ValueError: the record is damaged.
    """
    path = Path(recipe.training.output_dir) / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: is damaged ({error}); {NO_RECORD}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: is damaged (it holds {json.dumps(record)[:40]}, not settings); {NO_RECORD}")
    return record


def _tokenizer_rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a hash of a fast tokenizer's normalizer, pre-tokenizer and merges; None for a slow one."""
    if not tokenizer.is_fast:
        return None
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = [rules["normalizer"], rules["pre_tokenizer"], rules["model"].get("merges")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_resume(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Compares a resumed run's settings with the recorded ones, if there is a record.

    Returns:
        Descriptions of the changes, none of which affects the result.

    Raises:
        ValueError: changes that affect the result; the message lists them.
    """
    before, now = _read_record(recipe), describe(recipe, tokenizer)
    if before is None:
        return []
    before.pop("inputs", None)
    flags = [name for name in FLAGS if before.pop(name, False)]  # of older records
    before.setdefault("mixed_precision", flags[0] if flags else "no")
    for name, value in {**OLD_RUN_DEFAULTS, "tokenizer_rules": now["tokenizer_rules"]}.items():
        before.setdefault(name, value)
    changes = {
        name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    }
    if "mixed_precision" in changes:
        changes["mixed_precision"] += f" (bf16: {str(before['mixed_precision'] == 'bf16').lower()} in the recipe)"
    if "tokenizer" in changes:
        changes["tokenizer"] = "the tokenizer has another vocabulary"
    if "tokenizer_rules" in changes:
        changes["tokenizer_rules"] = "the tokenizer splits texts by other rules"
    # A checkpoint contains the model, but an adapter's and a draft head's need their base.
    neutral = RESULT_NEUTRAL_SETTINGS - ({"model_name_or_path"} if recipe.keeps_base else set())
    refused = [text for name, text in changes.items() if name not in neutral]
    if refused:
        raise ValueError(
            f"{Path(recipe.training.output_dir) / RECORD_FILE}: the run was started with other settings: "
            f"{'; '.join(refused)}. The result would differ: put them back, or give another output_dir "
            f"(if the same files were only moved, correct their paths in {RECORD_FILE})"
        )
    return list(changes.values())


def write_record(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, list] | None = None) -> None:
    """Writes the record of a new run into `output_dir`."""
    _write(recipe, {**describe(recipe, tokenizer), **({} if inputs is None else {"inputs": inputs})})


def _write(recipe: Recipe, record: dict[str, Any]) -> None:
    path = Path(recipe.training.output_dir) / RECORD_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
