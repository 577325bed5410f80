"""What a GPU must confirm of the plugin for vLLM, in one call, from a clone, in an environment with `a3-hf[vllm]`:

    python scripts/confirm_vllm.py models/smollm2-135m --adapter adapters/smollm2-135m --out confirmed.json
    python scripts/confirm_vllm.py --tiny        # a random model with two adapters; on a CPU ten minutes

The requests of `tests/engines/vllm` are asked of an engine in each setting: CUDA graphs and eager mode, bfloat16, three kinds
of attention, asynchronous scheduling on and off, too few blocks, adapters, tensor parallelism; once for blanks one token a
step, and once for groups. Each engine runs in a process of its own: one that dies or hangs has failed, and the next starts.

What is compared, token by token: this package computes in float32 how likely each token of an answer was, in the order in
which it was written. vLLM must say the same, and without sampling no other token may be likelier, both up to rounding: 0.05
nats in float32; in bfloat16 three times the 95th percentile of what this package's own bfloat16 is off by, if that is more.
For dynamic orders, which an answer does not tell, the tokens must be those of `generate_any_order`. The exit code is 1 if a
check failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the tests' requests

from a3_hf import A3LlamaForCausalLM  # noqa: E402
from a3_hf.adapters.checkpoint_info import CheckpointInfo  # noqa: E402
from a3_hf.adapters.checkpoints import load_model  # noqa: E402
from a3_hf.adapters.export import export  # noqa: E402
from a3_hf.adapters.layers import SlotLoraConfig  # noqa: E402
from a3_hf.evaluation.reporting.markdown import markdown_table  # noqa: E402
from a3_hf.evaluation.reporting.results import environment  # noqa: E402
from tests.engines.vllm import cases as requests  # noqa: E402
from tests.engines.vllm.cases import Case  # noqa: E402

NATS = (
    0.05  # that two computations of a log-probability in float32 may be apart; attention on a GPU may multiply in TF32
)
TIMES_ROUNDING = 3
CANVAS = 24
SEQS = 8
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
EAGER = {"enforce_eager": True}
KINDS = ("one token", "groups")
BACKENDS = {"FLASH_ATTN": "bfloat16", "TRITON_ATTN": "float32", "FLASHINFER": "bfloat16"}
FIELDS = ("engine", "check", "answers", "equal", "nats apart", "of", "result", "why", "seconds")
ENVIRONMENT = {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_PLUGINS": "a3"}  # what blanks need
USUAL = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
ON_CPU = {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Tested:
    """What is tested.

    Attributes:
        folder: of a LLaMA or an A3 model.
        slot_start: of the model; "left_token" for a LLaMA.
        adapters: folders of adapters on it, as training saved them.
    """

    folder: str
    slot_start: str
    adapters: tuple[str, ...] = ()
    is_gpu: bool = False
    num_gpus: int = 0

    @classmethod
    def read(cls, folder: str, adapters: Sequence[str] = (), **machine) -> "Tested":
        """Reads the configurations.

        Raises:
            ValueError: no model, no adapter, or one whose slots start in another way than the model's.
        """
        config = CheckpointInfo.read(folder).base_config
        if config.get("model_type") not in ("llama", "a3_llama"):
            raise ValueError(f"model={folder!r}: expected a folder with a LLaMA or an A3 model")
        start = "left_token" if config["model_type"] == "llama" else config.get("slot_start", "query_embed")
        for adapter in adapters:
            own = CheckpointInfo.read(adapter, base=folder).adapter_config
            if own is None or (own.slot_start or start) != start:
                raise ValueError(f"adapter={adapter!r}: expected an A3 adapter with slot_start={start!r}, the model's")
        return cls(folder, start, tuple(adapters), **machine)

    def model(self, dtype: str = "float32", adapter: str | None = None):
        settings = {"dtype": getattr(torch, dtype)}
        if adapter is None:
            found = A3LlamaForCausalLM.from_pretrained(self.folder, slot_start=self.slot_start, **settings)
        else:
            found = load_model(adapter, base=self.folder, **settings)
        return found.eval().to("cuda" if self.is_gpu else "cpu")


@dataclass
class Engine:
    """An engine, named "kind, variant".

    Attributes:
        settings: arguments of `vllm.LLM`.
        why_not: why it is not started.
    """

    kind: str
    variant: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    why_not: str = ""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.variant}"


def plan(tested: Tested) -> list[Engine]:
    """Returns all engines, the most important ones first."""
    is_gpu = tested.is_gpu
    usual, gpu = ({}, "") if is_gpu else (EAGER, "no GPU")
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    found = []
    for kind in KINDS:
        room = requests.ROOM if kind == "one token" else requests.GROUPS_ROOM
        found += [
            Engine(kind, "eager", EAGER),
            Engine(kind, "CUDA graphs", why_not=gpu),
            Engine(kind, "bfloat16", usual, "bfloat16", gpu if kind == "groups" else ""),
            Engine(kind, "too few blocks", usual | room),
            Engine(kind, "adapters", usual, why_not="" if tested.adapters else "none given (--adapter)"),
            *(
                Engine(kind, backend, {"attention_config": {"backend": backend}}, dtype, gpu)
                for backend, dtype in (BACKENDS.items() if kind == "one token" else ())  # groups have one kind
            ),
            *(
                Engine(kind, f"asynchronous scheduling {word}", {"async_scheduling": word == "on"}, why_not=gpu)
                for word in ("on", "off")
            ),
            Engine(kind, "tensor parallel", usual | parallel, why_not="one GPU" if tested.num_gpus == 1 else ""),
        ]
    for engine in found:
        if engine.kind == "one token" and tested.slot_start != "left_token":
            engine.why_not = f"slot_start is {tested.slot_start!r}: groups alone"
    return sorted(found, key=lambda engine: [one.variant for one in found].index(engine.variant))


# ------------------------------------------------------------------------------------------ an engine, in a process of its own


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        adapter: its folder; None: without.
        model: in float32, with the adapter.
        rough: the same in the engine's dtype; None where that is float32.
    """

    case: Case
    adapter: str | None
    model: Any
    rough: Any


