"""Type checks of settings, and their messages."""

import difflib
import types
from collections.abc import Collection
from enum import Enum
from os import PathLike
from typing import Any, Literal, Union, get_args, get_origin


def nearest(name: str, known: Collection[str]) -> str:
    """Returns a suggestion of the nearest known name for a message; empty if none is near."""
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_keys(where: str | PathLike, config: Collection[str], known: Collection[str]) -> None:
    """Raises ValueError for an unknown key; the message names `where` and the nearest known key."""
    for key in config:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(str(key), known)}")


def shown_value(value: Any) -> str:
    """Returns a value with its type for messages."""
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


def checked_value(key: str, value: Any, hint: Any, path: str | PathLike) -> Any:
    """Returns `value` as a field of type `hint`; an integer for a float field becomes a float.

    Raises:
        ValueError: a value of another type; the message names the key and its place (`path`).
    """
    members = types_of(hint)
    if not any(_is_a(value, member) for member in members):
        expected = " or ".join(dict.fromkeys(_described(member) for member in members))
        raise ValueError(f"{path}: {key}: expected {expected}, got {shown_value(value)}")
    if isinstance(value, int) and not isinstance(value, bool) and float in members and int not in members:
        return float(value)
    return value


def types_of(hint: Any) -> tuple:
    """Returns the member types of a hint. An enum beside str (`SchedulerType | str`) stands for the enum's values."""
    if get_origin(hint) not in (Union, types.UnionType):
        return (hint,)
    members = get_args(hint)
    has_enum = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    return tuple(member for member in members if not (has_enum and member is str))


def _is_a(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, get_args(hint)[0]) for item in value)
    if origin is not None:
        return isinstance(value, origin)
    if issubclass(hint, Enum):
        return value in [choice.value for choice in hint]
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _described(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if origin is list:
        return "a list"
    if origin is not None:
        return "a mapping"
    if issubclass(hint, Enum):
        return "one of " + ", ".join(repr(choice.value) for choice in hint)
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "a mapping"}
    return plain.get(hint, "null" if hint is type(None) else hint.__name__)
