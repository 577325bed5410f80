"""What methods return, shown in a line a field: shapes in place of tensors and caches."""

from typing import Any

import torch
from transformers.utils import ModelOutput


class BriefOutput(ModelOutput):
    # Identical to ModelOutput except: it can be printed. Subclasses are dataclasses with repr=False.
    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_brief(value)}' for name, value in self.items())})"


def _brief(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    if isinstance(value, list | tuple) and any(isinstance(one, torch.Tensor) for one in value):
        return f"<{len(value)} of {_brief(value[0])}>"
    if value is None or isinstance(value, str | int | float | list | tuple | dict | BriefOutput):
        return repr(value)
    return f"<{type(value).__name__}>"
