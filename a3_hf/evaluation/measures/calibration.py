"""Calibration: whether what was written with probability p is right in p of the cases."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.orders import seed_of

from .text_windows import Track, Window, check_length, cut_windows, pad_right, silently

SHAPES = ("scattered", "spans", "middle")
WHOLE = "all"  # in the place of a bin: the row over all of them


def draw_blanks(
    window: Window, *, share: float = 0.5, shape: str = "scattered", blank_length: int | None = None, seed: int
) -> list[bool]:
    """Which tokens of a window are taken out: for all of its tokens, the given ones (never taken) first.

    Args:
        share: of the scored tokens, rounded; at least one.
        shape: "scattered" (each by itself), "spans" (runs of `blank_length` neighbours; the last one shorter where the
            share is full) or "middle" (one run).
        seed: the draw depends on it and on the window's own tokens alone.
    """
    length = len(window.scored)
    number = max(round(share * length), 1)
    generator = torch.Generator().manual_seed(seed_of(seed, *window))
    if shape == "middle":
        start = (length - number) // 2
        taken = range(start, start + number)
    else:
        run = blank_length or 1
        order = torch.randperm(-(-length // run), generator=generator).tolist()
        taken = [place for index in order for place in range(index * run, min(index * run + run, length))][:number]
    blanks = [False] * (len(window.given) + length)
    for place in taken:
        blanks[len(window.given) + place] = True
    return blanks


def check_blanks(share: float, shape: str, blank_length: int | None, bins: int, settings: Mapping[str, Any]) -> None:
    """Raises a ValueError for blanks or strategies that confidence can't be measured on."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}; it takes a number above 0 and at most 1")
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is not known; it takes one of {', '.join(SHAPES)}")
    if (shape == "spans") != (blank_length is not None) or (blank_length is not None and blank_length < 1):
        raise ValueError(
            f"blank_length={blank_length} with shape={shape!r}; shape='spans' takes at least 1, others don't take it"
        )
    if bins < 1:
        raise ValueError(f"bins={bins}; it takes at least 1")
    config = A3GenerationConfig(**settings)
    if config.strategy == "refine":
        raise ValueError(
            "strategy='refine' writes tokens again, so that there is no one confidence; take another strategy"
        )
    if config.do_sample:
        raise ValueError("do_sample=True: blanks are filled with the likeliest tokens here")


def calibration_rows(
    model,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    share: float = 0.5,
    shape: str = "scattered",
    blank_length: int | None = None,
    max_length: int | None = None,
    bins: int = 10,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    track: Track = silently,
) -> list[dict[str, Any]]:
    """Takes tokens out of texts, has them written, and sets the confidence of each when it was committed, its probability
    under the model, against whether it is the true token (not in the paper).

    Args:
        share, shape, blank_length: what is taken out (see `draw_blanks`).
        max_length: of the windows that documents are cut into (see `perplexity.cut_windows`) — one less is scored, so that
            a window fits the context with its first token; None: the model's context.
        settings: of `A3GenerationConfig`: the strategy and its options.

    Returns:
        As `reliability`; the row over all bins has also `windows`, `tokens` (written), `passes` (forward passes, of
        each row until its last token is written), `seconds`, `tokens_per_second`.

    Raises:
        ValueError: as `check_blanks`, a length above the model's context, no document, an empty one, a tokenizer without
            BOS.
    """
    settings = {} if settings is None else settings
    check_blanks(share, shape, blank_length, bins, settings)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; it takes at least 1")
    length = model.config.max_position_embeddings if max_length is None else max_length
    check_length("max_length", length, model.config)
    if length < 3:
        raise ValueError(f"max_length={length}; it takes at least 3 tokens")
    windows = cut_windows(tokenizer, documents, length - 1)
    confidence, correct, passes = [], [], 0
    start = perf_counter()
    starts = range(0, len(windows), batch_size)
    for first in track(starts, "blanks"):
        batch = windows[first : first + batch_size]
        ids, mask = pad_right([window.given + window.scored for window in batch])
        blanks = torch.zeros_like(mask, dtype=torch.bool)
        for row, window in enumerate(batch):
            drawn = draw_blanks(window, share=share, shape=shape, blank_length=blank_length, seed=seed)
            blanks[row, : len(drawn)] = torch.tensor(drawn)
        output = model.generate_any_order(
            ids.to(model.device),
            blanks.to(model.device),
            attention_mask=mask.to(model.device),
            seed=[seed_of(seed, number) for number in range(first, first + len(batch))],
            **settings,
        )
        confidence.append(output.log_probs.cpu()[blanks].double().exp())
        correct.append(output.sequences.cpu()[blanks] == ids[blanks])
        passes += int((output.commit_step.amax(dim=1) + 1).sum())
    seconds = perf_counter() - start
    rows = reliability(torch.cat(confidence), torch.cat(correct), bins=bins)
    tokens = rows[-1]["count"]
    speed = {"passes": passes, "seconds": seconds, "tokens_per_second": tokens / seconds}
    rows[-1] |= {"windows": len(windows), "tokens": tokens, **speed}
    return rows


