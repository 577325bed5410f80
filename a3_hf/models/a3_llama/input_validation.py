"""Checks of tensors passed to a model. Errors name the argument, what it got and what was expected."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
import transformers
from transformers.utils import TransformersKwargs

MOST_TOKENS = 2**31  # per batch; more would run out of memory
# Arguments that transformers may pass to any model; `token_type_ids` come from tokenizers, and LLaMA ignores them.
COMMON_KEYWORDS = {*TransformersKwargs.__annotations__, "return_dict", "token_type_ids"}


def check_keywords(keywords: Iterable[str], takes: Callable) -> None:
    """Raises a ValueError for a keyword argument that would be silently ignored: neither an argument of the forward `takes`
    nor one that transformers passes to every model.
    """
    unknown = sorted(set(keywords) - COMMON_KEYWORDS)
    if not unknown:
        return
    names = [name for name, one in inspect.signature(takes).parameters.items() if one.kind != one.VAR_KEYWORD]
    close = get_close_matches(unknown[0], names, n=1)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"{unknown[0]} is not an argument of {takes.__qualname__} (transformers {transformers.__version__}): expected one of "
        f"{', '.join(name for name in names if name != 'self')}.{meant}"
    )


def check_token_ids(name: str, ids: Any, vocab_size: int, *, where: torch.Tensor | None = None) -> torch.LongTensor:
    """Returns the ids (B, S) as int64.

    Args:
        where: (B, S), True where ids must be in the vocabulary; None: everywhere.

    Raises:
        ValueError: not a 2D tensor of integers, an empty one, or an id outside the vocabulary.
    """
    check_integers(name, ids, dimensions=2)
    if not ids.numel():
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected at least one row and one token")
    check_in_vocabulary(name, ids, vocab_size, where=where)
    return ids.long()


def check_in_vocabulary(name: str, ids: torch.Tensor, vocab_size: int, *, where: torch.Tensor | None = None) -> None:
    """Raises a ValueError for ids (B, S) outside 0 .. `vocab_size` − 1, where `where` (B, S; None: everywhere) is True."""
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
    """Returns the ids (B, C) of a pass as int64; None if embeddings (B, C, D) are given. Values on a GPU are not checked, to
    avoid synchronisation.

    Raises:
        ValueError: both or neither of the two; a tensor of the wrong kind; no row, or no token unless `may_be_empty`; ids
            outside the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    name, content = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    if inputs_embeds is None:
        check_integers(name, content, dimensions=2)
    elif not isinstance(content, torch.Tensor) or content.ndim != 3 or not content.is_floating_point():
        raise ValueError(f"{name}: expected a tensor of floats (batch, sequence, hidden)")
    if not content.shape[0] or not (content.shape[1] or may_be_empty):
        raise ValueError(f"{name} has shape {tuple(content.shape)}: expected at least one row and one token")
    if input_ids is None:
        return None
    if looks_at_values(input_ids):
        check_in_vocabulary(name, input_ids, vocab_size)
    return input_ids.long()


def check_numbers(name: str, ids: Any, *, at_least: int, at_most: int | None = None, but: int | None = None) -> None:
    """Raises a ValueError unless `ids` is a tensor of integers, each in `at_least` .. `at_most` or equal to `but`. Values on a
    GPU are not checked.
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
    """Raises a ValueError unless `mask` has shape (B, cached + C) and holds only 0 and 1. Values on a GPU are not checked."""
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
    """Raises a ValueError unless `kept` is a number of last rows or a tensor of row indices."""
    if isinstance(kept, torch.Tensor):
        check_numbers("logits_to_keep", kept, at_least=-content_length, at_most=content_length - 1)
    elif not isinstance(kept, int) or isinstance(kept, bool) or kept < 0:
        raise ValueError(
            f"logits_to_keep={kept!r}: expected a number of last rows, at least 0 (all), or a tensor of row indices"
        )


def check_labels(labels: Any, content: Any, vocab_size: int, like_content: bool) -> torch.LongTensor:
    """Returns the labels as int64.

    Raises:
        ValueError: ids outside the vocabulary other than −100; with `like_content`, a shape other than (B, C) of content.
    """
    check_numbers("labels", labels, at_least=0, at_most=vocab_size - 1, but=-100)
    if like_content and isinstance(content, torch.Tensor) and labels.shape != content.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}: expected the shape of input_ids, {tuple(content.shape[:2])}"
        )
    return labels.long()


def looks_at_values(tensor: torch.Tensor) -> bool:
    """True if values are checked: not on a GPU, where reading them synchronises, nor in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_integers(name: str, ids: Any, *, dimensions: int | None = None) -> None:
    """Raises a ValueError unless `ids` is a tensor of integers with this number of dimensions (None: any)."""
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{name} is a {type(ids).__name__}: expected a tensor of integers")
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"{name} has dtype {ids.dtype}: expected integers")
    if dimensions is not None and ids.ndim != dimensions:
        takes = "(batch, sequence)" if dimensions == 2 else f"{dimensions} dimensions"
        raise ValueError(f"{name} has shape {tuple(ids.shape)}: expected {takes}")


def check_mask(name: str, mask: Any, shape: tuple[int, ...], *, of: str = "input_ids") -> torch.BoolTensor:
    """Returns the mask as booleans; it may hold 0 and 1 in any dtype.

    Raises:
        ValueError: not a tensor, a shape other than `shape` (that of the argument `of`), or other values.
    """
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"{name} is a {type(mask).__name__}: expected a tensor of booleans, or of 0 and 1")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: expected the shape of {of}, {tuple(shape)}")
    if mask.dtype == torch.bool:
        return mask
    as_bool = mask.to(torch.bool)
    if (as_bool.to(mask.dtype) != mask).any():
        raise ValueError(f"{name} holds other values of dtype {mask.dtype}: expected booleans, or 0 and 1")
    return as_bool


def checked_rows(
    model_config, input_ids, blank_mask, attention_mask, config
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Checks the rows of a generation, and returns (B, S) ids as int64 and two masks: real tokens (no padding) and blanks.
    A continuation counts towards the limits, but is not appended.

    Args:
        model_config: the model's config, for vocabulary and context.
        config: an `A3GenerationConfig`, for `max_new_tokens` and `num_return_sequences`.

    Raises:
        ValueError: a wrong type or shape; no blank, a blank at padding, a row without a given token; more tokens than the
            context or memory holds.
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
        raise ValueError("blank_mask is True at padding: expected blanks at real tokens only")
    if not num_new and not blank.any():
        raise ValueError("no blank to fill: expected blank_mask with True somewhere, or max_new_tokens")
    given = real & ~blank
    if not given.any(dim=1).all():
        row = int((~given.any(dim=1)).nonzero()[0])
        raise ValueError(f"input_ids: row {row} has no given token: expected at least one. Begin it with BOS.")
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
            f"num_return_sequences={copies} with input_ids of shape {shape} makes {copies * shape[0]} rows: expected at most "
            f"{MOST_TOKENS} tokens in total"
        )
    check_in_vocabulary("input_ids", input_ids, model_config.vocab_size, where=given)
    return input_ids.long(), real, blank
