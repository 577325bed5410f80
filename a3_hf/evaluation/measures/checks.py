"""Checks of settings that measures share."""

from transformers import PretrainedConfig


def check_counts(**settings: int) -> None:
    """Raises ValueError for a setting that is not a whole number of at least 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


def check_length(name: str, length: int, config: PretrainedConfig, *, least: int = 1, advice: str = "") -> None:
    """Checks a number of tokens against the model's context.

    Raises:
        ValueError: below `least` or above the context; the message ends with `advice`.
    """
    check_counts(**{name: length})
    context = config.max_position_embeddings
    if length < least:
        raise ValueError(f"{name}={length}: expected at least {least} tokens")
    if length > context:
        raise ValueError(f"{name}={length} is above the model's context (max_position_embeddings={context}){advice}")
