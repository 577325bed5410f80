"""Range of transformers releases that a3_hf was tested with, and a warning for a newer one."""

import re

import transformers
from transformers.utils import logging

TESTED_TRANSFORMERS = ("5.17", "5.24")  # the oldest and the newest minor; pyproject.toml has the same range


def warn_if_newer(installed: str = transformers.__version__) -> None:
    """Logs a warning if the installed transformers has a newer minor version than the tested ones."""
    if _minor(installed) > _minor(TESTED_TRANSFORMERS[1]):
        logging.get_logger(__name__).warning(
            f"a3_hf was tested with transformers {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[1]}, this is {installed}"
        )


def _minor(version: str) -> tuple[int, int]:
    return tuple(int(number) for number in re.match(r"(\d+)\.(\d+)", version).groups())
