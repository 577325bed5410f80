"""Outputs of the models' forwards, and a base class for outputs with a short repr."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .caching import BothWordsMixin


@dataclass
class A3ModelOutput(BothWordsMixin, BaseModelOutputWithPast):
    """Output of `A3LlamaModel`.

    Attributes:
        last_hidden_state: (B, Q, D) of query slots.
        content_hidden_state: (B, C, D) of content tokens; None if not computed.
        hidden_states, attentions: if requested: C + Q rows, content first (the last of `hidden_states`: slots only).
        cache, past_key_values: content keys and values only.
        kept_hidden_state: (B, C, D) of content tokens before layer `kept_layer`, if requested.
    """

    content_hidden_state: torch.FloatTensor | None = None
    kept_hidden_state: torch.FloatTensor | None = None


@dataclass
class A3CausalLMOutput(BothWordsMixin, CausalLMOutputWithPast):
    """Output of `A3LlamaForCausalLM`.

    Attributes:
        token_losses: (B, Q) loss of each slot in nats, without gradient, 0 where not scored; with `chunked_loss` only.
        content_hidden_state, content_logits: (B, C, D) and (N, V), if requested.
        kept_hidden_state: as in `A3ModelOutput`.
    """

    token_losses: torch.FloatTensor | None = None
    content_hidden_state: torch.FloatTensor | None = None
    kept_hidden_state: torch.FloatTensor | None = None
    content_logits: torch.FloatTensor | None = None


class BriefOutput(ModelOutput):
    # Identical to ModelOutput except: its repr shows shapes, not values. Subclasses are dataclasses with repr=False.
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
