"""Log-probabilities of a text, token by token, under one order or several."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .infilling_templates import encode_prompt
from .modeling_outputs import BriefOutput
from .orders import ORDERS, RANDOM_ORDERS, GroupOrder

MOST_SEED = 2**43  # a generator takes 64 bits, and each order has a seed of its own
MOST_POSITIONS = 2**20  # of one pass over all orders


@dataclass(repr=False)
class A3ScoreOutput(BriefOutput):
    """What `score` returns; S counts BOS.

    Attributes:
        token_ids: (S,), BOS first.
        group_ids: (orders, S).
        log_probs: (orders, S) nats, each order's exact factorisation; 0 at BOS.
        mean: (S,) of `log_probs` over the orders.
        spread: (S,) their standard deviation; 0 for one order.
        totals: (orders,) log-likelihood of the text, in nats.
    """

    token_ids: torch.LongTensor | None = None
    group_ids: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None
    mean: torch.FloatTensor | None = None
    spread: torch.FloatTensor | None = None
    totals: torch.FloatTensor | None = None


class A3ScoringMixin:
    """`score` for a model with `log_likelihood`."""

    def score(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        order: str = "left_to_right",
        group_size: int = 1,
        span_length: int | None = None,
        num_orders: int = 1,
        seed: int = 0,
    ) -> A3ScoreOutput:
        """The exact log-likelihood of a text, all orders in one pass.

        Args:
            order: `"left_to_right"`, `"right_to_left"`, `"random"` or `"spans"` (needs `span_length`).
            group_size: tokens predicted together.
            num_orders: how many orders to draw; more than one with a random order. They are scored in one pass, of 2^20
                tokens in all at most.
            seed: of the random orders; the first n orders of a seed are the same, whatever `num_orders`.

        Raises:
            ValueError: an empty text or none, an unknown order, a text longer than the model's context, several orders where
                nothing is drawn, a tokenizer without BOS, a model whose log-probabilities are NaN.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}: expected a string")
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: expected one of {', '.join(ORDERS)}")
        for name, value in {"group_size": group_size, "num_orders": num_orders, "seed": seed}.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: expected a whole number")
        if num_orders < 1 or (num_orders > 1 and order not in RANDOM_ORDERS):
            raise ValueError(
                f"num_orders={num_orders} with order={order!r}: expected more than 1 with 'random' and 'spans'"
            )
        if abs(seed) >= MOST_SEED:
            raise ValueError(f"seed={seed}: it takes an integer between -{MOST_SEED} and {MOST_SEED}")
        ids = torch.tensor([encode_prompt(tokenizer, text)])
        context = self.config.max_position_embeddings
        if ids.shape[1] == 1:
            raise ValueError("text is empty: expected at least one token to score")
        if ids.shape[1] > context:
            raise ValueError(
                f"text has {ids.shape[1]} tokens, {ids.shape[1] - context} more than the model's context "
                f"(max_position_embeddings={context})"
            )
        if num_orders * ids.shape[1] > MOST_POSITIONS:
            raise ValueError(
                f"num_orders={num_orders}: orders of a text of {ids.shape[1]} tokens are scored in one pass: expected at most "
                f"{MOST_POSITIONS // ids.shape[1]}"
            )
        ids = ids.expand(num_orders, -1)
        group_ids = GroupOrder.infilling(
            torch.arange(ids.shape[1]).expand_as(ids) > 0,  # all but BOS
            order=order,
            group_size=group_size,
            span_length=span_length,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + number) for number in range(num_orders)],
        ).group_ids
        log_probs = self.log_likelihood(ids.to(self.device), group_ids.to(self.device)).cpu()
        if log_probs.isnan().any():
            raise ValueError(
                "the model's log-probabilities are NaN: its weights are no model's; load another checkpoint"
            )
        return A3ScoreOutput(
            token_ids=ids[0],
            group_ids=group_ids,
            log_probs=log_probs,
            mean=log_probs.mean(dim=0),
            spread=log_probs.std(dim=0, correction=0),
            totals=log_probs.sum(dim=1),
        )
