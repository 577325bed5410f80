"""Seconds of a HellaSwag evaluation: A3's exact likelihood, lm-eval's `hf` on the base, and a Monte Carlo bound's passes.

    python eval/bench_likelihood.py ../shared/data/models/stories260K runs/stories260k ../shared/data

Interleaved in one run, medians. Masked diffusion models bound a likelihood by the mean over 128 masks (paper §1 lists those
that are compared there): `128 passes` is `hf`'s pass repeated so often, on a tenth of the items, as a measure of what that
costs, whatever the model.
"""

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter

import torch
from check_likelihood import requests_of
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from rich.table import Table

from a3_hf.evaluation.lm_harness.a3_lm import A3LM
from a3_hf.evaluation.lm_harness.causal_lm import CausalLM
from a3_hf.evaluation.reporting.results import write_result

MONTE_CARLO = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("model")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the rows to this JSON")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"device": device, "batch_size": arguments.batch_size}
    contestants = {
        "hf, base": HFLM(arguments.base, **settings),
        "a3_ar, base": CausalLM(arguments.base, **settings),
        "a3, left to right": A3LM(arguments.model, **settings),
        "a3, random order": A3LM(arguments.model, order="random", **settings),
        "a3, mean of 4 random orders": A3LM(arguments.model, order="random", num_orders=4, **settings),
    }
    requests = requests_of(arguments.data_dir, arguments.count)
    seconds = {name: [] for name in (*contestants, "128 passes")}
    for lm in contestants.values():
        lm.loglikelihood(requests[:64], disable_tqdm=True)
    for _ in range(arguments.rounds):
        for name, lm in contestants.items():
            start = perf_counter()
            lm.loglikelihood(requests, disable_tqdm=True)
            seconds[name].append(perf_counter() - start)
    few = requests[: len(requests) // (10 * MONTE_CARLO) + 8]
    start = perf_counter()
    for _ in range(MONTE_CARLO):
        contestants["hf, base"].loglikelihood(few, disable_tqdm=True)
    seconds["128 passes"].append((perf_counter() - start) * len(requests) / len(few))

    base = statistics.median(seconds["hf, base"])
    table = Table(
        title=f"{arguments.count} HellaSwag items, {len(requests)} requests, batches of {arguments.batch_size}"
    )
    for column in ("", "seconds", "against hf", "passes per request"):
        table.add_column(column, justify="right")
    rows = []
    for name, values in seconds.items():
        passes = {"128 passes": MONTE_CARLO, "a3, mean of 4 random orders": 4}.get(name, 1)
        if name.startswith("a3"):
            spent = contestants[name].speed.table()["hellaswag"]
            assert spent["passes"] == passes * spent["requests"]
        middle = statistics.median(values)
        rows.append({"model": name, "seconds": middle, "against_hf": middle / base, "passes_per_request": passes})
        table.add_row(name, f"{middle:.2f}", f"{middle / base:.2f}×", str(passes))
    Console(width=100).print(table)
    config = {name: str(value) for name, value in vars(arguments).items() if name != "output"}
    if arguments.output:
        write_result(arguments.output, "speed", config, rows, device=device)
    else:
        print(json.dumps(config))


if __name__ == "__main__":
    main()
