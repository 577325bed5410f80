"""Checkpoints of a run: finds the last whole one and sets half-written ones aside."""

import errno
import json
import os
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

logger = logging.get_logger(__name__)

HALF_WRITTEN_PREFIX = "half-written-"


def what_is_missing(checkpoint: str | os.PathLike) -> str | None:
    """Returns why a checkpoint can't be resumed from ("trainer_state.json is cut off"); None if it is whole. `Trainer` writes
    `trainer_state.json` last and deletes old checkpoints after that.
    """
    folder = Path(checkpoint)
    try:
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
    except FileNotFoundError:
        return "trainer_state.json is missing"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "trainer_state.json is cut off"
    if folder.name.removeprefix("checkpoint-") != str(step):
        return f"trainer_state.json is of step {step}"

    names = {path.name for path in folder.iterdir()}
    for name in sorted(names):
        if name.endswith(".index.json"):
            try:
                shards = set(json.loads((folder / name).read_text())["weight_map"].values())
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError):
                return f"{name} is cut off"
            if shards - names:
                return f"{min(shards - names)} is missing"
        elif name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="pt"):
                    pass
            except (SafetensorError, OSError):
                return f"{name} is cut off"
        elif name.endswith((".pt", ".pth", ".bin")) and not zipfile.is_zipfile(folder / name):
            return f"{name} is cut off"  # torch.save writes zip files, their directory at the end

    # Plain or sharded, FSDP's (`pytorch_model_fsdp…`, `optimizer…`), DeepSpeed's (`global_step…` holds both).
    for part, pattern in (
        ("weights", r".*\.safetensors|pytorch_model.*|global_step\d+"),
        ("optimizer state", r"optimizer.*|global_step\d+"),
        ("random state", r"rng_state.*\.pth"),
    ):
        if not any(re.fullmatch(pattern, name) for name in names):
            return f"its {part} is missing"
    return None


def last_whole_checkpoint(output_dir: str | os.PathLike) -> tuple[Path | None, list[Path]]:
    """Returns the whole checkpoint of the highest step, and the half-written ones (of runs killed while saving)."""
    folder = Path(output_dir)
    found = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if path.is_dir() and step.isdecimal():
            found.append((int(step), path))
    whole, skipped = None, []
    for _, path in sorted(found):
        reason = what_is_missing(path)
        if reason is None:
            whole = path
        else:
            logger.warning(f"{path} is half-written ({reason}): not used")
            skipped.append(path)
    return whole, skipped


def is_disk_full(error: Exception) -> bool:
    """Returns whether a write failed because the disk is full, in an error of the system, safetensors or torch."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(words in str(error) for words in (os.strerror(errno.ENOSPC), "PytorchStreamWriter failed writing"))


def set_aside(checkpoint: Path) -> Path:
    """Renames a half-written checkpoint, so that `save_total_limit` does not count it and delete a whole one instead."""
    target = checkpoint.with_name(HALF_WRITTEN_PREFIX + checkpoint.name)
    number = 1
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{HALF_WRITTEN_PREFIX}{checkpoint.name}-{number}")
    checkpoint.rename(target)
    return target
