"""Measurement: nats per token of texts that training did not see, under one order after another."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from a3_hf.data.tokenization import encode_documents
from a3_hf.models.a3_llama.infilling_templates import encode_prompt
from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.training.base_trainer import row_generator

from .next_token import NEXT_TOKEN_ARCHITECTURES, check_counts, check_max_length, next_token_log_probs, padded
from .trained_run import Trained

MakeOrder = Callable[[torch.Tensor, Sequence[torch.Generator]], GroupOrder]


def measure_losses(
    trained: Trained,
    *,
    num_documents: int = 64,
    num_ordered_documents: int | None = None,
    max_length: int = 256,
    group_size: int = 4,
    orders: int = 1,
    num_samples: int = 32,
    seed: int = 20,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Nats per token over the first held-out documents. Each is BOS, which is given, and its tokens, cut to `max_length`
    with BOS: longer documents are measured by their beginning. Every architecture and run is scored on the same tokens, and
    under the same random orders: a document's come from `seed` and its number alone, and those of all group sizes cut one
    permutation.

    Masked diffusion takes a pass for each group of an order, so its exact losses are of the first `num_ordered_documents`
    documents alone. To stand beside them, every loss of every architecture is given over these few documents too, under
    its name with `_few` behind it; names without it are always of all documents.

    Args:
        num_documents: how many documents, from the start.
        num_ordered_documents: how many of them are the few; None: four, or all where there are fewer.
        group_size: of the scattered groups, at least 2.
        orders: random orders of each document; a loss is the mean over them.
        num_samples: masks of each document in the bound of masked diffusion.
        seed: of the random orders and of the bound.
        batch_size: documents of a batch.

    Returns:
        `loss_documents`, `loss_tokens` (scored ones), `loss_documents_few`, `loss_tokens_few`, and in nats per token, where
        the architecture has it, each also with `_few`:

        - `nll_next_token`: each token given those before it, by plain LLaMA or by A3's content stream read as the LLaMA
          that it is: what is left of next-token use.
        - `nll_left_to_right`, `nll_right_to_left`: the exact loss of these orders, one token at a time: of A3 by its
          slots. Masked diffusion has only those of the few documents. Plain LLaMA's, left to right, is `nll_next_token`,
          and it has no other order.
        - `nll_scattered_1`: in random order, one token at a time. Of masked diffusion it is the negative of
          `log_likelihood_bound`, whose expectation is the mean over all orders of this loss: an unbiased estimate of what
          the random orders of the others estimate.
        - `nll_scattered_{group_size}`: in random order, groups written at once. A3, and masked diffusion on the few
          documents; Decoupled RoPE has no groups.

    Raises:
        ValueError: numbers that are not whole or below 1 (`group_size`: 2), a `max_length` above the model's context, fewer
            documents than asked for, a document without a token, a tokenizer without BOS.
    """
    if num_ordered_documents is None:
        num_ordered_documents = min(4, num_documents)
    check_counts(num_documents=num_documents, num_ordered_documents=num_ordered_documents, orders=orders)
    check_counts(num_samples=num_samples, batch_size=batch_size, group_size=group_size)
    check_max_length(max_length, trained)
    if group_size < 2:
        raise ValueError(f"group_size={group_size}; it takes at least 2: singletons are measured anyway")
    if num_ordered_documents > num_documents:
        raise ValueError(
            f"num_ordered_documents={num_ordered_documents}; it takes at most num_documents={num_documents}"
        )
    if len(trained.documents) < num_documents:
        raise ValueError(f"num_documents={num_documents}; there are {len(trained.documents)} held-out documents")
    bos, documents = encode_prompt(trained.tokenizer, ""), trained.documents[:num_documents]
    rows = [(bos + ids)[:max_length] for ids in encode_documents(documents, trained.tokenizer)]
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"held-out document {number} is empty; it takes at least one token to score")

    # 1. Log-likelihoods (documents,) by name, of all documents or of the few.
    totals: dict[str, torch.Tensor] = {}
    if trained.architecture in NEXT_TOKEN_ARCHITECTURES:
        totals["nll_next_token"] = _next_token_totals(trained, rows, batch_size=batch_size)
    if trained.architecture == "llama":
        totals["nll_left_to_right"] = totals["nll_next_token"]
    else:
        few = rows[:num_ordered_documents] if trained.architecture == "masked_diffusion" else rows
        ordered = partial(_order_totals, trained, few, seed=seed, batch_size=batch_size)
        totals["nll_left_to_right"] = ordered("left to right", _left_to_right)
        totals["nll_right_to_left"] = ordered("right to left", _right_to_left)
        if trained.architecture == "masked_diffusion":
            totals["nll_scattered_1"] = _bound_totals(
                trained, rows, num_samples=num_samples, seed=seed, batch_size=batch_size
            )
        else:
            totals["nll_scattered_1"] = ordered("scattered", partial(_scattered, group_size=1), orders=orders)
        if trained.architecture != "decoupled_rope":
            totals[f"nll_scattered_{group_size}"] = ordered(
                f"scattered, groups of {group_size}", partial(_scattered, group_size=group_size), orders=orders
            )

    # 2. Nats per token.
    result: dict[str, Any] = {}
    for behind, count in (("", num_documents), ("_few", num_ordered_documents)):
        tokens = sum(len(row) - 1 for row in rows[:count])
        result |= {f"loss_documents{behind}": count, f"loss_tokens{behind}": tokens}
        of_enough = {name: nats for name, nats in totals.items() if len(nats) >= count}
        result |= {name + behind: -nats[:count].sum().item() / tokens for name, nats in of_enough.items()}
    return result


