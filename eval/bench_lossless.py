"""The LLaMA's own text in fewer passes: tokens a pass, clock and equality, for stories and chat apart.

    python eval/bench_lossless.py models/smollm2-135m ../shared/data/rocstories/cloze_test_val__spring2016.csv --count 50 \\
        --drafts adapters/smollm2-135m-drafts

Each contestant continues each prompt greedily, in turns, at batch 1: the first two sentences of `--count` stories, and as many
questions of `eval/questions.txt` in the chat template. The contestants are transformers' `generate`, the same with prompt
lookup, and this package's decoding with packed weights: one token at a time, and with drafts that the content stream checks,
from lookup, from a draft head, and from both. Passes are calls of the model. Equal texts are those of the first contestant
up to its EOS; with `--temperature`, those of this package's one token at a time with the same seed, and the mean
log-probability (nats a token, with its standard error over texts) of what each contestant wrote stands beside them. With
`--batch-size`, prompts go in padded batches.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import transformers
from infill_rocstories import read_stories
from rich.progress import track
from transformers import AutoTokenizer, LlamaForCausalLM, set_seed

from a3_hf import A3LlamaForCausalLM, attach_draft_head
from a3_hf.evaluation.reporting.markdown import markdown_table

QUESTIONS = Path(__file__).with_name("questions.txt")
LOOKUP_TOKENS = 10  # drafts of transformers' prompt lookup, as its documentation has them
ONE_BY_ONE = "one token at a time, packed"
# Takes prompts (B, C), their mask and a seed; returns the texts after each prompt, and the number of passes.
Contestant = Callable[[torch.Tensor, torch.Tensor, int], tuple[list[list[int]], int]]


def until_end(texts: torch.Tensor, ends: set[int]) -> list[list[int]]:
    """Each row up to its first end, with it."""
    cut = []
    for row in texts.tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        cut.append(row[: end + 1])
    return cut


def generates(llama: LlamaForCausalLM, length: int, ends: set[int], **settings) -> Contestant:
    passes = 0

    def count(*_) -> None:
        nonlocal passes
        passes += 1

    llama.register_forward_pre_hook(count)

    def run(ids: torch.Tensor, mask: torch.Tensor, seed: int) -> tuple[list[list[int]], int]:
        before = passes
        set_seed(seed)
        text = llama.generate(ids, attention_mask=mask, max_new_tokens=length, **settings)
        return until_end(text[:, ids.shape[1] :], ends), passes - before

    return run


def fills(model: A3LlamaForCausalLM, length: int, ends: set[int], **settings) -> Contestant:
    def run(ids: torch.Tensor, mask: torch.Tensor, seed: int) -> tuple[list[list[int]], int]:
        output = model.generate_any_order(ids, attention_mask=mask, max_new_tokens=length, seed=seed, **settings)
        return until_end(output.sequences[:, ids.shape[1] :], ends), output.num_forward_passes

    return run


@torch.no_grad()
def log_prob(llama: LlamaForCausalLM, prompt: list[int], text: list[int]) -> float:
    """Mean log-probability of a text's tokens after a prompt, in nats."""
    logits = llama(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1]
    return float(-torch.nn.functional.cross_entropy(logits.double(), torch.tensor(text)))


