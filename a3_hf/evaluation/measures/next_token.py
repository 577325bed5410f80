"""What measurements of different architectures share: checks of their settings, rows, next-token log-probabilities."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from a3_hf.models.a3_llama.likelihood import SLOTS_PER_CHUNK, token_log_probs

from .trained_run import Trained

NEXT_TOKEN_ARCHITECTURES = ("a3", "llama")  # with a causal stream that is a LLaMA


def check_counts(**settings: int) -> None:
    """Raises a ValueError for settings that are no whole numbers of at least 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}; it takes a whole number of at least 1")


def check_max_length(max_length: int, trained: Trained) -> None:
    """Raises a ValueError for a number of tokens, BOS included, that leaves none to score or that is above the model's
    context.
    """
    check_counts(max_length=max_length)
    context = trained.model.config.max_position_embeddings
    if not 2 <= max_length <= context:
        raise ValueError(
            f"max_length={max_length}; it takes from 2 tokens, BOS and one to score, to the model's context "
            f"(max_position_embeddings={context})"
        )


def padded(rows: Sequence[Sequence[int]], *, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) of rows of different lengths, padded with 0 on one side, and their attention mask (B, S)."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return ids, pad_sequence(ones, batch_first=True, padding_side=side)


@torch.no_grad()
def next_token_log_probs(trained: Trained, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token given those before it, by a plain LLaMA or by A3's content stream, which is one: its
    slots have no part in it.

    Args:
        ids: (B, S) tokens, padded on the right.
        mask: (B, S), 0 at padding.

    Returns:
        (B, S) nats in fp32 on the CPU; 0 at each row's first token and at padding.

    Raises:
        ValueError: an architecture without a stream that is a LLaMA.
    """
    model, device = trained.model, trained.model.device
    if trained.architecture not in NEXT_TOKEN_ARCHITECTURES:
        raise ValueError(
            f"architecture={trained.architecture!r}; it takes one of {', '.join(NEXT_TOKEN_ARCHITECTURES)}"
        )
    on_device, inputs = ids.to(device), {"attention_mask": mask.to(device), "use_cache": False}
    if trained.architecture == "a3":
        hidden_states = model.model(on_device, target_position_ids=on_device[:, :0], **inputs).content_hidden_state
    else:
        hidden_states = model.model(on_device, **inputs).last_hidden_state
    # a large vocabulary's logits are never there all at once
    chunks = zip(
        hidden_states[:, :-1].flatten(0, 1).split(SLOTS_PER_CHUNK),
        on_device[:, 1:].flatten().split(SLOTS_PER_CHUNK),
        strict=True,
    )
    log_probs = torch.cat([token_log_probs(model.lm_head(hidden), wanted) for hidden, wanted in chunks])
    whole = torch.zeros(ids.shape)
    whole[:, 1:] = log_probs.view(len(ids), -1).cpu()
    return whole.masked_fill(~mask.bool(), 0.0)
