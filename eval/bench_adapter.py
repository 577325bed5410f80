"""Speed of an adapter of query slots, side by side in one run: decoding beside the base's own `generate`, and a training step
with content rows without gradients beside one with gradients in all rows.

    python eval/bench_adapter.py models/smollm2-135m
    python eval/bench_adapter.py MODEL --adapter PATH --threads 1 --rounds 9

Decoding is greedy, batch 1, with a cache; on a CPU also with packed weights (`pack_weights`).
A training step is forward and backward of 2 rows of `--row-length` tokens in
scattered groups of 4: every token scored, or the last eighth alone. Interleaved rounds, medians. The adapter is drawn at
random (r 16, all linear layers) unless `--adapter` names one.
"""

import argparse
import itertools
import platform
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from bench_decode import PeakMemory, timed
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

from a3_hf import A3LlamaForCausalLM, GroupOrder
from a3_hf.adapters.arguments import LoraArguments
from a3_hf.adapters.checkpoints import load_model
from a3_hf.adapters.layers import SlotLinear, attach
from a3_hf.training.model_inputs import model_inputs


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
    parser.add_argument("--row-length", type=int, default=128, help="tokens of a row of the training step")
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

    def decoding(model, group_size, is_packed):
        body = model.base_model if model is a3 else model.get_base_model().model
        packed = body.packed_layers

        def run():
            body.packed_layers = packed if is_packed else None
            model.generate_any_order(prompt, max_new_tokens=length, eos_token_id=[], group_size=group_size)

        return run

    forms = {"": False}
    if device == "cpu" and dtype == torch.float32:
        a3.pack_weights()
        adapted.get_base_model().pack_weights()
        forms[", packed"] = True
    runs = {"base.generate": run_base}
    for size, (form, is_packed) in itertools.product(arguments.group_sizes, forms.items()):
        runs[f"groupwise {size}, no adapter{form}"] = decoding(a3, size, is_packed)
        runs[f"groupwise {size}, adapter{form}"] = decoding(adapted, size, is_packed)
    seconds = interleaved(runs, arguments.rounds)

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
    print_training(adapted, arguments.row_length, arguments.rounds)


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one that warms up."""
    seconds = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            elapsed = timed(run)[0]
            if round_number:
                seconds[name].append(elapsed)
    return seconds


def print_training(adapted: torch.nn.Module, row_length: int, rounds: int) -> None:
    """Prints seconds and peak memory of training steps, content rows without gradients or with."""
    body = adapted.get_base_model().model
    adapted.train().requires_grad_(False)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    device = body.embed_tokens.weight.device
    ids = torch.randint(3, body.config.vocab_size, (2, row_length), device=device)
    columns = torch.arange(row_length, device=device).expand_as(ids)
    table = Table(title=f"a training step, 2 rows of {row_length} tokens, {rounds} rounds")
    for column in ("", "s", "peak MiB beside weights"):
        table.add_column(column, justify="right")

    def step(is_frozen: bool, inputs):
        def run():
            body.content_is_frozen = is_frozen
            adapted(**inputs).loss.backward()
            adapted.zero_grad()

        return run

    runs = {}
    for scored, num_given in (("all tokens scored", 1), ("an eighth scored", row_length - row_length // 8)):
        order = GroupOrder.scattered(torch.ones_like(ids), group_size=4, given_mask=columns < num_given)
        inputs = model_inputs(
            order, ids, group_size=4, implementation="sdpa", slot_start=body.config.slot_start, scored_only=True
        )
        for name, is_frozen in (("gradients in all rows", False), ("none in content rows", True)):
            runs[f"{scored}, {name}"] = step(is_frozen, inputs)
    seconds = interleaved(runs, rounds)
    for name, run in runs.items():
        with PeakMemory() as peak:
            run()
        memory = "–" if peak.mib is None else f"{peak.mib:.0f}"
        table.add_row(name, f"{statistics.median(seconds[name]):.3f}", memory)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