def _left_to_right(mask: torch.Tensor, generators: Sequence[torch.Generator]) -> GroupOrder:
    return GroupOrder.left_to_right(mask)


def _right_to_left(mask: torch.Tensor, generators: Sequence[torch.Generator]) -> GroupOrder:
    return GroupOrder.right_to_left(mask)


def _scattered(mask: torch.Tensor, generators: Sequence[torch.Generator], *, group_size: int) -> GroupOrder:
    return GroupOrder.scattered(mask, group_size=group_size, generator=generators)


def _order_totals(
    trained: Trained,
    rows: Sequence[list[int]],
    title: str,
    make_order: MakeOrder,
    *,
    orders: int = 1,
    seed: int,
    batch_size: int,
) -> torch.Tensor:
    """(rows,) log-likelihood of each row, nats in double, the mean over its orders."""
    model, parts = trained.model, []
    for start in tqdm(range(0, len(rows), batch_size), desc=title, leave=False):
        ids, mask = padded(rows[start : start + batch_size])
        total = torch.zeros(len(ids), dtype=torch.float64)
        for number in range(orders):
            generators = [row_generator(seed, index, number) for index in range(start, start + len(ids))]
            group_ids = make_order(mask, generators).group_ids
            inputs = (tensor.to(model.device) for tensor in (ids, group_ids, mask))
            total += model.log_likelihood(*inputs).double().sum(dim=1).cpu()
        parts.append(total / orders)
    return torch.cat(parts)


def _next_token_totals(trained: Trained, rows: Sequence[list[int]], *, batch_size: int) -> torch.Tensor:
    """(rows,) log-likelihood of each row, nats in double."""
    batches = tqdm(range(0, len(rows), batch_size), desc="next token", leave=False)
    parts = [next_token_log_probs(trained, *padded(rows[start : start + batch_size])) for start in batches]
    return torch.cat([part.double().sum(dim=1) for part in parts])


def _bound_totals(
    trained: Trained, rows: Sequence[list[int]], *, num_samples: int, seed: int, batch_size: int
) -> torch.Tensor:
    """(rows,) estimate of the mean over all orders of each row's log-likelihood, nats in double."""
    model, parts = trained.model, []
    for start in tqdm(range(0, len(rows), batch_size), desc="bound", leave=False):
        ids, mask = (tensor.to(model.device) for tensor in padded(rows[start : start + batch_size]))
        parts.append(model.log_likelihood_bound(ids, mask, num_samples=num_samples, seed=seed).double().cpu())
    return torch.cat(parts)