def asked_of(engine: Engine, tested: Tested) -> list[Asked]:
    """Returns what an engine is asked in one batch."""
    adapters: list[str | None] = [None]
    if engine.variant == "adapters":
        adapters += [one for one in tested.adapters if engine.kind == "groups" or not is_of_slots(one)]
    found = []
    for adapter in adapters:
        model = tested.model(adapter=adapter)
        rough = None if engine.dtype == "float32" else tested.model(engine.dtype, adapter)
        found += [Asked(case, adapter, model, rough) for case in cases_of(engine, model, adapter)]
    return found


def cases_of(engine: Engine, model, adapter: str | None = None) -> list[Case]:
    is_short_of_room = engine.variant == "too few blocks"
    if engine.kind == "one token":
        more = requests.long_blanks if is_short_of_room else requests.one_token_cases
        return requests.same_tokens(model) + more(model)
    ways = requests.WAYS
    if model.config.slot_start == "left_token" and (adapter is None or not is_of_slots(adapter)):
        ways = ways | requests.DRAFTS  # which content rows check
    if engine.dtype != "float32":  # rounding may change which order is chosen
        ways = {name: way for name, way in ways.items() if not name.startswith("dynamic")}
    return requests.long_groups(model, ways) if is_short_of_room else requests.cases_of(model, ways)[::3]


def is_of_slots(adapter: str) -> bool:
    return isinstance(CheckpointInfo.read(adapter).adapter_config, SlotLoraConfig)


def settings_of(engine: Engine, tested: Tested) -> dict[str, Any]:
    """Returns the arguments of `vllm.LLM` that this setting needs beside those of the tests."""
    found = {"dtype": engine.dtype, "max_num_seqs": SEQS, "enforce_eager": False, **engine.settings}
    overrides = {"architectures": ["A3LlamaForCausalLM"], "model_type": "a3_llama", "slot_start": tested.slot_start}
    if engine.kind == "groups":
        overrides["canvas_length"] = CANVAS
        found.setdefault("max_num_batched_tokens", 2 * SEQS * CANVAS)
    if tested.is_gpu:
        found |= {"gpu_memory_utilization": 0.6, "kv_cache_memory_bytes": 2 << 30}
    if engine.variant == "adapters":
        rank = max(CheckpointInfo.read(adapter).adapter_config.r for adapter in tested.adapters)
        room = next(room for room in ADAPTER_RANKS if room >= rank)
        found |= {"enable_lora": True, "max_loras": len(tested.adapters) + 1, "max_lora_rank": room}
    return found | {"hf_overrides": overrides | found.get("hf_overrides", {})}


