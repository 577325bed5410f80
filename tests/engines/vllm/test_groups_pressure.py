"""Groups where vLLM's scheduler is short of room, in an engine of their own."""

import pytest

from tests.engines.vllm.cases import DRAFTS, GROUPS_ROOM, WAYS, long_groups
from tests.engines.vllm.engines import ask, counter, engine, num_equal


@pytest.mark.parametrize("start", ["left_token", "query_embed"])
def test_requests_that_lose_their_blocks_and_prompts_in_chunks(checkpoints, start):
    """Written groups are encoded as groups again, and dynamic orders begin again."""
    folder, model = checkpoints[start]
    ways = WAYS | (DRAFTS if start == "left_token" else {})
    cases = long_groups(model, ways)
    with engine(folder, **GROUPS_ROOM) as llm:
        assert num_equal(cases, ask(llm, cases)) == len(cases)
        assert counter(llm, "num_preemptions") >= 1
