"""`eval/bench_vllm.py` and `scripts/confirm_vllm.py` without vLLM: what they ask, count, and say of failures."""

import asyncio
import importlib.util
import json
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from tests.conftest import tiny_model
from tests.engines.vllm import cases as requests

ROOT = Path(__file__).parents[3]
COUNTS = {"completion_tokens": 2, "prompt_tokens": 9}


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it
    spec.loader.exec_module(module)
    return module


bench, confirm = load("eval/bench_vllm.py"), load("scripts/confirm_vllm.py")


def event(**fields) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


# ------------------------------------------------------------------------------------------------------- bench_vllm.py


def test_bodies_of_all_ways():
    shared = {"max_tokens": 5, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    blank = {"prompt": "a b", "suffix": " c"}
    wanted = {
        "infill": shared | blank,
        "own": shared | blank,
        "groups": shared | blank | {"group_size": 2},
        "plain": shared | {"prompt": "a b c", "ignore_eos": True},
    }
    assert {way: bench.body_of(way, "a b", " c", length=5, group_size=2) for way in bench.WAYS} == wanted


def test_every_request_has_a_text_of_its_own():
    texts = bench.Texts(20, 5, seed=1)
    found = [texts.of(way, 4, number) for way in bench.WAYS for number in range(50)]
    assert len({prefix for prefix, _ in found}) == len({suffix for _, suffix in found}) == len(found)
    assert all(len(prefix.split()) == 20 and len(suffix.split()) == 5 and suffix[0] == " " for prefix, suffix in found)
    assert (
        texts.of("own", 4, 7)
        == bench.Texts(20, 5, seed=1).of("own", 4, 7)
        != bench.Texts(20, 5, seed=2).of("own", 4, 7)
    )
    shared = bench.Texts(20, 5, shared_prefix=True)
    found = [shared.of(way, number) for way in ("infill", "plain") for number in range(9)]
    assert len({prefix for prefix, _ in found}) == 2 and len({suffix for _, suffix in found}) == 18
    files = bench.Texts("A story.", "The end.")
    found = [files.of("infill", number) for number in range(9)]
    assert len(set(found)) == 9 and all(one[0].endswith(" A story.") and one[1] == " The end." for one in found)


def test_percentiles_are_values_that_were_measured():
    values = [float(number) for number in range(1, 101)]
    random.Random(0).shuffle(values)
    assert [bench.percentile(values, part) for part in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert [bench.percentile([3.0, 1.0, 2.0], part) for part in (0, 50, 95)] == [1, 2, 3]
    assert bench.percentile([], 50) is None


def test_a_stream_is_read_in_pieces_of_any_size():
    whole = event(choices=[{"text": ""}]) + event(choices=[{"text": "a"}]) + event(choices=[{"text": "b"}])
    whole += event(choices=[], usage=COUNTS) + b"data: [DONE]\n\n"
    for size in (1, 7, len(whole)):
        pieces = [(float(place + size), whole[place : place + size]) for place in range(0, len(whole), size)]
        answer = bench.read_stream(pieces, 2)
        assert (answer.tokens, answer.prompt_tokens, answer.error) == (2, 9, "")
        end_of_first = whole.index(b"\n", whole.index(b'"a"')) + 1
        assert answer.seconds == pieces[-1][0] and end_of_first <= answer.first < end_of_first + size
    assert bench.read_stream(pieces, 3).error == "2 of 3 tokens"
    assert bench.read_stream([(0.1, event(error={"message": "too late"}))], 2).error == "stream: too late"
    assert bench.read_stream([], 2).error == "0 of 2 tokens"


def test_a_row_counts_good_answers_and_tells_of_others():
    def answers(seconds: float, count: int = 4) -> list:
        return [bench.Answer(first=seconds / 2, seconds=seconds, tokens=10, prompt_tokens=7) for _ in range(count)]

    found = {way: bench.Measured() for way in ("infill", "plain", "own")}
    found["plain"].add(answers(1.0), 2.0)
    found["plain"].add(answers(1.0), 1.0)
    found["infill"].add(answers(2.0), 4.0)
    found["infill"].add(
        [*answers(4.0, 3), bench.Answer(tokens=3, error="503: busy"), bench.Answer(error="503: so")], 2.0
    )
    found["own"].add([bench.Answer(error="ConnectError: ")], 1.0)
    row = bench.row_of("infill", 4, found)
    assert (row["tokens/s"], row["least"], row["most"]) == (12.5, 10, 15)
    assert row["of plain"] == (10 / 20 + 15 / 40) / 2 and row["of own"] is None  # which wrote nothing
    assert (row["first p50, s"], row["whole p50, s"], row["whole p99, s"]) == (1.0, 2.0, 4.0)
    assert (row["given"], row["written"], row["answers"], row["errors"]) == (7, 70, 7, 2)
    assert row["told"] == {"503": [2, "503: busy"]}
    row = bench.row_of("own", 4, found)
    assert (row["tokens/s"], row["whole p95, s"], row["errors"]) == (0, None, 1)
    table = bench.table_of([bench.row_of(way, 4, found) for way in found])
    assert len(table.splitlines()) == 5 and "| 12.5 (10–15) |" in table
    assert bench.ratio([1.0], None) is None and bench.ratio([], [1.0]) is None


def test_requests_are_sent_and_failures_counted():
    asked = []

    def server(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked.append(body)
        if not body.get("stream"):
            return httpx.Response(200, json={"usage": {"prompt_tokens": 1 + 2 * len(body["prompt"].split())}})
        if "two" in body["prompt"]:
            raise httpx.ConnectError("gone")
        if "suffix" not in body:
            return httpx.Response(429, text="full")
        return httpx.Response(200, content=event(choices=[{"text": "ab"}]) + event(choices=[], usage=COUNTS))

    async def run():
        async with httpx.AsyncClient(base_url="http://localhost", transport=httpx.MockTransport(server)) as client:
            assert await bench.words_of(client, 60) == 30  # two tokens a word, and one before them
            bodies = [
                bench.body_of(way, prompt, " c", length=2, group_size=1)
                for way, prompt in (("infill", "one"), ("plain", "one"), ("infill", "two"), ("own", "one"))
            ]
            return await bench.send_all(client, bodies, 2)

    answers, seconds = asyncio.run(run())
    assert sorted(answer.error for answer in answers) == ["", "", "429: full", "ConnectError: gone"] and seconds > 0
    assert len(asked) == 6


def test_the_servers_that_are_started(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = [
        "--start",
        str(tmp_path),
        "--canvas-length",
        "16",
        "--concurrency",
        "2",
        "8",
        "--vllm-options",
        "--max-model-len 99",
    ]
    found = bench.commands(bench.parse(words), is_gpu=False)
    assert list(found) == ["vllm", "groups", "own"]
    assert json.loads(found["vllm"][found["vllm"].index("--hf-overrides") + 1])["slot_start"] == "left_token"
    assert json.loads(found["groups"][found["groups"].index("--hf-overrides") + 1])["canvas_length"] == 16
    assert found["groups"][-2:] == ["--max-model-len", "99"] and "--enforce-eager" in found["vllm"]
    assert found["own"][found["own"].index("--max-batch") + 1] == "8"
    (tmp_path / "config.json").write_text('{"model_type": "a3_llama"}')
    found = bench.commands(bench.parse(["--start", str(tmp_path), "--ways", "plain"]), is_gpu=True)
    assert list(found) == ["vllm"] and "--hf-overrides" not in found["vllm"] and "bfloat16" in found["vllm"]


def test_arguments_of_the_benchmark(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("Once.\n")
    found = bench.parse(["--prefix", str(tmp_path / "text.txt"), "--suffix", "9"])
    assert (found.prefix, found.suffix, found.concurrency) == ("Once.", 9, [1, 16, 64])
    for words in (["--requests", "0"], ["--concurrency", "4", "0"], ["--suffix", "0"], ["--prefix", "nothing.txt"]):
        with pytest.raises(SystemExit):
            bench.parse(words)
        assert "expected" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------- confirm_vllm.py


@pytest.fixture(scope="module")
def tested(tmp_path_factory):
    """What --tiny tests."""
    folder = tmp_path_factory.mktemp("tiny")
    return confirm.Tested.read(str(folder / "base"), confirm.make_tiny(folder))


def test_the_plan_of_a_cpu_and_of_gpus(tested):
    engines = confirm.plan(tested)
    assert all(engine.settings.get("enforce_eager") for engine in engines if not engine.why_not)
    absent = {engine.variant for engine in engines if engine.why_not == "no GPU"}
    assert absent >= {"CUDA graphs", *confirm.BACKENDS}
    engines = confirm.plan(replace(tested, is_gpu=True, num_gpus=2))
    assert not [engine.name for engine in engines if engine.why_not]
    assert len({engine.name for engine in engines}) == len(engines)
    assert {one.variant for one in engines if one.kind == "groups"} == {one.variant for one in engines} - {
        *confirm.BACKENDS
    }
    parallel = [engine.why_not for engine in confirm.plan(replace(tested, is_gpu=True, num_gpus=1))]
    assert parallel.count("one GPU") == 2
    [lora] = [one for one in engines if one.name == "groups, adapters"]
    settings = confirm.settings_of(lora, tested)
    assert (settings["max_loras"], settings["max_lora_rank"]) == (3, 8)


def test_requests_fit_their_engines(tested):
    engines = {engine.name: engine for engine in confirm.plan(tested)}
    for name in ("groups, eager", "groups, too few blocks", "one token, adapters"):
        asked = confirm.asked_of(engines[name], tested)
        assert {one.adapter for one in asked} == ({None, tested.adapters[1]} if "adapters" in name else {None})
        overrides = confirm.settings_of(engines[name], tested)["hf_overrides"]
        for case in (one.case for one in asked):
            assert len(case.given) + len(case.answer) <= 256
            if "groups" in name:
                assert case.blanks.width() <= overrides["canvas_length"]
    rough = confirm.asked_of(engines["groups, bfloat16"], tested)
    assert rough[0].rough.dtype == torch.bfloat16 and all(one.case.groups for one in rough)
    assert len({one.adapter for one in confirm.asked_of(engines["groups, adapters"], tested)}) == 3


def test_a_model_whose_slots_start_as_query_embed(tmp_path, tested):
    tiny_model(slot_start="query_embed", **requests.SHAPE).save_pretrained(tmp_path)
    found = confirm.Tested.read(str(tmp_path))
    engines = confirm.plan(found)
    assert all(engine.why_not for engine in engines if engine.kind == "one token")
    assert not [one for one in confirm.cases_of(engines[1], found.model()) if one.blanks.drafts]
    with pytest.raises(ValueError, match="slot_start='query_embed'"):
        confirm.Tested.read(str(tmp_path), tested.adapters)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="a LLaMA or an A3 model"):
        confirm.Tested.read(str(tmp_path))


@pytest.fixture(scope="module")
def asked():
    """A continuation, a blank, groups, sampled groups and a dynamic order, with their answers."""
    model = tiny_model(slot_start="left_token", **requests.SHAPE)
    ways = {name: requests.WAYS[name] for name in ("random pairs", "sampled", "dynamic")}
    cases = [*requests.same_tokens(model)[::6], *requests.cases_of(model, ways, requests.LAYOUTS[1:2])]
    return [confirm.Asked(case, None, model, None) for case in cases]


def written_of(asked) -> list:
    return [[list(one.case.answer), list(one.case.log_probs)] for one in asked]


def result_of(asked, written, **judges) -> str:
    asked = [replace(one, **judges) for one in asked]
    return confirm.judged(asked, [(tuple(tokens), log_probs) for tokens, log_probs in written])


def test_right_answers_pass(asked):
    found = result_of(asked, written_of(asked))
    assert found["result"] == "passed" and found["answers"] == found["equal"] == len(asked) == 5
    assert found["nats apart"] < 1e-4 and found["of"] == confirm.NATS


@pytest.mark.parametrize("number", range(5))
def test_another_token_fails_unless_it_was_drawn(asked, number):
    written = written_of(asked)
    case, (tokens, log_probs) = asked[number].case, written[number]
    tokens[-1] = 7 if tokens[-1] != 7 else 8
    if case.groups is not None:
        log_probs[-1] = confirm.scores(asked[number].model, case, tokens)[0][-1].item()
    assert result_of(asked, written)["result"] == ("failed" if case.is_greedy else "passed")


@pytest.mark.parametrize("value", [-0.2, math.nan, -math.inf])
def test_other_log_probabilities_fail(asked, value):
    written = written_of(asked)
    written[3][1][2] += value
    assert result_of(asked, written)["result"] == "failed"


def test_rounding_in_bfloat16_is_measured(asked):
    rough = tiny_model(slot_start="left_token", dtype=torch.bfloat16, **requests.SHAPE)
    assert result_of(asked, written_of(asked), rough=rough)["of"] > confirm.NATS


def test_an_engine_that_dies_leaves_what_it_has_done(tmp_path):
    engine, results = confirm.Engine("groups", "FLASHINFER"), tmp_path / "1.jsonl"
    results.write_text('{"check": "in one batch", "result": "passed", "why": ""}\n')
    first, second = confirm.lines_of(engine, results, "not done after 5 s")
    assert (first["check"], first["result"], second["result"]) == ("in one batch", "passed", "failed")
    [line] = confirm.lines_of(
        engine, tmp_path / "none", "ValueError: F is not valid for this configuration. Reason: [x]"
    )
    assert line["result"] == "not there"
    [line] = confirm.lines_of(replace(engine, why_not="no GPU"), tmp_path / "none", "")
    assert (line["result"], line["why"], line["engine"]) == ("not there", "no GPU", "groups, FLASHINFER")


def test_a_process_is_ended_with_what_it_started(tmp_path):
    def run(program: str, seconds: float = 30) -> str:
        return confirm.run_process([sys.executable, "-c", program], tmp_path / "log", {}, seconds)

    assert run("print(1)") == ""
    assert run("raise ValueError('the\\nreason')").startswith("ValueError: the")
    assert run("import os; os.kill(os.getpid(), 8)") == "ended by signal 8"
    assert run("raise SystemExit(3)") == "exit code 3"
    child = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    assert run(child, 2) == "not done after 2 s"
    pid = int((tmp_path / "log").read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("its child runs on")


def test_reasons():
    log = "x ERROR ValueError: the cause\nRuntimeError: Engine core initialization failed. See root cause above.\n"
    assert confirm.reason_in(log, 1) == "ValueError: the cause"
    assert confirm.reason_in("INFO: fine", -9) == "ended by signal 9"


def test_environments(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    for name in ("TRITON_INTERPRET", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    found = confirm.environment_of(confirm.Engine("groups", "eager", confirm.EAGER), is_gpu=False)
    assert (found["VLLM_PLUGINS"], found["VLLM_CPU_KVCACHE_SPACE"], found["TRITON_INTERPRET"]) == ("a3", "7", "1")
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    found = confirm.environment_of(confirm.Engine("groups", "CUDA graphs"), is_gpu=True)
    assert "TRITON_INTERPRET" not in found and "VLLM_ENABLE_V1_MULTIPROCESSING" not in found
    found = confirm.environment_of(confirm.Engine("groups", "tensor parallel", confirm.EAGER), is_gpu=False)
    assert "|" in found["VLLM_CPU_OMP_THREADS_BIND"]


def test_arguments_of_the_confirmation(capsys):
    found = confirm.parse(["folder", "--adapter", "a", "--adapter", "b", "--out", "x.json"])
    assert (found.model, found.adapter, found.out) == ("folder", ["a", "b"], Path("x.json"))
    with pytest.raises(SystemExit):
        confirm.parse(["--help"])
    assert "--scratch" not in capsys.readouterr().out
