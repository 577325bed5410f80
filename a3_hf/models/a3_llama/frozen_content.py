"""A training pass whose content rows have no gradient, for adapters that act on query slots alone."""

import torch
from torch import nn

from .attention_masks import AttentionMasks, content_attention_mask, slots_attention_mask


class FrozenContent:
    """The keys and values of a pass's content rows, which its slot rows see without a gradient. Not a `Cache`, because layers
    under gradient checkpointing drop one.
    """

    def __init__(self):
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the keys and values (B, H, C, head_dim) of a layer and returns them; without rows, returns those stored."""
        if key_states.shape[2]:
            self._layers[layer_idx] = key_states, value_states
        return self._layers[layer_idx]


def content_has_no_gradient(model: nn.Module, inputs_embeds: torch.Tensor | None) -> bool:
    """Whether a pass trains slot rows alone: adapters of slots are there, and nothing else that content rows pass learns. Such
    a pass makes no cache, as under gradient checkpointing.
    """
    return (
        model.content_is_frozen
        and model.training
        and torch.is_grad_enabled()
        and not (model.embed_tokens.weight if inputs_embeds is None else inputs_embeds).requires_grad
        and not any(
            parameter.requires_grad and "lora_" not in name for name, parameter in model.layers.named_parameters()
        )
    )


def run_on_frozen_content(
    model: nn.Module,
    hidden_states: torch.Tensor,
    masks: AttentionMasks,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    content_length: int,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the layers of an `A3LlamaModel` on content rows without gradients, and on slot rows with the content's keys and
    values. The model's one pass over all rows gives the same values and gradients.

    Args:
        hidden_states: (B, C + Q, D) what enters the layers.

    Returns:
        Content rows (B, C, D) and slot rows (B, Q, D) after the last layer.
    """
    content_rows, slot_rows = hidden_states[:, :content_length].detach(), hidden_states[:, content_length:]
    content_rope = tuple(angles[:, :content_length] for angles in position_embeddings)
    slot_rope = tuple(angles[:, content_length:] for angles in position_embeddings)
    content_masks = content_attention_mask(masks, content_length)
    slot_masks = slots_attention_mask(masks, content_length)
    kwargs = {**kwargs, "frozen_content": FrozenContent()}
    for decoder_layer in model.layers:
        with torch.no_grad():
            content_rows = decoder_layer(
                content_rows,
                attention_mask=content_masks,
                position_embeddings=content_rope,
                content_length=content_length,
                **kwargs,
            )
        slot_rows = decoder_layer(
            slot_rows, attention_mask=slot_masks, position_embeddings=slot_rope, content_length=0, **kwargs
        )
    return content_rows, slot_rows
