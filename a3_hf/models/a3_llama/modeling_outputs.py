"""Outputs of the models' forwards, and a base for outputs that can be printed."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .caching import BothWordsMixin


@dataclass
class A3ModelOutput(BothWordsMixin, BaseModelOutputWithPast):
    """Output of `A3LlamaModel`: `last_hidden_state` (B, Q, D) belongs to the query slots, `content_hidden_state`
    (B, C, D) to the content tokens (None where it was not computed); `hidden_states` and `attentions`, when asked for,
    hold C + Q rows, content first (the last of `hidden_states` holds the slots alone). `cache` (or
    `past_key_values`) holds content keys and values only.
    """

    content_hidden_state: torch.FloatTensor | None = None


@dataclass
class A3CausalLMOutput(BothWordsMixin, CausalLMOutputWithPast):
    """Output of `A3LlamaForCausalLM`: `token_losses` (B, Q), with `chunked_loss` alone, are each slot's own in nats, 0
    where nothing is scored, without gradient; `content_hidden_state` (B, C, D) and `content_logits` (N, V) are there where
    they were asked for.
    """

    token_losses: torch.FloatTensor | None = None
    content_hidden_state: torch.FloatTensor | None = None
    content_logits: torch.FloatTensor | None = None


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