def run_engine(engine: Engine, tested: Tested, scratch: Path, results: Path) -> None:
    """Starts an engine, and writes a line of JSON for each check that is done."""
    from vllm.lora.request import LoRARequest

    from tests.engines.vllm.engines import ask, counter
    from tests.engines.vllm.engines import engine as started

    torch.set_grad_enabled(False)
    batch, loras = asked_of(engine, tested), {}
    for number, adapter in enumerate(sorted({one.adapter for one in batch if one.adapter is not None}), start=1):
        export(adapter, scratch / f"{engine.kind}{number}", base=tested.folder)
        loras[adapter] = LoRARequest(adapter, number, str(scratch / f"{engine.kind}{number}"))
    if engine.variant == "too few blocks":
        checks = [("in one batch", batch, True, "num_preemptions")]
    else:
        checks = [
            ("in one batch", batch, True, None),
            ("from the prefix cache", batch, True, "prefix_cache_hits"),
            ("one by one", batch[::5], False, "prefix_cache_hits"),
        ]
    with started(tested.folder, **settings_of(engine, tested)) as llm:
        for name, asked, together, grows in checks:
            start, before = time.perf_counter(), counter(llm, grows)
            lora = [loras.get(one.adapter) for one in asked] if loras else None
            line = judged(asked, ask(llm, [one.case for one in asked], together=together, lora=lora))
            grown = counter(llm, grows) - before
            line |= {
                "check": name,
                "seconds": time.perf_counter() - start,
                "why": f"{grows} +{grown:.0f}" if grows else "",
            }
            if grows and not grown:
                line |= {"result": "failed", "why": f"{grows} did not grow, so that nothing was tested"}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")


def judged(asked: Sequence[Asked], written: Sequence[tuple[tuple, tuple]]) -> dict[str, Any]:
    """Returns numbers of answers and of equal ones, the largest difference in nats, how large it may be, and the result.

    Args:
        written: tokens and their log-probabilities of each answer.
    """
    equal, apart, rounding, is_right = 0, [0.0], [0.0], True
    for one, (tokens, log_probs) in zip(asked, written, strict=True):
        is_equal = tokens == one.case.answer
        equal += is_equal
        if one.case.groups is None:
            is_right &= is_equal
            continue
        true, best = scores(one.model, one.case, tokens)
        apart += (torch.tensor(log_probs) - true).abs().tolist()
        if one.case.is_greedy:
            apart += (best - true).tolist()
        if one.rough is not None:
            rounding += (scores(one.rough, one.case, tokens)[0] - true).abs().tolist()
    nats = max(NATS, TIMES_ROUNDING * torch.tensor(rounding).quantile(0.95).item())
    passed = is_right and all(number <= nats for number in apart)  # which NaN is not
    line = {"answers": len(asked), "equal": equal, "nats apart": max(apart), "of": nats}
    return line | {"result": "passed" if passed else "failed"}


