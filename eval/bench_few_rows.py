"""A matrix product of few rows on a CPU, two ways: `linear`, and weight · inputᵀ (`a3_hf/models/a3_llama/cpu_linear.py`).

    python eval/bench_few_rows.py

Microseconds a product, medians; each weight is read from memory, not from a cache, as in a pass through a model.
"""

import argparse
import platform
import statistics
import time
from datetime import date

import torch

from a3_hf.models.a3_llama.cpu_linear import other_way_round

SHAPES = ((512, 512), (1344, 512), (512, 1344), (2048, 2048), (5632, 2048), (32000, 512))
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 48, 64, 96)
ENTRIES = 50_000_000  # of all weights of a shape together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{date.today()}, {platform.machine()} CPU, {arguments.threads} threads, torch {torch.__version__}, fp32\n")
    print("| weight | way | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |")
    print("|---" * (len(ROWS) + 2) + "|")
    ways = {"linear": torch.nn.functional.linear, "weight · inputᵀ": other_way_round}
    for shape in SHAPES:
        weights = [torch.randn(shape) for _ in range(max(2, min(60, ENTRIES // (shape[0] * shape[1]))))]
        cells = {name: [] for name in ways}
        with torch.inference_mode():
            for num_rows in ROWS:
                rows = torch.randn(num_rows, shape[1])
                seconds = {name: [] for name in ways}
                for _ in range(arguments.rounds):
                    for name, product in ways.items():
                        start = time.perf_counter()
                        for weight in weights:
                            product(rows, weight)
                        seconds[name].append((time.perf_counter() - start) / len(weights))
                for name, times in seconds.items():
                    cells[name].append(f"{1e6 * statistics.median(times):.0f}")
        for name, row in cells.items():
            print(f"| {shape[0]} × {shape[1]} | {name} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
