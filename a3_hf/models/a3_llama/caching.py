"""The key/value cache: its keyword in the installed transformers, and checks that a pass filled it."""

import inspect
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

PAGED = "PagedAttentionCache"  # class name of continuous batching's cache
CACHE_WORDS = ("past_key_values", "cache")  # keyword up to transformers 5.23, and from 5.24 on


def _installed_word() -> str:
    """Returns the keyword for the cache in LLaMA's layers and outputs in the installed transformers, found by inspecting
    their signatures rather than the version.

    Raises:
        ImportError: layers and outputs don't share exactly one keyword of `CACHE_WORDS`.
    """
    places = {"BaseModelOutputWithPast": {field.name for field in fields(BaseModelOutputWithPast)}}
    for layer in (LlamaDecoderLayer, LlamaAttention):
        parameters = inspect.signature(layer.forward).parameters
        if "hidden_states" in parameters:  # not monkey-patched with (*args, **kwargs)
            places[f"{layer.__name__}.forward"] = set(parameters)
    words = [word for word in CACHE_WORDS if all(word in names for names in places.values())]
    if len(words) != 1:
        found = "; ".join(f"{place} has {', '.join(sorted(names))}" for place, names in places.items())
        raise ImportError(
            f"transformers {transformers.__version__} passes the key/value cache under none of the keywords that a3_hf knows, "
            f"{' and '.join(CACHE_WORDS)}: {found}. Install a version that this a3_hf was tested with."
        )
    return words[0]


CACHE = _installed_word()
OTHER_WORD = next(word for word in CACHE_WORDS if word != CACHE)


class BothWordsMixin:
    """Mixin for outputs: the cache can be read under both keywords, whichever of them is the field."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(CACHE if key == OTHER_WORD else key)

    def __getattr__(self, name: str) -> Any:
        # Called only if `name` is not an attribute.
        if name == OTHER_WORD:
            return getattr(self, CACHE)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class NoPagedCacheMixin:
    """Mixin for models without support for transformers' continuous batching, which would return empty texts on errors."""

    def init_continuous_batching(self, *args, **kwargs):
        """Raises a ValueError: the model does not support a paged cache."""
        raise ValueError(
            f"{type(self).__name__} does not support transformers' continuous batching (generate_batch). Use generate or "
            "generate_any_order on a padded batch."
        )

    generate_batch = init_continuous_batching


def one_cache(
    past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any], *, takes_paged: bool = False
) -> Cache | None:
    """Returns the cache that a caller passed under either keyword.

    Args:
        others: the caller's other keyword arguments.
        takes_paged: also accept continuous batching's cache, which is not a `Cache`.

    Raises:
        ValueError: both keywords at once, a cache under any other keyword, or an object that is not a cache.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are the same argument: expected one of them")
    refuse_other_words(others)
    cache = cache if past_key_values is None else past_key_values
    is_paged = takes_paged and type(cache).__name__ == PAGED
    if cache is not None and not isinstance(cache, Cache) and not is_paged:
        raise ValueError(f"past_key_values is a {type(cache).__name__}: expected a transformers Cache")
    return cache


def take_cache(kwargs: dict[str, Any]) -> Cache | None:
    """Pops the cache from the keyword arguments that a decoder layer passes to attention.

    Raises:
        RuntimeError: the layer passes no argument `CACHE`.
        ValueError: a cache under another keyword.
    """
    refuse_other_words({name: value for name, value in kwargs.items() if name != CACHE})
    if CACHE not in kwargs:
        raise RuntimeError(
            f"transformers {transformers.__version__}: LlamaDecoderLayer passes attention no argument {CACHE!r}, but "
            f"{', '.join(sorted(kwargs))}; a3_hf can't find the key/value cache"
        )
    return kwargs.pop(CACHE)


def refuse_other_words(arguments: dict[str, Any]) -> None:
    """Raises a ValueError for a cache under an unknown keyword, which would be ignored."""
    for name, value in arguments.items():
        if isinstance(value, Cache):
            raise ValueError(
                f"{name} is a {type(value).__name__}: expected a cache as {' or '.join(CACHE_WORDS)} (transformers "
                f"{transformers.__version__})"
            )


def check_filled(cache: Cache, length: int | torch.Tensor, *, last_layer: int) -> None:
    """Checks that the first and last layer of the cache hold `length` tokens after a pass. Skipped for a static cache on a
    GPU or in a compiled graph, whose length is a tensor.

    Raises:
        RuntimeError: they don't, so the next pass would see too few or too many tokens.
    """
    for layer in {0, last_layer}:
        held = cache.get_seq_length(layer)
        if isinstance(held, torch.Tensor) and (held.device.type != "cpu" or torch.compiler.is_compiling()):
            continue
        if int(held) == int(length):
            continue
        raise RuntimeError(
            f"after the pass, layer {layer} of the cache holds {int(held)} tokens: expected {int(length)}. Either activation "
            "(gradient) checkpointing in training mode dropped the cache: pass use_cache=False or call eval(). Or the layers "
            f"of transformers {transformers.__version__} no longer pass it as a3_hf expects."
        )
