"""Whether there is a model where a user says: in a folder, or on the hub."""

import re
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

SECONDS = 10  # for the hub to answer; its own loaders try again for more than a minute
LOCAL = ("runs", "models")  # where this project's commands write models: nobody's name on the hub
HTTPError = HfHubHTTPError.__bases__[0]  # of the HTTP library that the hub's client is written with


def check_is_there(path: str, *, name: str | None = None) -> None:
    """Whether `path` is a folder, or the name of a model that the hub's cache or the hub has.

    Raises:
        ValueError: it is not. A name whose first part is a folder here is a mistyped path, and the hub is not asked.
            Says the argument's `name`, where there is one.
    """
    shown = repr(path) if name is None else f"{name}={path!r}"
    if path and Path(path).is_dir():
        return
    if path and Path(path).exists():
        raise ValueError(f"{shown} is a file; it takes a folder, or a model's name on the hub")
    missing = f"{shown}: there is no such folder (relative to {Path.cwd()})"
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)
    if not is_name or Path(path).parts[0] in LOCAL or Path(path).parent.exists():
        raise ValueError(f"{missing}; a model on the hub would be OWNER/NAME")
    _ask_the_hub(path, missing)


@lru_cache
def _ask_the_hub(name: str, missing: str) -> None:
    if Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots").is_dir():
        return
    try:
        HfApi().model_info(name, timeout=SECONDS)
    except (OSError, HTTPError) as error:
        raise ValueError(f"{missing}, and the hub gave none: {str(error).splitlines()[0]}") from error