def scores(model, case: Case, tokens: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (n,) the log-probabilities of an answer's tokens, and (n,) those of the likeliest tokens in their places."""
    size, columns = len(case.groups), torch.tensor(case.columns)
    is_given = torch.ones(size, dtype=torch.bool).index_fill(0, columns, False)
    input_ids = torch.zeros(1, size, dtype=torch.long)
    input_ids[0, is_given], input_ids[0, columns] = torch.tensor(case.given), torch.tensor(tokens)
    group_ids = torch.tensor([case.groups])
    logits = model(input_ids.to(model.device), group_ids=group_ids.to(model.device)).logits[0].cpu()
    log_probs = logits.float().log_softmax(-1)[columns]
    return log_probs.gather(1, torch.tensor(tokens)[:, None])[:, 0], log_probs.amax(-1)


# --------------------------------------------------------------------------------------------------- all engines, one by one


def run_process(command: Sequence[str], log: Path, environment: dict[str, str], seconds: float) -> str:
    """Runs a command that must end in time, and ends all that it started; returns why it failed, "" if it did not."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
            return "" if code == 0 else reason_in(log.read_text(errors="replace"), code)
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def reason_in(log: str, code: int) -> str:
    """Returns the error that ended a process: the last one that is not vLLM's "see above"."""
    errors = re.findall(r"(?:^|[ :])((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b: .+)$", log, re.MULTILINE)
    told = [error for error in errors if "Engine core init" not in error and "EngineDeadError" not in error]
    if told:
        return told[-1].strip()
    return f"ended by signal {-code}" if code < 0 else f"exit code {code}"


def lines_of(engine: Engine, results: Path, why: str) -> list[dict[str, Any]]:
    """Returns a line for each check of an engine; one that did not end well has failed, or this machine has no such kernel."""
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    if engine.why_not or why:
        is_absent = bool(engine.why_not) or (
            engine.variant in BACKENDS and "is not valid for this configuration" in why
        )
        done.append({"result": "not there" if is_absent else "failed", "why": engine.why_not or why})
    return [{name: ({"engine": engine.name} | line).get(name) for name in FIELDS} for line in done]


def environment_of(engine: Engine, *, is_gpu: bool) -> dict[str, str]:
    """Returns a process's environment; what the user has set stays, but for what blanks need."""
    usual, needed = dict(USUAL), dict(ENVIRONMENT)
    if not is_gpu:
        usual |= ON_CPU
        needed["TRITON_INTERPRET"] = "1"
    if engine.variant == "tensor parallel" and not is_gpu:
        usual["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if (os.cpu_count() or 1) > 1 else "0|0"
    elif engine.settings.get("enforce_eager"):
        usual["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # then all requests are there when the first step begins
    return usual | os.environ | needed


def make_tiny(folder: Path) -> list[str]:
    """Writes a random model and an adapter of each kind; returns the folders of the adapters. The model's is `folder/base`."""
    from tests.conftest import tiny_model

    def base():
        return tiny_model(slot_start="left_token", dtype=torch.float32, **requests.SHAPE)

    return [requests.adapter(folder, base(), rows, number)[1] for number, rows in enumerate(("slots", "all"))]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/smollm2-135m", help="folder of a LLaMA or an A3 model")
    parser.add_argument("--tiny", action="store_true", help="a random model in place of it, with adapters")
    parser.add_argument("--adapter", action="append", default=[], help="folder of an adapter; repeat for more")
    parser.add_argument("--out", type=Path, help="writes the table, versions and device; .json")
    parser.add_argument("--only", default="", help="engines whose name holds this, as 'one token' or 'blocks'")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each engine, its start included")
    for name in ("--engine", "--scratch", "--results"):  # of the processes that this script starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main() -> int:
    arguments = parse()
    is_gpu, scratch = torch.cuda.is_available(), arguments.scratch
    machine = {"is_gpu": is_gpu, "num_gpus": torch.cuda.device_count()}
    if arguments.engine:
        tested = Tested.read(arguments.model, arguments.adapter, **machine)
        [engine] = [engine for engine in plan(tested) if engine.name == arguments.engine]
        run_engine(engine, tested, Path(scratch), Path(arguments.results))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # which ends the engine that runs, too
    with tempfile.TemporaryDirectory(prefix="confirm-vllm-") as scratch:
        model, adapters = arguments.model, arguments.adapter
        if arguments.tiny:
            model, adapters = f"{scratch}/base", make_tiny(Path(scratch))
        try:
            tested = Tested.read(model, adapters, **machine)
            if not any(arguments.only in engine.name for engine in plan(tested)):
                raise ValueError(
                    f"only={arguments.only!r}: expected a part of {', '.join(one.name for one in plan(tested))}"
                )
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        command = [sys.executable, __file__, model, *(word for one in adapters for word in ("--adapter", one))]
        engines, lines = [engine for engine in plan(tested) if arguments.only in engine.name], []
        for number, engine in enumerate(engines):
            results, log, why = Path(scratch, f"{number}.jsonl"), Path(scratch, f"{number}.log"), ""
            if not engine.why_not:
                words = ["--engine", engine.name, "--scratch", scratch, "--results", str(results)]
                own = environment_of(engine, is_gpu=is_gpu)
                why = run_process([*command, *words], log, own, arguments.timeout)
            lines += (found := lines_of(engine, results, why))
            print(f"{engine.name}: {found[-1]['result']} {found[-1]['why']}", flush=True)
            if why:
                print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
    about = environment("cuda" if is_gpu else "cpu")
    about["versions"]["vllm"] = version("vllm")
    print(markdown_table(FIELDS, ([line[name] for name in FIELDS] for line in lines)))
    results = [line["result"] for line in lines]
    print(", ".join(f"{results.count(word)} {word}" for word in ("passed", "failed", "not there")))
    print(
        f"{about['device']}; {', '.join(f'{name} {number}' for name, number in about['versions'].items())}; {about['date']}"
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(about | {"checks": lines}, indent=2) + "\n")
    return int("failed" in results)


if __name__ == "__main__":
    sys.exit(main())
