"""Groups, orders, drafts and dynamic orders inside vLLM against `generate_any_order`, token by token, sampled ones too."""

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from a3_hf.engines.vllm.requests import Blanks, Sampling
from tests.engines.vllm.cases import DRAFTS, WAYS, Case, cases_of, filled, given_tokens
from tests.engines.vllm.engines import ask, counter, engine, num_equal

CANVAS = {"hf_overrides": {"canvas_length": 24}}


@pytest.fixture(scope="module", params=["left_token", "query_embed"])
def served(request, checkpoints):
    folder, model = checkpoints[request.param]
    ways = WAYS | (DRAFTS if request.param == "left_token" else {})
    with engine(folder, **CANVAS) as llm:
        yield llm, model, ways


@pytest.mark.parametrize("again", [False, True], ids=["first", "with cached prefixes"])
def test_all_ways_in_one_batch(served, again):
    llm, model, ways = served
    cases, before = cases_of(model, ways), counter(llm, "prefix_cache_hits")
    assert num_equal(cases, ask(llm, cases)) == len(cases)
    if again:  # each prompt, and not only what ways have in common
        num_given = sum(len(case.given) // 32 * 32 for case in cases)
        assert counter(llm, "prefix_cache_hits") - before >= num_given / 2


def test_one_by_one(served):
    llm, model, ways = served
    cases = cases_of(model, ways)[::9]
    assert num_equal(cases, ask(llm, cases, together=False)) == len(cases)


def test_plain_requests_continue_their_prompt(served):
    llm, model, _ = served
    given = given_tokens(40, 1)
    params = SamplingParams(max_tokens=9, ignore_eos=True, detokenize=False, top_k=1)
    [output] = llm.generate([{"prompt_token_ids": given}], [params], use_tqdm=False)
    blanks = Blanks((40, 0), (9,), is_text=False)
    assert tuple(output.outputs[0].token_ids) == filled(model, blanks, given).answer
    if model.config.slot_start == "left_token":
        whole = model.generate(torch.tensor([given]), max_new_tokens=9, do_sample=False, eos_token_id=None)
        assert list(output.outputs[0].token_ids) == whole[0, 40:].tolist()


def test_the_log_probabilities_of_given_tokens(served):
    """What `auto` lengths are compared by: tokens written by force, in passes of three widths."""
    llm, model, _ = served
    if model.config.slot_start != "left_token":
        return
    tokens = given_tokens(70, 4)
    scored = torch.zeros(1, 70, dtype=torch.bool)
    scored[:, 20:] = True
    expected = model.log_likelihood(torch.tensor([tokens]), torch.arange(70)[None], scored_mask=scored)[0, 20:].tolist()
    cases = []
    for drafts in (1, 7, 23):
        blanks = Blanks((20, 0), (50,), is_text=False, drafts=drafts, forced=tuple(tokens[20:]), sampling=Sampling())
        cases.append(Case(blanks, tuple(tokens[:20]), tuple(tokens[20:]), tuple(expected)))
    for _ in range(2):
        assert num_equal(cases, ask(llm, cases)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"presence_penalty": 0.5}, "presence_penalty=0.5"),
        ({"max_tokens": 3}, "max_tokens=3"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"extra_args": Blanks((40, 30), (5,)).extra_args()}, "sampling: expected with steps"),
    ],
)
def test_odd_requests_are_refused_before_they_run(served, changes, message):
    llm, model, _ = served
    case = filled(model, Blanks((40, 30), (5,)), given_tokens(70, 0))
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate([case.prompt()], [case.sampling_params(**changes)], use_tqdm=False)
