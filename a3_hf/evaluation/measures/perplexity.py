"""Perplexity of texts under several orders and lengths, and the cost of adaptation relative to the base LLaMA."""

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from a3_hf.models.a3_llama.orders import ORDERS, RANDOM_ORDERS, seed_of

from .batching import Track, next_token_scores, order_inputs, pad_rows, silently, span_mask
from .checks import check_length
from .text_windows import SCALE, Window, cut_windows


def order_log_likelihoods(
    model,
    windows: Sequence[Window],
    *,
    order: str,
    group_size: int = 1,
    span_length: int | None = None,
    num_orders: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    track: Track = silently,
) -> torch.Tensor:
    """The exact log-likelihood of each window under each of `num_orders` orders: (windows, num_orders) nats, in double.

    As in lm-eval's model `a3`, a random order is seeded by the seed, the given tokens, the number of scored tokens and the
    number of the order. It must not depend on the scored tokens: only then do the probabilities of all texts sum to 1. It does
    not depend on the batch, and the first n orders are the same whatever `num_orders`.
    """
    rows = [(index, number) for index in range(len(windows)) for number in range(num_orders)]
    rows.sort(key=lambda row: -sum(map(len, windows[row[0]])))
    totals = torch.zeros(len(windows), num_orders, dtype=torch.float64)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for batch in track(batches, f"{order}, groups of {group_size}"):
        members = [windows[index] for index, _ in batch]
        seeds = [
            seed_of(seed, list(window.given), [], len(window.scored), number)
            for window, (_, number) in zip(members, batch, strict=True)
        ]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        settings = {"order": order, "group_size": group_size, "span_length": span_length, "generator": generators}
        log_probs = model.log_likelihood(**order_inputs(*_window_batch(members), model.device, **settings)).cpu()
        index, number = torch.tensor(batch).unbind(dim=1)
        totals[index, number] = log_probs.double().sum(dim=1)
    return totals


def base_log_likelihoods(
    base: LlamaForCausalLM, windows: Sequence[Window], *, batch_size: int = 8, track: Track = silently
) -> torch.Tensor:
    """The log-likelihood of each window under a plain LLaMA, next token by next token: (windows,) nats, in double."""
    order = sorted(range(len(windows)), key=lambda index: -sum(map(len, windows[index])))
    totals = torch.zeros(len(windows), dtype=torch.float64)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in track(batches, "the base"):
        log_probs, _ = next_token_scores(base, *_window_batch([windows[index] for index in batch]))
        totals[torch.tensor(batch)] = log_probs.double().sum(dim=1)
    return totals


