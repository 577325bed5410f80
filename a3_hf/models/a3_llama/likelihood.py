"""Exact log-likelihoods in any order, in one pass."""

import torch

from .attention_masks import groups_of, sees_something
from .generation_sampling import at_least_float32
from .input_validation import check_integers, check_mask, check_token_ids

SLOTS_PER_CHUNK = 1024  # rows of logits held at once, to avoid B × S × V numbers


class A3LikelihoodMixin:
    """Mixin with `log_likelihood`, for a model with an A3 body `self.model` and a head `self.lm_head`."""

    def log_likelihood(
        self,
        input_ids: torch.LongTensor,
        group_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scored_mask: torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """Returns log-probabilities log p(x_i | x of all lower groups), exact for that factorisation, in one pass (paper §1).

        Args:
            input_ids: (B, S) tokens.
            group_ids: (B, S) integers, lower = earlier. Tokens of one group are independent given the earlier ones.
            attention_mask: (B, S), 0 at padding.
            scored_mask: (B, S), True at tokens to score; None: everywhere. Fewer cost less.

        Returns:
            (B, S) nats in fp32 (fp64 from an fp64 model); 0 where nothing is scored: outside `scored_mask`, at padding, and
            in each row's lowest group, which sees nothing.

        Raises:
            ValueError: shapes that don't match, ids that are not integers or not in the vocabulary, no token, or masks with
                values other than 0 and 1.
        """
        return self.log_likelihood_and_greedy(input_ids, group_ids, attention_mask, scored_mask=scored_mask)[0]

    @torch.no_grad()
    def log_likelihood_and_greedy(
        self,
        input_ids: torch.LongTensor,
        group_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scored_mask: torch.Tensor | None = None,
    ) -> tuple[torch.FloatTensor, torch.BoolTensor]:
        """Returns `log_likelihood`, and (B, S) True where a scored token is the likeliest at its position."""
        input_ids, group_ids, attention_mask, scored_mask = checked_text(
            input_ids, group_ids, attention_mask, scored_mask, vocab_size=self.config.vocab_size
        )
        columns, targets = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids), {}
        if scored_mask is not None:
            # The columns (B, Q) of the scored tokens; rows with fewer of them are padded with other columns.
            most = max(int(scored_mask.sum(dim=1).max()), 1)
            columns = scored_mask.long().argsort(dim=1, descending=True, stable=True)[:, :most]
            places = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            places = (places.cumsum(dim=1) - 1).clamp_min(0)
            targets = {
                "target_position_ids": places.gather(1, columns),
                "target_group_ids": group_ids.gather(1, columns),
            }
        hidden_states = self.model(
            input_ids,
            attention_mask=attention_mask,
            group_ids=group_ids,
            use_cache=False,
            **targets,
        ).last_hidden_state
        wanted = input_ids.gather(1, columns)
        chunks = zip(
            hidden_states.flatten(0, 1).split(SLOTS_PER_CHUNK), wanted.flatten().split(SLOTS_PER_CHUNK), strict=True
        )
        parts = []
        for hidden, ids in chunks:
            logits = self.lm_head(hidden)
            parts.append((token_log_probs(logits, ids), logits.argmax(dim=-1) == ids))
        scored = sees_something(*groups_of(group_ids, group_ids), attention_mask, num_cached=0)
        for mask in (scored_mask, attention_mask):
            scored = scored if mask is None else scored & mask.to(torch.bool)
        log_probs, greedy = (torch.cat(part).view(columns.shape) for part in zip(*parts, strict=True))
        whole = torch.zeros(input_ids.shape, dtype=log_probs.dtype, device=input_ids.device)
        log_probs = whole.scatter(1, columns, log_probs).masked_fill(~scored, 0.0)
        return log_probs, whole.bool().scatter(1, columns, greedy) & scored


def token_log_probs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Returns (…) the log-probabilities of `token_ids` (…) under `logits` (…, V), in fp32 (fp64 from fp64)."""
    logits = at_least_float32(logits)
    return logits.gather(-1, token_ids[..., None]).squeeze(-1) - logits.logsumexp(dim=-1)


def likeliest_tokens(logits: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (…, `number`) the highest log-probabilities under `logits` (…, V), and their token ids."""
    values, token_ids = at_least_float32(logits).topk(number, dim=-1)
    return values - at_least_float32(logits).logsumexp(dim=-1, keepdim=True), token_ids


def checked_text(
    input_ids: torch.Tensor,
    group_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scored_mask: torch.Tensor | None,
    *,
    vocab_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Checks and returns the arguments of `log_likelihood`, each (B, S): ids as int64, 0 at padding, and masks as booleans.

    Raises:
        ValueError: shapes that don't match, or invalid values.
    """
    check_integers("input_ids", input_ids, dimensions=2)
    check_integers("group_ids", group_ids)
    shape = tuple(input_ids.shape)
    if tuple(group_ids.shape) != shape:
        raise ValueError(f"group_ids has shape {tuple(group_ids.shape)}: expected the shape of input_ids, {shape}")
    masks = {"attention_mask": attention_mask, "scored_mask": scored_mask}
    masks = {name: None if mask is None else check_mask(name, mask, shape) for name, mask in masks.items()}
    real = masks["attention_mask"]
    input_ids = check_token_ids("input_ids", input_ids, vocab_size, where=real)
    if real is not None:
        input_ids = input_ids.masked_fill(~real, 0)
    return input_ids, group_ids.long(), real, masks["scored_mask"]
