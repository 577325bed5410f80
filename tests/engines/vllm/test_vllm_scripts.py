"""`eval/bench_vllm.py` and `scripts/confirm_vllm.py` without vLLM: what they ask, count, and say of failures."""

import asyncio
import importlib.util
import json
import math
import random
import sys
import time
from pathlib import Path

import httpx
import pytest
import torch

from tests.conftest import tiny_model

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
    assert table.row_count == 3 and "12.5 (10–15)" in list(table.columns[2].cells)
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
def folders(tmp_path_factory):
    """What --tiny tests: the model's folder and the adapters'."""
    folder = tmp_path_factory.mktemp("tiny")
    model, adapters = confirm.make_tiny(folder)
    return folder, model, adapters


def setting_of(folders, **more):
    folder, model, adapters = folders
    return confirm.Setting.read(
        model, **{"device": "cpu", "adapters": adapters, "llama": str(folder / "llama"), **more}
    )


def test_the_plan_of_a_cpu_and_of_gpus(folders):
    engines = {engine.name: engine for engine in confirm.plan(setting_of(folders))}
    assert all(engine.settings.get("enforce_eager") for engine in engines.values() if not engine.why_not)
    assert engines["one token, CUDA graphs"].why_not == engines["one token, FLASHINFER"].why_not == "no GPU"
    assert engines["one token, tensor parallel"].why_not.startswith("not asked for")
    engines = confirm.plan(setting_of(folders, device="cuda", tensor_parallel_size=2))
    assert not [engine.name for engine in engines if engine.why_not] and len(
        {engine.name for engine in engines}
    ) == len(engines)
    backends = [
        engine.settings["attention_config"]["backend"] for engine in engines if "attention_config" in engine.settings
    ]
    assert backends == list(confirm.BACKENDS)
    for engine in engines:
        checks = [check.name for check in engine.checks]
        assert checks and len(set(checks)) == len(checks)
        settings = confirm.engine_settings(engine, setting_of(folders, device="cuda"))
        for case in (case for check in engine.checks for case in check.cases):
            assert sum(case.pieces) + sum(case.lengths) < settings["max_model_len"]
            if case.way in confirm.WAYS:
                blanks = confirm.blanks_of(case, [5] * sum(case.pieces))
                assert settings["hf_overrides"]["canvas_length"] == confirm.CANVAS >= blanks.width()
        many = [check for check in engine.checks if check.name.startswith("many")]
        assert all(len(check.cases) > settings["max_num_seqs"] for check in many)
    assert [engine.name for engine in confirm.chosen(engines, "adapters")] == [
        "groups, adapters, left_token",
        "one token, adapters",
    ]


def test_a_model_whose_slots_start_as_query_embed(tmp_path):
    tiny_model(slot_start="query_embed").save_pretrained(tmp_path)
    engines = confirm.plan(confirm.Setting.read(str(tmp_path), device="cpu"))
    assert all(engine.why_not for engine in engines if engine.name.startswith("one token"))
    ways = {case.way for engine in engines if not engine.why_not for check in engine.checks for case in check.cases}
    assert "dynamic" in ways and not [way for way in ways if way.startswith("speculation")]


def test_a_plain_llama_is_served_as_a3(folders):
    llama = confirm.Setting.read(str(folders[0] / "llama"), device="cpu")
    overrides = [
        confirm.engine_settings(engine, llama)["hf_overrides"] for engine in confirm.plan(llama) if engine.checks
    ]
    assert all(
        one["architectures"] == ["A3LlamaForCausalLM"] and one["slot_start"] == "left_token" for one in overrides
    )
    with pytest.raises(ValueError, match="expected a folder with a LLaMA"):
        confirm.Setting.read(str(folders[0]), device="cpu")
    with pytest.raises(ValueError, match="a3 export"):
        confirm.Setting.read(folders[1], adapters=[str(folders[0] / "slots-saved")], device="cpu")


