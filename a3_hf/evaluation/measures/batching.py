"""Padded batches of token rows, and their log-probabilities under an order of groups or next token by next token."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedModel

from a3_hf.models.a3_llama.likelihood import SLOTS_PER_CHUNK, token_log_probs
from a3_hf.models.a3_llama.modeling_a3_llama import A3LlamaForCausalLM
from a3_hf.models.a3_llama.orders import GroupOrder

# Architectures with a causal stream: plain LLaMA, and A3's content stream, which is a LLaMA.
NEXT_TOKEN_ARCHITECTURES = ("a3", "llama")
# Shows progress over the items of a sequence, under a title.
Track = Callable[[Sequence, str], Iterable]


def silently(items: Sequence, description: str) -> Iterable:
    """Iterates without showing progress."""
    return items


def pad_rows(rows: Sequence[Sequence[int]], *, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) of rows of different lengths, padded with 0 on one side, and their attention mask (B, S)."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    pairs = (ids, [torch.ones_like(row) for row in ids])
    ids, mask = (pad_sequence(one, batch_first=True, padding_side=side) for one in pairs)
    return ids, mask


def span_mask(starts: Sequence[int], lengths: Sequence[int], width: int) -> torch.Tensor:
    """(B, width), True at `lengths[row]` columns of each row, from column `starts[row]` on."""
    first, count = torch.tensor(starts)[:, None], torch.tensor(lengths)[:, None]
    columns = torch.arange(width)
    return (columns >= first) & (columns < first + count)


def order_inputs(ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor, device, **order: Any) -> dict[str, Any]:
    """Arguments of `log_likelihood` for scoring some tokens given the others of their row.

    Args:
        ids: (B, S) tokens.
        mask: (B, S), 0 at padding.
        scored: (B, S), True at tokens that are scored.
        order: settings of `GroupOrder.infilling`; none: left to right, one token at a time.
    """
    group_ids = GroupOrder.infilling(scored, attention_mask=mask, **order).group_ids
    tensors = {"input_ids": ids, "group_ids": group_ids, "attention_mask": mask, "scored_mask": scored}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@torch.no_grad()
def next_token_scores(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, scored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores tokens given those before them, by a causal model. Of an A3 model, adapted or not, the content stream is used,
    which is a LLaMA.

    Args:
        ids: (B, S) tokens, padded on the right.
        mask: (B, S), 0 at padding.
        scored: (B, S), True at tokens that are scored; not at a row's first token.

    Returns:
        Log-probabilities (B, S) in nats, fp32 (fp64 from an fp64 model), 0 at other tokens; and (B, S) whether a token is the
        likeliest one, True at other tokens. Both on the CPU.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()  # with its adapters
    where, inputs = scored[:, 1:].to(model.device), {"attention_mask": mask.to(model.device), "use_cache": False}
    on_device = ids.to(model.device)
    if isinstance(model, A3LlamaForCausalLM):
        states = model.model(on_device, target_position_ids=on_device[:, :0], **inputs).content_hidden_state
    elif isinstance(model, LlamaForCausalLM):
        states = model.model(on_device, **inputs).last_hidden_state
    else:
        states = model(on_device, **inputs).logits
    head = model.lm_head if isinstance(model, (A3LlamaForCausalLM, LlamaForCausalLM)) else torch.nn.Identity()
    parts = []
    # in chunks, so that not all logits are in memory at once
    for state, wanted in zip(
        states[:, :-1][where].split(SLOTS_PER_CHUNK), on_device[:, 1:][where].split(SLOTS_PER_CHUNK), strict=True
    ):
        logits = head(state)
        parts.append((token_log_probs(logits, wanted).cpu(), (logits.argmax(dim=-1) == wanted).cpu()))
    values, is_likeliest = (torch.cat(part) for part in zip(*parts, strict=True))
    log_probs, greedy = torch.zeros(ids.shape, dtype=values.dtype), torch.ones(ids.shape, dtype=torch.bool)
    log_probs[:, 1:][where.cpu()], greedy[:, 1:][where.cpu()] = values, is_likeliest
    return log_probs, greedy
