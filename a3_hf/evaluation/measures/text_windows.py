"""Running text in windows and batches, and contexts stretched to hold more of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import LlamaConfig, PreTrainedTokenizerBase

from a3_hf.data.tokenization import encode_documents
from a3_hf.models.a3_llama.infilling_templates import encode_prompt

# The kinds of RoPE scaling that turn a position by the same angle whatever else is in the batch, and what each needs
# beside its factor. ("dynamic" and "longrope" look at the longest row.)
SCALINGS = {"linear": (), "yarn": (), "llama3": ("low_freq_factor", "high_freq_factor")}
SCALING_OPTIONS = {
    "linear": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (),
}

SCALE = ", or rope_scaling to reach further"  # advice

Track = Callable[[Sequence, str], Iterable]


def silently(items: Sequence, description: str) -> Iterable:
    """Where no progress is shown."""
    return items


class Window(NamedTuple):
    """Neighbouring tokens of a document: those that are given, and behind them those that are scored."""

    given: tuple[int, ...]
    scored: tuple[int, ...]


def cut_windows(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int) -> list[Window]:
    """Cuts documents into windows as lm-eval's `loglikelihood_rolling` does, with a context of one token: every token is
    scored in exactly one window, of at most `length` scored tokens. The first window of a document is given BOS, each
    later one the token before it; the last, where it is shorter, as many of those before it as make it full.

    As in lm-eval, the last token of a full window stands one position behind the `length` of the context.

    Raises:
        ValueError: a length below 2, no document, an empty one, a tokenizer without BOS.
    """
    if length < 2:
        raise ValueError(f"max_length={length}; it takes at least 2 tokens")
    if not documents:
        raise ValueError("documents is empty; it takes at least one text")
    windows = []
    for number, document in enumerate(documents, start=1):
        (bos,) = encode_prompt(tokenizer, "")
        (ids,) = encode_documents([document], tokenizer)
        if not ids:
            raise ValueError(f"document {number} is empty; it takes at least one token to score")
        for pair in get_rolling_token_windows(token_list=ids, prefix_token=bos, max_seq_len=length, context_len=1):
            given, scored = make_disjoint_window(pair)
            windows.append(Window(tuple(given), tuple(scored)))
    return windows


def check_length(name: str, length: int, config: LlamaConfig, *, advice: str = "") -> None:
    """Raises a ValueError, which ends with `advice`, for a length that is above the model's context."""
    context = config.max_position_embeddings
    if length > context:
        raise ValueError(
            f"{name}={length} is above the model's context (max_position_embeddings={context}); it takes at most that"
            f"{advice}"
        )


def scale_rope(config: LlamaConfig, rope_scaling: Mapping[str, Any]) -> None:
    """Stretches the context of a model that is not loaded yet to `factor` times what it was.

    Args:
        config: changed in place: `rope_parameters`, of which `rope_theta` stays, and `max_position_embeddings`.
        rope_scaling: `rope_type` ("linear", "yarn" or "llama3") and `factor`, and what else the type takes;
            `original_max_position_embeddings`, what the model was trained at, is by default the config's
            `max_position_embeddings`.

    Raises:
        ValueError: a type that is not known or whose angles depend on the batch, a key that is missing or that the type
            doesn't take, a factor below 1.
    """
    given = dict(rope_scaling)
    kind, factor = given.get("rope_type"), given.get("factor")
    if kind not in SCALINGS:
        raise ValueError(f"rope_scaling has rope_type={kind!r}; it takes one of {', '.join(SCALINGS)}")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or factor < 1:
        raise ValueError(f"rope_scaling has factor={factor!r}; it takes a number of at least 1")
    needed = ("rope_type", "factor", *SCALINGS[kind])
    known = (*needed, *SCALING_OPTIONS[kind], "original_max_position_embeddings", "rope_theta")
    missing = [key for key in needed if key not in given]
    unknown = [key for key in given if key not in known]
    if missing or unknown:
        wrong = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}"
        raise ValueError(f"rope_scaling {wrong}; rope_type={kind!r} takes {', '.join(known)}")
    original = given.pop("original_max_position_embeddings", config.max_position_embeddings)
    parameters = {"rope_theta": config.rope_parameters["rope_theta"], **given}
    if kind != "linear":
        parameters["original_max_position_embeddings"] = original
    config.rope_parameters = parameters
    config.max_position_embeddings = int(original * factor)


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, S) of rows of different lengths, padded with 0 on the right, and their attention mask (B, S)."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return ids, mask


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, padded on the left, so that all rows go on at the same column."""
    ids, mask = pad_right([row[::-1] for row in rows])
    return ids.flip(1), mask.flip(1)
