"""Blanks on vLLM's plain path, one row a token, against `generate_any_order` and `generate`."""

import pytest
from vllm.exceptions import VLLMValidationError

from a3_hf.engines.vllm.requests import Blanks
from tests.engines.vllm.cases import filled, given_tokens
from tests.engines.vllm.engines import ask, counter, engine, num_equal


@pytest.fixture(scope="module")
def llm(checkpoints):
    with engine(checkpoints["left_token"][0], max_num_batched_tokens=64) as llm:
        yield llm


@pytest.mark.parametrize("again", [False, True], ids=["first", "with cached prefixes"])
def test_blanks_of_all_kinds_in_one_batch(llm, blanks_of_all_kinds, again):
    before = counter(llm, "prefix_cache_hits")
    assert num_equal(blanks_of_all_kinds, ask(llm, blanks_of_all_kinds)) == len(blanks_of_all_kinds)
    assert (counter(llm, "prefix_cache_hits") > before) == again


def test_blanks_of_all_kinds_one_by_one(llm, blanks_of_all_kinds):
    assert num_equal(blanks_of_all_kinds, ask(llm, blanks_of_all_kinds, together=False)) == len(blanks_of_all_kinds)


def test_same_tokens_at_other_positions(llm, same_tokens):
    for together in (False, True, True):
        assert num_equal(same_tokens, ask(llm, same_tokens, together=together)) == 8


def test_seeds_and_several_answers(llm, blanks_of_all_kinds):
    case = blanks_of_all_kinds[1]

    def write(**changes):
        [output] = llm.generate([case.prompt()], [case.sampling_params(temperature=1.0, **changes)], use_tqdm=False)
        return [case.written(one)[0] for one in output.outputs]

    assert write(seed=7) == write(seed=7) != write(seed=8)
    assert len(set(write(n=4, seed=1))) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 3}, "max_tokens=3"),
        ({"ignore_eos": False}, "ignore_eos=False"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"extra_args": {"a3": {"pieces": [1], "lengths": [2]}}}, "pieces"),
        ({"extra_args": {"a3": [1]}}, "expected the fields of Blanks"),
        ({"extra_args": {"a3": {"pieces": [40, 30], "lengths": [5], "group": 3}}}, "'group'"),
        (
            {"extra_args": Blanks((40, 30), (5,), drafts=2, sampling={}).extra_args()},
            "this engine writes one token a step",
        ),
    ],
)
def test_odd_requests_are_refused_before_they_run(llm, model, changes, message):
    case = filled(model, Blanks((40, 30), (5,)), given_tokens(70, 0), in_groups=False)
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate([case.prompt()], [case.sampling_params(**changes)], use_tqdm=False)
