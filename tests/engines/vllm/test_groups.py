"""Groups, orders, drafts and dynamic orders inside vLLM against `generate_any_order`, token by token, sampled ones too."""

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from a3_hf.engines.vllm.requests import Blanks, Sampling
from tests.engines.vllm.cases import LAYOUTS, Case, ask, counter, engine, filled, given_tokens, num_equal

CANVAS = {"hf_overrides": {"canvas_length": 24}}
WAYS = {
    "one by one": {},
    "groups of 4": {"group_size": 4},
    "groups of 3 from the right": {"group_size": 3, "order": "right_to_left"},
    "random pairs": {"group_size": 2, "order": "random"},
    "spans": {"order": "spans", "span_length": 3, "group_size": 2},
    "sampled": {"group_size": 3, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "seed": 5},
    "sampled, top_k and min_p": {"do_sample": True, "top_k": 20, "min_p": 0.05, "seed": 6},
    "dynamic": {"strategy": "dynamic", "tokens_per_step": 2},
    "dynamic by a threshold": {"strategy": "dynamic", "threshold": 0.3},
    "dynamic, sampled": {"strategy": "dynamic", "entropy_budget": 1.0, "do_sample": True, "seed": 3},
    "dynamic at random in a window": {"strategy": "dynamic", "window": 3, "criterion": "random", "seed": 4},
}
DRAFTS = {
    "drafts": {"strategy": "speculative", "draft_tokens": 4},
    "drafts, sampled": {
        "strategy": "speculative",
        "draft_tokens": 3,
        "do_sample": True,
        "temperature": 0.7,
        "seed": 9,
    },
}


def cases_of(model, ways) -> list:
    """Each layout in each way."""
    return [
        filled(model, Blanks(*layout, is_text=False), given_tokens(sum(layout[0]), number), **way)
        for way in ways.values()
        for number, layout in enumerate(LAYOUTS)
    ]


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
