"""Decoding speed of A3 beside its base's own `generate`, side by side in one run.

    python eval/bench_decode.py ../shared/data/models/stories260K
    python eval/bench_decode.py --shape 512,8,32000 --new-tokens 128

Batch 1, greedy, both with a cache, interleaved rounds, medians. Speed does not depend on what the weights have learnt: a
plain LLaMA serves for both sides. The limit of a group of g tokens is g times the base.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from a3_hf import A3LlamaConfig, A3LlamaForCausalLM


def random_models(shape: str, context: int) -> tuple[LlamaForCausalLM, A3LlamaForCausalLM]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a LLaMA or A3 checkpoint")
    parser.add_argument("--shape", help="random weights instead: hidden,layers,vocabulary")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--profile", action="store_true", help="print what eats the time of group size 4")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    if (arguments.model is None) == (arguments.shape is None):
        parser.error("give a model or --shape")

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    if arguments.shape:
        base, a3 = random_models(arguments.shape, arguments.prompt_tokens + arguments.new_tokens)
    else:
        base = LlamaForCausalLM.from_pretrained(arguments.model)
        a3 = A3LlamaForCausalLM.from_pretrained(arguments.model)
    base, a3 = (model.to(device=device, dtype=dtype).eval() for model in (base, a3))
    prompt = torch.randint(3, base.config.vocab_size, (1, arguments.prompt_tokens), device=device)
    new = arguments.new_tokens

    def run_base():
        # EOS is forbidden, so that the base writes as many tokens as A3
        return base.generate(
            prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    def run_a3(group_size):
        return lambda: a3.generate_any_order(prompt, max_new_tokens=new, group_size=group_size)

    contestants = {"base.generate": run_base, **{f"groupwise {size}": run_a3(size) for size in arguments.group_sizes}}
    seconds = {name: [] for name in contestants}
    for round_number in range(arguments.rounds + 1):  # the first round warms up
        for name, run in contestants.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    where = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {arguments.threads} threads"
    )
    header = {
        "date": date.today().isoformat(),
        "device": where,
        "dtype": arguments.dtype,
        "model": Path(arguments.model).name if arguments.model else f"random {arguments.shape}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": new,
        "rounds": arguments.rounds,
    }
    table = Table(title=", ".join(f"{key} {value}" for key, value in header.items()))
    for column in ("", "passes", "s", "tokens/s", "ms per pass", "times the base", "limit"):
        table.add_column(column, justify="right")
    rows = []
    for name, median in medians.items():
        size = int(name.split()[-1]) if name.startswith("groupwise") else 1
        passes = -(-new // size)
        ratio = medians["base.generate"] / median
        rows.append({"name": name, "passes": passes, "seconds": median, "tokens_per_s": new / median, "ratio": ratio})
        cells = f"{median:.3f}", f"{new / median:.0f}", f"{1000 * median / passes:.2f}", f"{ratio:.2f}", str(size)
        table.add_row(name, str(passes), *cells)
    Console(width=110).print(table)
    if arguments.profile:
        profile_steps(run_a3(4))
    if arguments.json:
        arguments.json.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")


def profile_steps(run) -> None:
    """Self time by operator over one generation: arithmetic against everything around it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        run()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))


if __name__ == "__main__":
    main()
