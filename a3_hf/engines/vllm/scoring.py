"""Exact log-probabilities of given text in vLLM, from left to right."""

from collections.abc import Sequence
from typing import Any

import torch

from a3_hf.serving.engine import Ticket
from a3_hf.serving.texts import Commit

from .engine_jobs import EngineJobs, final_params, log_prob_of
from .requests import Blanks, Sampling


class Scorer:
    """Scores the last tokens of texts, whose beginning vLLM caches. It stands for the model in `choose_lengths`.

    Args:
        canvas_length: None: of an engine that writes one token a step, whose prompts vLLM scores itself. Where groups are
            written it can't, and the tokens are written by force.
    """

    def __init__(self, engine: EngineJobs, ticket: Ticket, adapter: Any, canvas_length: int | None):
        self.engine, self.ticket, self.adapter, self.canvas_length = engine, ticket, adapter, canvas_length

    def log_likelihood(self, token_ids: torch.Tensor, *others: torch.Tensor, scored_mask: torch.Tensor) -> torch.Tensor:
        """As the model's, for groups from left to right; `others` ends with the attention mask."""
        rows = []
        for tokens, is_real, is_scored in zip(token_ids, others[-1].bool(), scored_mask, strict=True):
            rows.append((tokens[is_real].tolist(), int(is_scored[is_real].long().argmax())))
        values = torch.zeros(token_ids.shape, dtype=torch.float64)
        for row, found in enumerate(self.commits(rows, 0)):
            values[row][scored_mask[row]] = torch.tensor([one.log_prob for one in found], dtype=torch.float64)
        return values

    def commits(self, rows: Sequence[tuple[list[int], int]], num_top: int) -> list[list[Commit]]:
        """Returns the tokens of each row from the given column on, at least 1, with `num_top` likeliest ones."""
        if self.canvas_length is not None:
            return self._forced(rows, num_top)
        if num_top:
            return self._of_prompts(rows, num_top)
        found = self._of_tokens(rows, skips_cache=False)
        # a prefix that is cached beyond the first scored token tells nothing of it
        missing = [number for number, commits in enumerate(found) if commits is None]
        for number, commits in zip(
            missing, self._of_tokens([rows[one] for one in missing], skips_cache=True), strict=True
        ):
            found[number] = commits
        return found

    def _of_tokens(self, rows: Sequence[tuple[list[int], int]], *, skips_cache: bool) -> list[list[Commit] | None]:
        asked = []
        for tokens, first in rows:
            wanted = [[token] for token in tokens[first:]]
            settings = {"prompt_logprob_token_ids": wanted, "prompt_logprob_start": first - 1}
            asked.append((tokens, final_params(max_tokens=1, skip_reading_prefix_cache=skips_cache, **settings)))
        found = []
        for (tokens, first), output in zip(rows, self._ask(asked), strict=True):
            values = output.prompt_token_id_logprobs
            pairs = () if values is None else zip(tokens[first:], values, strict=True)
            commits = [Commit(first + n, token, float(row[0]), -1) for n, (token, row) in enumerate(pairs)]
            found.append(None if values is None else commits)
        return found

    def _of_prompts(self, rows: Sequence[tuple[list[int], int]], num_top: int) -> list[list[Commit]]:
        asked = [(tokens, final_params(max_tokens=1, prompt_logprobs=num_top)) for tokens, _ in rows]
        found = []
        for (tokens, first), output in zip(rows, self._ask(asked), strict=True):
            commits = []
            for column, (token, of) in enumerate(zip(tokens, output.prompt_logprobs, strict=True)):
                if column >= first:
                    likely = sorted((one.rank, other, one.logprob) for other, one in of.items() if one.rank <= num_top)
                    top = tuple((other, value) for _, other, value in likely)
                    commits.append(Commit(column, token, of[token].logprob, -1, top))
            found.append(commits)
        return found

    def _forced(self, rows: Sequence[tuple[list[int], int]], num_top: int) -> list[list[Commit]]:
        asked = []
        for tokens, first in rows:
            blanks = Blanks(
                (first, 0),
                (len(tokens) - first,),
                is_text=False,
                drafts=max(self.canvas_length - 1, 1),
                forced=tuple(tokens[first:]),
                sampling=Sampling(),
            )
            extra = {**blanks.extra_args(), "diffusion_canvas_length": blanks.width()}
            settings = {"max_tokens": len(tokens) - first, "ignore_eos": True, "logprobs": num_top}
            asked.append((tokens[:first], final_params(extra_args=extra, **settings)))
        found = []
        for (_, first), output in zip(rows, self._ask(asked), strict=True):
            [completion] = output.outputs
            found.append(
                [
                    Commit(first + place, token, *log_prob_of(completion, place, -1, num_top))
                    for place, token in enumerate(completion.token_ids)
                ]
            )
        return found

    def _ask(self, asked) -> list[Any]:
        return self.engine.ask(asked, self.ticket, self.adapter)
