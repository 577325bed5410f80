"""Blanks on vLLM's plain path where the scheduler is short of room, each in an engine of its own."""

import pytest

from a3_hf.engines.vllm.requests import Blanks
from tests.engines.vllm.cases import ask, counter, engine, filled, given_tokens, num_equal


@pytest.mark.parametrize("budget", [32, 17])
def test_prompts_in_chunks(checkpoints, same_tokens, blanks_of_all_kinds, budget):
    cases = [*same_tokens, *blanks_of_all_kinds]
    with engine(checkpoints["left_token"][0], max_num_batched_tokens=budget) as llm:
        assert num_equal(cases, ask(llm, cases)) == len(cases)
        assert num_equal(cases, ask(llm, cases)) == len(cases)


def test_requests_that_lose_their_blocks_begin_again(checkpoints, same_tokens, model):
    # longer blanks than above, so that blocks run out while they are written
    splits = [((60, 30, 10), (20, 15)), ((60, 40, 0), (12, 30)), ((62, 30), (40,)), ((40, 20), (50,))]
    cases = [
        filled(model, Blanks(*split, is_text=False), given_tokens(sum(split[0]), seed), in_groups=False)
        for split in splits
        for seed in (7, 8)
    ]
    cases = [*same_tokens, *cases]
    with engine(checkpoints["left_token"][0], num_gpu_blocks_override=14) as llm:
        assert num_equal(cases, ask(llm, cases)) == len(cases)
        assert counter(llm, "num_preemptions") >= 3


def test_cache_keys_that_know_tokens_alone_give_wrong_texts(checkpoints, same_tokens, monkeypatch):
    """The negative control: without the keys of `prefix_cache`, blanks and even plain continuations go wrong, in silence."""
    with engine(checkpoints["left_token"][0]) as llm:  # which would refuse to start without the keys
        monkeypatch.setattr("a3_hf.engines.vllm.prefix_cache.blank_keys", lambda request, end: ())
        ask(llm, same_tokens, together=False)
        assert num_equal(same_tokens, ask(llm, same_tokens)) < 8
