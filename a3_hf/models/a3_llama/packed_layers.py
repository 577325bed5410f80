"""Decoding passes of few rows on a CPU: fewer and wider products, weights packed once, keys that aren't repeated.

Not specified in the paper. The model's own layers run every other pass, and are what tests compare with.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .attention_masks import AttentionMasks
from .rope import apply_rotary

MOST_ROWS = 64  # of a pass, over all texts; with more, the layers' own products are as fast
DTYPES = (torch.float32, torch.float64)
LEAST_PACKED = 4  # rows; fewer are as fast with weights that aren't packed


class SlotFactors(NamedTuple):
    """A low-rank term that a linear layer adds to query slots alone: `scale` · x @ `down`.T @ `up`.T, of weights (r, in) and
    (out, r).
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float


def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether torch has its private operators for products with packed weights, for this dtype."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return dtype == torch.float32 and all(hasattr(torch.ops.mkldnn, name) for name in operators)


class JoinedWeights:
    """Weights (out, in) of one input, in one product.

    Their memory is moved into one tensor, of which they become views. Where torch can, a packed copy serves `LEAST_PACKED`
    and more rows.
    """

    def __init__(self, weights: Sequence[nn.Parameter]):
        if len(weights) == 1:
            self.joined = weights[0].data
        else:
            self.joined = torch.cat([weight.data for weight in weights])
            for weight, rows in zip(weights, self.joined.split([len(weight) for weight in weights]), strict=True):
                weight.data = rows
        # The second argument, a number of rows, is a hint; products take any number.
        is_packed = has_packed_products(self.joined.dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.joined, 8) if is_packed else None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns rows @ weights.T, (N, all out), of rows (N, in)."""
        if self.packed is None or len(rows) < LEAST_PACKED:
            return F.linear(rows, self.joined)
        return torch.ops.mkldnn._linear_pointwise(rows, self.packed, None, "none", [], "")


class SlotLinears:
    """Linear layers of one input in one product, and another for all that they add to slots."""

    def __init__(self, linears: Sequence[nn.Linear]):
        self.weights = [linear.weight for linear in linears]
        self.width = sum(len(weight) for weight in self.weights)
        factors = [(number, one) for number, linear in enumerate(linears) for one in slot_factors(linear)]
        self.joined = JoinedWeights([*self.weights, *(one.down for _, one in factors)])
        self.ups = None  # (all r, all out), 0 where a term does not belong to a layer
        if factors:
            widths = [len(weight) for weight in self.weights]
            self.ups = torch.cat(
                [F.pad(one.up.detach().T * one.scale, (sum(widths[:n]), sum(widths[n + 1 :]))) for n, one in factors]
            )
            self.weights += [weight for _, one in factors for weight in (one.down, one.up)]

    def __call__(self, rows: torch.Tensor, first_slot: int) -> torch.Tensor:
        """Returns (N, all out) of rows (N, in); terms of slots are added from row `first_slot` on."""
        result = self.joined(rows)
        if self.ups is None:
            return result
        result, terms = result[:, : self.width], result[first_slot:, self.width :]
        if len(terms):
            result[first_slot:].addmm_(terms, self.ups)
        return result


class PackedLayers:
    """Runs few rows through all layers of an `A3LlamaModel`, and through its head: the same values up to rounding.

    After a change of weights, layers, hooks or active adapters, the model's own layers run until weights are packed again. A
    copied or pickled model has no packed layers.

    Raises:
        ValueError: weights that are not float32 or float64 on a CPU, another attention than `sdpa`, or linear layers with a
            bias or of an unknown kind.
    """

    def __init__(self, model: nn.Module, head: nn.Linear):
        _check(model, head)
        self.model, self.layers = model, [_PackedLayer(layer, index) for index, layer in enumerate(model.layers)]
        self.head = JoinedWeights([head.weight])
        self._places = [place for layer in self.layers for place in layer.places]
        self._weights = [head.weight, *(weight for layer in self.layers for weight in layer.weights)]
        self._modules = [head, *model.layers.modules()]
        self._packed_state, self._is_used = self._state(), False

    def __reduce__(self):
        return type(None), ()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Passes run here within this context, unless the model learns or has changed since its weights were packed."""
        before = self._is_used
        self._is_used = not self.model.training and not torch.is_grad_enabled() and self._state() == self._packed_state
        try:
            yield
        finally:
            self._is_used = before

    def can_run(self, hidden_states: torch.Tensor, masks: AttentionMasks | None = None) -> bool:
        """Whether a pass (…, D) is one of few rows, under one dense mask if any, in the context of `in_use`."""
        return (
            self._is_used
            and 0 < hidden_states.shape[:-1].numel() <= MOST_ROWS
            and not torch.compiler.is_compiling()
            and (masks is None or (len(masks) == 1 and not masks[0].is_causal and _is_dense(masks[0].mask)))
        )

    def _state(self) -> list:
        """What decides about the values of a pass, and who watches it."""
        linears = [getattr(parent, name) for parent, name in self._places]
        return [
            self.model.config._attn_implementation,
            *((weight.data_ptr(), weight._version) for weight in self._weights),
            *linears,
            *(linear.slot_state() for linear in linears if hasattr(type(linear), "slot_state")),
            sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self._modules),
        ]

    def __call__(
        self,
        hidden_states: torch.Tensor,
        masks: AttentionMasks,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        content_length: int,
        cache: Cache | None,
        kept_layer: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the hidden states (B, C + Q, D) after the last layer, and those before layer `kept_layer` if one is given.
        Other arguments as the layers take them.
        """
        batch_size, num_rows, width = hidden_states.shape
        rows = hidden_states.transpose(0, 1).reshape(-1, width)  # one place of all texts after another: slots come last
        mask = masks[0].mask
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat(1, 1, self.layers[0].heads_per_key, 1)
        kept = None
        with torch.inference_mode():  # some 4% of a pass; its tensors do not leave, as they can't be changed in place
            for index, layer in enumerate(self.layers):
                kept = rows if index == kept_layer else kept
                rows = layer(rows, batch_size, mask, position_embeddings, content_length, cache)
        kept = rows if kept_layer == len(self.layers) else kept

        def by_text(states: torch.Tensor) -> torch.Tensor:
            return states.clone().view(num_rows, batch_size, width).transpose(0, 1)

        return by_text(rows), None if kept is None else by_text(kept)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns logits (…, V) of hidden states (…, D)."""
        return self.head(hidden_states.flatten(0, -2)).unflatten(0, hidden_states.shape[:-1])


class _PackedLayer:
    def __init__(self, layer: nn.Module, index: int):
        attention, mlp, self.index = layer.self_attn, layer.mlp, index
        self.norms, self.activation = (layer.input_layernorm, layer.post_attention_layernorm), mlp.act_fn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        self.num_heads, self.num_key_heads = (linear.weight.shape[0] // self.head_dim for linear in (q, k))
        self.heads_per_key = self.num_heads // self.num_key_heads
        self.qkv, self.o = SlotLinears([q, k, v]), SlotLinears([o])
        self.gate_up, self.down = SlotLinears([mlp.gate_proj, mlp.up_proj]), SlotLinears([mlp.down_proj])
        self.weights = [weight for one in (self.qkv, self.o, self.gate_up, self.down) for weight in one.weights]
        names = {attention: ("q_proj", "k_proj", "v_proj", "o_proj"), mlp: ("gate_proj", "up_proj", "down_proj")}
        self.places = [(parent, name) for parent, all_names in names.items() for name in all_names]

    def __call__(
        self,
        rows: torch.Tensor,
        batch_size: int,
        mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        content_length: int,
        cache: Cache | None,
    ) -> torch.Tensor:
        first_slot = content_length * batch_size
        states = self.qkv(_normed(self.norms[0], rows), first_slot)
        states = states.view(-1, batch_size, self.num_heads + 2 * self.num_key_heads, self.head_dim).permute(1, 2, 0, 3)
        rotated = apply_rotary(states[:, : -self.num_key_heads], *position_embeddings)
        keys = rotated[:, self.num_heads :, :content_length]
        values = states[:, -self.num_key_heads :, :content_length]
        if cache is not None:
            keys, values = cache.update(keys, values, self.index)
        seen = attend(rotated[:, : self.num_heads], keys, values, mask, self.scaling)
        rows = rows + self.o(seen.permute(2, 0, 1, 3).reshape(len(rows), -1), first_slot)
        gate, up = self.gate_up(_normed(self.norms[1], rows), first_slot).chunk(2, dim=-1)
        return rows + self.down(self.activation(gate) * up, first_slot)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention of few rows: queries (B, H, R, d) of the heads that share a key head are rows of it, so that keys and values
    (B, G, K, d) aren't repeated. `mask` (B or 1, 1, 1 or R · H / G, K) is True where a row of a key head sees a key. Returns
    (B, H, R, d).
    """
    grouped = queries.reshape(len(queries), keys.shape[1], -1, queries.shape[-1])
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling).reshape(queries.shape)


def _normed(norm: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """LLaMA's RMS norm, which rounds to float32, in one operation."""
    if rows.dtype != torch.float32:
        return norm(rows)
    return F.rms_norm(rows, rows.shape[-1:], norm.weight, norm.variance_epsilon)


def _is_dense(mask: object) -> bool:
    return mask is None or (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool)


def slot_factors(linear: nn.Module) -> list[SlotFactors]:
    return linear.slot_factors() if hasattr(type(linear), "slot_factors") else []


def _check(model: nn.Module, head: nn.Module) -> None:
    kinds = {type(norm) for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)}
    if kinds != {LlamaRMSNorm}:
        raise ValueError(f"norms are {sorted(kind.__name__ for kind in kinds)}: packed weights expect LlamaRMSNorm")
    if model.config._attn_implementation != "sdpa":
        raise ValueError(f"attn_implementation={model.config._attn_implementation!r}: packed weights expect 'sdpa'")
    linears = {name: module for name, module in model.layers.named_modules() if name.endswith("_proj")}
    for name, linear in {**linears, "lm_head": head}.items():
        is_known = type(linear) is nn.Linear or hasattr(type(linear), "slot_factors")
        if not is_known or linear.bias is not None:
            raise ValueError(f"{name} is a {type(linear).__name__}: packed weights expect an nn.Linear without bias")
        for weight in (linear.weight, *(one for factors in slot_factors(linear) for one in factors[:2])):
            if weight.dtype not in DTYPES or (weight.dtype, weight.device.type) != (head.weight.dtype, "cpu"):
                raise ValueError(
                    f"{name} has {weight.dtype} on {weight.device}: packed weights expect float32 or float64 on a CPU, one of "
                    "them for all layers and adapters"
                )
