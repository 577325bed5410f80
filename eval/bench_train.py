"""What a training step costs beside a plain LLaMA's: time and memory, forward and backward, side by side in one run.

    python eval/bench_train.py --shape 512,8,32000 --length 512 --batch-size 4
    python eval/bench_train.py --shape 2048,16,128256 --length 2048 --dtype bfloat16 --gradient-checkpointing

The same rows for all: a LLaMA predicts each token from those before it; A3 predicts it under the orders of a stage, drawn
anew for each step. Interleaved rounds, medians. A step is forward and backward; an optimizer's share, the same for all, is
left out. Memory is the most that a step holds beyond the weights, its gradients among it.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
from bench_decode import PeakMemory, profile, random_models, timed
from rich.console import Console
from rich.progress import track
from rich.table import Table

from a3_hf.models.a3_llama.attention_masks import MaskCache
from a3_hf.models.a3_llama.chunked_cross_entropy import chunked_cross_entropy
from a3_hf.training.curriculum import draw_order
from a3_hf.training.model_inputs import model_inputs
from a3_hf.training.schedule import StageAtStep
from a3_hf.training.throughput import peak_flops, training_flops

BASE = "llama"
COLUMNS = (
    "",
    "forward s",
    "backward s",
    "step s",
    "× llama",
    "× flops",
    "peak MiB",
    "× llama",
    "tokens/s",
    "MFU",
    "rounds",
)
STAGES = {
    "ar": StageAtStep("ar", group_size=1, index=0),
    "expand 4": StageAtStep("expand", group_size=4, index=0),
    "permute 1": StageAtStep("permute", group_size=1, index=0),
    "permute 4": StageAtStep("permute", group_size=4, index=0),
}


@dataclass
class Result:
    """One contestant: medians of seconds, and beside the base's its time, its arithmetic and its memory."""

    name: str
    forward: float
    backward: float
    rounds: int
    peak_mib: float | None
    flops: float
    time_ratio: float = 1.0
    flops_ratio: float = 1.0
    memory_ratio: float | None = None
    tokens_per_s: float = 0.0
    mfu: float | None = None

    @property
    def step(self) -> float:
        return self.forward + self.backward

    def cells(self) -> list[str]:
        return [
            self.name,
            f"{self.forward:.3f}",
            f"{self.backward:.3f}",
            f"{self.step:.3f}",
            f"{self.time_ratio:.2f}",
            f"{self.flops_ratio:.2f}",
            "" if self.peak_mib is None else f"{self.peak_mib:.0f}",
            "" if self.memory_ratio is None else f"{self.memory_ratio:.2f}",
            f"{self.tokens_per_s:.0f}",
            "" if self.mfu is None else f"{self.mfu:.1%}",
            str(self.rounds),
        ]


def text_order_inputs(order, input_ids: torch.Tensor) -> dict:
    """The arguments of the same step with the tokens where the text has them; masks are scattered then."""
    return {
        "input_ids": input_ids,
        "position_ids": (order.attention_mask.long().cumsum(1) - 1).clamp_min(0),
        "group_ids": order.group_ids,
        "attention_mask": order.attention_mask,
        "labels": input_ids.masked_fill(~order.scored_mask, -100),
        "use_cache": False,
    }


