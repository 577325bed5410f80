"""Likelihoods of masked diffusion: a Monte Carlo bound, the exact bound of short rows, and that of a given order."""

import math
from collections.abc import Iterator

import torch

from a3_hf.models.a3_llama.input_validation import check_integers, check_mask, check_token_ids
from a3_hf.models.a3_llama.likelihood import SLOTS_PER_CHUNK, checked_text, token_log_probs
from a3_hf.models.a3_llama.orders import seed_of

from .corruption import check_text, mask_by_count, required_mask_token, spread_counts

TOKENS_PER_PASS = 2**14
EXACT_AT_MOST = 12  # open tokens: 2¹² masks


class DiffusionLikelihoodMixin:
    """Mixin with likelihood methods, for a model with `predicting_states` and `predict`."""

    @torch.no_grad()
    def log_likelihood_bound(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        given_mask: torch.Tensor | None = None,
        *,
        num_samples: int = 128,
        seed: int = 0,
    ) -> torch.FloatTensor:
        """Returns a Monte Carlo lower bound on log p(open tokens | given tokens), by LLaDA's estimator (not in the paper):
        mask l of the L open tokens, l uniform in 1..L, and take L/l times the log-probability of the masked ones. Its
        expectation is `exact_bound`. The l of a row's samples are spread evenly over 1..L, which lowers the variance.

        A row's value depends only on its text and the seed, up to rounding.

        Args:
            input_ids: (B, S) tokens.
            attention_mask: (B, S), 0 at padding.
            given_mask: (B, S), True at given tokens, which must include the first of each row; None: only the first (BOS).
            num_samples: masks per row; each costs one row of a pass.

        Returns:
            (B,) nats in fp32; 0 if a row has no open token.

        Raises:
            ValueError: no samples, shapes that don't match, a first token that is not given, the mask token in the text.
        """
        if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
            raise ValueError(f"num_samples={num_samples!r}: expected a whole number of at least 1")
        input_ids, real, is_open = self._open_tokens(input_ids, attention_mask, given_mask)
        num_open, length = is_open.sum(dim=1), input_ids.shape[1]
        offset, noise = torch.zeros(len(input_ids)), torch.zeros(len(input_ids), num_samples, length)
        for row, number in enumerate(num_open.tolist()):
            text = input_ids[row, real[row]].tolist(), is_open[row, real[row]].tolist()
            generator = torch.Generator().manual_seed(seed_of(seed, text))
            offset[row] = torch.rand((), generator=generator)
            noise[row, :, :number] = torch.rand(num_samples, number, generator=generator)
        counts = spread_counts(num_open, offset.to(num_open.device), num_samples)
        rows = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(num_samples)
        masked, weights = mask_by_count(is_open[rows], counts.view(-1, 1), noise.view(-1, length).to(input_ids.device))
        return self._weighted_sums(input_ids, real, rows, masked, weights[:, 0] / num_samples)

    @torch.no_grad()
    def exact_bound(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        given_mask: torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """Returns the expectation of `log_likelihood_bound`, by summing over all masks of short rows: the mean log-likelihood
        of writing the open tokens one by one, over all orders.

        Args:
            input_ids, attention_mask, given_mask: as in `log_likelihood_bound`; at most `EXACT_AT_MOST` open tokens per row.

        Returns:
            (B,) nats in fp32.

        Raises:
            ValueError: as `log_likelihood_bound`; a row with too many open tokens.
        """
        input_ids, real, is_open = self._open_tokens(input_ids, attention_mask, given_mask)
        rows, masks, weights = [], [], []
        for row, columns in enumerate(is_open):
            columns = columns.nonzero().flatten()
            total = len(columns)
            if total > EXACT_AT_MOST:
                raise ValueError(
                    f"input_ids: row {row} has {total} open tokens, and 2^{total} masks: exact_bound expects at most "
                    f"{EXACT_AT_MOST}. Use log_likelihood_bound."
                )
            subsets = torch.arange(1, 2**total, device=input_ids.device)
            chosen = (subsets[:, None] >> torch.arange(total, device=input_ids.device)) & 1
            mask = torch.zeros(len(subsets), input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
            mask[:, columns] = chosen.bool()
            by_size = [0.0] + [1.0 / (size * math.comb(total, size)) for size in range(1, total + 1)]
            masks.append(mask)
            weights.append(torch.tensor(by_size, dtype=torch.float64, device=input_ids.device)[chosen.sum(dim=1)])
            rows.append(torch.full_like(subsets, row))
        return self._weighted_sums(input_ids, real, torch.cat(rows), torch.cat(masks), torch.cat(weights))

    def log_likelihood(
        self,
        input_ids: torch.LongTensor,
        group_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        *,
        scored_mask: torch.Tensor | None = None,
    ) -> torch.FloatTensor:
        """Returns log-probabilities log p(x_i | x of all lower groups), all other tokens masked: exact for writing the groups
        one after the other. Costs one row of a pass per group that holds a scored token.

        Args:
            input_ids: (B, S) tokens.
            group_ids: (B, S) integers, lower = earlier. Tokens of one group are independent given the earlier ones. The
                first token of a row must be in its lowest group.
            attention_mask: (B, S), 0 at padding.
            scored_mask: (B, S), True at tokens to score; None: everywhere. Fewer groups cost less.

        Returns:
            (B, S) nats in fp32 (fp64 from an fp64 model); 0 where nothing is scored: outside `scored_mask`, at padding, and
            in each row's lowest group.

        Raises:
            ValueError: shapes that don't match, group ids that are not integers, a first token that would be scored, the
                mask token in the text.
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
        real = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask
        last = torch.iinfo(group_ids.dtype).max
        lowest = group_ids.masked_fill(~real, last).amin(dim=1, keepdim=True)
        wanted = real & (group_ids > lowest)
        wanted = wanted if scored_mask is None else wanted & scored_mask
        input_ids, real, wanted = self._open_tokens(input_ids, attention_mask, ~wanted)
        pairs = [(row, group) for row in range(len(real)) for group in group_ids[row, wanted[row]].unique().tolist()]
        dtype = torch.promote_types(self.dtype, torch.float32)
        log_probs = torch.zeros(input_ids.shape, dtype=dtype, device=input_ids.device)
        greedy = torch.zeros_like(real)
        if not pairs:
            return log_probs, greedy
        rows, groups = torch.tensor(pairs, device=input_ids.device).t()
        masked = real[rows] & (group_ids[rows] >= groups[:, None])
        asked = wanted[rows] & (group_ids[rows] == groups[:, None])
        for part, values, is_greedy in self._score_masked(input_ids, real, rows, masked, asked):
            at_rows, columns = rows[part].unsqueeze(1).expand_as(asked[part])[asked[part]], asked[part].nonzero()[:, 1]
            log_probs[at_rows, columns], greedy[at_rows, columns] = values, is_greedy
        return log_probs, greedy

    def _open_tokens(self, input_ids, attention_mask, given_mask) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Checks the arguments, and returns (B, S) ids as int64, True at real tokens, and True at tokens to predict."""
        check_integers("input_ids", input_ids, dimensions=2)
        real, given = (
            None if mask is None else check_mask(name, mask, tuple(input_ids.shape))
            for name, mask in {"attention_mask": attention_mask, "given_mask": given_mask}.items()
        )
        input_ids = check_token_ids("input_ids", input_ids, self.config.vocab_size, where=real)
        real = torch.ones_like(input_ids).bool() if real is None else real
        input_ids = input_ids.masked_fill(~real, 0)
        first = real & (real.long().cumsum(dim=1) == 1)
        is_open = real & ~(first if given is None else given)
        check_text(input_ids, real, required_mask_token(self.config))
        if (is_open & first).any():
            raise ValueError(
                f"input_ids: the first token of row {int((is_open & first).any(dim=1).nonzero()[0])} is open, but nothing "
                "predicts it: expected a given first token (BOS)"
            )
        return input_ids, real, is_open

    def _weighted_sums(self, input_ids, real, rows, masked, weights) -> torch.Tensor:
        """Returns (B,) for each row of `input_ids` the weighted sum, over its masks, of the masked tokens' log-probability.

        Args:
            rows: (N,) the row of each mask.
            masked: (N, S) the masks.
            weights: (N,) the weight of each mask.
        """
        sums = torch.zeros(len(input_ids), dtype=torch.float64, device=input_ids.device)
        for part, log_probs, _ in self._score_masked(input_ids, real, rows, masked, masked):
            number = masked[part].sum(dim=1)
            of_token = torch.repeat_interleave(rows[part], number), torch.repeat_interleave(weights[part], number)
            sums.index_add_(0, of_token[0], log_probs.double() * of_token[1])
        return sums.float()

    def _score_masked(self, input_ids, real, rows, masked, asked) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Runs passes over the rows `rows` (N,) of a text under the masks `masked` (N, S). Yields per pass its slice of N and,
        for the tokens in `asked` (N, S), row by row, log-probabilities (n,) and whether each is the likeliest (n,).
        """
        mask_token_id, rows_per_pass = required_mask_token(self.config), max(TOKENS_PER_PASS // input_ids.shape[1], 1)
        for start in range(0, len(rows), rows_per_pass):
            part = slice(start, start + rows_per_pass)
            text, is_real = input_ids[rows[part]], real[rows[part]]
            states = self.predicting_states(
                text.masked_fill(masked[part], mask_token_id),
                attention_mask=None if is_real.all() else is_real,
                asked=asked[part],
            )
            scores = []
            for state, ids in zip(states.split(SLOTS_PER_CHUNK), text[asked[part]].split(SLOTS_PER_CHUNK), strict=True):
                logits = self.predict(state)
                scores.append((token_log_probs(logits, ids), logits.argmax(dim=-1) == ids))
            log_probs, greedy = (torch.cat(score) for score in zip(*scores, strict=True))
            yield part, log_probs, greedy
