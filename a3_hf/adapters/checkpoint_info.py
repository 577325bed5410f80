"""What a checkpoint's small files say about it: whether it is an adapter, its base, its architecture."""

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

from a3_hf.models.auto import ARCHITECTURES

from .layers import SLOT_ADAPTER_TYPE, A3LoraConfig, SlotLoraConfig

HUB_TIMEOUT = 10  # seconds; the hub's own loaders retry for more than a minute
LOCAL_FOLDERS = ("runs", "models")  # where this project's commands write models: never an owner's name on the hub
HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library under the hub's client


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint, read once by `CheckpointInfo.read` and handed to everything that loads or checks it.

    Attributes:
        path: a folder or a hub id.
        base: where the whole model is: an adapter's base; `path` itself for a whole model.
        adapter_config: the adapter's settings; None for a whole model.
    """

    path: str
    base: str
    adapter_config: A3LoraConfig | None = None

    @classmethod
    def read(cls, path: str | PathLike, *, base: str | None = None) -> "CheckpointInfo":
        """Reads the adapter's settings, if there are any, and finds its base.

        Args:
            base: the adapter's base, where it was moved since training. By default the base is looked for at the path
                stored with the adapter: relative to the current directory, to the adapter's folder and those above it,
                then beside the adapter.

        Raises:
            ValueError: no checkpoint at `path`, no base found, a base given for a whole model, or an adapter that
                `read_adapter_config` refuses.
        """
        path = str(path)
        config = read_adapter_config(path)
        if config is None:
            if base is not None:
                raise ValueError(f"base={base!r}: {path} is a whole model and needs none; leave it out")
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
        """The base's key in `ARCHITECTURES`, by its model type; `"a3"` for a LLaMA, which becomes one by default.

        Raises:
            ValueError: a model type that no architecture has.
        """
        model_type = self.base_config.get("model_type")
        if model_type == LlamaConfig.model_type:
            return "a3"
        for name, architecture in ARCHITECTURES.items():
            if architecture.config.model_type == model_type:
                return name
        known = ", ".join(architecture.config.model_type for architecture in ARCHITECTURES.values())
        raise ValueError(f"{self.path} holds a checkpoint of model type {model_type!r}; expected one of {known}")

    def model_config(self, architecture: str | None = None) -> LlamaConfig:
        """The base's configuration as an architecture's; None: as its own.

        Raises:
            ValueError: a base that is neither a LLaMA nor of this architecture.
        """
        config_class = ARCHITECTURES[architecture or self.architecture].config
        model_type = self.base_config.get("model_type")
        if config_class is LlamaConfig and model_type != LlamaConfig.model_type:
            raise ValueError(
                f"{self.base} holds a checkpoint of model type {model_type!r}; architecture 'llama' takes a LLaMA"
            )
        return config_class.from_pretrained(self.base)

    def slot_start_settings(self, wanted: str | None = None) -> dict[str, str]:
        """The `slot_start` with which `from_pretrained` loads the base: the adapter's own, or else `wanted`; empty where
        the base's own is right.

        Raises:
            ValueError: `wanted` differs from the adapter's own.
        """
        own = None if self.adapter_config is None else self.adapter_config.slot_start
        if own is None and self.adapter_config is not None and self.base_config.get("model_type") == "llama":
            own = "query_embed"  # adapters that don't store it are older than the other value
        if own is not None and wanted not in (None, own):
            raise ValueError(f"slot_start={wanted!r}: the adapter {self.path} was trained with {own!r}; leave it out")
        start = own or wanted
        return {} if start is None else {"slot_start": start}


def read_adapter_config(path: str | PathLike) -> A3LoraConfig | None:
    """The settings of the adapter at `path`, a folder or a hub id; None where there is no adapter.

    Raises:
        ValueError: nothing at `path`; an adapter that is not LoRA, or with settings unknown to the installed peft; a
            damaged file.
    """
    check_is_there(str(path))
    file = find_adapter_config_file(str(path))
    if file is None:
        return None
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is cut off, or not JSON: {error}") from error
    kind = settings.get("peft_type") if isinstance(settings, Mapping) else None
    if kind not in ("LORA", SLOT_ADAPTER_TYPE):
        raise ValueError(f"{path} holds an adapter of type {kind!r}; expected LORA or A3's own {SLOT_ADAPTER_TYPE}")
    unknown = sorted(set(settings) - {field.name for field in fields(SlotLoraConfig)})
    if unknown:
        raise ValueError(
            f"{file} has settings that peft {peft.__version__} doesn't know: {', '.join(unknown)}; update peft"
        )
    config_class = SlotLoraConfig if kind == SLOT_ADAPTER_TYPE else A3LoraConfig
    return config_class(**{**settings, "peft_type": "LORA"})


def check_is_there(path: str, *, name: str | None = None) -> None:
    """Raises ValueError unless `path` is a folder, or a model that the hub's cache or the hub has. A name whose first part
    is a local folder counts as a mistyped path: the hub is not asked. The message names the argument `name`.
    """
    shown = repr(path) if name is None else f"{name}={path!r}"
    if path and Path(path).is_dir():
        return
    if path and Path(path).exists():
        raise ValueError(f"{shown} is a file; expected a folder, or a model's name on the hub")
    missing = f"{shown}: there is no such folder (relative to {Path.cwd()})"
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)
    if not is_name or Path(path).parts[0] in LOCAL_FOLDERS or Path(path).parent.exists():
        raise ValueError(f"{missing}; a model on the hub would be OWNER/NAME")
    _ask_the_hub(path, missing)


@lru_cache
def _ask_the_hub(name: str, missing: str) -> None:
    if Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").is_dir():
        return
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except (OSError, HTTPError) as error:
        raise ValueError(f"{missing}, and the hub has none: {str(error).splitlines()[0]}") from error


def _find_base(path: str, stored: str) -> str:
    folder = Path(path).absolute()
    places = [stored, *(parent / stored for parent in (folder, *folder.parents)), folder.parent / Path(stored).name]
    found = next((str(place) for place in places if Path(place).is_dir()), stored)
    try:
        check_is_there(found)
    except ValueError as error:
        raise ValueError(f"{path}: its base {error}. Give the base's place: base (--base)") from error
    return found
