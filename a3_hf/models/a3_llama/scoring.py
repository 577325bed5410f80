"""Log-probabilities of each token of a text, in one order or several."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .infilling_templates import encode_prompt
from .modeling_outputs import BriefOutput
from .orders import ORDERS, RANDOM_ORDERS, GroupOrder

MOST_SEED = 2**43  # keeps every order's seed within a generator's 64 bits
MOST_POSITIONS = 2**20  # tokens of one pass over all orders


@dataclass(repr=False)
class A3ScoreOutput(BriefOutput):
    """Output of `score`; S includes BOS.

    Attributes:
        token_ids: (S,), BOS first.
        group_ids: (orders, S), lower = earlier.
        log_probs: (orders, S) nats, exact for each order; 0 at BOS.
        mean: (S,) mean of `log_probs` over the orders.
        spread: (S,) standard deviation of `log_probs` over the orders; 0 for one order.
        totals: (orders,) log-likelihood of the text, in nats.
    """

    token_ids: torch.LongTensor | None = None
    group_ids: torch.LongTensor | None = None
    log_probs: torch.FloatTensor | None = None
    mean: torch.FloatTensor | None = None
    spread: torch.FloatTensor | None = None
    totals: torch.FloatTensor | None = None


class A3ScoringMixin:
    """Mixin with `score`, for a model with `log_likelihood`."""

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
        """Returns the exact log-likelihood of a text in one or several orders, computed in one pass.

        Args:
            order: `"left_to_right"`, `"right_to_left"`, `"random"` or `"spans"` (needs `span_length`).
            group_size: tokens per group.
            num_orders: number of orders to draw; above 1 for random orders only. All are scored in one pass of at most 2^20
                tokens.
            seed: seed of random orders; the first n orders don't depend on `num_orders`.

        Raises:
            ValueError: an empty text, an unknown order, a text longer than the model's context, several orders that are not
                random, a tokenizer without BOS, log-probabilities that are NaN.
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
                f"num_orders={num_orders} with order={order!r}: expected 1, or more with order='random' or 'spans'"
            )
        if abs(seed) >= MOST_SEED:
            raise ValueError(f"seed={seed}: expected an integer between -{MOST_SEED} and {MOST_SEED}")
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
                f"num_orders={num_orders}: expected at most {MOST_POSITIONS // ids.shape[1]} for {ids.shape[1]} tokens"
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
            raise ValueError("the model's log-probabilities are NaN. Check the checkpoint's weights and the dtype.")
        return A3ScoreOutput(
            token_ids=ids[0],
            group_ids=group_ids,
            log_probs=log_probs,
            mean=log_probs.mean(dim=0),
            spread=log_probs.std(dim=0, correction=0),
            totals=log_probs.sum(dim=1),
        )
