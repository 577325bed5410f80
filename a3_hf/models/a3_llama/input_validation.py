"""Checks of the tensors that callers hand to a model; an error names the argument, what it got and what it takes."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
import transformers
from transformers.utils import TransformersKwargs

MOST_TOKENS = 2**31  # of a batch; more would fail for want of memory
# What transformers' own tools may hand to any model; `token_type_ids` come from tokenizers and mean nothing to a LLaMA.
COMMON_KEYWORDS = {*TransformersKwargs.__annotations__, "return_dict", "token_type_ids"}


def check_keywords(keywords: Iterable[str], takes: Callable) -> None:
    """Raises a ValueError for an argument of a forward that neither `takes` names nor transformers hands to every model: it
    would change nothing, in silence.
    """
    unknown = sorted(set(keywords) - COMMON_KEYWORDS)
    if not unknown:
        return
    names = [name for name, one in inspect.signature(takes).parameters.items() if one.kind != one.VAR_KEYWORD]
    close = get_close_matches(unknown[0], names, n=1)
    meant = f". Did you mean {close[0]}?" if close else "."
    raise ValueError(
        f"{unknown[0]} is no argument of {takes.__qualname__} (transformers {transformers.__version__}){meant} It takes "
        f"{', '.join(name for name in names if name != 'self')}"
    )


def check_token_ids(name: str, ids: Any, vocab_size: int, *, where: torch.Tensor | None = None) -> torch.LongTensor:
    """The ids (B, S) as int64.

    Args:
        where: (B, S), True where an id must be one of the vocabulary; None: everywhere.

    Raises:
        ValueError: no tensor of integers of two dimensions, an empty one, or an id outside the vocabulary.
    """
    check_integers(name, ids, dimensions=2)
    if not ids.numel():
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected at least one row and one token")
    check_in_vocabulary(name, ids, vocab_size, where=where)
    return ids.long()


def check_in_vocabulary(name: str, ids: torch.Tensor, vocab_size: int, *, where: torch.Tensor | None = None) -> None:
    """Raises a ValueError for ids (B, S), at `where` (B, S; None: anywhere), that are not in 0 .. `vocab_size` − 1."""
    wrong = (ids < 0) | (ids >= vocab_size)
    if where is not None:
        wrong = wrong & where
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name} holds {int(ids[row, column])} at row {row}, column {column}: expected ids of the model's vocabulary, "
            f"0 to {vocab_size - 1}"
        )


def check_content(
    input_ids: Any, inputs_embeds: Any, vocab_size: int, *, may_be_empty: bool = False
) -> torch.LongTensor | None:
    """The ids (B, C) of a pass as int64, None where embeddings (B, C, D) are given. Ids on a GPU are not looked at, which
    would be a wait.

    Raises:
        ValueError: both or none of the two; another kind of tensor; no row, or no token unless there `may_be_empty`; ids that
            are not in the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    name, content = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if inputs_embeds is None:
        check_integers(name, content, dimensions=2)
    elif not isinstance(content, torch.Tensor) or content.ndim != 3 or not content.is_floating_point():
        raise ValueError(f"{name} takes a tensor of floats (batch, sequence, hidden)")
    if not content.shape[0] or not (content.shape[1] or may_be_empty):
        raise ValueError(f"{name} has shape {tuple(content.shape)}: expected at least one row and one token")
    if input_ids is None:
        return None
    if looks_at_values(input_ids):
        check_in_vocabulary(name, input_ids, vocab_size)
    return input_ids.long()


def check_numbers(name: str, ids: Any, *, at_least: int, at_most: int | None = None, but: int | None = None) -> None:
    """Raises a ValueError for anything but a tensor of integers, or where it holds others than `at_least` .. `at_most` and
    `but`. Those on a GPU are not looked at.
    """
    check_integers(name, ids)
    if not looks_at_values(ids):
        return
    wrong = ids < at_least
    if at_most is not None:
        wrong = wrong | (ids > at_most)
    if but is not None:
        wrong = wrong & (ids != but)
    if wrong.any():
        upper = "" if at_most is None else f" and at most {at_most}"
        other = "" if but is None else f", or {but}"
        raise ValueError(f"{name} holds {int(ids[wrong][0])}: expected integers of at least {at_least}{upper}{other}")


def check_padding_mask(name: str, mask: Any, batch_size: int, num_cached: int, length: int) -> None:
    """Raises a ValueError for a mask (B, cached + C) of another shape, or with other values than 0 and 1 (on a GPU they are
    not looked at).
    """
    expected = (batch_size, num_cached + length)
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"{name} is a {type(mask).__name__}: expected a tensor of booleans, or of 0 and 1")
    if tuple(mask.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}: expected {expected}: batch, {num_cached} cached and {length} new tokens"
        )
    if looks_at_values(mask):
        check_mask(name, mask, expected)


