"""Rows of vLLM's batches that stand, are written and see otherwise than vLLM's scheduler counts. All of it is metadata of
paged attention: the model and its kernels are vLLM's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

PAD_SLOT = -1  # where the keys of a row go that no other row sees


@dataclass(frozen=True)
class PlannedRows:
    """The rows of one request in a pass.

    Attributes:
        number: of the request in the batch.
        first: its first row in the batch.
        positions: (R,) true positions, for RoPE.
        places: (R,) where in the request's cache the keys are written; `PAD_SLOT`: nowhere.
        keys: (R,) how many of the cache's keys each row sees, from the first on, after this pass has written its own.
    """

    number: int
    first: int
    positions: np.ndarray
    places: np.ndarray
    keys: np.ndarray

    def runs(self, *, may_mix: bool) -> list[tuple[int, int, bool]]:
        """Returns the rows as (start, end, is_causal): in a causal run each row sees one key more than the one before it; in
        another, which are there with `may_mix`, all see the same keys.
        """
        kinds = (0, 1) if may_mix else (1,)
        found, start, more = [], 0, np.diff(self.keys)
        while start < len(self.keys):
            kind = int(more[start]) if start < len(more) else 1
            if kind not in kinds:
                end = start + 1
            else:
                others = np.flatnonzero(more[start:] != kind)
                end = (start + int(others[0]) if len(others) else len(more)) + 1
            found.append((start, end, kind != 0 or end == start + 1))
            start = end
        return found


class PlannedRowsState(DefaultModelState):
    """A model state whose subclasses plan the rows of some requests, or of all."""

    mixes_causal = False  # whether rows of a request may all see the same keys

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        # Captured graphs read these at every step.
        self.positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)
        self.block_tables = None
        self._planned: tuple[InputBatch, list[PlannedRows]] | None = None

    def initialize_kv_cache(self, kv_cache_config, block_tables) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self.block_tables = block_tables

    def plan(self, batch: InputBatch) -> list[PlannedRows]:
        """Returns the rows of requests that are not plain. Batches of warm-up hold requests that were never added."""
        raise NotImplementedError

    def planned(self, batch: InputBatch) -> list[PlannedRows]:
        """Returns `plan` of a batch, made once."""
        if self._planned is None or self._planned[0] is not batch:
            self._planned = (batch, self.plan(batch))
        return self._planned[1]

    def prepare_inputs(self, input_batch: InputBatch, req_states) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        positions = self.positions[: input_batch.num_tokens_after_padding]
        positions.copy_(input_batch.positions)
        planned = self.planned(input_batch)
        if planned:
            positions[self.moved(_rows_of(planned))] = self.moved(np.concatenate([one.positions for one in planned]))
        return {**inputs, "positions": positions}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {**super().prepare_dummy_inputs(num_reqs, num_tokens), "positions": self.positions[:num_tokens]}

    def prepare_attn(
        self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
    ) -> dict[str, Any]:
        seq_lens = self.seq_lens[: len(input_batch.seq_lens)]
        seq_lens.copy_(input_batch.seq_lens)
        batch = replace(input_batch, seq_lens=seq_lens)
        planned = self.planned(input_batch)
        if not planned:
            return super().prepare_attn(
                batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
            )
        self._write_where_planned(batch, planned, slot_mappings)
        runs = {one.number: one.runs(may_mix=self.mixes_causal) for one in planned}
        if all(len(found) == 1 and found[0][2] for found in runs.values()):
            numbers = np.array([one.number for one in planned])
            seq_lens[self.moved(numbers)] = self.moved(np.array([one.keys[-1] for one in planned], np.int32))
            return super().prepare_attn(
                batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
            )
        assert cudagraph_mode != CUDAGraphMode.FULL, "full graphs are refused when the model is loaded"
        batch, block_tables, causal = self._as_runs(batch, planned, runs, block_tables)
        if not self.mixes_causal:
            return super().prepare_attn(
                batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config, **kwargs
            )
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=batch.num_reqs,
            num_tokens=batch.num_tokens,
            query_start_loc_gpu=batch.query_start_loc,
            query_start_loc_cpu=torch.from_numpy(batch.query_start_loc_np),
            max_query_len=int(batch.num_scheduled_tokens.max()),
            seq_lens=batch.seq_lens,
            max_seq_len=int(batch.seq_lens_cpu_upper_bound.max()),
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=batch.seq_lens_cpu_upper_bound,
            causal=causal,
        )

    def _write_where_planned(self, batch: InputBatch, planned: Sequence[PlannedRows], slot_mappings) -> None:
        """Sets, in place, where the keys of planned rows go."""
        rows, places = _rows_of(planned), np.concatenate([one.places for one in planned])
        kept = self.moved(rows[places != PAD_SLOT])
        counted = batch.positions.clone()
        counted[kept] = self.moved(places[places != PAD_SLOT])
        self.block_tables.compute_slot_mappings(
            batch.idx_mapping, batch.query_start_loc, counted, num_tokens_padded=slot_mappings.shape[1]
        )
        slot_mappings[:, self.moved(rows[places == PAD_SLOT])] = PAD_SLOT

    def _as_runs(self, batch: InputBatch, planned, runs, block_tables):
        """Returns the batch with each run of rows as a sequence of its own over its request's blocks, their block tables, and
        whether they are causal, (runs,).
        """
        of = {one.number: one for one in planned}
        bounds, keys, requests, causal = [], [], [], []
        for number in range(batch.num_reqs):
            first, end = (int(row) for row in batch.query_start_loc_np[number : number + 2])
            for start, stop, is_causal in runs.get(number, [(0, end - first, True)]):
                bounds.append(first + start)
                seen = of[number].keys[stop - 1] if number in of else batch.num_computed_tokens_np[number] + stop
                keys.append(int(seen))
                requests.append(number)
                causal.append(int(is_causal))
        bounds = np.array([*bounds, batch.query_start_loc_np[batch.num_reqs]], np.int32)
        whole = replace(
            batch,
            num_reqs=len(keys),
            num_reqs_after_padding=len(keys),
            num_scheduled_tokens=np.diff(bounds),
            query_start_loc=self.moved(bounds),
            query_start_loc_np=bounds,
            seq_lens=self.moved(np.array(keys, np.int32)),
            seq_lens_cpu_upper_bound=torch.tensor(keys, dtype=torch.int32),
            is_prefilling_np=batch.is_prefilling_np[requests],
            max_query_len=None,
        )
        of_request = self.moved(np.array(requests))
        return (
            whole,
            tuple(table.index_select(0, of_request) for table in block_tables),
            self.moved(np.array(causal, np.int32)),
        )

    def moved(self, values: np.ndarray) -> torch.Tensor:
        """Returns an array on the device."""
        return async_tensor_h2d(values, self.device)


def _rows_of(planned: Sequence[PlannedRows]) -> np.ndarray:
    return np.concatenate([one.first + np.arange(len(one.keys)) for one in planned])
