"""What each decoding strategy makes of ROCStories: passes, and the exact likelihood of what it wrote.

    python eval/strategies_rocstories.py runs/stories260k ../shared/data/rocstories/cloze_test_val__spring2016.csv

Two tasks: `infill`, the third sentence given all the others, at the true sentence's number of tokens; and `continue`, 64
tokens after the first two sentences. The likelihood is that of the written tokens, one by one from left to right, given all
other text, whatever the strategy: nats per token. `same as sequential` counts the texts equal to those of greedy
`groupwise` with groups of one.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from infill_rocstories import read_stories
from rich.console import Console
from rich.progress import track
from rich.table import Table

from a3_hf.adapters.checkpoints import load_model, load_tokenizer
from a3_hf.models.a3_llama.infilling_templates import encode_piece
from a3_hf.models.a3_llama.orders import GroupOrder

NEW_TOKENS = 64
SEQUENTIAL = "groupwise 1"
STRATEGIES = {
    SEQUENTIAL: {},
    "groupwise 4": {"group_size": 4},
    "dynamic": {"strategy": "dynamic"},
    "dynamic, threshold 0.5": {"strategy": "dynamic", "threshold": 0.5},
    **{
        f"speculative {drafts}, {source}": {"strategy": "speculative", "draft_tokens": drafts, "draft": source}
        for drafts in (4, 8)
        for source in ("model", "ngram")
    },
    "speculative 4, sampled": {"strategy": "speculative", "draft_tokens": 4, "do_sample": True, "seed": 0},
    "refine": {"strategy": "refine"},
}


def problems(tokenizer, sentences: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The ids (1, S) and blanks (1, S) of both tasks."""
    before = [tokenizer.bos_token_id, *encode_piece(tokenizer, " ".join(sentences[:2]), is_start=True)]
    blank = encode_piece(tokenizer, " " + sentences[2], is_start=False)
    after = encode_piece(tokenizer, " " + " ".join(sentences[3:]), is_start=False)
    tasks = {"infill": (before, blank, after), "continue": (before, [0] * NEW_TOKENS, [])}
    return {
        task: (
            torch.tensor([[*left, *middle, *right]]),
            torch.tensor([[False] * len(left) + [True] * len(middle) + [False] * len(right)]),
        )
        for task, (left, middle, right) in tasks.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("stories", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tasks", nargs="+", choices=["infill", "continue"], default=["infill", "continue"])
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model).eval()
    stories = list(islice(read_stories(arguments.stories), arguments.count))
    for task in arguments.tasks:
        likelihoods = {name: [] for name in STRATEGIES}
        tokens, passes, same, most = dict.fromkeys(STRATEGIES, 0), dict.fromkeys(STRATEGIES, 0), {}, {}
        for sentences in track(stories, task, transient=True):
            ids, blanks = problems(tokenizer, sentences)[task]
            sequential = None
            for name, settings in STRATEGIES.items():
                output = model.generate_any_order(ids, blanks, **settings)
                sequential = output.sequences if sequential is None else sequential
                groups = GroupOrder.infilling(blanks).group_ids
                log_probs = model.log_likelihood(output.sequences, groups)[blanks]
                likelihoods[name].append(log_probs.mean().item())
                tokens[name] += len(log_probs)
                passes[name] += output.num_forward_passes
                same[name] = same.get(name, 0) + torch.equal(output.sequences, sequential)
                most[name] = max(most.get(name, 0.0), output.num_forward_passes / len(log_probs))
        table = Table(title=f"{task}: {len(stories)} stories")
        columns = (
            "",
            "tokens per pass",
            "most passes per token",
            "log-likelihood",
            "same as sequential",
            "over dynamic",
        )
        for column in columns:
            table.add_column(column, justify="right")
        for name, values in likelihoods.items():
            pairs = list(zip(values, likelihoods["dynamic"], strict=True))
            rose, fell = (sum(sign * (one - other) > 1e-6 for one, other in pairs) for sign in (1, -1))
            table.add_row(
                name,
                f"{tokens[name] / passes[name]:.2f}",
                f"{most[name]:.2f}",
                f"{sum(values) / len(values):.4f}",
                f"{same[name]}",
                f"{rose} higher, {fell} lower",
            )
        Console(width=130).print(table)


if __name__ == "__main__":
    main()
