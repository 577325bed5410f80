"""Metadata of a checkpoint, read from its JSON files: adapter settings, base model, architecture."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import peft
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from transformers import LlamaConfig
from transformers.utils import find_adapter_config_file

from a3_hf.models.a3_draft_head.configuration_a3_draft_head import DraftHeadConfig
from a3_hf.models.auto import ARCHITECTURES

from .layers import SLOT_ADAPTER_TYPE, A3LoraConfig, SlotLoraConfig

HUB_TIMEOUT = 10  # seconds; the hub's own loaders retry for more than a minute
LOCAL_FOLDERS = ("runs", "models")  # output folders of this project's commands; never looked up as owners on the hub
HTTPError = HfHubHTTPError.__bases__[0]  # base error of the hub client's HTTP library


@dataclass(frozen=True)
class CheckpointInfo:
    """Metadata of a checkpoint, read once by `CheckpointInfo.read` and passed to all code that loads or checks it.

    Attributes:
        path: a folder or a hub id.
        base: folder or hub id of the full model: the base of an adapter or a draft head, or `path` itself for a full model.
        adapter_config: the adapter's settings; None for a full model and for a draft head.
        is_draft_head: `path` holds a draft head.
    """

    path: str
    base: str
    adapter_config: A3LoraConfig | None = None
    is_draft_head: bool = False

    @classmethod
    def read(cls, path: str | PathLike, *, base: str | None = None) -> "CheckpointInfo":
        """Reads a checkpoint's adapter settings, if any, and finds the adapter's base.

        Args:
            base: the adapter's base, if it has moved since training. By default, the path stored with the adapter is tried
                relative to the current directory, the adapter's folder and its parents; then the adapter's sibling folders.

        Raises:
            ValueError: no checkpoint at `path`, no base found, a base given for a full model, or an adapter that
                `read_adapter_config` rejects.
        """
        path = str(path)
        config = read_adapter_config(path)
        head = None if config is not None else read_draft_head_config(path)
        if head is not None:
            if base is not None:
                check_is_there(base)
            return cls(path, base or _find_base(path, head.base_model_name_or_path), is_draft_head=True)
        if config is None:
            if base is not None:
                raise ValueError(f"base={base!r}: expected None, as {path} is a full model. Leave it out.")
            return cls(path, path)
        if base is not None:
            check_is_there(base)
            return cls(path, base, config)
        return cls(path, _find_base(path, config.base_model_name_or_path), config)

    @cached_property
    def base_config(self) -> dict[str, Any]:
        """The base's config.json."""
        return LlamaConfig.get_config_dict(self.base)[0]

    @cached_property
    def architecture(self) -> str:
        """The base's key in `ARCHITECTURES`; `"a3"` for a LLaMA, which is converted to A3 by default.

        Raises:
            ValueError: an unknown model type.
        """
        model_type = self.base_config.get("model_type")
        if model_type == LlamaConfig.model_type:
            return "a3"
        for name, architecture in ARCHITECTURES.items():
            if architecture.config.model_type == model_type:
                return name
        known = ", ".join(dict.fromkeys(architecture.config.model_type for architecture in ARCHITECTURES.values()))
        raise ValueError(f"{self.path} holds a checkpoint of model type {model_type!r}: expected one of {known}")

    def model_config(self, architecture: str | None = None) -> LlamaConfig:
        """Returns the base's configuration, in the class of `architecture` (None: the checkpoint's own).

        Raises:
            ValueError: a base that is neither a LLaMA nor of this architecture.
        """
        config_class = ARCHITECTURES[architecture or self.architecture].config
        model_type = self.base_config.get("model_type")
        if config_class is LlamaConfig and model_type != LlamaConfig.model_type:
            raise ValueError(
                f"{self.base} holds a checkpoint of model type {model_type!r}: architecture 'llama' expects a LLaMA"
            )
        return config_class.from_pretrained(self.base)

    def base_settings(self, slot_start: str | None = None, suffix_template: str | None = None) -> dict[str, str]:
        """Returns keyword arguments with which `from_pretrained` loads the base: `slot_start` and `suffix_template` as given,
        or else as stored with the adapter; without those that neither sets.

        Raises:
            ValueError: `slot_start` differs from the adapter's.
        """
        own = None if self.adapter_config is None else self.adapter_config.slot_start
        if own is None and self.adapter_config is not None and self.base_config.get("model_type") == "llama":
            own = "query_embed"  # adapters that don't store it were saved before "left_token" existed
        if own is not None and slot_start not in (None, own):
            raise ValueError(
                f"slot_start={slot_start!r}: the adapter {self.path} was trained with {own!r}. Leave it out."
            )
        if suffix_template is None and self.adapter_config is not None:
            suffix_template = self.adapter_config.suffix_template
        settings = {"slot_start": own or slot_start, "suffix_template": suffix_template}
        return {name: value for name, value in settings.items() if value is not None}


