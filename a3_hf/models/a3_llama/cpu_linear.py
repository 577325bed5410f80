"""What makes decoding on a CPU faster and leaves its values as they are."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn

# With 8 to 63 rows, fp32 `linear` on a CPU takes up to three times as long as the same product the other way round
# (weight · inputᵀ), which does not repack the weight; with a weight as tall as an lm_head's, from 4 rows on. Below and above
# there is nothing to gain. `eval/bench_few_rows.py` measures it, `LOG.md` has the figures.
ROWS, ROWS_OF_TALL, TALL = range(8, 64), range(4, 64), 8
SMALLEST_WEIGHT = 2**17  # entries


@contextmanager
def fast_on_cpu(model: nn.Module) -> Iterator[None]:
    """Within it, the plain fp32 `nn.Linear`s of a model on a CPU multiply few rows the other way round (the same values
    but for rounding), and nothing is kept for autograd, not even version counters. Where a weight lies elsewhere or is
    sharded, nothing is changed, and linears that something else has taken over (adapters, quantisation, hooks on
    `forward`) stay as they are. What is made within it are inference tensors.
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
    """`linear` of rows (n, in) with a weight (out, in): (n, out), which lies in memory as (out, n)."""
    return torch.mm(weight, rows.t().contiguous()).t()


def _forward(module: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    is_tall = module.out_features >= TALL * module.in_features
    if rows.numel() // rows.shape[-1] not in (ROWS_OF_TALL if is_tall else ROWS):
        return nn.functional.linear(rows, module.weight, module.bias)
    products = other_way_round(rows.reshape(-1, rows.shape[-1]), module.weight)
    if module.out_features <= module.in_features:
        products = products.contiguous()  # attention needs it; what is wide feeds element-wise operations, as it lies
    if module.bias is not None:
        products = products + module.bias
    return products.unflatten(0, rows.shape[:-1])
