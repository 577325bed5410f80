"""Rotary positions that are the same in every pass, as a cache, padding and neighbours in a batch need them."""

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half


class FixedRotaryEmbedding(LlamaRotaryEmbedding):
    """Identical to LLaMA's except: kinds of RoPE whose frequencies depend on the length of a pass are refused, for a token
    would then be turned by another angle alone than in a longer batch, and in a cached pass than in the whole one:
    `longrope` as a whole, `dynamic` where it would begin to scale, beyond the model's context.

    Raises:
        ValueError: `rope_type="longrope"`; in a pass, with `"dynamic"`, a position outside the context.
    """

    def __init__(self, config):
        super().__init__(config)
        if self.rope_type == "longrope":
            raise ValueError(
                "rope_type='longrope': it turns all positions of a pass by other angles where the pass is long, so that no "
                "cached state lasts: expected one of default, linear, dynamic, yarn, llama3"
            )

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if "dynamic" in self.rope_type and int(position_ids.max()) >= self.original_max_seq_len:
            raise ValueError(
                f"position_ids reach {int(position_ids.max())} with rope_type='dynamic', which would turn all positions of "
                f"this pass by other angles from {self.original_max_seq_len} on (max_position_embeddings): expected positions "
                "below that, those of slots included"
            )
        return super().forward(x, position_ids)


def apply_rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """LLaMA's `apply_rotary_pos_emb` for one of its two arguments: queries and keys differ in length here."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (states * cos) + (rotate_half(states) * sin)