def read_adapter_config(path: str | PathLike) -> A3LoraConfig | None:
    """Reads the settings of the adapter at `path`, a folder or a hub id; None if there is no adapter.

    Raises:
        ValueError: no checkpoint at `path`, an adapter other than LoRA, settings unknown to the installed peft, or a damaged
            file.
    """
    check_is_there(str(path))
    file = find_adapter_config_file(str(path))
    if file is None:
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is truncated or not JSON: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, Mapping) else None
    if kind not in ("LORA", SLOT_ADAPTER_TYPE):
        raise ValueError(f"{path} holds an adapter of type {kind!r}: expected LORA or A3's {SLOT_ADAPTER_TYPE}")
    known = {field.name for field in fields(SlotLoraConfig)}
    # A newer peft also stores its settings that are not in use, as null.
    settings = {name: value for name, value in settings.items() if name in known or value is not None}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{file} has settings unknown to peft {peft.__version__}: {', '.join(unknown)}. Update peft.")
    config_class = SlotLoraConfig if kind == SLOT_ADAPTER_TYPE else A3LoraConfig
    return config_class(**{**settings, "peft_type": "LORA"})


def read_draft_head_config(path: str) -> DraftHeadConfig | None:
    """Reads the configuration of the draft head at `path`, a folder or a hub id; None if there is no draft head.

    Raises:
        ValueError: a draft head that does not name its base.
    """
    try:
        settings = DraftHeadConfig.get_config_dict(path)[0]
    except OSError:
        return None
    if settings.get("model_type") != DraftHeadConfig.model_type:
        return None
    config = DraftHeadConfig.from_dict(settings)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{path} holds a draft head whose config.json lacks base_model_name_or_path: expected its LLaMA"
        )
    return config


def check_is_there(path: str, *, name: str | None = None) -> None:
    """Raises a ValueError unless `path` is a folder or a model on the hub or in its cache. If the first part of `path` is a
    local folder, it counts as a mistyped path and the hub is not queried. The message names the argument `name`.
    """
    shown = repr(path) if name is None else f"{name}={path!r}"
    if path and Path(path).is_dir():
        return
    if path and Path(path).exists():
        raise ValueError(f"{shown} is a file: expected a folder, or a model's name on the hub")
    missing = f"{shown}: no such folder (relative to {Path.cwd()})"
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)
    if not is_name or Path(path).parts[0] in LOCAL_FOLDERS or Path(path).parent.exists():
        raise ValueError(f"{missing}; a model on the hub is named OWNER/NAME")
    _check_is_on_hub(path, missing)


@lru_cache
def _check_is_on_hub(name: str, missing: str) -> None:
    if Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").is_dir():
        return
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except (OSError, HTTPError) as error:
        raise ValueError(f"{missing}, and no such model on the hub: {str(error).splitlines()[0]}") from error


def _find_base(path: str, stored: str) -> str:
    folder = Path(path).absolute()
    places = [stored, *(parent / stored for parent in (folder, *folder.parents)), folder.parent / Path(stored).name]
    found = next((str(place) for place in places if Path(place).is_dir()), stored)
    try:
        check_is_there(found)
    except ValueError as error:
        raise ValueError(f"{path}: its base {error}. Give the base's path as base (--base).") from error
    return found
