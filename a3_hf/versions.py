"""The releases of transformers that this release of a3_hf was tested with, and a line where the installed one is newer."""

import re

import transformers
from transformers.utils import logging

TESTED_TRANSFORMERS = ("5.17", "5.24")  # the oldest and the newest minor; pyproject.toml has the same range


def warn_if_newer(installed: str = transformers.__version__) -> None:
    """Logs one line if the installed transformers is of a newer minor than any that was tested."""
    if _minor(installed) > _minor(TESTED_TRANSFORMERS[1]):
        logging.get_logger(__name__).warning(
            f"a3_hf was tested with transformers {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[1]}, this is {installed}"
        )


def _minor(version: str) -> tuple[int, int]:
    return tuple(int(number) for number in re.match(r"(\d+)\.(\d+)", version).groups())
