"""Decoding speed of every strategy beside the base's own `generate`, side by side in one run.

    python eval/bench_decode.py --shape 512,8,32000 --lengths 256 --batch-sizes 1 --profile
    python eval/bench_decode.py ../shared/data/models/stories260K --only 'groupwise*' 'speculative*'
    python eval/bench_decode.py --shape 2048,16,128256 --dtype bfloat16 --lengths 256 1024 --output eval/results/gpu_1b

Greedy, with a cache unless its name says otherwise; interleaved rounds, medians. Tokens per second count what was written.
Speed does not depend on what the weights have learnt, so a plain LLaMA serves for both sides, but for the passes of
`speculative`, which do. The limit of a pass that writes g tokens is g times the base.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from a3_hf import A3LlamaConfig, A3LlamaForCausalLM

BASE = "base.generate"
COLUMNS = ("", "passes", "tokens/pass", "s", "tokens/s", "ms/pass", "× base", "bandwidth", "peak MiB", "rounds")
COPIED = 2**25  # fp32 numbers: more than a processor's caches hold


@dataclass
class Result:
    """One contestant at one batch size and length.

    Attributes:
        seconds: the median; of one run where that took longer than `--patience`.
        ratio: the base's seconds to these.
        bandwidth: the share of the memory bandwidth, as measured by copying, that reading the weights once a pass takes.
        peak_mib: the most memory held during a run, beyond what was held before it.
    """

    name: str
    batch_size: int
    length: int
    passes: int
    seconds: float
    rounds: int
    peak_mib: float | None
    ratio: float = 1.0
    bandwidth: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        return self.batch_size * self.length / self.seconds

    def cells(self) -> list[str]:
        return [
            self.name,
            str(self.passes),
            f"{self.length / self.passes:.2f}",
            f"{self.seconds:.3f}",
            f"{self.tokens_per_s:.0f}",
            f"{1000 * self.seconds / self.passes:.2f}",
            f"{self.ratio:.2f}",
            f"{self.bandwidth:.0%}",
            "" if self.peak_mib is None else f"{self.peak_mib:.0f}",
            str(self.rounds),
        ]


def contestants(tokens_per_step: int, window: int) -> dict[str, dict]:
    """What is compared with the base: settings of `generate_any_order`."""
    dynamic = {"strategy": "dynamic", "tokens_per_step": tokens_per_step}
    named = {f"groupwise {size}": {"group_size": size} for size in (1, 2, 4, 8, 16)}
    named[f"dynamic {tokens_per_step}"] = dynamic
    named[f"dynamic {tokens_per_step} uncached"] = {**dynamic, "use_cache": False}
    named[f"dynamic {tokens_per_step} window {window}"] = {**dynamic, "window": window}
    named[f"dynamic {tokens_per_step} window {window} uncached"] = {**dynamic, "window": window, "use_cache": False}
    for drafts in (4, 8):
        for source in ("model", "ngram"):
            settings = {"strategy": "speculative", "draft_tokens": drafts, "draft": source}
            named[f"speculative {drafts} {source}"] = settings
    return named


def random_models(shape: str, context: int) -> tuple[LlamaForCausalLM, A3LlamaForCausalLM]:
    """A LLaMA of a shape (hidden, layers, vocabulary) and an A3 model, with weights drawn at random."""
    hidden, layers, vocabulary = map(int, shape.split(","))
    settings = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": max(hidden // 64, 1),
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**settings)), A3LlamaForCausalLM(A3LlamaConfig(**settings))


def timed(run: Callable[[], object]) -> tuple[float, object]:
    """Seconds of a call, with all that it has put on the device, and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    returned = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, returned


class PeakMemory:
    """Within it, the peak is watched; `mib` is None where the system doesn't tell (outside Linux, without a GPU)."""

    mib: float | None = None

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            gc.collect()
            try:
                ctypes.CDLL(None).malloc_trim(0)  # what earlier runs left is given back
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            except (OSError, AttributeError):
                pass
        self.before = self._read(peak=False)
        return self

    def __exit__(self, *_) -> None:
        peak = self._read(peak=True)
        self.mib = None if peak is None else max(peak - self.before, 0.0)

    @staticmethod
    def _read(peak: bool) -> float | None:
        if torch.cuda.is_available():
            return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        name = "VmHWM:" if peak else "VmRSS:"
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)


def measured_bandwidth(device: str) -> float:
    """Bytes per second that copying a large tensor reads and writes."""
    source = torch.ones(COPIED, device=device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source))[0] for _ in range(10))
    return 2 * source.nbytes / seconds


