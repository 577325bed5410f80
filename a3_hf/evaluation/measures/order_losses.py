"""Measure of losses: nats per token of held-out texts under several orders."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from a3_hf.data.tokenization import encode_documents
from a3_hf.models.a3_llama.infilling_templates import encode_prompt
from a3_hf.models.a3_llama.orders import GroupOrder
from a3_hf.training.base_trainer import row_generator

from .batching import NEXT_TOKEN_ARCHITECTURES, next_token_scores, pad_rows
from .checks import check_counts, check_length
from .trained_run import Trained

# An order of rows with an attention mask (B, S), from a generator for each row.
MakeOrder = Callable[[torch.Tensor, Sequence[torch.Generator]], GroupOrder]
# The log-likelihood (B,) of padded rows, from their ids and mask (B, S) and the number of the first of them.
ScoreBatch = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


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
    """Measures nats per token over the first held-out documents, cut to `max_length` tokens; BOS is given. Every architecture
    and run is scored on the same tokens and under the same random orders; all group sizes use the same permutation.

    Masked diffusion needs a pass per group of an order, so its exact losses cover only the first `num_ordered_documents`
    documents. For comparison every loss of every architecture is also given over these, with `_few` after its name.

    Args:
        num_documents: number of documents.
        num_ordered_documents: number of documents of the losses with `_few`; None: four, or all if there are fewer.
        max_length: tokens of a document, BOS included.
        group_size: size of the scattered groups, at least 2.
        orders: random orders of each document; a loss is the mean over them.
        num_samples: masks of each document in the bound of masked diffusion.
        seed: seed of random orders and of the bound, together with a document's number.
        batch_size: documents per batch.

    Returns:
        `loss_documents`, `loss_tokens` (scored), `loss_documents_few`, `loss_tokens_few`, and in nats per token, if the
        architecture has it, each also with `_few`:

        - `nll_next_token`: each token given those before it, by plain LLaMA or by A3's content stream read as a LLaMA.
        - `nll_left_to_right`, `nll_right_to_left`: the exact loss of these orders, one token at a time. Masked diffusion has
          only those of the few documents; plain LLaMA has only the first, which is `nll_next_token`.
        - `nll_scattered_1`: in random order, one token at a time. For masked diffusion, the negative `log_likelihood_bound`,
          an unbiased estimate of the mean of this loss over all orders.
        - `nll_scattered_{group_size}`: in random order, groups written at once; not for Decoupled RoPE, which has no groups,
          and for masked diffusion on the few documents.

    Raises:
        ValueError: numbers that are not whole or below 1 (`group_size`: 2), a `max_length` above the model's context, fewer
            documents than asked for, a document without a token, a tokenizer without BOS.
    """
    if num_ordered_documents is None:
        num_ordered_documents = min(4, num_documents)
    check_counts(num_documents=num_documents, num_ordered_documents=num_ordered_documents, orders=orders)
    check_counts(num_samples=num_samples, batch_size=batch_size, group_size=group_size)
    check_length("max_length", max_length, trained.model.config, least=2)
    if group_size < 2:
        raise ValueError(f"group_size={group_size}: expected at least 2, because groups of one are always measured")
    if num_ordered_documents > num_documents:
        raise ValueError(
            f"num_ordered_documents={num_ordered_documents}: expected at most num_documents={num_documents}"
        )
    rows = _read_rows(trained, num_documents, max_length)

    # 1. Log-likelihoods (documents,) by name, of all documents or of the few.
    totals: dict[str, torch.Tensor] = {}
    batches = partial(_totals, rows, batch_size=batch_size)
    if trained.architecture in NEXT_TOKEN_ARCHITECTURES:
        totals["nll_next_token"] = batches("next token", partial(_next_token, trained))
    if trained.architecture == "llama":
        totals["nll_left_to_right"] = totals["nll_next_token"]
    else:
        is_diffusion = trained.architecture == "masked_diffusion"
        few = rows[:num_ordered_documents] if is_diffusion else rows

        def ordered(title: str, make_order: MakeOrder, orders: int = 1) -> torch.Tensor:
            score = partial(_in_orders, trained, make_order=make_order, orders=orders, seed=seed)
            return _totals(few, title, score, batch_size=batch_size)

        totals["nll_left_to_right"] = ordered("left to right", lambda mask, _: GroupOrder.left_to_right(mask))
        totals["nll_right_to_left"] = ordered("right to left", lambda mask, _: GroupOrder.right_to_left(mask))
        if is_diffusion:
            totals["nll_scattered_1"] = batches("bound", partial(_bound, trained, num_samples=num_samples, seed=seed))
        else:
            totals["nll_scattered_1"] = ordered("scattered", partial(_scattered, group_size=1), orders)
        if trained.architecture != "decoupled_rope":
            title = f"scattered, groups of {group_size}"
            totals[f"nll_scattered_{group_size}"] = ordered(title, partial(_scattered, group_size=group_size), orders)

    # 2. Nats per token.
    result: dict[str, Any] = {}
    for ending, count in (("", num_documents), ("_few", num_ordered_documents)):
        tokens = sum(len(row) - 1 for row in rows[:count])
        result |= {f"loss_documents{ending}": count, f"loss_tokens{ending}": tokens}
        of_enough = {name: nats for name, nats in totals.items() if len(nats) >= count}
        result |= {name + ending: -nats[:count].sum().item() / tokens for name, nats in of_enough.items()}
    return result


def _read_rows(trained: Trained, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens, BOS included, of the first `count` held-out documents."""
    if len(trained.documents) < count:
        raise ValueError(f"num_documents={count}: expected at most the {len(trained.documents)} held-out documents")
    bos, documents = encode_prompt(trained.tokenizer, ""), trained.documents[:count]
    rows = [(bos + ids)[:length] for ids in encode_documents(documents, trained.tokenizer)]
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"held-out document {number} is empty: expected at least one token to score")
    return rows