def batches(rows: list[list[int]], size: int, padding: int):
    for first in range(0, len(rows), size):
        chosen = rows[first : first + size]
        width = max(map(len, chosen))
        ids = torch.tensor([[padding] * (width - len(row)) + row for row in chosen])
        yield first, ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a LLaMA whose tokenizer has a chat template")
    parser.add_argument("stories", type=Path, help="file of the story cloze test")
    parser.add_argument("--drafts", help="a draft head")
    parser.add_argument("--draft-tokens", type=int, help="of the head, default 8")
    parser.add_argument("--draft-width", type=int, help="of the head, default 4")
    parser.add_argument("--count", type=int, default=50, help="prompts of each kind")
    parser.add_argument("--length", type=int, default=64, help="most tokens to write")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest tokens")
    parser.add_argument("--samples", type=int, default=1, help="with --temperature: texts of each prompt")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants beside generate and one token at a time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    arguments = parser.parse_args()
    if arguments.samples > 1 and not arguments.temperature:
        parser.error(f"samples={arguments.samples} has no effect without --temperature")

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
    prompts = {kind: rows * arguments.samples for kind, rows in prompts.items()}
    end = llama.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    padding = llama.generation_config.pad_token_id or min(ends)
    how = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature else {"do_sample": False}
    common = {"length": arguments.length, "ends": ends, **how}
    head = {name: value for name in ("draft_tokens", "draft_width") if (value := getattr(arguments, name)) is not None}
    checked = {"strategy": "speculative", "verify": "content", **common}
    contestants = {"generate": generates(llama, **common, **({"top_k": 0} if arguments.temperature else {}))}
    if arguments.batch_size == 1:  # transformers' own takes no batch
        contestants["generate, prompt lookup"] = generates(
            llama, **common, prompt_lookup_num_tokens=LOOKUP_TOKENS, **({"top_k": 0} if arguments.temperature else {})
        )
    contestants[ONE_BY_ONE] = fills(model, **common)
    contestants["lookup, packed"] = fills(model, draft="ngram", **checked)
    if arguments.drafts:
        attach_draft_head(model, arguments.drafts)
        contestants["draft head, packed"] = fills(model, draft="head", **head, **checked)
        contestants["lookup and draft head, packed"] = fills(model, draft="ngram+head", **head, **checked)
    if arguments.only is not None:
        unknown = set(arguments.only) - set(contestants)
        if unknown:
            parser.error(f"only={', '.join(sorted(unknown))}: expected some of {', '.join(contestants)}")
        wanted = {"generate", ONE_BY_ONE, *arguments.only}
        contestants = {name: run for name, run in contestants.items() if name in wanted}
    reference = ONE_BY_ONE if arguments.temperature else "generate"
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    likelihoods: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in contestants.values():
        run(*next(batches(prompts["stories"], arguments.batch_size, padding))[1:], 0)  # warms up
    for kind, rows in prompts.items():
        for first, ids, mask in track(list(batches(rows, arguments.batch_size, padding)), kind):
            texts = {}
            for name, run in contestants.items():
                start = time.perf_counter()
                texts[name], passes = run(ids, mask, first)
                total = totals[kind, name]
                total["seconds"] += time.perf_counter() - start
                total["tokens"] += sum(map(len, texts[name]))
                total["passes"] += passes * len(ids)
            for name, written in texts.items():
                totals[kind, name]["equal"] += sum(a == b for a, b in zip(written, texts[reference], strict=True))
                if arguments.temperature:
                    pairs = zip(rows[first : first + len(ids)], written, strict=True)
                    likelihoods[kind, name] += [log_prob(llama, prompt, text) for prompt, text in pairs]
    table = []
    for (kind, name), total in totals.items():
        base, plain = totals[kind, "generate"], totals[kind, ONE_BY_ONE]
        rate = total["tokens"] / total["seconds"]
        row = {
            "prompts": kind,
            "": name,
            "tokens a pass": total["tokens"] / total["passes"],
            "tokens/s": rate,
            "× generate": rate / (base["tokens"] / base["seconds"]),
            "× one token at a time": rate / (plain["tokens"] / plain["seconds"]),
            "equal texts": f"{total['equal']:.0f} of {len(prompts[kind])}",
        }
        if arguments.temperature:
            values = likelihoods[kind, name]
            error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            row["nats a token"] = f"{statistics.mean(values):.3f} ± {error:.3f}"
        table.append(row)
    how = f"temperature {arguments.temperature:g}" if arguments.temperature else "greedy"
    print(f"{arguments.model}, {how}, {arguments.length} tokens, batches of {arguments.batch_size}, {date.today()}, "
          f"{platform.machine()} CPU, fp32, threads: {arguments.threads}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}")  # fmt: skip
    cells = [[one if isinstance(one, str) else f"{one:.2f}" for one in row.values()] for row in table]
    print(markdown_table(list(table[0]), cells))
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
