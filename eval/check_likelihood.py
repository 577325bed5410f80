"""Is the likelihood that lm-eval gets the model's own, and that of single-token forwards?

    python eval/check_likelihood.py runs/stories260k ../shared/data

HellaSwag items, every ending; prints the largest differences, in nats: of the sum over an ending's tokens, and per token.
"""

import argparse
import json
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks.hellaswag.utils import process_docs
from rich.console import Console
from rich.progress import track
from rich.table import Table

from a3_hf.evaluation.lm_harness.a3_lm import A3LM
from a3_hf.evaluation.tasks.datasets import hellaswag

BATCH_SIZES = (1, 7, 32)


def requests_of(data_dir: Path, count: int) -> list[Instance]:
    """Those of lm-eval's HellaSwag task."""
    items = process_docs(hellaswag(data_dir=str(data_dir), first=count)["validation"])
    pairs = [(item["query"], f" {choice}") for item in items for choice in item["choices"]]
    return [
        Instance("loglikelihood", {}, pair, 0, metadata=("hellaswag", index, 1)) for index, pair in enumerate(pairs)
    ]


@torch.no_grad()
def by_single_tokens(lm: A3LM, requests: list[Instance], batch_size: int = 64) -> torch.Tensor:
    """(N,) each ending's log-likelihood by one forward a token: a slot for the next token, in sight of all before it."""
    rows = [lm._encode(request.args, "chain") for request in requests]
    totals = torch.zeros(len(rows), dtype=torch.float64)
    for step in track(range(max(len(row.continuation) for row in rows)), "single tokens", transient=True):
        going = [index for index, row in enumerate(rows) if len(row.continuation) > step]
        for start in range(0, len(going), batch_size):
            part = going[start : start + batch_size]
            known = [[*rows[index].context, *rows[index].continuation[:step]] for index in part]
            ids, mask = torch.zeros(2, len(part), max(map(len, known)), dtype=torch.long)
            for place, tokens in enumerate(known):
                ids[place, : len(tokens)], mask[place, : len(tokens)] = torch.tensor(tokens), 1
            ends = mask.sum(dim=1, keepdim=True)
            logits = lm.model(
                ids,
                attention_mask=mask,
                group_ids=torch.arange(ids.shape[1]).expand_as(ids),
                target_position_ids=ends,
                target_group_ids=torch.full_like(ends, ids.shape[1]),
            ).logits[:, 0]
            wanted = torch.tensor([[rows[index].continuation[step]] for index in part])
            totals[part] += logits.double().log_softmax(dim=-1).gather(1, wanted).flatten()
    return totals


def by_the_model(lm: A3LM, requests: list[Instance]) -> torch.Tensor:
    """(N,) `log_likelihood` of one row at a time, summed."""
    totals = []
    for request in requests:
        row = lm._encode(request.args, "model")
        ids = torch.tensor([[*row.context, *row.continuation]])
        log_probs = lm.model.log_likelihood(ids, torch.arange(ids.shape[1])[None])
        totals.append(log_probs[0, len(row.context) :].double().sum())
    return torch.stack(totals)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()

    requests = requests_of(arguments.data_dir, arguments.count)
    answers, tokens = {}, None
    for batch_size in BATCH_SIZES:
        lm = A3LM(arguments.model, device="cpu", batch_size=batch_size, dtype=arguments.dtype)
        replies = lm.loglikelihood(requests)
        answers[f"batch {batch_size}"] = torch.tensor([reply[0] for reply in replies], dtype=torch.float64)
        tokens = torch.tensor([reply.num_tokens for reply in replies])
    answers["log_likelihood, summed"] = by_the_model(lm, requests)
    answers["single-token forwards"] = by_single_tokens(lm, requests)
    table = Table(title=f"{len(requests)} endings of {arguments.count} HellaSwag items, {arguments.dtype}")
    for column in ("against batch 1", "largest |Δ|, nats", "per token", "of the sum"):
        table.add_column(column, justify="right")
    first = answers.pop("batch 1")
    for name, values in answers.items():
        gap = (values - first).abs()
        figures = (gap.max(), (gap / tokens).max(), (gap / first.abs()).max())
        table.add_row(name, *(f"{figure:.1e}" for figure in figures))
    Console(width=100).print(table)
    print(json.dumps({"sums from": first.min().item(), "to": first.max().item(), "tokens": int(tokens.sum())}))


if __name__ == "__main__":
    main()
