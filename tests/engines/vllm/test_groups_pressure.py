"""Groups where vLLM's scheduler is short of room, in an engine of their own."""

import pytest

from a3_hf.engines.vllm.requests import Blanks
from tests.engines.vllm.cases import ask, counter, engine, filled, given_tokens, num_equal
from tests.engines.vllm.test_groups import DRAFTS, WAYS


@pytest.mark.parametrize("start", ["left_token", "query_embed"])
def test_requests_that_lose_their_blocks_and_prompts_in_chunks(checkpoints, start):
    """Written groups are encoded as groups again, and dynamic orders begin again."""
    folder, model = checkpoints[start]
    ways = WAYS | (DRAFTS if start == "left_token" else {})
    layouts = [((60, 30, 10), (14, 9)), ((90, 10), (22,)), ((60, 0), (24,))]
    cases = [
        filled(
            model, Blanks(*layouts[number % 3], is_text=False), given_tokens(sum(layouts[number % 3][0]), number), **way
        )
        for number, way in enumerate([*ways.values(), *ways.values()])
    ]
    with engine(
        folder, num_gpu_blocks_override=14, max_num_batched_tokens=53, hf_overrides={"canvas_length": 49}
    ) as llm:
        assert num_equal(cases, ask(llm, cases)) == len(cases)
        assert counter(llm, "num_preemptions") >= 1
