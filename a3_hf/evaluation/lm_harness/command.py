"""lm-eval's command line with the models `a3` and `a3_ar` and the tasks of this package."""

import logging
import sys
from pathlib import Path

import torch
from lm_eval.__main__ import cli_evaluate

from . import a3_lm, causal_lm  # noqa: F401  (they register their models)

TASKS = Path(__file__).parents[1] / "tasks"


def evaluate(args: list[str]) -> None:
    """Runs lm-eval with its own arguments. Tasks are those of this package unless `--include_path` is given; the device is the
    CPU if there is no GPU.
    """
    leave_out_expected_warnings()
    given = {arg.split("=")[0] for arg in args}
    if "--include_path" not in given:
        args = [*args, "--include_path", str(TASKS)]
    if "--device" not in given and args[0] not in ("ls", "validate") and not torch.cuda.is_available():
        args = [*args, "--device", "cpu"]  # lm-eval's own default is a GPU
    sys.argv = ["lm_eval", *args]
    cli_evaluate()


def leave_out_expected_warnings() -> None:
    """Silences lm-eval's warnings of tasks that replace its own and of `--metadata`, which are intended here."""

    def is_news(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not (
            ("overrides existing task" in said and str(TASKS) in said)
            or said.partition(": ")[2].startswith("Custom kwargs can")
        )

    for name in ("lm_eval.tasks._index", "lm_eval.api.task"):
        logging.getLogger(name).addFilter(is_news)
