"""The LLaMA's own text in fewer passes: tokens a pass, clock and equality, for stories and chat apart.

    python eval/bench_lossless.py models/smollm2-135m ../shared/data/rocstories/cloze_test_val__spring2016.csv --count 50

Each contestant continues each prompt greedily, in turns, at batch 1: the first two sentences of `--count` stories, and as many
questions of `eval/questions.txt` in the chat template. The contestants are transformers' `generate`, the same with prompt
lookup, and this package's decoding with packed weights: one token at a time, and with lookup drafts that the content stream
checks. Passes are calls of the model; equal texts are those of the first contestant up to its EOS.
"""

import argparse
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from infill_rocstories import read_stories
from rich.progress import track
from transformers import AutoTokenizer, LlamaForCausalLM

from a3_hf import A3LlamaForCausalLM
from a3_hf.evaluation.reporting.markdown import markdown_table

QUESTIONS = Path(__file__).with_name("questions.txt")
LOOKUP_TOKENS = 10  # drafts of transformers' prompt lookup, as its documentation has them
# Takes a prompt (1, C); returns the text (1, C + n) and the number of passes.
Contestant = Callable[[torch.Tensor], tuple[torch.Tensor, int]]


def generates(llama: LlamaForCausalLM, length: int, **settings) -> Contestant:
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    llama.register_forward_pre_hook(count)

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        before = passes
        text = llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, **settings
        )
        return text, passes - before

    return run


def fills(model: A3LlamaForCausalLM, length: int, **settings) -> Contestant:
    def run(ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        output = model.generate_any_order(ids, max_new_tokens=length, **settings)
        return output.sequences[:, : int((output.group_ids >= 0).sum())], output.num_forward_passes

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a LLaMA whose tokenizer has a chat template")
    parser.add_argument("stories", type=Path, help="file of the story cloze test")
    parser.add_argument("--count", type=int, default=50, help="prompts of each kind")
    parser.add_argument("--length", type=int, default=64, help="most tokens to write")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    llama = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model = A3LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    model.pack_weights()
    stories = [" ".join(sentences[:2]) for sentences in read_stories(arguments.stories)[: arguments.count]]
    questions = QUESTIONS.read_text(encoding="utf-8").splitlines()[: arguments.count]
    prompts = {
        "stories": [[tokenizer.bos_token_id, *tokenizer.encode(story, add_special_tokens=False)] for story in stories],
        "chat": [
            tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)[
                "input_ids"
            ]
            for question in questions
        ],
    }
    contestants = {
        "generate": generates(llama, arguments.length),
        "generate, prompt lookup": generates(llama, arguments.length, prompt_lookup_num_tokens=LOOKUP_TOKENS),
        "one token at a time, packed": fills(model, arguments.length),
        "lookup, packed": fills(model, arguments.length, strategy="speculative", draft="ngram", verify="content"),
    }
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for run in contestants.values():
        run(torch.tensor([prompts["stories"][0]]))  # warms up
    for kind, rows in prompts.items():
        for row in track(rows, kind):
            ids = torch.tensor([row])
            wanted = None
            for name, run in contestants.items():
                start = time.perf_counter()
                text, passes = run(ids)
                total = totals[kind, name]
                total["seconds"] += time.perf_counter() - start
                total["tokens"] += text.shape[1] - ids.shape[1]
                total["passes"] += passes
                wanted = text if wanted is None else wanted
                total["equal"] += torch.equal(text, wanted)
    table = []
    for (kind, name), total in totals.items():
        base = totals[kind, "generate"]
        table.append(
            {
                "prompts": kind,
                "": name,
                "tokens a pass": total["tokens"] / total["passes"],
                "tokens/s": total["tokens"] / total["seconds"],
                "× generate": (total["tokens"] / total["seconds"]) / (base["tokens"] / base["seconds"]),
                "equal texts": f"{total['equal']:.0f} of {len(prompts[kind])}",
            }
        )
    print(f"{arguments.model}, greedy, {arguments.length} tokens, {date.today()}, {platform.machine()} CPU, fp32, threads: "
          f"{arguments.threads}, torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    cells = [[one if isinstance(one, str) else f"{one:.2f}" for one in row.values()] for row in table]
    print(markdown_table(list(table[0]), cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
