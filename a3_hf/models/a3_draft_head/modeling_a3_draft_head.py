"""A draft head: slots that enter a frozen LLaMA late, behind its last content token, and guess the tokens that follow.

Not in the paper. A slot per distance starts from the last content token's state before layer `first_layer`, from the token
just chosen and from a vector of its own; it passes the remaining layers, with adapters, and sees the content's keys. A small
network then tells each guess of the one before (as Hydra and EAGLE do).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from a3_hf.models.a3_llama.generation_sampling import at_least_float32
from a3_hf.models.a3_llama.packed_layers import attend
from a3_hf.models.a3_llama.rope import apply_rotary

from .configuration_a3_draft_head import OF_THE_BASE, DraftHeadConfig

WEIGHT_OF_FURTHER = 0.8  # a distance weighs this much of the one before in the loss
START_SCALE = 0.3  # of the slots' vectors, beside a state and an embedding of root mean square 1
ADAPTER_SCALE = 2.0
ADAPTED = ("q", "o", "gate_up", "down")
Product = Callable[[torch.Tensor], torch.Tensor]
KeysValues = tuple[torch.Tensor, torch.Tensor]


@dataclass
class DraftHeadOutput(ModelOutput):
    """Output of `DraftHead`.

    Attributes:
        loss: (), weighted over distances.
        losses: (K,) mean cross-entropy of each distance, in nats.
        right: (K,) share of tokens whose likeliest guess, after the true token before it, is right.
        num_scored: (K,) tokens that these are means of.
    """

    loss: torch.FloatTensor | None = None
    losses: torch.FloatTensor | None = None
    right: torch.FloatTensor | None = None
    num_scored: torch.LongTensor | None = None


class LowRank(nn.Module):
    """A low-rank map (…, in) → (…, out), zero at first."""

    def __init__(self, num_in: int, num_out: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, num_in) * num_in**-0.5)
        self.up = nn.Parameter(torch.zeros(num_out, rank))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(rows, self.down.to(rows.dtype)), self.up.to(rows.dtype)) * ADAPTER_SCALE

    def matrix(self) -> torch.Tensor:
        return self.up @ self.down * ADAPTER_SCALE


class Sampler(nn.Module):
    """Changes the state of a slot, given the token before its own."""

    def __init__(self, hidden_size: int, sampler_size: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(sampler_size, 2 * hidden_size) * (2 * hidden_size) ** -0.5)
        self.up = nn.Parameter(torch.zeros(hidden_size, sampler_size))

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        inside = F.silu(F.linear(torch.cat([states, tokens], dim=-1), self.down.to(states.dtype)))
        return states + F.linear(inside, self.up.to(states.dtype))


class LateLayer(NamedTuple):
    """A layer as slots pass it: the base's norms, and products with its weights and the head's."""

    index: int
    norms: tuple[nn.Module, nn.Module]
    activation: Callable
    scaling: float
    q: Product
    o: Product
    gate_up: Product
    down: Product


class DraftHead(PreTrainedModel):
    """Guesses the `num_drafts` tokens after the next one (see the module). Its base is not part of it."""

    config_class = DraftHeadConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: DraftHeadConfig):
        super().__init__(config)
        width, inner = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads * config.head_dim
        sizes = {"q": (width, heads), "o": (heads, width), "gate_up": (width, 2 * inner), "down": (inner, width)}
        late = range(config.first_layer, config.num_hidden_layers) if config.rank else ()
        self.start = nn.Parameter(torch.randn(config.num_drafts, width) * START_SCALE)
        self.from_state, self.from_token = (nn.Parameter(torch.eye(width)) for _ in range(2))
        self.adapters = nn.ModuleDict(
            {
                str(index): nn.ModuleDict({name: LowRank(*sizes[name], config.rank) for name in ADAPTED})
                for index in late
            }
        )
        num_samplers = config.num_drafts - 1 if config.sampler_size else 0
        self.samplers = nn.ModuleList([Sampler(width, config.sampler_size) for _ in range(num_samplers)])
        self.register_buffer("candidates", torch.arange(config.num_candidates, dtype=torch.int32))
        self.base: list = []  # not a submodule
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are initialised where they are made."""

    def attach_to(self, base: nn.Module) -> "DraftHead":
        """Sets the base, an `A3LlamaForCausalLM`.

        Raises:
            ValueError: another model, sizes that differ, or layers with quantised weights or biases.
        """
        if base.config.model_type != "a3_llama":
            raise ValueError(f"draft head: its base is of type {base.config.model_type!r}: expected 'a3_llama'")
        for name in OF_THE_BASE:
            mine, its = getattr(self.config, name), getattr(base.config, name)
            if mine != its:
                raise ValueError(f"draft head: its base has {name}={its}: expected {mine}")
        linears = [module for name, module in base.model.layers.named_modules() if name.endswith("_proj")]
        if any(not one.weight.is_floating_point() or one.bias is not None for one in linears):
            raise ValueError("draft head: expected a base whose linear layers are neither quantised nor have biases")
        self.base = [base]
        return self

    def late_layers(self) -> list[LateLayer]:
        """The layers that slots pass, to learn."""

        def product(weight: torch.Tensor, adapter: LowRank | None) -> Product:
            return lambda rows: F.linear(rows, weight) + (0 if adapter is None else adapter(rows))

        return self._layers(product)

    def merged_layers(self, product: Callable[[torch.Tensor], Product]) -> list[LateLayer]:
        """The layers that slots pass, with the head's weights added to copies of the base's; `product` makes a function of a
        weight.
        """

        def merged(weight: torch.Tensor, adapter: LowRank | None) -> Product:
            return product(weight if adapter is None else weight + adapter.matrix().to(weight))

        return self._layers(merged)

    def _layers(self, product: Callable[[torch.Tensor, LowRank | None], Product]) -> list[LateLayer]:
        layers = []
        for index in range(self.config.first_layer, self.config.num_hidden_layers):
            layer = self.base[0].model.layers[index]
            attention, mlp = layer.self_attn, layer.mlp
            adapters = self.adapters[str(index)] if self.config.rank else dict.fromkeys(ADAPTED)
            gate_up = torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()])
            weights = (attention.q_proj.weight, attention.o_proj.weight, gate_up, mlp.down_proj.weight)
            products = {
                name: product(weight.detach(), adapters[name]) for name, weight in zip(ADAPTED, weights, strict=True)
            }
            norms = (layer.input_layernorm, layer.post_attention_layernorm)
            layers.append(LateLayer(index, norms, mlp.act_fn, attention.scaling, **products))
        return layers

    def embedded(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (…, D) of tokens (…), of root mean square 1."""
        return _normed(self.base[0].model.embed_tokens(token_ids))

    def states(
        self,
        layers: Sequence[LateLayer],
        content_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        next_positions: torch.Tensor,
        keys_values: Callable[[int], KeysValues],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the slots' normed states (B, A, K, D), K slots behind each of A content tokens.

        Args:
            layers: from `late_layers` or `merged_layers`.
            content_states: (B, A, D) before layer `first_layer`.
            next_token_ids: (B, A) the tokens after the content tokens.
            next_positions: (B, A) their positions.
            keys_values: gives the content's keys and values (B, G, T, head_dim) of a layer.
            mask: (B or 1, A or 1, T), True where the slots of a content token see a key; None: everywhere.
        """
        config, body = self.config, self.base[0].model
        batch_size, num_tokens, width = content_states.shape
        start = F.linear(_normed(content_states), self.from_state.to(content_states.dtype))
        start = start + F.linear(self.embedded(next_token_ids), self.from_token.to(start.dtype))
        rows = (start[:, :, None] + self.start.to(start.dtype)).flatten(1, 2)
        distance = torch.arange(config.num_drafts, device=rows.device)
        rope = body.rotary_emb(rows, position_ids=(next_positions[..., None] + distance).flatten(1))
        if mask is not None:
            if mask.shape[1] > 1:
                mask = mask.repeat_interleave(config.num_drafts, dim=1)
                mask = mask.repeat(1, config.num_attention_heads // body.config.num_key_value_heads, 1)
            mask = mask[:, None]
        for layer in layers:
            normed = layer.norms[0](rows)
            queries = layer.q(normed).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            seen = attend(apply_rotary(queries, *rope), *keys_values(layer.index), mask, layer.scaling)
            rows = rows + layer.o(seen.transpose(1, 2).flatten(2))
            gate, up = layer.gate_up(layer.norms[1](rows)).chunk(2, dim=-1)
            rows = rows + layer.down(layer.activation(gate) * up)
        return body.norm(rows).view(batch_size, num_tokens, config.num_drafts, width)

    def told(self, states: torch.Tensor, previous_ids: torch.Tensor, distance: int) -> torch.Tensor:
        """Returns the states (…, D) of the slots at `distance` (from 0), told of the tokens (…) before theirs."""
        if distance == 0 or not len(self.samplers):
            return states
        return self.samplers[distance - 1](states, self.embedded(previous_ids))

    def candidate_weights(self) -> torch.Tensor:
        """The rows (N, D) of the base's head that belong to the candidates."""
        return self.base[0].lm_head.weight.detach()[self.candidates.long()]

    def forward(
        self,
        input_ids: torch.LongTensor,
        labels: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> DraftHeadOutput:
        """Returns the loss of guesses behind each token of texts that are padded on the right.

        Args:
            input_ids: (B, T) tokens.
            labels: (B, T) −100 at tokens that are not to be guessed. Tokens that are no candidates are not scored.
            attention_mask: (B, T); without effect, as no token sees what comes after it.
            num_items_in_batch: tokens that the sums are divided by; None: those of this batch.
        """
        base, num_drafts = self.base[0], self.config.num_drafts
        with torch.no_grad():
            output = base.model(
                input_ids=input_ids,
                target_position_ids=input_ids[:, :0],
                use_cache=True,
                kept_layer=self.config.first_layer,
            )
        places, is_place = self._places(labels)
        tokens = F.pad(input_ids, (0, num_drafts + 1))
        to_guess = F.pad(labels, (0, num_drafts + 1), value=-100)
        content_states = output.kept_hidden_state.take_along_dim(places[..., None], dim=1)
        seen = torch.arange(input_ids.shape[1], device=places.device) <= places[..., None]
        layers = output.cache.layers
        states = self.states(
            self.late_layers(),
            content_states,
            tokens.gather(1, places + 1),
            places + 1,
            lambda index: (layers[index].keys, layers[index].values),
            seen,
        )
        weights, numbers = self.candidate_weights(), self._numbers()
        sums, right, counts = [], [], []
        for distance in range(num_drafts):
            goal = places + 2 + distance
            number = numbers[tokens.gather(1, goal)]
            scored = is_place & (to_guess.gather(1, goal) != -100) & (number >= 0)
            told = self.told(states[:, :, distance], tokens.gather(1, goal - 1), distance)
            logits = at_least_float32(F.linear(told[scored], weights))
            sums.append(F.cross_entropy(logits, number[scored], reduction="sum"))
            right.append((logits.argmax(dim=-1) == number[scored]).sum())
            counts.append(scored.sum())
        counts = torch.stack(counts)
        by_distance = torch.stack(sums)
        divisor = counts[0].clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        weight = WEIGHT_OF_FURTHER ** torch.arange(num_drafts, device=counts.device, dtype=by_distance.dtype)
        return DraftHeadOutput(
            loss=(by_distance * weight).sum() / divisor,
            losses=by_distance.detach() / counts.clamp_min(1),
            right=torch.stack(right) / counts.clamp_min(1),
            num_scored=counts,
        )

    def _places(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (B, A) the content tokens behind which something is guessed, and where there is one."""
        wanted = labels != -100
        ahead = F.pad(wanted, (0, self.config.num_drafts + 1))
        length = labels.shape[1]
        has_goal = torch.stack([ahead[:, 2 + n : 2 + n + length] for n in range(self.config.num_drafts)]).any(dim=0)
        most = max(1, int(has_goal.sum(dim=1).max()))
        places = (~has_goal).long().argsort(dim=1, stable=True)[:, :most]
        return places, has_goal.gather(1, places)

    def _numbers(self) -> torch.Tensor:
        """Returns (V,) the number of each token among the candidates; −1: it is none."""
        numbers = torch.full((self.config.vocab_size,), -1, device=self.candidates.device)
        numbers[self.candidates.long()] = torch.arange(len(self.candidates), device=numbers.device)
        return numbers


def _normed(states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:])
