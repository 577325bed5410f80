"""One model on two cores: blanks one row a token, and groups, traced by Dynamo as on a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json, sys
import torch
from vllm import SamplingParams
from tests.conftest import tiny_model
from tests.engines.vllm.cases import DRAFTS, LAYOUTS, SHAPE, WAYS, filled, given_tokens
from tests.engines.vllm.engines import ask, engine, num_equal
from a3_hf.engines.vllm.requests import Blanks

if __name__ == "__main__":
    folder, groups = sys.argv[1], sys.argv[2] == "groups"
    model = tiny_model(slot_start="left_token", **SHAPE)
    model.save_pretrained(folder)
    ways = [*WAYS.values(), *DRAFTS.values()] if groups else [{"in_groups": False}]
    cases = [
        filled(model, Blanks(*layout, is_text=False), given_tokens(sum(layout[0]), number), **way)
        for number, layout in enumerate(LAYOUTS)
        for way in ways[number % len(ways) :: 4]
    ]
    overrides = {"hf_overrides": {"canvas_length": 24}} if groups else {}
    with engine(folder, tensor_parallel_size=2, distributed_executor_backend="mp", **overrides) as llm:
        equal = num_equal(cases, ask(llm, cases))
        # sampled without a seed: the workers must draw the same, or each goes on from another token
        params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=0)
        given = given_tokens(40, 5)
        [output] = llm.generate([{"prompt_token_ids": given}], [params], use_tqdm=False)
        tokens, groups = torch.tensor([[*given, *output.outputs[0].token_ids]]), torch.arange(52)[None]
        true = model.log_likelihood(tokens, groups, scored_mask=groups >= 40)[0, 40:].tolist()
        said = [of[token].logprob for token, of in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]
        apart = max(abs(a - b) for a, b in zip(true, said, strict=True))
        print("EQUAL", json.dumps([equal, len(cases), apart]))
"""


@pytest.mark.parametrize("kind", ["one token", "groups"])
def test_two_workers_write_what_one_does(tmp_path, kind):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if (os.cpu_count() or 1) > 1 else "0|0",
    }
    command = [sys.executable, str(program), str(tmp_path / "model"), "groups" if kind == "groups" else "one"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert "EQUAL" in done.stdout, done.stdout[-1000:] + done.stderr[-3000:]
    equal, total, apart = json.loads(done.stdout.split("EQUAL")[1].splitlines()[0])
    assert equal == total >= 8 and apart < 5e-3