def compare(base, a3, names: dict[str, dict], batch_size: int, length: int, arguments) -> list[Result]:
    """Measures all of `names` beside the base, in turns."""
    device = base.device
    prompt = torch.randint(3, base.config.vocab_size, (batch_size, arguments.prompt_tokens), device=device)

    def run_base():
        # EOS is forbidden, so that the base writes as many tokens as A3
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        return base.generate(
            prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, pad_token_id=0, **settings
        )

    runs = {BASE: run_base}
    for name, settings in names.items():
        settings = {"max_new_tokens": length, "eos_token_id": [], **settings}
        runs[name] = lambda settings=settings: a3.generate_any_order(prompt, **settings)
    results, seconds = {}, {name: [] for name in runs}
    for round_number in track(range(arguments.rounds + 1), f"batch {batch_size}, length {length}", transient=True):
        for name, run in runs.items():
            if round_number == 0:  # warms up, and watches the memory
                with PeakMemory() as memory:
                    elapsed, output = timed(run)
                passes = getattr(output, "num_forward_passes", length)
                results[name] = Result(name, batch_size, length, passes, elapsed, 1, memory.mib)
            elif results[name].seconds <= arguments.patience:
                seconds[name].append(timed(run)[0])
    weights = sum(weight.nbytes for weight in base.parameters()) - base.get_input_embeddings().weight.nbytes
    for name, result in results.items():
        if seconds[name]:
            result.seconds, result.rounds = statistics.median(seconds[name]), len(seconds[name])
        result.ratio = results[BASE].seconds / result.seconds
        result.bandwidth = weights * result.passes / result.seconds / arguments.bandwidth
    return list(results.values())


def profile(run: Callable[[], object]) -> list[dict]:
    """The operators that take most of the time themselves, with their share: arithmetic against everything around it."""
    on_gpu = torch.cuda.is_available()
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA] if on_gpu else [kinds.CPU]) as recorded:
        run()
    rows = [
        (event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in recorded.key_averages()
    ]
    total = sum(microseconds for _, microseconds, _ in rows)
    rows = sorted(rows, key=lambda row: -row[1])[:10]
    return [{"operator": key, "share": microseconds / total, "calls": count} for key, microseconds, count in rows]


def markdown(header: dict, tables: dict[str, list[list[str]]]) -> str:
    lines = ["`" + ", ".join(f"{key} {value}" for key, value in header.items()) + "`"]
    for title, rows in tables.items():
        heading = COLUMNS if len(rows[0]) == len(COLUMNS) else ("operator", "share", "calls")
        lines += ["", f"**{title}**", "", "| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a LLaMA or A3 checkpoint")
    parser.add_argument("--shape", help="random weights instead: hidden,layers,vocabulary")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256], help="tokens to write")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names, such as 'groupwise*'")
    parser.add_argument("--tokens-per-step", type=int, default=4, help="of dynamic")
    parser.add_argument("--window", type=int, default=32, help="of dynamic, where it has one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60, help="what takes longer, in seconds, is not repeated")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--profile", action="store_true", help="tell what takes the time of groupwise 4")
    parser.add_argument("--output", type=Path, help="write PATH.json and PATH.md as well")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.shape is None):
        parser.error("give a model or --shape")
    names = {
        name: settings
        for name, settings in contestants(arguments.tokens_per_step, arguments.window).items()
        if any(fnmatch(name, pattern) for pattern in arguments.only)
    }

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    context = arguments.prompt_tokens + max(arguments.lengths)
    if arguments.shape:
        base, a3 = random_models(arguments.shape, context)
    else:
        base = LlamaForCausalLM.from_pretrained(arguments.model)
        a3 = A3LlamaForCausalLM.from_pretrained(arguments.model)
        if context > base.config.max_position_embeddings:
            parser.error(f"--lengths: {context} tokens with the prompt; {arguments.model} takes fewer")
    base, a3 = (one.to(device=device, dtype=getattr(torch, arguments.dtype)).eval() for one in (base, a3))
    arguments.bandwidth = measured_bandwidth(device)

    here = f"{platform.machine()} CPU, {arguments.threads} threads"
    header = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else here,
        "GB/s": round(arguments.bandwidth / 1e9, 1),
        "dtype": arguments.dtype,
        "model": Path(arguments.model).name if arguments.model else f"random {arguments.shape}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt_tokens": arguments.prompt_tokens,
        "rounds": arguments.rounds,
    }
    console = Console(width=140)
    console.print(", ".join(f"{key} {value}" for key, value in header.items()))
    results, tables = [], {}

    def save(**more) -> None:
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            rows = [{**asdict(result), "tokens_per_s": result.tokens_per_s} for result in results]
            content = json.dumps({**header, "rows": rows, **more}, indent=2, ensure_ascii=False)
            arguments.output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
            arguments.output.with_suffix(".md").write_text(markdown(header, tables), encoding="utf-8")

    for length in arguments.lengths:
        for batch_size in arguments.batch_sizes:
            measured = compare(base, a3, names, batch_size, length, arguments)
            results += measured
            title = f"batch {batch_size}, {length} tokens"
            tables[title] = [result.cells() for result in measured]
            table = Table(title=title)
            for column in COLUMNS:
                table.add_column(column, justify="right")
            for row in tables[title]:
                table.add_row(*row)
            console.print(table)
            save()
    if arguments.profile:
        prompt = torch.randint(3, base.config.vocab_size, (1, arguments.prompt_tokens), device=device)
        settings = {"max_new_tokens": arguments.lengths[0], "group_size": 4, "eos_token_id": []}
        shares = profile(lambda: a3.generate_any_order(prompt, **settings))
        title = "what takes the time of groupwise 4 at batch 1"
        tables[title] = [[row["operator"], f"{row['share']:.1%}", str(row["calls"])] for row in shares]
        console.print(title)
        for row in tables[title]:
            console.print("  " + "  ".join(row))
        save(profile=shares)


if __name__ == "__main__":
    main()
