"""Speed of decoding with an adapter of query slots, beside the base's own `generate`, side by side in one run.

    python eval/bench_adapter.py ../shared/data/models/stories260K
    OMP_NUM_THREADS=1 python eval/bench_adapter.py MODEL --adapter PATH --threads 1 --rounds 9

Greedy, batch 1, with a cache; interleaved rounds, medians. The adapter is drawn at random (r 16, all linear layers) unless
`--adapter` names one. "plain": adapted rows are computed apart and joined with the others, as a reference.
"""

import argparse
import platform
import statistics
from datetime import date
from pathlib import Path

import torch
import transformers
from bench_decode import timed
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from a3_hf import A3LlamaForCausalLM
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoints import load_model
from a3_hf.adapters.layers import SlotLinear, attach

FAST = SlotLinear.forward


def plain_forward(layer: SlotLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer in peft's order of operations; content and slot rows are joined by a copy."""
    result = layer.base_layer(x)
    if layer.num_slots == 0 or layer.disable_adapters:
        return result
    content, adapted = result[:, : -layer.num_slots], result[:, -layer.num_slots :]
    for name in layer.active_adapters:
        down, up = layer.lora_A[name], layer.lora_B[name]
        slots = x[:, -layer.num_slots :].to(down.weight.dtype)
        adapted = adapted + (up(down(layer.lora_dropout[name](slots))) * layer.scaling[name]).to(result.dtype)
    return torch.cat([content, adapted], dim=1)


def random_adapter(model: A3LlamaForCausalLM) -> torch.nn.Module:
    """The model with slot adapters of rank 16 whose output is not zero."""
    adapted = attach(model, LoraArguments(r=16, rows="slots"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    return adapted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a LLaMA or A3 checkpoint")
    parser.add_argument("--adapter", help="a saved slot adapter of this model, in place of a random one")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=64, help="tokens to write")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    base = LlamaForCausalLM.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    a3, second = (A3LlamaForCausalLM.from_pretrained(arguments.model, dtype=dtype) for _ in range(2))
    a3 = a3.to(device).eval()
    adapted = random_adapter(second) if arguments.adapter is None else load_model(arguments.adapter, dtype=dtype)
    if not any(isinstance(module, SlotLinear) for module in adapted.modules()):
        parser.error(f"--adapter {arguments.adapter}: expected an adapter with rows: slots")
    adapted = adapted.to(device).eval()
    prompt = torch.randint(3, base.config.vocab_size, (1, arguments.prompt_tokens), device=device)
    length = arguments.length

    def run_base():
        # EOS is forbidden, so that the base writes as many tokens as A3
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        base.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, pad_token_id=0, **settings)

    def decoding(model, group_size, form="fast"):
        def run():
            SlotLinear.forward = {"plain": plain_forward, "fast": FAST}[form]
            model.generate_any_order(prompt, max_new_tokens=length, eos_token_id=[], group_size=group_size)

        return run

    runs = {"base.generate": run_base}
    for size in arguments.group_sizes:
        runs[f"groupwise {size}, no adapter"] = decoding(a3, size)
        for form in ("plain", "fast"):
            runs[f"groupwise {size}, adapter, {form}"] = decoding(adapted, size, form)
    seconds = {name: [] for name in runs}
    for round_number in range(arguments.rounds + 1):
        for name, run in runs.items():
            elapsed = timed(run)[0]
            if round_number:  # the first warms up
                seconds[name].append(elapsed)
    SlotLinear.forward = FAST

    here = f"{platform.machine()} CPU, {arguments.threads} threads"
    title = (
        f"{Path(arguments.model).name}, {length} tokens, {arguments.dtype}, "
        f"{torch.cuda.get_device_name() if device == 'cuda' else here}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {date.today().isoformat()}, {arguments.rounds} rounds"
    )
    table = Table(title=title)
    for column in ("", "s", "best s", "tokens/s", "× base", "× base, best"):
        table.add_column(column, justify="right")
    base_seconds = seconds["base.generate"]
    for name, measured in seconds.items():
        median = statistics.median(measured)
        table.add_row(
            name,
            f"{median:.3f}",
            f"{min(measured):.3f}",
            f"{length / median:.1f}",
            f"{statistics.median(base_seconds) / median:.2f}",
            f"{min(base_seconds) / min(measured):.2f}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
