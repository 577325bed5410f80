"""Trees of guesses behind each text's last token, from a draft head."""

import warnings
from functools import partial
from os import PathLike

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache

from a3_hf.models.a3_llama.generation_sampling import at_least_float32
from a3_hf.models.a3_llama.generation_trees import DraftTree

from .modeling_a3_draft_head import DraftHead, Product

LEAST_PROBABILITY = 0.05  # of the path to a node, by the head: below it, a node costs a pass about what it brings


def in_eight_bits(weight: torch.Tensor) -> Product:
    """Returns the product of float32 rows (…, in) on a CPU with a weight (out, in) that is rounded to 8 bits, a scale for
    each output: a quarter of the memory to read, with an error of some 2%, which guesses bear. Without torch's private
    operators for it, the plain product.
    """
    plain = partial(F.linear, weight=weight)
    operators = torch.ops.quantized
    if not hasattr(torch, "quantize_per_channel") or not hasattr(operators, "linear_dynamic"):
        return plain
    scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(weight.dtype).tiny).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantised tensors are deprecated
        try:
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            packed = operators.linear_prepack(rounded, None)
        except RuntimeError:  # built without kernels for this processor
            return plain
    return lambda rows: operators.linear_dynamic(rows, packed, True)


class Drafter:
    """Proposes trees with a draft head, whose weights are added once to copies of its base's last layers. Beside packed
    weights (`pack_weights`), these are in 8 bits.

    After a change of the base's weights or of the head's, make a new one; the text would be right all the same, as the base
    checks every guess.
    """

    def __init__(self, head: DraftHead):
        self.head, self.kept_layer, self._made_for = head, head.config.first_layer, None

    def ready(self) -> "Drafter":
        """Follows the base to its device and dtype."""
        base = self.head.base[0]
        weight = base.lm_head.weight
        on_cpu = (weight.device.type, weight.dtype) == ("cpu", torch.float32)
        is_rounded = on_cpu and base.model.packed_layers is not None
        made_for = weight.device, weight.dtype, is_rounded
        if made_for != self._made_for:
            self.head.to(device=weight.device, dtype=weight.dtype)
            product = in_eight_bits if is_rounded else lambda weight: partial(F.linear, weight=weight)
            with torch.no_grad():
                self.layers = self.head.merged_layers(product)
                self.logits = product(self.head.candidate_weights())
            self._made_for = made_for
        return self

    @torch.no_grad()
    def propose(
        self,
        content_states: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        cache: Cache,
        key_mask: torch.Tensor | None,
        *,
        most_nodes: int,
        width: int,
        deepest: torch.Tensor,
        never: torch.Tensor,
    ) -> DraftTree:
        """Returns the likeliest continuations of each text as a tree.

        Args:
            content_states: (B, D) of the last content token before layer `kept_layer`.
            token_ids: (B,) the token after it.
            positions: (B,) that token's position.
            cache: the content's keys and values.
            key_mask: (B, cached), False where a key is not seen; None: all are.
            most_nodes: of a tree.
            width: most nodes after one node; 1 makes a chain.
            deepest: (B,) most nodes in a row.
            never: (n,) tokens that are no drafts.
        """
        head = self.head
        states = head.states(
            self.layers,
            content_states[:, None],
            token_ids[:, None],
            positions[:, None],
            lambda index: (cache.layers[index].keys, cache.layers[index].values),
            None if key_mask is None else key_mask[:, None],
        )[:, 0]
        tree = DraftTree.empty(len(token_ids), token_ids.device)
        path = torch.ones_like(positions, dtype=states.dtype)[
            :, None
        ]  # (B, F) probability of each node of the last level
        ids, last = torch.full_like(positions, -1)[:, None], token_ids[:, None]  # their numbers and tokens
        is_allowed = ~torch.isin(head.candidates, never)
        paths = path[:, :0]
        for distance in range(states.shape[1]):
            slots = states[:, distance, None].expand(-1, last.shape[1] if distance else 1, -1)
            logits = self.logits(head.told(slots, last, distance))
            likely, choice = at_least_float32(logits).softmax(dim=-1).topk(min(width, logits.shape[-1]), dim=-1)
            likely = likely * is_allowed[choice] * path[..., None] * (deepest > distance)[:, None, None]
            likely, place = likely.flatten(1).topk(min(most_nodes, likely[0].numel()), dim=1)
            likely = likely.where(likely > LEAST_PROBABILITY, 0)
            live = int((likely > 0).sum(dim=1).max())
            if not live:
                break
            path, place = likely[:, :live], place[:, :live]
            last = head.candidates[choice.flatten(1).gather(1, place)].long()
            parents = ids.gather(1, place // choice.shape[2])
            ids = (tree.tokens.shape[1] + torch.arange(live, device=last.device)).expand_as(last)
            tree = tree.with_nodes(last, parents, path > 0)
            paths = torch.cat([paths, path], dim=1)
        return tree.likeliest(paths, most_nodes)


def attach_draft_head(model: nn.Module, head: str | PathLike | DraftHead) -> None:
    """Gives an `A3LlamaForCausalLM`, adapted or not, a draft head, with which `strategy="speculative"` writes the text of its
    content stream in fewer passes.

    Args:
        head: a head, or its folder or hub id.

    Raises:
        ValueError: a head for a model of other sizes; quantised layers.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(head, DraftHead):
        head = DraftHead.from_pretrained(head)
    model.drafter = Drafter(head.eval().requires_grad_(False).attach_to(model))