def _totals(rows: Sequence[list[int]], title: str, score: ScoreBatch, *, batch_size: int) -> torch.Tensor:
    """(rows,) log-likelihood of each row, nats in double."""
    starts = tqdm(range(0, len(rows), batch_size), desc=title, leave=False)
    return torch.cat([score(*pad_rows(rows[start : start + batch_size]), start) for start in starts])


def _scattered(mask: torch.Tensor, generators: Sequence[torch.Generator], *, group_size: int) -> GroupOrder:
    return GroupOrder.scattered(mask, group_size=group_size, generator=generators)


def _in_orders(
    trained: Trained,
    ids: torch.Tensor,
    mask: torch.Tensor,
    start: int,
    *,
    make_order: MakeOrder,
    orders: int,
    seed: int,
) -> torch.Tensor:
    """(rows,) log-likelihood of each row in nats, the mean over its orders."""
    total = torch.zeros(len(ids), dtype=torch.float64)
    for number in range(orders):
        generators = [row_generator(seed, index, number) for index in range(start, start + len(ids))]
        inputs = (one.to(trained.model.device) for one in (ids, make_order(mask, generators).group_ids, mask))
        total += trained.model.log_likelihood(*inputs).double().sum(dim=1).cpu()
    return total / orders


def _next_token(trained: Trained, ids: torch.Tensor, mask: torch.Tensor, start: int) -> torch.Tensor:
    scored = mask.bool()
    scored[:, 0] = False
    return next_token_scores(trained.model, ids, mask, scored)[0].double().sum(dim=1)


def _bound(
    trained: Trained, ids: torch.Tensor, mask: torch.Tensor, start: int, *, num_samples: int, seed: int
) -> torch.Tensor:
    """(rows,) log-likelihood bound of each row in nats, an estimate of the mean over all orders."""
    inputs = (tensor.to(trained.model.device) for tensor in (ids, mask))
    return trained.model.log_likelihood_bound(*inputs, num_samples=num_samples, seed=seed).double().cpu()
