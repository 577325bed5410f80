"""Chooses the tokens of a pass in groups, as `generate_any_order` does, with the same noise for the same seed."""

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from a3_hf.models.a3_llama.generation_decoder import CRITERION, SAMPLE
from a3_hf.models.a3_llama.generation_processors import WARPERS, make_warpers, warp
from a3_hf.models.a3_llama.generation_sampling import (
    choose_tokens,
    commit_scores,
    slots_to_commit,
    uniform_noise,
)
from a3_hf.models.a3_llama.orders import seed_of

from .requests import Sampling


class Wanted(NamedTuple):
    """A row of logits whose token is to be chosen."""

    req_id: str
    logit: int  # row of the logits
    column: int
    step: int


class GroupSampler:
    """Stands in for vLLM's sampler.

    Args:
        state: the `GroupState` whose passes it ends.
        sampler: vLLM's, whose per-request states its runner reads.
    """

    penalties_state = SimpleNamespace(output_bin_counts=None)  # none are counted
    compute_nans = False

    def __init__(self, state, sampler):
        self.state, self.sampling_states = state, sampler.sampling_states
        self.log_probs: dict[
            str, dict[int, tuple[torch.Tensor, ...]]
        ] = {}  # of a request's columns, until it is reported

    def add_request(self, req_idx: int, sampling_params) -> None:
        """Called by vLLM's runner."""
        self.sampling_states.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """Called by vLLM's runner."""
        self.sampling_states.apply_staged_writes()

    def __call__(self, logits: torch.Tensor, input_batch: InputBatch) -> SamplerOutput:
        state, batch = self.state, input_batch
        state.planned(batch)
        self._forget()
        wanted, of_request = [], {}
        for number, req_id in enumerate(batch.req_ids[: batch.num_reqs]):
            if req_id in state.passes:
                first = int(batch.cu_num_logits_np[number])
                own = [Wanted(req_id, first + row, column, step) for row, column, step in state.passes[req_id].wanted]
                of_request[req_id] = range(len(wanted), len(wanted) + len(own))
                wanted += own
        tokens, kept = self._choose(logits, wanted)
        tokens = [
            state.requests[one.req_id].forced.get(one.column, token) for one, token in zip(wanted, tokens, strict=True)
        ]
        self._remember(logits, wanted, tokens)
        reported = []
        for req_id in batch.req_ids[: batch.num_reqs]:
            columns, progress = [], state.requests.get(req_id)
            if req_id in state.passes:
                own = of_request[req_id]
                columns = progress.take(state.passes[req_id], [tokens[row] for row in own], [kept[row] for row in own])
            reported.append([(column, int(progress.token_of[column])) for column in columns])
        return self._output(batch, reported, logits.device)

    def _choose(self, logits: torch.Tensor, wanted: Sequence[Wanted]) -> tuple[list[int], list[bool]]:
        """Returns the tokens of the wanted rows, and with a dynamic order whether they stay."""
        if not wanted:
            return [], []
        device, requests = logits.device, self.state.requests
        scores = self._masked(logits[torch.tensor([one.logit for one in wanted], device=device)], wanted)
        tokens = torch.empty(len(wanted), dtype=torch.long, device=device)
        ways = defaultdict(list)
        for row, one in enumerate(wanted):
            sampling = requests[one.req_id].blanks.sampling
            ways[_way(sampling)].append(row)
        for way, rows in ways.items():
            index = torch.tensor(rows, device=device)
            own = warp(make_warpers(way), scores[index][None])[0]
            noise = None if way is None else self._noise([wanted[row] for row in rows], SAMPLE, device)
            tokens[index] = choose_tokens(own, noise)
        kept = [True] * len(wanted)
        by_request = defaultdict(list)
        for row, one in enumerate(wanted):
            if requests[one.req_id].blanks.dynamic is not None:
                by_request[one.req_id].append(row)
        for req_id, rows in by_request.items():
            stays = self._select(req_id, scores[torch.tensor(rows, device=device)], [wanted[row] for row in rows])
            for row, one in zip(rows, stays, strict=True):
                kept[row] = one
        return tokens.tolist(), kept

    def _select(self, req_id: str, scores: torch.Tensor, wanted: Sequence[Wanted]) -> list[bool]:
        """Returns which slots of a dynamic order stay, as `Decoder.select`."""
        how, scores = self.state.requests[req_id].blanks.dynamic, scores[None]
        criterion = how.criterion or ("confidence" if how.entropy_budget is None else "entropy")
        noise = self._noise(wanted, CRITERION, scores.device)[None] if criterion == "random" else None
        chosen = slots_to_commit(
            commit_scores(scores, criterion, noise),
            torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device),
            tokens_per_step=how.tokens_per_step or 1,
            confidence=None if how.threshold is None else commit_scores(scores, "confidence").exp(),
            threshold=how.threshold,
            entropy=None if how.entropy_budget is None else -commit_scores(scores, "entropy"),
            entropy_budget=how.entropy_budget,
        )
        return chosen[0].tolist()

    def _masked(self, scores: torch.Tensor, wanted: Sequence[Wanted]) -> torch.Tensor:
        """Returns scores (N, V) without the tokens that a blank may not hold."""
        text, requests = self.state.text, self.state.requests
        if text is None:
            return scores
        texts = [row for row, one in enumerate(wanted) if requests[one.req_id].blanks.is_text]
        spaced = [row for row, one in enumerate(wanted) if one.column in requests[one.req_id].spaced_columns]
        if texts:
            scores = scores.clone()
            scores[torch.tensor(texts, device=scores.device)[:, None], text.special] = -torch.inf
        if spaced:
            rows = torch.tensor(spaced, device=scores.device)
            scores[rows] = scores[rows].masked_fill(~text.begins, -torch.inf)
        return scores

    def _noise(self, wanted: Sequence[Wanted], purpose: int, device: torch.device) -> torch.Tensor:
        """Returns (N,) uniform numbers, as `SlotNoise.uniform` gives them."""
        seeds, places, steps = [], [], []
        for one in wanted:
            progress = self.state.requests[one.req_id]
            seed = progress.blanks.sampling.seed
            # every rank of tensor parallelism draws for itself, and must draw the same
            seeds.append(seed_of(one.req_id) if seed is None else seed)
            places.append([progress.columns.index(one.column) + 1])
            steps.append([one.step])
        as_tensor = [torch.tensor(each, dtype=torch.long, device=device) for each in (seeds, places, steps)]
        return uniform_noise(*as_tensor, purpose)[:, 0]

    def _remember(self, logits: torch.Tensor, wanted: Sequence[Wanted], tokens: Sequence[int]) -> None:
        """Keeps the log-probabilities of chosen tokens for requests that want them."""
        numbers = self.state.num_logprobs
        rows = [row for row, one in enumerate(wanted) if one.req_id in numbers]
        if not rows:
            return
        index = torch.tensor([wanted[row].logit for row in rows], device=logits.device)
        chosen = torch.tensor([tokens[row] for row in rows], device=logits.device)
        most = max(max(numbers[wanted[row].req_id], 0) for row in rows)
        found = compute_topk_scores(logits[index], most, chosen)
        for number, row in enumerate(rows):
            own = self.log_probs.setdefault(wanted[row].req_id, {})
            own[wanted[row].column] = tuple(each[number] for each in found[:3])

    def _output(self, batch: InputBatch, reported, device: torch.device) -> SamplerOutput:
        width = self.state.canvas_length
        sampled = torch.zeros(batch.num_reqs, width, dtype=torch.int32)
        for number, tokens in enumerate(reported):
            sampled[number, : len(tokens)] = torch.tensor([token for _, token in tokens], dtype=torch.int32)
        counts = [len(tokens) for tokens in reported]
        drafts = batch.num_draft_tokens_per_req
        rows = [0] * len(counts) if drafts is None else drafts[: batch.num_reqs].tolist()
        rejected = [max(own - count, 0) for own, count in zip(rows, counts, strict=True)]
        return SamplerOutput(
            sampled_token_ids=sampled.to(device),
            logprobs_tensors=self._log_probs(batch, reported),
            num_nans=None,
            num_sampled=torch.tensor(counts, dtype=torch.int32, device=device),
            num_rejected=torch.tensor(rejected, dtype=torch.int32, device=device),
        )

    def _log_probs(self, batch: InputBatch, reported) -> LogprobsTensors | None:
        rows, bounds = [], [0]
        for req_id, tokens in zip(batch.req_ids, reported, strict=False):
            own = self.log_probs.get(req_id, {})
            rows += [own.pop(column) for column, _ in tokens if column in own]
            bounds.append(len(rows))
        if not rows:
            return None
        most = max(len(ids) for ids, *_ in rows)
        padded = [torch.nn.functional.pad(ids, (0, most - len(ids))) for ids, *_ in rows]
        values = [torch.nn.functional.pad(each, (0, most - len(each)), value=-torch.inf) for _, each, _ in rows]
        return LogprobsTensors(
            torch.stack(padded), torch.stack(values), torch.stack([rank for *_, rank in rows]), bounds
        )

    def _forget(self) -> None:
        """Drops what was kept for requests that are gone."""
        for req_id in [one for one in self.log_probs if one not in self.state.requests]:
            del self.log_probs[req_id]


def _way(sampling: Sampling) -> tuple[float | None, ...] | None:
    """Returns the sampling processors' settings, in the order of `WARPERS`; None: greedy."""
    if sampling.temperature == 0:
        return None
    return tuple(getattr(sampling, name, None) for name in WARPERS)
