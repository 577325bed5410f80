"""Attention, as a difference from transformers' LLaMA: keys and values come from content tokens only."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager_attention_forward

from .attention_masks import AttentionMasks
from .caching import take_cache
from .frozen_content import FrozenContent
from .rope import apply_rotary


class A3LlamaAttention(LlamaAttention):
    # Identical to LlamaAttention except: keys and values come from the first `content_length` rows only, or were made by
    # `frozen_content` before, and the mask is one for all rows, or a pair for content and slots.
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: AttentionMasks,
        content_length: int,
        position_ids: torch.LongTensor | None = None,
        frozen_content: FrozenContent | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # `position_ids` stop here: flash attention would treat non-ascending positions as several packed texts.
        cache = take_cache(kwargs)
        heads = (-1, self.head_dim)
        # Two dimensions: of a slice of a larger tensor, torch would make a slow batch of products.
        content_states = hidden_states[:, :content_length].flatten(0, 1)
        cos, sin = position_embeddings
        input_shape = hidden_states.shape[:-1]

        query_states = self.q_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        key_states, value_states = (
            project(content_states).unflatten(0, (input_shape[0], content_length)).unflatten(-1, heads).transpose(1, 2)
            for project in (self.k_proj, self.v_proj)
        )
        # Under autocast the rotation gives float32 and values have 16 bits; not every kernel takes both.
        query_states = apply_rotary(query_states, cos, sin).to(value_states.dtype)
        key_states = apply_rotary(key_states, cos[:, :content_length], sin[:, :content_length]).to(value_states.dtype)

        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx)
        elif frozen_content is not None:
            key_states, value_states = frozen_content.update(key_states, value_states, self.layer_idx)

        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        lengths = (input_shape[1],) if len(attention_mask) == 1 else (content_length, input_shape[1] - content_length)
        outputs = [
            attention_interface(
                self,
                queries,
                key_states,
                value_states,
                mask,
                dropout=0.0 if not self.training else self.attention_dropout,
                scaling=self.scaling,
                is_causal=is_causal,
                **kwargs,
            )
            for queries, (mask, is_causal) in zip(query_states.split(lengths, dim=2), attention_mask, strict=True)
        ]
        attn_weights = outputs[0][1]
        attn_output = outputs[0][0] if len(outputs) == 1 else torch.cat([output for output, _ in outputs], dim=1)
        attn_output = self.o_proj(attn_output.reshape(*input_shape, -1).contiguous())
        return attn_output, attn_weights


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    # Identical to LLaMA's except: boolean masks work, and a row that sees nothing gets zeros (as from `sdpa`) instead of
    # the average of all values, which would leak.
    if attention_mask is None or attention_mask.dtype != torch.bool:
        return llama_eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).masked_fill(~attention_mask, 0.0)
    weights = nn.functional.dropout(weights.to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
