"""Blanks on vLLM's plain autoregressive path: one token a step, one row a token (not in the paper).

With `slot_start="left_token"` and one set of weights, the content row of a token is the slot of the next one. So scheduler,
sampler, chunked prefill, preemption, prefix cache, LoRA and tensor parallelism stay vLLM's; only three things differ:

- positions are the text's: those after a blank leave room for it;
- where the token left of a blank has not seen what is known, it comes once more as a slot (`OneRowScript`), whose keys are not
  written;
- rows behind such a slot are written, and see, one place earlier than the scheduler counts.
"""

import numpy as np
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch

from .planned_rows import PAD_SLOT, PlannedRows, PlannedRowsState
from .requests import Blanks, OneRowScript


class OneRowState(PlannedRowsState):
    """Rows of requests with blanks; plain requests are untouched."""

    def __init__(self, vllm_config, model, encoder_cache, device):
        super().__init__(vllm_config, model, encoder_cache, device)
        mode = vllm_config.compilation_config.cudagraph_mode
        if mode is not None and mode.mixed_mode() == CUDAGraphMode.FULL:
            raise ValueError(
                f"cudagraph_mode={mode.name}: expected one that captures prefills piecewise or not at all, as "
                "FULL_AND_PIECEWISE (vLLM's default) or FULL_DECODE_ONLY, since a blank's first slot is a sequence of its own"
            )
        self.arrays: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # positions, places, keys of each place

    def add_request(self, req_index: int, new_req_data) -> None:
        super().add_request(req_index, new_req_data)
        blanks = Blanks.of(new_req_data.sampling_params)
        if blanks is not None:
            script = OneRowScript(blanks)
            if len(new_req_data.prompt_token_ids) != script.num_prompt:
                raise ValueError(
                    f"prompt has {len(new_req_data.prompt_token_ids)} tokens: expected {script.num_prompt}"
                )
            self.arrays[new_req_data.req_id] = _arrays(script)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.arrays.pop(req_id, None)

    def plan(self, batch: InputBatch) -> list[PlannedRows]:
        found = []
        for number, req_id in enumerate(batch.req_ids[: batch.num_reqs]):
            if req_id in self.arrays:
                arrays = self.arrays[req_id]
                first, end = (int(row) for row in batch.query_start_loc_np[number : number + 2])
                computed = int(batch.num_computed_tokens_np[number])
                # asynchronous scheduling may run a step behind the last token, whose result nobody wants
                at = np.minimum(np.arange(computed, computed + end - first), len(arrays[0]) - 1)
                found.append(PlannedRows(number, first, *(array[at] for array in arrays)))
        return found


def _arrays(script: OneRowScript) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    is_slot = np.array([row.is_slot for row in script.rows])
    positions = np.array([row.position for row in script.rows], np.int64)
    written_before = np.cumsum(~is_slot) - ~is_slot
    return positions, np.where(is_slot, PAD_SLOT, written_before), written_before + ~is_slot
