"""Nats of a blanked sentence of a story, with the text after it in its place, in a prompt or left out."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from a3_hf.models.a3_llama.infilling_templates import Template, encode_piece, encode_prompt

from .batching import Track, order_inputs, pad_rows, silently, span_mask

IN_PLACE, PREFIX_ALONE = "in place", "prefix alone"
# The text before a blank, in it, and after it: as text, or as token ids.
Parts = tuple[str, str, str]
Row = tuple[list[int], list[int], list[int]]


def split_story(sentences: Sequence[str]) -> Parts:
    """Returns sentences 1 and 2, sentence 3, and the others of a story, with the spaces between them.

    Examples:
        >>> split_story(["One.", "Two.", "Three.", "Four.", "Five."])
        ('One. Two.', ' Three.', ' Four. Five.')
    """
    first, second, third, *rest = (sentence.strip() for sentence in sentences)
    return f"{first} {second}", f" {third}", f" {' '.join(rest)}"


def arrange(tokenizer: PreTrainedTokenizerBase, story: Parts, way: str) -> Row:
    """Returns token ids before the blank (BOS first), in it, and after it.

    Args:
        way: `IN_PLACE`; `PREFIX_ALONE`, without the text after the blank; or a `suffix_template` (see `A3LlamaConfig`), by
            which that text stands in front.
    """
    before, target, suffix = story
    if way == PREFIX_ALONE:
        suffix = ""
    elif way != IN_PLACE:
        before, suffix = Template((before, suffix), (1,)).with_suffix_first(way).pieces
    ids = (encode_piece(tokenizer, text, is_start=False) for text in (target, suffix))
    return encode_prompt(tokenizer, before), *ids


@torch.no_grad()
def blank_nats(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    track: Track = silently,
    about: str = "",
) -> list[float]:
    """Returns the nats of each row's blank given the rest of the row, left to right in the blank.

    Args:
        model: a model with `log_likelihood`.
        track: shows progress over the batches, under the title `about`.
    """
    order = sorted(range(len(rows)), key=lambda index: -sum(map(len, rows[index])))
    nats = [0.0] * len(rows)
    for batch in track([order[start : start + batch_size] for start in range(0, len(order), batch_size)], about):
        parts = [rows[index] for index in batch]
        ids, real = pad_rows([[*before, *target, *after] for before, target, after in parts])
        blank = span_mask(
            [len(before) for before, _, _ in parts], [len(target) for _, target, _ in parts], ids.shape[1]
        )
        log_probs = model.log_likelihood(**order_inputs(ids, real, blank, model.device))
        for index, total in zip(batch, log_probs.double().sum(dim=-1).tolist(), strict=True):
            nats[index] = -total
    return nats


def mean_nats(nats: Sequence[float], rows: Sequence[Row]) -> float:
    """Returns the nats per token of all rows' blanks together."""
    return sum(nats) / sum(len(target) for _, target, _ in rows)
