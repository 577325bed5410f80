"""Another machine's kernels, for `make test-other-kernels`: every Python process with this folder on its path has them.

A CPU's matrix product may treat the rows of one batch differently: which instructions sum a row up depends on where it lies
and on the shapes of the whole. Here every product of matrices (forward and backward: `linear`, `matmul`, eager attention)
and `scaled_dot_product_attention` is off by up to four units in the last place (one in bfloat16), by a fixed function of the
entry's place and of the shapes. The same call gives the same bits; the same row in another batch, or elsewhere in this one,
does not. What is zero stays zero. Compiled kernels are left as they are.
"""

import warnings
from functools import lru_cache

import torch

AMPLITUDE = {torch.float32: 4, torch.float64: 4}  # in `torch.finfo(dtype).eps`; shorter ones are summed in fp32: 1
LIBRARY = torch.library.Library("aten", "IMPL")


@lru_cache(maxsize=128)
def factors(shape: tuple[int, ...], inner: int, dtype: torch.dtype) -> torch.Tensor:
    """What a product of this shape, which sums `inner` terms an entry, is multiplied by: one number an entry."""
    columns = shape[-1]
    rows = torch.Size(shape[:-1]).numel()
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    mixed = (row * 2654435761 + column * 40503 + (rows * 31 + columns) * 7919 + inner * 104729) % 1000003
    most = AMPLITUDE.get(dtype, 1)
    units = mixed * mixed % 1000003 % (2 * most + 1) - most
    return (1 + units.to(torch.float64) * torch.finfo(dtype).eps).to(dtype).view(shape)


def as_elsewhere(product: torch.Tensor, inner: int) -> torch.Tensor:
    if not product.is_floating_point() or not product.numel():
        return product
    with torch.inference_mode(False):
        others = factors(tuple(product.shape), inner, product.dtype)
    return product * others


def with_out(name: str):
    """A kernel of an operator whose form with `out=` is another operator, which stays as it is."""
    plain = getattr(torch.ops.aten, name).out

    def kernel(*arguments, **settings):
        left, right = arguments[-2:]
        out = left.new_empty(*left.shape[:-1], right.shape[-1])
        return as_elsewhere(plain(*arguments, **settings, out=out), left.shape[-1])

    return kernel


def attention(*arguments, plain=torch.nn.functional.scaled_dot_product_attention, **settings):
    output = plain(*arguments, **settings)
    return as_elsewhere(output, arguments[1].shape[-2]) if output.device.type == "cpu" else output


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that there is a kernel already
    for name in ("mm", "addmm", "bmm", "baddbmm"):
        LIBRARY.impl(name, with_out(name), "CPU")
torch.nn.functional.scaled_dot_product_attention = attention
