"""Measure of attention: its mass by distance in the text and by distance in generation, per stream and layer."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.training.base_trainer import row_generator
from a3_hf.training.model_inputs import model_inputs

from .checks import check_counts, check_length
from .coherence_diversity import held_out_rows
from .trained_run import Trained

NEAR = 2  # the scalars are of distances from 1 to this
TEXTUAL, GENERATION = "textual", "generation"


class Stream(NamedTuple):
    """Rows of one stream in one pass, and how far from them the keys are.

    Attributes:
        weights: (layers, rows, keys) attention, the mean over heads.
        visible: (rows, keys) bool.
        distances: by kind, (rows, keys) whole numbers, of any value where the key is not visible.
    """

    name: str
    weights: torch.Tensor
    visible: torch.Tensor
    distances: dict[str, torch.Tensor]


def measure_attention(
    trained: Trained,
    *,
    num_rows: int = 16,
    length: int | None = None,
    distances: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures attention mass by textual and by generation distance (paper §2, which claims that predicting states look at
    tokens near in the text and summarising states at tokens just generated, and that a state with both tasks trades them off).

    Held-out texts are encoded in a random order of single tokens, drawn from `seed` and the text's number. The mass is the
    mean over texts, heads, and the states of a stream that see at least half of a text. `uniform` is the mass of attention
    spread evenly over the visible keys. By stream:

    - A3, `query`: a slot; distances are from the token that it predicts, which is generated next.
    - A3, `content`: a token, which sees itself at distance 0 in both. The last layer is omitted: no slot reads its content
      rows.
    - Decoupled RoPE, `single`: a token that predicts the next one in the order; distances are from that one, and the token's
      own key is at generation distance 1. The same for plain LLaMA, left to right, without generation distance.
    - masked diffusion, `single`: the state that predicts a masked token, half of the tokens being masked; textual distances
      are from that token, and all keys are visible. There is no generation distance.

    Args:
        num_rows: held-out rows, packed as in training.
        length: tokens of a row, BOS included; None: the recipe's `block_size`.
        distances: the smallest distance of each bin, ascending from 0; None: 0, 1, 2, 4, 8, … up to the row's length.
        seed: seed of the orders, or of the masks.

    Returns:
        `attention`, a dict per stream, layer, kind and bin with a visible key: `stream`, `layer` (from 0), `kind`
        (`"textual"` or `"generation"`), `distance_from` and `distance_to` (inclusive), `mass` and `uniform`, which sum to 1
        over the bins; and per stream the scalars `attention_textual_{stream}` and `attention_generation_{stream}`: mass over
        uniform at distances 1 and 2, the mean over layers (1: no preference).

    Raises:
        ValueError: numbers that are not whole or below 1; a length above the model's context or below 3; distances that do
            not ascend from 0, or that no pair of tokens can have; less held-out text than `num_rows` rows.
    """
    check_counts(num_rows=num_rows)
    length = trained.recipe.data.block_size if length is None else length
    check_length("length", length, trained.model.config, least=3)  # BOS and two tokens: the second has a choice
    starts = _bins(distances, length)
    rows = held_out_rows(trained, length=length, count=num_rows)
    if len(rows) < num_rows:
        raise ValueError(
            f"num_rows={num_rows} of {length} tokens: the {len(trained.documents)} held-out documents fill {len(rows)}"
        )

    totals: dict[tuple[str, str], torch.Tensor] = {}
    model, implementation = trained.model, trained.model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only implementation that returns weights
    try:
        for number, row in enumerate(tqdm(rows, desc="attention", leave=False)):
            generator = row_generator(seed, number)
            ids = torch.tensor([row], device=model.device)
            for stream in map(_late, _STREAMS[trained.architecture](model, ids, generator)):
                for kind, distance in stream.distances.items():
                    sums = _fractions(stream, distance, starts.to(distance.device))
                    totals[stream.name, kind] = totals.get((stream.name, kind), 0.0) + sums / num_rows
    finally:
        model.set_attn_implementation(implementation)

    curves, scalars = [], {}
    ends = [*(starts[1:] - 1).tolist(), length - 1]
    for (stream, kind), fractions in totals.items():
        *masses, uniform = fractions[:, :-1].tolist()
        *near, near_uniform = fractions[:, -1].tolist()
        for layer, mass in enumerate(masses):
            bins = zip(starts.tolist(), ends, mass, uniform, strict=True)
            names = ("distance_from", "distance_to", "mass", "uniform")
            about = {"stream": stream, "layer": layer, "kind": kind}
            curves += [about | dict(zip(names, values, strict=True)) for values in bins if values[-1] > 0]
        scalars[f"attention_{kind}_{stream}"] = sum(near) / len(masses) / near_uniform
    return {"attention": curves, **scalars}