def check_kept(kept: int | torch.Tensor, content_length: int) -> None:
    """Raises a ValueError for anything but a number of last rows or a tensor of rows."""
    if isinstance(kept, torch.Tensor):
        check_numbers("logits_to_keep", kept, at_least=-content_length, at_most=content_length - 1)
    elif not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
        raise ValueError(
            f"logits_to_keep={kept!r}: expected a number of last rows, at least 0 (all), or a tensor of rows"
        )


def check_labels(labels: Any, content: Any, vocab_size: int, like_content: bool) -> torch.LongTensor:
    """The labels as int64.

    Raises:
        ValueError: ids outside the vocabulary other than −100, or with `like_content` a shape other than that of content
            (B, C) or (B, C, D).
    """
    check_numbers("labels", labels, at_least=0, at_most=vocab_size - 1, but=-100)
    if like_content and isinstance(content, torch.Tensor) and labels.shape != content.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: expected the shape of input_ids, {tuple(content.shape[:2])}"
        )
    return labels.long()


def looks_at_values(tensor: torch.Tensor) -> bool:
    """Whether values are checked: not on a GPU, where looking is a wait, nor in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_integers(name: str, ids: Any, *, dimensions: int | None = None) -> None:
    """Raises a ValueError for anything but a tensor of integers, of so many dimensions."""
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}: expected a tensor of integers")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} has dtype {ids.dtype}: expected integers")
    if dimensions is not None and ids.ndim != dimensions:
        takes = "(batch, sequence)" if dimensions == 2 else f"{dimensions} dimensions"
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected {takes}")


def check_mask(name: str, mask: Any, shape: tuple[int, ...], *, of: str = "input_ids") -> torch.BoolTensor:
    """The mask as booleans; it may hold 0 and 1 in any other dtype.

    Raises:
        ValueError: no tensor, another shape than `shape`, which is that of the argument `of`, or other values.
    """
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"{name} is a {type(mask).__name__}: expected a tensor of booleans, or of 0 and 1")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected the shape of {of}, {tuple(shape)}")
    if mask.dtype == torch.bool:
        return mask
    as_bool = mask.to(torch.bool)
    if (as_bool.to(mask.dtype) != mask).any():
        raise ValueError(f"{name} holds values of dtype {mask.dtype} other than 0 and 1: expected booleans, or 0 and 1")
    return as_bool


def checked_rows(
    model_config, input_ids, blank_mask, attention_mask, config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, S) ids as int64, and two masks: what is no padding, and what is to be written. A continuation is counted, not yet
    appended.

    Args:
        model_config: the model's, for its vocabulary and its context.
        config: an `A3GenerationConfig`, for `max_new_tokens` and `num_return_sequences`.

    Raises:
        ValueError: what is not of the right kind or shape; no blank, a blank at padding, a row without a given token; more
            than the context or than memory holds.
    """
    check_integers("input_ids", input_ids, dimensions=2)
    shape, num_new = tuple(input_ids.shape), config.max_new_tokens or 0
    if not input_ids.numel():
        raise ValueError(f"input_ids has shape {shape}: expected at least one row and one token (BOS)")
    real, blank = (
        torch.full_like(input_ids, default, dtype=torch.bool) if mask is None else check_mask(name, mask, shape)
        for name, mask, default in (("attention_mask", attention_mask, True), ("blank_mask", blank_mask, False))
    )
    if (blank & ~real).any():
        raise ValueError("blank_mask is True at padding, outside the row: expected blanks at real tokens only")
    if not num_new and not blank.any():
        raise ValueError("there is no blank to fill: blank_mask is True nowhere, and max_new_tokens is not given")
    given = real & ~blank
    if not given.any(dim=1).all():
        row = int((~given.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} of input_ids has no given token, so that nothing could be seen; begin it with BOS")
    longest, context = int(real.sum(dim=1).max()) + num_new, model_config.max_position_embeddings
    if longest > context:
        new = f" (max_new_tokens={num_new})" if num_new else ""
        raise ValueError(
            f"input_ids and its blanks{new} take {longest} positions, {longest - context} more than the model's context "
            f"(max_position_embeddings={context})"
        )
    copies = config.num_return_sequences or 1
    if copies * shape[0] * (shape[1] + num_new) > MOST_TOKENS:
        raise ValueError(
            f"num_return_sequences={copies} with input_ids of shape {shape} takes {copies * shape[0]} rows: expected at "
            f"most {MOST_TOKENS} tokens in all"
        )
    check_in_vocabulary("input_ids", input_ids, model_config.vocab_size, where=given)
    return input_ids.long(), real, blank
