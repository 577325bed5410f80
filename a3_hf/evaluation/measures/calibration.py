"""Calibration: whether a fraction p of the tokens written with probability p is right."""

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from a3_hf.models.a3_llama.generation_config import A3GenerationConfig
from a3_hf.models.a3_llama.orders import seed_of

from .batching import Track, pad_rows, silently
from .checks import check_counts, check_length
from .text_windows import Window, cut_windows

SHAPES = ("scattered", "spans", "middle")
WHOLE = "all"  # `bin` of the row over all bins


def draw_blanks(
    window: Window, *, share: float = 0.5, shape: str = "scattered", blank_length: int | None = None, seed: int
) -> list[bool]:
    """Draws which tokens of a window become blanks. Returns a flag per token; given tokens come first and are never blanked.

    Args:
        share: fraction of the scored tokens, rounded; at least one token.
        shape: "scattered" (single tokens), "spans" (runs of `blank_length` neighbours, the last one cut at `share`) or
            "middle" (one run).
        seed: seed of the draw, together with the window's own tokens.
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
    """Raises ValueError for invalid settings of blanks, and for strategies whose confidence can't be measured."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a number above 0 and at most 1")
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r}: expected one of {', '.join(SHAPES)}")
    if (shape == "spans") != (blank_length is not None) or (blank_length is not None and blank_length < 1):
        raise ValueError(
            f"blank_length={blank_length} with shape={shape!r}: expected at least 1 with 'spans', and none with others"
        )
    check_counts(bins=bins)
    config = A3GenerationConfig(**settings)
    if config.strategy == "refine":
        raise ValueError(
            "strategy='refine' writes tokens several times, so they have no single confidence. Use another strategy"
        )
    if config.do_sample:
        raise ValueError("do_sample=True: expected False, because blanks are filled with the likeliest tokens")


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
    """Blanks tokens of texts, fills them, and compares each token's confidence (its probability under the model when it was
    committed) with whether it is the true token (not in the paper).

    Args:
        share, shape, blank_length: see `draw_blanks`.
        max_length: tokens of the windows that documents are cut into, the given one included; None: the model's context.
        settings: settings of `A3GenerationConfig`: the strategy and its options.

    Returns:
        The rows of `reliability`; the last one also has `windows`, `tokens` (written), `passes` (forward passes of each row
        until its last token is written), `seconds`, `tokens_per_second`.

    Raises:
        ValueError: the errors of `check_blanks`; a length above the model's context, no document, an empty one, a tokenizer
            without BOS.
    """
    settings = {} if settings is None else settings
    check_blanks(share, shape, blank_length, bins, settings)
    check_counts(batch_size=batch_size)
    length = model.config.max_position_embeddings if max_length is None else max_length
    check_length("max_length", length, model.config, least=3)
    windows = cut_windows(tokenizer, documents, length - 1)
    confidence, correct, passes = [], [], 0
    start = perf_counter()
    starts = range(0, len(windows), batch_size)
    for first in track(starts, "blanks"):
        batch = windows[first : first + batch_size]
        ids, mask = pad_rows([window.given + window.scored for window in batch])
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
    """Sorts predictions, from their probabilities (N,) and whether each was right (N,), into bins of equal width.

    Returns:
        A dict per bin (above < probability ≤ up_to; the first includes 0): `bin` (from 1), `above`, `up_to`, `count`,
        `mean_confidence` and `accuracy` (None in an empty bin). The last dict, with `bin` "all", is over all bins and
        also has `expected_calibration_error`: the mean distance of the two over the bins, weighted by their counts.
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
