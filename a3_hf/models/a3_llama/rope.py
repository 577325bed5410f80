"""Rotary embeddings that don't depend on the length of a pass, as required by caching and batching."""

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half


class FixedRotaryEmbedding(LlamaRotaryEmbedding):
    """Identical to LLaMA's except: it raises where RoPE frequencies would depend on the length of a pass, since a token's
    rotation would then change with batching and caching.

    Raises:
        ValueError: `rope_type="longrope"`; in a pass with `"dynamic"`, a position outside the model's context.
    """

    def __init__(self, config):
        super().__init__(config)
        if self.rope_type == "longrope":
            raise ValueError(
                "rope_type='longrope': expected one of default, linear, dynamic, yarn, llama3. Its angles depend on the "
                "length of a pass, which invalidates cached keys."
            )

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if "dynamic" in self.rope_type and int(position_ids.max()) >= self.original_max_seq_len:
            raise ValueError(
                f"position_ids reach {int(position_ids.max())} with rope_type='dynamic': expected positions, including those "
                f"of slots, below {self.original_max_seq_len} (max_position_embeddings), where its angles start to depend on "
                "the length of a pass"
            )
        return super().forward(x, position_ids)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies RoPE as LLaMA's `apply_rotary_pos_emb`, but to one tensor, as queries and keys differ in length."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (states * cos) + (rotate_half(states) * sin)