@pytest.mark.parametrize("way", ["", *confirm.WAYS, "continued"])
def test_what_an_engine_is_asked_and_what_it_reports(folders, way):
    """The prompt begins with what is given, each token of a blank is reported once, and the reference knows how likely."""
    setting = setting_of(folders)
    case = confirm.Case((20, 6), (5,), 3, way) if way == "continued" else confirm.Case((9, 4, 3), (3, 2), 3, way)
    model = confirm.load(setting, setting.folder, "left_token", None, torch.float32)
    given = confirm.given_tokens(setting.folder, sum(case.pieces), case.text)
    prompt, params = confirm.request_of(case, given)
    answer = confirm.answer_of(model, case, given)
    kept, numbers = confirm.reported(case, given)
    assert prompt[: len(given)] == given and sorted(numbers) == list(range(sum(case.lengths)))
    assert len(kept) <= params["max_tokens"] and (params["extra_args"]["a3"]["pieces"] if way != "continued" else True)
    for tokens, likely, log_prob in zip(*(answer[name] for name in ("tokens", "likely", "log_probs")), strict=True):
        assert dict(likely).get(tokens, log_prob) == pytest.approx(log_prob, abs=1e-4)
    columns = confirm.blanks_of(case, given).open_columns() if way != "continued" else range(5)
    assert len(kept) == len(columns)
    if way == "one at a time":
        assert answer["tokens"] == confirm.answer_of(model, confirm.replace(case, way="speculation"), given)["tokens"]


def test_an_exported_adapter_is_loaded_as_it_was(folders):
    from a3_hf.adapters.checkpoints import load_model

    setting = setting_of(folders)
    for number, rows in enumerate(("slots", "all")):
        saved = load_model(str(folders[0] / f"{rows}-saved"), base=setting.folder).state_dict()
        loaded = confirm.load(setting, setting.folder, "left_token", number, torch.float32).state_dict()
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)


def expected(tokens=(1, 2), likely=((1, -0.1), (2, -0.12), (3, -4.0))) -> dict:
    return {"tokens": list(tokens), "log_probs": [-0.1] * len(tokens), "likely": [list(likely)] * len(tokens)}


@pytest.mark.parametrize(
    ("tokens", "log_probs", "kind", "counts", "verdict"),
    [
        ([1, 2], [-0.1, -0.1], {}, (2, 0, 0), ("passed", "")),
        ([1, 1], [-0.1, -0.11], {}, (1, 1, 1), ("passed", "1 answers part by rounding, at most 0 nats apart")),
        ([2, 9], [-0.13, -7.0], {}, (0, 1, 1), ("passed", "1 answers part by rounding, at most 0.02 nats apart")),
        ([1, 3], [-0.1, -4.0], {}, (1, 1, 0), ("failed", "1 answers differ, 3.88 nats apart at most")),
        ([1, 3], [-0.1, -4.0], {"is_greedy": False}, (1, 1, 1), ("passed", None)),  # a draw, from the same distribution
        ([1, 1], [-0.1, -2.0], {}, (1, 1, 0), ("failed", None)),  # another distribution
        ([1, 1], [-0.9, -0.1], {}, (1, 1, 0), ("failed", None)),  # another one before
        ([1, 9], [-0.1, -0.1], {}, (1, 1, 0), ("failed", "1 answers differ, not among the 50 likeliest")),
        ([1, 1], [-0.1, -0.1], {"is_ordered": False}, (1, 1, 0), ("failed", None)),
        ([1], [-0.1], {}, (1, 1, 0), ("failed", None)),
        ([1, 2], [-0.1, -0.4], {}, (2, 0, 0), ("failed", "log-probabilities differ by up to 0.3 nats")),
        ([1, 2], [-0.1, -0.4], {"is_ordered": False}, (2, 0, 0), ("passed", "")),
    ],
)
def test_answers_part_by_rounding_or_are_wrong(tokens, log_probs, kind, counts, verdict):
    found = confirm.Comparison()
    found.add(tokens, log_probs, expected(), 0.05, **{"is_greedy": True, "is_ordered": True} | kind)
    assert (found.equal, found.apart, found.rounded) == counts and found.total == 2
    status, why = found.verdict(0.05)
    assert status == verdict[0]
    if verdict[1] is not None:
        assert why == verdict[1]