def _window_batch(windows: Sequence[Window]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask, and True at scored tokens, each (B, S)."""
    ids, mask = pad_rows([window.given + window.scored for window in windows])
    given, scored = ([len(one) for one in part] for part in zip(*windows, strict=True))
    return ids, mask, span_mask(given, scored, ids.shape[1])


def check_orders(
    orders: Sequence[str], group_sizes: Sequence[int], *, num_orders: int, span_length: int | None
) -> None:
    """Raises ValueError for unknown orders, and for settings that have no effect on any of them."""
    if not orders:
        raise ValueError(f"orders is empty: expected one or more of {', '.join(ORDERS)}")
    for order in orders:
        if order not in ORDERS:
            raise ValueError(f"orders holds {order!r}: expected some of {', '.join(ORDERS)}")
    if not group_sizes or min(group_sizes) < 1:
        raise ValueError(f"group_sizes={list(group_sizes)}: expected one or more whole numbers of at least 1")
    if num_orders < 1 or (num_orders > 1 and not set(orders) & set(RANDOM_ORDERS)):
        raise ValueError(
            f"num_orders={num_orders} with orders={','.join(orders)}: expected at least 1, and more with 'random' or 'spans'"
        )
    if ("spans" in orders) != (span_length is not None):
        raise ValueError(
            f"span_length={span_length} with orders={','.join(orders)}: expected a length with 'spans', and none without"
        )
    if span_length is not None and not 1 <= max(group_sizes) <= span_length:
        raise ValueError(
            f"span_length={span_length} with group_sizes={list(group_sizes)}: expected at least {max(group_sizes)}, because a "
            "group lies within its span"
        )


def perplexity_rows(
    model,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    orders: Sequence[str] = ("left_to_right", "right_to_left", "random"),
    group_sizes: Sequence[int] = (1,),
    num_orders: int = 1,
    span_length: int | None = None,
    max_lengths: Sequence[int] | None = None,
    base: LlamaForCausalLM | None = None,
    seed: int = 0,
    batch_size: int = 8,
    track: Track = silently,
) -> list[dict[str, Any]]:
    """Measures rolling perplexity for each length, order and group size.

    Args:
        num_orders: number of orders of each random kind; the other kinds have one.
        max_lengths: lengths of windows, in tokens; None: the model's context.
        base: the LLaMA that the model was adapted from. It is measured on the same windows, left to right.

    Returns:
        A dict per measurement: `max_length`, `model` ("a3" or "base"), `order`, `group_size`, `num_orders`, `documents`,
        `windows`, `tokens` (scored), `bytes` (of the documents in UTF-8); then

        - `log_likelihood` (nats), `nats_per_token`, `perplexity` (per token), `bits_per_byte`. Over several orders each
          window's likelihood is the mean of the orders' likelihoods, which is a likelihood itself (not in the paper);
        - `log_likelihood_mean_of_orders` and `nats_per_token_mean_of_orders`: the mean of the orders' log-likelihoods,
          never above the former (Jensen);
        - `adaptation_cost`, with a base, left to right in groups of one: nats per token above the base's;
        - `passes` (forward passes, each counted once per row), `seconds`, `tokens_per_second` (scored, each once per order).

    Raises:
        ValueError: an unknown order, a setting that has no effect on any order, a length above the model's or the base's
            context, a base with another vocabulary or without the row to compare it with, no document, an empty one, a
            tokenizer without BOS.
    """
    check_orders(orders, group_sizes, num_orders=num_orders, span_length=span_length)
    max_lengths = [model.config.max_position_embeddings] if max_lengths is None else max_lengths
    if not max_lengths:
        raise ValueError("max_length is empty: expected at least one length")
    for length in max_lengths:
        check_length("max_length", length, model.config, advice=SCALE)
    if base is not None:
        check_base(base, model, orders, group_sizes, max_lengths)
    num_bytes = sum(len(document.encode()) for document in documents)
    rows = []
    for length in max_lengths:
        windows = cut_windows(tokenizer, documents, length)
        about = {"max_length": length, "documents": len(documents), "windows": len(windows)}
        about |= {"tokens": sum(len(window.scored) for window in windows), "bytes": num_bytes}
        base_row = None
        if base is not None:
            start = perf_counter()
            totals = base_log_likelihoods(base, windows, batch_size=batch_size, track=track)[:, None]
            base_row = {"model": "base", "order": "left_to_right", "group_size": 1, "num_orders": 1, **about}
            base_row |= _figures(totals, about["tokens"], num_bytes, perf_counter() - start)
            rows.append(base_row)
        for order in orders:
            for group_size in group_sizes:
                start = perf_counter()
                totals = order_log_likelihoods(
                    model,
                    windows,
                    order=order,
                    group_size=group_size,
                    span_length=span_length if order == "spans" else None,
                    num_orders=num_orders if order in RANDOM_ORDERS else 1,
                    seed=seed,
                    batch_size=batch_size,
                    track=track,
                )
                row = {"model": "a3", "order": order, "group_size": group_size, "num_orders": totals.shape[1], **about}
                row |= _figures(totals, about["tokens"], num_bytes, perf_counter() - start)
                if base_row is not None and order == "left_to_right" and group_size == 1:
                    row["adaptation_cost"] = row["nats_per_token"] - base_row["nats_per_token"]
                rows.append(row)
    return rows


def check_base(base: LlamaForCausalLM, model, orders: Sequence[str], group_sizes: Sequence[int], max_lengths) -> None:
    """Raises ValueError for a base that can't be compared with the model."""
    if "left_to_right" not in orders or 1 not in group_sizes:
        raise ValueError(
            f"orders={','.join(orders)}, group_sizes={list(group_sizes)}: expected left_to_right and 1 among them, with which "
            "base is compared"
        )
    if base.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"base has a vocabulary of {base.config.vocab_size} tokens and the model one of {model.config.vocab_size}: "
            "expected the LLaMA that the model was adapted from"
        )
    for length in max_lengths:
        check_length("max_length", length, base.config, advice=SCALE)


def _figures(totals: torch.Tensor, tokens: int, num_bytes: int, seconds: float) -> dict[str, Any]:
    """A row's figures, from the log-likelihoods (windows, orders)."""
    num_orders = totals.shape[1]
    total = float((totals.logsumexp(dim=1) - math.log(num_orders)).sum())
    mean_of_orders = float(totals.mean(dim=1).sum())
    return {
        "log_likelihood": total,
        "nats_per_token": -total / tokens,
        "perplexity": math.exp(-total / tokens),
        "bits_per_byte": -total / math.log(2) / num_bytes,
        "log_likelihood_mean_of_orders": mean_of_orders,
        "nats_per_token_mean_of_orders": -mean_of_orders / tokens,
        "adaptation_cost": None,
        "passes": totals.numel(),
        "seconds": seconds,
        "tokens_per_second": tokens * num_orders / seconds,
    }
