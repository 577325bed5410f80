"""Times `left_token` with one row a token against two, in turns on the same model.

python eval/bench_one_row.py models/smollm2-135m --batch-sizes 1 16
"""

import argparse
import time
from datetime import date
from statistics import median

import torch
from transformers import AutoTokenizer

from a3_hf import A3LlamaForCausalLM
from a3_hf.evaluation.reporting.markdown import markdown_table
from a3_hf.models.a3_llama.generation_strategies import GroupwiseFilling

ONE_ROW = GroupwiseFilling._logits


def two_rows(filling: GroupwiseFilling, slots: torch.Tensor) -> torch.Tensor:
    return filling.decoder.logits_of(filling.content, slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a LLaMA")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--length", type=int, default=32, help="of the blank, in tokens")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model = A3LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, slot_start="left_token").eval()
    model.pack_weights()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = f"One day, a little girl named Lily <blank:{arguments.length}> and they went home together."
    table = []
    for batch_size in arguments.batch_sizes:
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        texts = {}
        for _ in range(arguments.repeats):
            for name, logits in (("two", two_rows), ("one", ONE_ROW)):
                GroupwiseFilling._logits = logits
                start = time.perf_counter()
                texts[name] = model.infill(tokenizer, [text] * batch_size)
                seconds[name].append(time.perf_counter() - start)
        rates = {name: batch_size * arguments.length / median(each) for name, each in seconds.items()}
        same = sum(a == b for a, b in zip(texts["one"], texts["two"], strict=True))
        table.append(
            [str(batch_size), f"{rates['two']:.1f}", f"{rates['one']:.1f}", f"{rates['one'] / rates['two']:.2f}",
             f"{same} of {batch_size}"]
        )  # fmt: skip
    head = ["batch", "two rows, tokens a second", "one row, tokens a second", "ratio", "texts equal"]
    print(markdown_table(head, table))
    print(f"{date.today()}, {model.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