def reliability(confidence: torch.Tensor, correct: torch.Tensor, *, bins: int) -> list[dict[str, Any]]:
    """Sorts (N,) probabilities into `bins` of equal width, with (N,) whether each was right.

    Returns:
        A dict for each bin (from, but not including, `above` to `up_to`; the first from 0): `bin` (from 1), `above`,
        `up_to`, `count`, `mean_confidence` and `accuracy` (None in an empty bin). A last one with `bin` "all": over all,
        and `expected_calibration_error`, the mean distance of the two over the bins, weighted by their counts.
    """
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(index, minlength=bins).tolist()
    sums = torch.zeros(2, bins, dtype=torch.float64)
    for row, values in zip(sums, (confidence, correct), strict=True):
        row.scatter_add_(0, index, values.double())
    rows, error = [], 0.0
    for number, (count, sure, right) in enumerate(zip(counts, *sums.tolist(), strict=True)):
        error += abs(sure - right) / len(confidence)
        rows.append(
            {
                "bin": number + 1,
                "above": number / bins,
                "up_to": (number + 1) / bins,
                "count": count,
                "mean_confidence": sure / count if count else None,
                "accuracy": right / count if count else None,
            }
        )
    sure, right = (sums.sum(dim=1) / len(confidence)).tolist()
    whole = {"bin": WHOLE, "above": 0.0, "up_to": 1.0, "count": len(confidence)}
    return [*rows, {**whole, "mean_confidence": sure, "accuracy": right, "expected_calibration_error": error}]


def plot_reliability(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a PNG: accuracy over confidence, bin by bin, beside the diagonal on which the two agree; below it how many
    tokens each bin has.
    """
    from matplotlib.figure import Figure  # only where it is asked for: an extra

    *parts, whole = rows
    figure = Figure(figsize=(6, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    filled = [row for row in parts if row["count"]]
    upper.plot([0, 1], [0, 1], color="grey", linestyle=":", label="calibrated")
    upper.bar(
        [row["above"] for row in filled],
        [row["accuracy"] for row in filled],
        width=[row["up_to"] - row["above"] for row in filled],
        align="edge",
        edgecolor="white",
        alpha=0.5,
    )
    sure, right = ([row[name] for row in filled] for name in ("mean_confidence", "accuracy"))
    upper.plot(sure, right, marker="o", markersize=4, label="written")
    upper.set_title(
        f"{whole['count']} tokens, {whole['accuracy']:.1%} right, "
        f"expected calibration error {whole['expected_calibration_error']:.3f}"
    )
    upper.set_ylim(0, 1)
    upper.set_ylabel("accuracy")
    upper.legend()
    lower.bar(
        [row["above"] for row in parts],
        [row["count"] for row in parts],
        width=[row["up_to"] - row["above"] for row in parts],
        align="edge",
        edgecolor="white",
    )
    lower.set_xlim(0, 1)
    lower.set_xlabel("confidence at commit")
    lower.set_ylabel("tokens")
    figure.savefig(path, dpi=120)
