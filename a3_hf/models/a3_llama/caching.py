"""The key/value cache under the installed transformers' word for it, and the checks that a pass filled it."""

import inspect
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

PAGED = "PagedAttentionCache"  # the class of continuous batching's
CACHE_WORDS = ("past_key_values", "cache")  # up to transformers 5.23, and from 5.24 on


def _installed_word() -> str:
    """The word under which the installed transformers hands a cache to LLaMA's layers and returns it in outputs, found by
    looking at both, not at the version.

    Raises:
        ImportError: there is no such word among `CACHE_WORDS`, or the places disagree.
    """
    places = {"BaseModelOutputWithPast": {field.name for field in fields(BaseModelOutputWithPast)}}
    for layer in (LlamaDecoderLayer, LlamaAttention):
        parameters = inspect.signature(layer.forward).parameters
        if "hidden_states" in parameters:  # not replaced by a patch with (*args, **kwargs)
            places[f"{layer.__name__}.forward"] = set(parameters)
    words = [word for word in CACHE_WORDS if all(word in names for names in places.values())]
    if len(words) != 1:
        found = "; ".join(f"{place} has {', '.join(sorted(names))}" for place, names in places.items())
        raise ImportError(
            f"transformers {transformers.__version__} hands on the key/value cache under none of the words that a3_hf knows, "
            f"{' and '.join(CACHE_WORDS)}: {found}. Install a version that this a3_hf was tested with"
        )
    return words[0]


CACHE = _installed_word()
OTHER_WORD = next(word for word in CACHE_WORDS if word != CACHE)


class BothWordsMixin:
    """For outputs: the cache is read under both words, whichever of them is the field."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(CACHE if key == OTHER_WORD else key)

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no attribute.
        if name == OTHER_WORD:
            return getattr(self, CACHE)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class NoPagedCacheMixin:
    """For models that can't be run by transformers' continuous batching, whose errors would end in empty texts."""

    def init_continuous_batching(self, *args, **kwargs):
        """Raises a ValueError: continuous batching keeps its paged cache where this model has no place for it."""
        raise ValueError(
            f"{type(self).__name__} takes no part in transformers' continuous batching (generate_batch and the like); use "
            "generate or generate_any_order on a padded batch"
        )

    generate_batch = init_continuous_batching


def one_cache(
    past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any], *, takes_paged: bool = False
) -> Cache | None:
    """The cache that a caller gave under either word.

    Args:
        others: the caller's other keyword arguments.
        takes_paged: that of continuous batching, which is no `Cache`, is handed on as well.

    Raises:
        ValueError: both words at once, a cache under a third, or what is no cache.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two words for the same; give one of them")
    refuse_other_words(others)
    cache = cache if past_key_values is None else past_key_values
    is_paged = takes_paged and type(cache).__name__ == PAGED
    if cache is not None and not isinstance(cache, Cache) and not is_paged:
        raise ValueError(f"past_key_values is a {type(cache).__name__}; it takes a transformers Cache")
    return cache


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Takes the cache out of what a decoder layer hands to attention.

    Raises:
        RuntimeError: the layer hands nothing on under `CACHE`.
        ValueError: there is a cache under another word.
    """
    refuse_other_words({name: value for name, value in kwargs.items() if name != CACHE})
    if CACHE not in kwargs:
        raise RuntimeError(
            f"transformers {transformers.__version__}: LlamaDecoderLayer hands attention no argument {CACHE!r}, but "
            f"{', '.join(sorted(kwargs))}; a3_hf can't tell where the key/value cache is"
        )
    return kwargs.pop(CACHE)


def refuse_other_words(arguments: dict[str, Any]) -> None:
    """Raises a ValueError for a cache among arguments that no word of ours covers: nobody would read it."""
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise ValueError(
                f"{name} holds a {type(value).__name__}; a cache is given as {' or '.join(CACHE_WORDS)} (transformers "
                f"{transformers.__version__})"
            )


def check_filled(cache: Cache, length: int | torch.Tensor, *, last_layer: int) -> None:
    """Whether the first and the last layer of the cache hold `length` tokens after a pass. A static cache counts on its
    device: on a GPU, and in a compiled graph, it is not asked.

    Raises:
        RuntimeError: they don't, so that the next pass would see too little or too much.
    """
    for layer in {0, last_layer}:
        held = cache.get_seq_length(layer)
        if isinstance(held, torch.Tensor) and (held.device.type != "cpu" or torch.compiler.is_compiling()):
            continue
        if int(held) == int(length):
            continue
        raise RuntimeError(
            f"after the pass, layer {layer} of the cache holds {int(held)} tokens where it takes {int(length)}. Either "
            "activation (gradient) checkpointing in training mode dropped the cache: give none there (use_cache=False), or "
            f"call eval(); or the layers of transformers {transformers.__version__} no longer hand it on as a3_hf expects"
        )
