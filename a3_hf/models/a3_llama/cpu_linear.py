"""Faster fp32 linear layers for decoding on a CPU, with the same results up to rounding."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

# With 8 to 63 rows, fp32 `linear` on a CPU takes up to three times as long as the transposed product
# (weight · inputᵀ), which does not repack the weight; with a weight as tall as an lm_head's, from 4 rows on. Other row
# counts gain nothing. Measured by `eval/bench_few_rows.py`; figures in `LOG.md`.
ROWS, ROWS_OF_TALL, TALL = range(8, 64), range(4, 64), 8
SMALLEST_WEIGHT = 2**17  # entries


@contextmanager
def fast_on_cpu(model: nn.Module) -> Iterator[None]:
    """Context manager in which the plain fp32 `nn.Linear`s of a CPU model use the transposed product for few rows (the same
    values up to rounding), in inference mode. It does nothing if any weight is sharded or not on the CPU, and it skips
    linears that are modified (adapters, quantisation, a patched `forward`). Tensors made in it are inference tensors.
    """
    plain = all(type(weight) is nn.Parameter and weight.device.type == "cpu" for weight in model.parameters())
    linears = [
        module
        for module in (model.modules() if plain else ())
        if type(module) is nn.Linear
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= SMALLEST_WEIGHT
        and "forward" not in module.__dict__
    ]
    for module in linears:
        module.forward = partial(_forward, module)
    try:
        with torch.inference_mode() if plain else nullcontext():
            yield
    finally:
        for module in linears:
            module.__dict__.pop("forward", None)


def other_way_round(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns `linear` of rows (n, in) with a weight (out, in) as weight · rowsᵀ: (n, out), stored in memory as (out, n)."""
    return torch.mm(weight, rows.t().contiguous()).t()


def _forward(module: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    is_tall = module.out_features >= TALL * module.in_features
    if rows.numel() // rows.shape[-1] not in (ROWS_OF_TALL if is_tall else ROWS):
        return nn.functional.linear(rows, module.weight, module.bias)
    products = other_way_round(rows.reshape(-1, rows.shape[-1]), module.weight)
    if module.out_features <= module.in_features:
        products = (
            products.contiguous()
        )  # attention needs it; wider outputs go to element-wise operations, in any layout
    if module.bias is not None:
        products = products + module.bias
    return products.unflatten(0, rows.shape[:-1])
