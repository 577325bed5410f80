"""Adapters in the form that other engines load: PEFT's LoRA."""

import json
from os import PathLike
from pathlib import Path

from peft.utils import load_peft_weights
from safetensors.torch import save_file

from .checkpoint_info import CheckpointInfo
from .layers import SlotLoraConfig

ROWS = "a3_rows"  # field of adapter_config.json: "all" or "slots"
QUERY_EMBED = "query_embed.safetensors"
KEPT = ("r", "lora_alpha", "target_modules", "bias", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


def export(path: str, output: str | PathLike, *, base: str | None = None) -> None:
    """Writes an adapter as a folder that vLLM's `--lora-modules` takes.

    `adapter_config.json` is PEFT's of a LoRA, with `a3_rows`, `slot_start` and `suffix_template`, which others pass over. An
    adapter of all rows has its `query_embed` in a file of its own. One of slots keeps it among its weights: an engine that
    would put the adapter on content rows, too, meets a weight that it does not know, and refuses the adapter.

    Args:
        output: a new or empty folder.
        base: as in `load_model`.

    Raises:
        ValueError: no adapter, a folder that is not empty, or an error of `CheckpointInfo.read`.
    """
    info = CheckpointInfo.read(path, base=base)
    config, output = info.adapter_config, Path(output)
    if config is None:
        raise ValueError(f"path={path!r} holds no adapter (no adapter_config.json): nothing to export")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists: expected a new or empty folder")
    is_of_slots = isinstance(config, SlotLoraConfig)
    weights = load_peft_weights(path, device="cpu")
    output.mkdir(parents=True, exist_ok=True)
    if not is_of_slots:
        starts = {name: weights.pop(name) for name in list(weights) if "query_embed" in name}
        save_file({name.rpartition("model.")[2]: tensor for name, tensor in starts.items()}, output / QUERY_EMBED)
    save_file(weights, output / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in ((name, getattr(config, name)) for name in KEPT)
    }
    own = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": info.base,
        ROWS: "slots" if is_of_slots else "all",
        "slot_start": config.slot_start,
        "suffix_template": config.suffix_template,
    }
    (output / "adapter_config.json").write_text(json.dumps(own | settings, indent=2) + "\n")
