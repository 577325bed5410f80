"""Blanks on vLLM's plain path where the scheduler is short of room, each in an engine of its own."""

import pytest

from tests.engines.vllm.cases import ROOM, long_blanks
from tests.engines.vllm.engines import ask, counter, engine, num_equal


@pytest.mark.parametrize("budget", [32, 17])
def test_prompts_in_chunks(checkpoints, same_tokens, blanks_of_all_kinds, budget):
    cases = [*same_tokens, *blanks_of_all_kinds]
    with engine(checkpoints["left_token"][0], max_num_batched_tokens=budget) as llm:
        assert num_equal(cases, ask(llm, cases)) == len(cases)
        assert num_equal(cases, ask(llm, cases)) == len(cases)


def test_requests_that_lose_their_blocks_begin_again(checkpoints, same_tokens, model):
    cases = [*same_tokens, *long_blanks(model)]
    with engine(checkpoints["left_token"][0], **ROOM) as llm:
        assert num_equal(cases, ask(llm, cases)) == len(cases)
        assert counter(llm, "num_preemptions") >= 3


def test_cache_keys_that_know_tokens_alone_give_wrong_texts(checkpoints, same_tokens, monkeypatch):
    """The negative control: without the keys of `prefix_cache`, blanks and even plain continuations go wrong, in silence."""
    with engine(checkpoints["left_token"][0]) as llm:  # which would refuse to start without the keys
        monkeypatch.setattr("a3_hf.engines.vllm.prefix_cache.blank_keys", lambda request, end: ())
        ask(llm, same_tokens, together=False)
        assert num_equal(same_tokens, ask(llm, same_tokens)) < 8