def test_rounding_in_bfloat16_is_measured():
    answers = {
        "f s float32 1": expected(),
        "f s bfloat16 1": expected(likely=((1, -0.3), (2, -0.1), (3, -4.0))),
        "f s float32 2": expected(),
    }
    nats = confirm.nats_of(answers)
    assert nats == {"float32": confirm.NATS, "bfloat16": pytest.approx(3 * 0.2)}
    assert confirm.nats_of({})["bfloat16"] == confirm.NATS


def test_an_engine_that_dies_leaves_what_it_has_done(tmp_path):
    engine = confirm.Engine("one", [confirm.Check("a"), confirm.Check("b")])
    results = tmp_path / "1.jsonl"
    [first, second] = confirm.lines_of(engine, results, "RuntimeError: no", 2.0)
    assert first["status"] == second["status"] == "failed" and first["why"] == "RuntimeError: no"
    results.write_text(
        '{"started": 3.0, "chose": "x"}\n{"check": "a", "status": "passed", "why": "", "seconds": 1, "equal": 2}\n'
    )
    [first, second] = confirm.lines_of(engine, results, "not done after 5 s", 5.0)
    assert (first["status"], first["start_seconds"], second["status"], second["why"]) == (
        "passed",
        3,
        "failed",
        "not done after 5 s",
    )
    [line] = confirm.lines_of(confirm.replace(engine, why_not="no GPU"), results, "", 0.0)
    assert (line["status"], line["why"]) == ("not there", "no GPU")
    with results.open("a") as file:
        file.write('{"check": "b", "status": "passed", "why": "", "seconds": 1}\n')
    assert [line["check"] for line in confirm.lines_of(engine, results, "ended by signal 11", 5.0)] == [
        "a",
        "b",
        "its end",
    ]
    lines = [*confirm.lines_of(engine, results, "", 5.0), line | {"why": "[x] " + "y" * 200}]
    table = confirm.table_of(lines)
    assert table.row_count == 3 and list(table.columns[2].cells) == ["2", "–", "–"]


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
    eager = confirm.Engine("one", [], confirm.EAGER)
    found = confirm.environment_of("cpu", eager)
    assert (found["VLLM_PLUGINS"], found["VLLM_CPU_KVCACHE_SPACE"], found["TRITON_INTERPRET"]) == ("a3", "7", "1")
    assert found["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    found = confirm.environment_of("cuda", confirm.Engine("one", []))
    assert "TRITON_INTERPRET" not in found or "TRITON_INTERPRET" in confirm.os.environ
    parallel = confirm.Engine("two", [], confirm.EAGER | {"tensor_parallel_size": 2})
    assert "|" in confirm.environment_of("cpu", parallel)["VLLM_CPU_OMP_THREADS_BIND"]


def test_arguments_of_the_confirmation(capsys):
    found = confirm.parse([])
    assert (found.model, found.tensor_parallel_size, found.budget) == ("models/smollm2-135m", 1, math.inf)
    found = confirm.parse(
        ["folder", "--adapter", "a", "--adapter", "b", "--tensor-parallel-size", "4", "--out", "x.json"]
    )
    assert (found.model, found.adapter, found.out) == ("folder", ["a", "b"], Path("x.json"))
    with pytest.raises(SystemExit):
        confirm.parse(["--help"])
    assert "--scratch" not in capsys.readouterr().out


def test_texts_from_a_tokenizer(folders, monkeypatch):
    monkeypatch.setattr(
        confirm, "_tokenizer", lambda folder: lambda text: {"input_ids": text.replace(".", " .").split()}
    )
    found = [confirm.given_tokens(folders[1], 200, text) for text in (1, 1, 2)]
    assert found[0] == found[1] != found[2] and len(found[0]) == 200
