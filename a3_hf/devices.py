"""Data types that a device multiplies fast, and settings of torch for GPUs."""

import os
from typing import Literal

import torch


def has_bf16_products(device: torch.device) -> bool:
    """Returns whether a device multiplies bfloat16 matrices by instructions of its own: a CPU with AMX or AVX-512 BF16
    (unknown, and so False, before torch 2.13), a CUDA GPU from Ampere on. Elsewhere bfloat16 is emulated, slower than float32.
    """
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def default_dtype(device: torch.device) -> torch.dtype | Literal["auto"]:
    """Returns the `dtype` for `from_pretrained` with which a model runs well on a device: on a CPU bfloat16 if it multiplies
    such matrices fast (see `has_bf16_products`), else float32; on others "auto", the checkpoint's own.
    """
    if device.type != "cpu":
        return "auto"
    return torch.bfloat16 if has_bf16_products(device) else torch.float32


def leave_out_cudnn_attention() -> None:
    """Takes cuDNN's kernel out of `scaled_dot_product_attention` for this process, if there is a GPU. Where the environment
    sets TORCH_CUDNN_SDPA_DEPRIORITIZED, to 0 or 1, torch's own choice stays.
    """
    # From torch 2.11 on it is the first choice on an H100. It plans anew for each shape, and decoding has a new one in each
    # pass; and with a mask its backward can give NaN (pytorch#196678).
    if torch.cuda.is_available() and "TORCH_CUDNN_SDPA_DEPRIORITIZED" not in os.environ:
        torch.backends.cuda.enable_cudnn_sdp(False)
