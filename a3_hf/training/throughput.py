"""Costs of training: FLOPs, tokens per second, peak memory."""

import resource
import sys
import time
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig

# Dense 16-bit FLOP/s with fp32 accumulation, from the makers' data sheets, by the start of the device's name.
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
}


class AdapterWeights(NamedTuple):
    """Numbers of adapter weights that a content row and a slot pass. (0, 0): no adapters, and all weights are trained."""

    content: int = 0
    slots: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> "AdapterWeights":
        """Counts those of a model; keys and values have no slots."""
        sizes = {name: weight.numel() for name, weight in model.named_parameters() if "lora_" in name}
        on_slots = sum(size for name, size in sizes.items() if not ("k_proj" in name or "v_proj" in name))
        is_frozen = any(getattr(module, "content_is_frozen", False) for module in model.modules())
        return cls(0 if is_frozen else sum(sizes.values()), on_slots)


NO_ADAPTERS = AdapterWeights()


def training_flops(
    config: LlamaConfig,
    *,
    length: int,
    slots: float = 1,
    adapters: AdapterWeights = NO_ADAPTERS,
    recomputed: bool = False,
) -> float:
    """Returns the FLOPs per token of a training step, forward and backward, on rows of `length` tokens.

    Attention counts all pairs, whatever the mask skips. A product costs 2 operations forward, 2 for the gradient of what
    enters it and 2 for that of its weights (in attention: of its other factor). Without adapters each costs 6. Beside
    adapters, weights get no gradient: 4. If content rows have no adapters, they are not trained: 2, and 4 in slots.

    Args:
        slots: slots per token; 0: LLaMA's next-token step, or Decoupled RoPE's.
        adapters: weights of adapters; (0, 0): all weights are trained.
        recomputed: counts a second forward of trained rows (gradient checkpointing).
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = config.head_dim * heads
    keys_and_values = 2 * hidden * config.head_dim * config.num_key_value_heads
    weights = 2 * hidden * width + 3 * hidden * config.intermediate_size
    attention = 2 * width * length
    layers = config.num_hidden_layers
    again = 2 if recomputed else 0
    of_weights = (4 if any(adapters) else 6) + again
    is_frozen = adapters.content == 0 and adapters.slots > 0
    of_pairs = (4 if is_frozen else 6) + again

    if is_frozen:
        content = 2 * (weights + keys_and_values + attention) * layers
    else:
        content = (of_weights * (weights + keys_and_values) + of_pairs * attention) * layers
    content += (6 + again) * adapters.content
    slot = (of_weights * weights + of_pairs * attention) * layers + (6 + again) * adapters.slots
    return float(content + slots * slot + (slots or 1) * of_weights * hidden * config.vocab_size)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns a device's peak FLOP/s in 16-bit types; None if unknown."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for start, peak in PEAK_FLOPS.items() if name.startswith(start)), None)


def peak_memory_mib(device: torch.device) -> float:
    """Returns the peak memory in MiB: of tensors on a GPU, of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


class Meter:
    """Measures tokens per second between readings.

    Example:
        >>> meter = Meter()
        >>> meter.start()
        >>> meter.add(torch.tensor(4096))
        >>> rate = meter.read()  # tokens per second; resets the meter
    """

    def __init__(self):
        self._seconds = 0.0
        self._tokens: torch.Tensor | int = 0
        self._since: float | None = None

    def start(self) -> None:
        """Starts the clock, if it is not running."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stops the clock until the next start."""
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def add(self, tokens: torch.Tensor) -> None:
        """Adds a number of tokens, a tensor () that stays on its device to avoid a synchronization."""
        self._tokens = self._tokens + tokens

    def read(self) -> float | None:
        """Returns tokens per second since the last reading (None: no tokens) and resets."""
        self.pause()
        tokens, seconds = int(self._tokens), self._seconds
        self._tokens, self._seconds = 0, 0.0
        return tokens / seconds if tokens and seconds > 0 else None