def contestants(base, a3, input_ids: torch.Tensor, *, on_gpu: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """What is compared: calls that return a loss, orders drawn within."""
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    generator, kept = torch.Generator().manual_seed(0), MaskCache()

    def llama(chunked: bool) -> torch.Tensor:
        if not chunked:
            return base(input_ids, labels=input_ids, use_cache=False).loss
        hidden_states = base.model(input_ids, use_cache=False).last_hidden_state
        return chunked_cross_entropy(hidden_states[:, :-1], base.lm_head, input_ids[:, 1:]).loss

    def step(stage: StageAtStep, *, chunked: bool, text_order: bool = False, implementation: str = "sdpa"):
        order = draw_order(stage, attention_mask, generator=generator)
        a3.config._attn_implementation = implementation
        if text_order:
            arguments = text_order_inputs(order, input_ids)
        else:
            arguments = model_inputs(
                order, input_ids, group_size=stage.group_size, implementation=implementation, kept=kept
            )
        return a3(**arguments, chunked_loss=chunked).loss

    calls = {BASE: lambda: llama(False), f"{BASE}, chunked loss": lambda: llama(True)}
    for name, stage in STAGES.items():
        calls[name] = lambda stage=stage: step(stage, chunked=False)
        calls[f"{name}, chunked loss"] = lambda stage=stage: step(stage, chunked=True)
    permute = STAGES["permute 4"]
    calls["permute 4, text order"] = lambda: step(permute, chunked=False, text_order=True)
    if on_gpu:
        flex = {"implementation": "flex_attention"}
        calls["permute 4, flex"] = lambda: step(permute, chunked=False, **flex)
        calls["permute 4, flex, chunked loss"] = lambda: step(permute, chunked=True, **flex)
        calls["permute 4, flex, text order"] = lambda: step(permute, chunked=False, text_order=True, **flex)
    return calls


def measure(calls: dict[str, Callable], models: list, *, rounds: int) -> dict[str, tuple[list, list, float | None]]:
    """Seconds forward and backward of each call in turns, and the peak of the first."""

    def forget() -> None:
        for model in models:
            model.zero_grad(set_to_none=True)

    measured = {name: ([], [], None) for name in calls}
    for round_number in track(range(rounds + 1), transient=True):
        for name, call in calls.items():
            forget()
            if round_number == 0:  # warms up; the second step's memory is that of any later one
                timed(lambda call=call: call().backward())
                forget()
                with PeakMemory() as memory:
                    timed(lambda call=call: call().backward())
                measured[name] = ([], [], memory.mib)
                continue
            forward, loss = timed(call)
            backward, _ = timed(loss.backward)
            measured[name][0].append(forward)
            measured[name][1].append(backward)
            del loss
    forget()
    return measured


def markdown(header: dict, rows: list[list[str]], shares: list[dict]) -> str:
    lines = ["`" + ", ".join(f"{key} {value}" for key, value in header.items()) + "`", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if shares:
        lines += [
            "",
            "**what takes the time of permute 4, chunked loss**",
            "",
            "| operator | share | calls |",
            "|---|---|---|",
        ]
        lines += [f"| {row['operator']} | {row['share']:.1%} | {row['calls']} |" for row in shares]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="512,8,32000", help="hidden,layers,vocabulary")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names, such as 'permute*'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peak-flops", type=float, help="of the device, for MFU where the device is not known")
    parser.add_argument("--profile", action="store_true", help="tell what takes the time of a permute step")
    parser.add_argument("--output", type=Path, help="write PATH.json and PATH.md as well")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    models = [
        model.to(device=device, dtype=dtype).train() for model in random_models(arguments.shape, arguments.length)
    ]
    if arguments.gradient_checkpointing:
        for model in models:
            model.gradient_checkpointing_enable()
    base, a3 = models
    input_ids = torch.randint(3, base.config.vocab_size, (arguments.batch_size, arguments.length), device=device)
    calls = {
        name: call
        for name, call in contestants(base, a3, input_ids, on_gpu=device.type == "cuda").items()
        if name == BASE or any(fnmatch(name, pattern) for pattern in arguments.only)
    }
    peak = arguments.peak_flops or peak_flops(device, dtype)
    header = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {arguments.threads} threads",
        "dtype": arguments.dtype,
        "model": f"random {arguments.shape}",
        "rows": f"{arguments.batch_size} × {arguments.length}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rounds": arguments.rounds,
        "gradient_checkpointing": arguments.gradient_checkpointing,
    }
    console = Console(width=150)
    console.print(", ".join(f"{key} {value}" for key, value in header.items()))

    tokens = input_ids.numel()
    results = []
    for name, (forward, backward, peak_mib) in measure(calls, models, rounds=arguments.rounds).items():
        flops = training_flops(base.config, length=arguments.length, slots=not name.startswith(BASE)) * tokens
        result = Result(name, statistics.median(forward), statistics.median(backward), len(forward), peak_mib, flops)
        first = results[0] if results else result
        result.time_ratio, result.flops_ratio = result.step / first.step, flops / first.flops
        result.memory_ratio = None if peak_mib is None else peak_mib / first.peak_mib
        result.tokens_per_s = tokens / result.step
        result.mfu = None if peak is None else flops / result.step / peak
        results.append(result)
    table = Table(title="a training step")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(*result.cells())
    console.print(table)
    shares = []
    if arguments.profile:
        shares = profile(lambda: calls["permute 4, chunked loss"]().backward())
        for row in shares:
            console.print(f"  {row['operator']}  {row['share']:.1%}  {row['calls']}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        rows = [{**asdict(result), "step": result.step} for result in results]
        content = json.dumps({**header, "rows": rows, "profile": shares}, indent=2, ensure_ascii=False)
        arguments.output.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
        text = markdown(header, [result.cells() for result in results], shares)
        arguments.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