def _bins(distances: Sequence[int] | None, length: int) -> torch.Tensor:
    """(bins,) the smallest distance of each bin."""
    if distances is None:
        distances = [0, *(2**power for power in range(length.bit_length()) if 2**power < length)]
    ascending = all(a < b for a, b in pairwise(distances))
    if not distances or distances[0] != 0 or not ascending or distances[-1] >= length:
        raise ValueError(
            f"distances={distances!r}: expected whole numbers that ascend from 0 and stay below the row's length, {length}"
        )
    return torch.tensor(distances)


def _late(stream: Stream) -> Stream:
    """The rows of a text that see at least half as many keys as the last one."""
    seen = stream.visible.sum(dim=1)
    late = 2 * seen >= seen.max()
    return Stream(
        stream.name,
        stream.weights[:, late],
        stream.visible[late],
        {kind: distance[late] for kind, distance in stream.distances.items()},
    )


def _fractions(stream: Stream, distance: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """(layers + 1, bins + 1) the fraction of a row's attention in each bin of distance, the mean over rows, and in the last
    column that of distances 1 to `NEAR`; the last line is uniform attention.
    """
    even = stream.visible / stream.visible.sum(dim=1, keepdim=True)
    weights = torch.cat([stream.weights, even[None]]).double()
    bins = torch.bucketize(distance, starts, right=True) - 1
    seen = stream.visible.flatten()
    flat, bins, distance = weights.flatten(1)[:, seen], bins.flatten()[seen], distance.flatten()[seen]
    binned = weights.new_zeros(len(weights), len(starts)).index_add_(1, bins, flat)
    near = (flat * ((distance >= 1) & (distance <= NEAR))).sum(dim=1, keepdim=True)
    return (torch.cat([binned, near], dim=1) / len(stream.visible)).cpu()


def _attentions(model, **inputs: Any) -> torch.Tensor:
    """(layers, rows, keys) the attention of a batch of one, the mean over heads."""
    with torch.no_grad():
        attentions = model.model(**inputs, output_attentions=True).attentions
    return torch.stack([weights[0].float().mean(dim=0) for weights in attentions])


def _scattered(
    ids: torch.Tensor, generator: torch.Generator, *, one_stream: bool
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The model's inputs for a row (1, S) in a random order; the positions (S − 1,) of its tokens in that order, without the
    last; and those of the token that each predicts.
    """
    order = GroupOrder.scattered(torch.ones_like(ids, dtype=torch.bool), group_size=1, generator=[generator])
    inputs = model_inputs(order, ids, group_size=1, implementation="eager", one_stream=one_stream)
    del inputs["labels"]
    return inputs, inputs["position_ids"][0], inputs["target_position_ids"][0]


def _between(rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] - keys[None, :]).abs()


def _streams_of_a3(model, ids: torch.Tensor, generator: torch.Generator) -> list[Stream]:
    inputs, own, targets = _scattered(ids, generator, one_stream=False)
    weights, ranks = _attentions(model, **inputs), torch.arange(len(own), device=ids.device)
    visible = ranks[:, None] >= ranks
    distances = {TEXTUAL: _between(targets, own), GENERATION: _between(ranks + 1, ranks)}
    streams = [Stream("query", weights[:, len(own) :], visible, distances)]
    if len(weights) > 1:  # only slots read the last layer
        distances = {TEXTUAL: _between(own, own), GENERATION: _between(ranks, ranks)}
        streams.append(Stream("content", weights[:-1, : len(own)], visible, distances))
    return streams


def _streams_of_decoupled_rope(model, ids: torch.Tensor, generator: torch.Generator) -> list[Stream]:
    inputs, own, targets = _scattered(ids, generator, one_stream=True)
    ranks = torch.arange(len(own), device=ids.device)
    distances = {TEXTUAL: _between(targets, own), GENERATION: _between(ranks + 1, ranks)}
    return [Stream("single", _attentions(model, **inputs), ranks[:, None] >= ranks, distances)]


def _streams_of_llama(model, ids: torch.Tensor, generator: torch.Generator) -> list[Stream]:
    places = torch.arange(ids.shape[1] - 1, device=ids.device)
    weights = _attentions(model, input_ids=ids[:, :-1], use_cache=False)
    return [Stream("single", weights, places[:, None] >= places, {TEXTUAL: _between(places + 1, places)})]


def _streams_of_masked_diffusion(model, ids: torch.Tensor, generator: torch.Generator) -> list[Stream]:
    length = ids.shape[1]
    masked = 1 + torch.randperm(length - 1, generator=generator)[: length // 2].sort().values.to(ids.device)
    text = ids.index_fill(1, masked, model.config.mask_token_id)
    # A token is predicted by the state before it.
    weights = _attentions(model, input_ids=text, use_cache=False)[:, masked - 1]
    places = torch.arange(length, device=ids.device)
    visible = torch.ones(len(masked), length, dtype=torch.bool, device=ids.device)
    return [Stream("single", weights, visible, {TEXTUAL: _between(masked, places)})]


_STREAMS = {
    "a3": _streams_of_a3,
    "decoupled_rope": _streams_of_decoupled_rope,
    "masked_diffusion": _streams_of_masked_diffusion,
    "llama": _streams_of_llama,
}
