"""Blanks in groups, on the path that vLLM has for diffusion models: each step has the last group as content, whose keys are
written, and the next group's slots, whose keys are not. It covers `query_embed`, any order, adapters of slots, lossless
speculation and dynamic orders.
"""

from typing import Any

import numpy as np
import torch
from vllm.lora.layers import LoRAMapping
from vllm.v1.worker.gpu.input_batch import InputBatch

from .adapters import Adapter
from .blank_masks import TextTokens
from .group_progress import UNKNOWN, Pass, Progress, start_progress
from .group_sampler import GroupSampler
from .planned_rows import PAD_SLOT, PlannedRows, PlannedRowsState
from .requests import Blanks, Sampling

PLAIN_DRAFTS = 4  # of requests without blanks, whose rows are scheduled in any case


class GroupState(PlannedRowsState):
    """The requests of an engine that writes groups. Plain requests continue their prompt, one token a step."""

    mixes_causal = True
    num_new_sampled_tokens_per_step = 0  # what a step writes are its "draft tokens"

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.from_left = getattr(model.config, "slot_start", "left_token") == "left_token"
        self.canvas_length = vllm_config.diffusion_config.canvas_length
        self.text = TextTokens.of(vllm_config, device)
        self.requests: dict[str, Progress] = {}
        self.passes: dict[str, Pass] = {}  # of the batch that was planned last
        self.num_logprobs: dict[str, int] = {}
        self.adapters: dict[str, Adapter] = {}  # of requests
        self.embeds = torch.zeros(self.max_num_tokens, self.inputs_embeds_size, dtype=self.dtype, device=device)

    def get_supported_generation_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[GroupSampler, None]:
        return GroupSampler(self, sampler), None

    def add_request(self, req_index: int, new_req_data) -> None:
        super().add_request(req_index, new_req_data)
        params, prompt = new_req_data.sampling_params, new_req_data.prompt_token_ids
        known = new_req_data.prefill_token_ids or prompt  # with what was written before a preemption
        blanks = Blanks.of(params) or plain_blanks(len(prompt), params, from_left=self.from_left)
        req_id = new_req_data.req_id
        self.requests[req_id] = start_progress(
            blanks,
            prompt,
            known[len(prompt) :],
            num_cached=new_req_data.num_computed_tokens,
            from_left=self.from_left,
        )
        if params is not None and params.logprobs is not None:
            self.num_logprobs[req_id] = params.logprobs
        if new_req_data.lora_request is not None:
            self.adapters[req_id] = Adapter.read(new_req_data.lora_request, self.device, self.dtype)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        for kept in (self.requests, self.passes, self.num_logprobs, self.adapters):
            kept.pop(req_id, None)

    def plan(self, batch: InputBatch) -> list[PlannedRows]:
        self.passes, found = {}, []
        drafts = batch.num_draft_tokens_per_req
        for number, req_id in enumerate(batch.req_ids[: batch.num_reqs]):
            if req_id not in self.requests:
                continue
            first, end = (int(row) for row in batch.query_start_loc_np[number : number + 2])
            asks = drafts is not None and drafts[number] > 0
            planned = self.requests[req_id].next_pass(end - first, asks=asks)
            self.passes[req_id] = planned
            places = np.full(end - first, PAD_SLOT, np.int64)
            places[: len(planned.content)] = planned.first_place + np.arange(len(planned.content))
            found.append(PlannedRows(number, first, planned.positions, places, planned.keys))
        return found

    def prepare_inputs(self, input_batch: InputBatch, req_states) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        planned = self.planned(input_batch)
        embeds = self.embeds[: input_batch.num_tokens_after_padding]
        if planned:
            tokens, starts = input_batch.input_ids.clone(), []
            for one in planned:
                req_id = input_batch.req_ids[one.number]
                of_pass = self.passes[req_id]
                rows = slice(one.first, one.first + len(of_pass.tokens))
                tokens[rows] = self.moved(np.maximum(of_pass.tokens, 0).astype(np.int32))
                unknown = one.first + np.flatnonzero(of_pass.tokens == UNKNOWN)
                if len(unknown):
                    starts.append((req_id, unknown))
            embeds.copy_(self.model.embed_input_ids(tokens))
            for req_id, rows in starts:
                own = self.adapters[req_id].query_embed if req_id in self.adapters else None
                embeds[self.moved(rows)] = (self.model.query_embed if own is None else own).to(embeds.dtype)
        else:
            embeds.copy_(self.model.embed_input_ids(input_batch.input_ids))
        return {**inputs, "inputs_embeds": embeds}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {**inputs, "inputs_embeds": self.embeds[:num_tokens]}

    def prepare_attn(self, input_batch: InputBatch, *args, **kwargs) -> dict[str, Any]:
        metadata = super().prepare_attn(input_batch, *args, **kwargs)
        if any(self.adapters[req_id].slots_only for req_id in input_batch.req_ids if req_id in self.adapters):
            self._adapt_slots_only(input_batch)
        return metadata

    def _adapt_slots_only(self, batch: InputBatch) -> None:
        """Gives the batch's rows their adapters anew: the content of a request whose adapter is of slots has none. vLLM's
        kernels take an adapter for each row; the runner has given all rows of a request its own by now.
        """
        rows = np.zeros(batch.num_tokens, np.int64)
        for one in self.planned(batch):
            req_id = batch.req_ids[one.number]
            if req_id in self.adapters:
                adapter, of_pass = self.adapters[req_id], self.passes[req_id]
                start = one.first + (len(of_pass.content) if adapter.slots_only else 0)
                rows[start : one.first + len(of_pass.tokens)] = adapter.lora_id
        for_head = (0,)  # which no adapter adapts here
        self.model.lora_manager.set_adapter_mapping(LoRAMapping(tuple(rows.tolist()), for_head, is_prefill=False))


def plain_blanks(num_given: int, params, *, from_left: bool) -> Blanks:
    """Returns the blanks of a request that has none: one behind its prompt, with vLLM's own temperature of 1."""
    length = (params.max_tokens if params is not None else None) or 1
    top_k = params.top_k if params is not None and params.top_k > 0 else None
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=params.top_p if params is not None else None, seed=None)
    if from_left:
        return Blanks((num_given, 0), (length,), is_text=False, drafts=PLAIN_DRAFTS, sampling=sampling)
    steps = tuple((column,) for column in range(num_given, num_given + length))
    return Blanks((num_given, 0), (length,), is_text=False, steps=steps, sampling=sampling)
