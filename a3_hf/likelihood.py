"""Exact log-likelihoods under any order, in one pass."""

import torch

from .masks import sees_something

SLOTS_PER_CHUNK = 1024  # rows of logits held at once, so that a large vocabulary doesn't take B × S × V


class A3LikelihoodMixin:
    """`log_likelihood` for a model with an A3 body `self.model` and a head `self.lm_head`."""

    @torch.no_grad()
    def log_likelihood(
        self,
        input_ids: torch.LongTensor,
        group_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """Log-probabilities log p(x_i | x of all lower groups), exact for that factorisation, in one pass (paper §1).

        Args:
            input_ids: (B, S) tokens.
            group_ids: (B, S) integers, lower = earlier. Tokens of one group are independent given the earlier ones.
            attention_mask: (B, S), 0 at padding.

        Returns:
            (B, S) natural logarithms in fp32; 0 where nothing is scored: padding, and each row's lowest group, which sees
            nothing.

        Raises:
            ValueError: shapes that don't match or group ids that are not integers.
        """
        hidden_states = self.model(
            input_ids,
            attention_mask=attention_mask,
            group_ids=group_ids,
            use_cache=False,
            content_hidden_state=False,
        ).last_hidden_state
        chunks = zip(
            hidden_states.flatten(0, 1).split(SLOTS_PER_CHUNK), input_ids.flatten().split(SLOTS_PER_CHUNK), strict=True
        )
        log_probs = torch.cat([token_log_probs(self.lm_head(hidden), ids) for hidden, ids in chunks])
        scored = sees_something(group_ids, group_ids, attention_mask, num_cached=0)
        if attention_mask is not None:
            scored = scored & attention_mask.to(torch.bool)
        return log_probs.view(input_ids.shape).masked_fill(~scored, 0.0)


def token_log_probs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Log-probability of `token_ids` (…) under `logits` (…, V), in fp32."""
    logits = logits.float()
    return logits.gather(-1, token_ids[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)
