"""What vLLM's LoRA does not know of an adapter that `a3 export` wrote."""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from vllm.lora.utils import get_adapter_absolute_path

from a3_hf.adapters.export import QUERY_EMBED, ROWS

CONFIG = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter of a request.

    Attributes:
        lora_id: vLLM's.
        slots_only: content rows are the base's.
        query_embed: (1, D) where slots start that have no token on their left; None: the model's.
    """

    lora_id: int
    slots_only: bool
    query_embed: torch.Tensor | None

    @classmethod
    def read(cls, lora_request, device: torch.device, dtype: torch.dtype) -> "Adapter":
        """Reads it, once, from the folder of vLLM's request."""
        folder = get_adapter_absolute_path(lora_request.lora_path)
        changed = Path(folder, CONFIG).stat().st_mtime_ns  # vLLM may load an adapter again in its place
        return _read(lora_request.lora_int_id, folder, changed, device, dtype)


def adapter_settings(path: str) -> dict:
    """Returns the `adapter_config.json` of an adapter, whose path is anything that vLLM takes.

    Raises:
        ValueError: it has none.
    """
    config = Path(get_adapter_absolute_path(path), CONFIG)
    if not config.is_file():
        raise ValueError(f"model: the adapter at {path!r} has no {CONFIG}")
    return json.loads(config.read_text())


@lru_cache(maxsize=256)
def _read(lora_id: int, folder: str, changed: int, device: torch.device, dtype: torch.dtype) -> Adapter:
    query_embed = None
    for name in (QUERY_EMBED, "adapter_model.safetensors"):
        if query_embed is None and Path(folder, name).is_file():
            with safe_open(Path(folder, name), framework="pt") as weights:
                found = [key for key in weights.keys() if "query_embed" in key]
                query_embed = weights.get_tensor(found[0]).to(device, dtype) if found else None
    return Adapter(lora_id, adapter_settings(folder).get(ROWS) == "slots", query_embed)
