"""A setting of torch's compiler."""

import torch
import torch._dynamo

RECOMPILE_LIMIT = 64


def raise_recompile_limit() -> None:
    """Lets a compiled function have up to 64 graphs, unless the limit is higher already. Does nothing in a compiled graph. The
    limit holds for the calling thread: settings of torch's compiler do.
    """
    # At torch's own limit of 8, which four orders of an evaluation and two odd last batches reach, flex attention holds all
    # scores in memory from then on, in silence; and a static cache has a graph for each batch and group size.
    if torch.compiler.is_compiling():
        return
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name before torch 2.6
    setattr(config, name, max(getattr(config, name), RECOMPILE_LIMIT))
