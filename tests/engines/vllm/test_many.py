"""Five hundred requests of all kinds, sixteen at a time, a twentieth of them given up, in 40 blocks of cache: every answer is
that of `generate_any_order` alone.
"""

import asyncio
import itertools
import random

import pytest
from vllm.lora.request import LoRARequest

from a3_hf.engines.vllm.requests import Blanks
from tests.conftest import tiny_model
from tests.engines.vllm.cases import SHAPE, adapter, filled, given_tokens

NUM_REQUESTS, AT_ONCE, GIVEN_UP = 500, 16, 0.05


def made_cases(models) -> list:
    """Cases and their adapters: plain ones, suffixes, several lengths before the same text, groups and orders."""
    ways = (
        {},
        {"group_size": 4},
        {"order": "right_to_left", "group_size": 3},
        {"strategy": "dynamic", "tokens_per_step": 2},
        {"group_size": 2, "do_sample": True, "temperature": 0.9, "seed": 8},
    )
    # most prompts end just before a block does, so that blocks run out while blanks are written
    layouts = [((50, 40), (length,)) for length in (3, 5, 8, 11)]
    layouts += [((60, 20, 10), (5, 6)), ((92, 0), (9,)), ((80, 12), (12,)), ((46, 46), (7,))]
    found = []
    for number, (layout, way) in enumerate(itertools.product(layouts, ways)):
        model, lora = models[number % len(models)]
        given = given_tokens(92, 0 if number % 4 == 0 else number)[: sum(layout[0])]
        found.append((filled(model, Blanks(*layout, is_text=False), given, **way), lora))
    for number in range(6):  # continuations with drafts, as `vllm serve` asks for them
        model, lora = models[-1]
        blanks = Blanks((88 + number, 0), (8,), is_text=False)
        found.append(
            (filled(model, blanks, given_tokens(93, 1)[: 88 + number], strategy="speculative", draft_tokens=4), lora)
        )
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    ones = [adapter(folder, tiny_model(slot_start="left_token", **SHAPE), "slots", seed) for seed in (1, 2)]
    models = [(one[0], LoRARequest(f"slots{number}", number, one[2])) for number, one in enumerate(ones, start=1)]
    return str(folder / "base"), [*models, (tiny_model(slot_start="left_token", **SHAPE), None)]


def test_five_hundred_requests(served):
    folder, models = served
    cases = made_cases(models)
    equal, wrong, given_up, preemptions = asyncio.run(ask_all(folder, cases))
    print(f"{equal} equal, {len(wrong)} wrong, {given_up} given up, {preemptions} preemptions")
    assert not wrong, wrong[:3]
    assert equal + given_up == NUM_REQUESTS and given_up >= NUM_REQUESTS * GIVEN_UP / 2
    assert preemptions >= 3


async def ask_all(folder: str, cases):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.reader import get_metrics_snapshot

    settings = {
        "model": folder, "dtype": "float32", "max_model_len": 256, "max_num_seqs": AT_ONCE, "enforce_eager": True,
        "max_num_batched_tokens": 256, "skip_tokenizer_init": True, "block_size": 32, "num_gpu_blocks_override": 40,
        "hf_overrides": {"canvas_length": 16}, "enable_lora": True, "max_lora_rank": 8, "max_loras": 3, "seed": 0,
    }  # fmt: skip
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
    draw, room = random.Random(0), asyncio.Semaphore(AT_ONCE)
    equal, wrong, given_up = 0, [], 0

    async def one(number: int) -> None:
        nonlocal equal, given_up
        case, lora = cases[draw.randrange(len(cases))]
        leaves_after = draw.randrange(1, 4) if draw.random() < GIVEN_UP else None
        async with room:
            last, outputs = (
                None,
                engine.generate(case.prompt(), case.sampling_params(), f"r{number}", lora_request=lora),
            )
            if leaves_after is not None:
                task = asyncio.create_task(anext(outputs))
                await asyncio.sleep(0.1 * leaves_after)
                task.cancel()
                given_up += 1
                return
            async for output in outputs:
                last = output
        written = case.written(last.outputs[0])[0]
        if written == case.answer:
            equal += 1
        else:
            wrong.append((case.blanks, written, case.answer))

    try:
        await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))
        preempted = sum(metric.value for metric in get_metrics_snapshot() if metric.name == "vllm:num_preemptions")
        return equal, wrong, given_up, preempted
    finally:
        engine.shutdown()
