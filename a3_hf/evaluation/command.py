"""`a3 eval`: lm-eval's command line with the models `a3` and `a3_ar` and the task pack, and the measurements beyond tasks."""

import logging
import sys
from importlib.util import find_spec
from pathlib import Path

HELP = """\
Usage: a3 eval --model a3|a3_ar|hf --model_args pretrained=PATH,… --tasks NAME,… [any option of lm_eval]
       a3 eval ppl|judge|needle|calibration …   (each has --help)

The first form is lm-eval's own command line, with two more models and the tasks of eval/tasks:
  a3     an A3 model, an adapter, or a LLaMA as one: order=, group_size=, num_orders=, decoding=, and any option of
         A3GenerationConfig
  a3_ar  a LLaMA, or the content stream of an A3 checkpoint: infilling=prefix|suffix_prompt|best_of
  --metadata data_dir=FOLDER   the tasks read local files instead of the hub (eval/tasks/README.md)
  --output_path FOLDER         for `a3 report FOLDER`
  --use_cache PATH             an interrupted run goes on where it was
  --include_path FOLDER        other tasks, in place of eval/tasks
  --seed N                     lm-eval's: few-shot examples, and what a3_ar and hf sample; a3 takes seed= in --model_args
a3 eval run --help shows all of lm-eval's options; hyphens and underscores are alike."""


def task_folder() -> Path:
    """The task pack: in the repository, or as installed beside this file."""
    in_repository = Path(__file__).parents[2] / "eval" / "tasks"
    return in_repository if in_repository.is_dir() else Path(__file__).parent / "task_pack"


def run(args: list[str]) -> None:
    """Runs `a3 eval` with its arguments.

    Raises:
        ValueError: lm-eval is not installed.
    """
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    if find_spec("lm_eval") is None:
        raise ValueError("a3 eval needs lm-eval: pip install 'a3-hf[eval]'")
    from .measure import app

    args = [_spelled_as_lm_evals(arg) for arg in args]
    if args[0] in {command.name or command.callback.__name__ for command in app.registered_commands}:
        app(args=args, prog_name="a3 eval")
        return
    import torch
    from lm_eval.__main__ import cli_evaluate

    from . import causal, harness  # noqa: F401  (they register their models)

    leave_out_what_is_meant()
    given = {arg.split("=")[0] for arg in args}
    if "--include_path" not in given:
        args = [*args, "--include_path", str(task_folder())]
    if "--device" not in given and args[0] not in ("ls", "validate") and not torch.cuda.is_available():
        args = [*args, "--device", "cpu"]  # lm-eval's own default is a GPU
    sys.argv = ["lm_eval", *args]
    cli_evaluate()


def leave_out_what_is_meant() -> None:
    """lm-eval warns of what this command does on purpose: that its tasks stand in for lm-eval's own, and that they take
    `--metadata`.
    """
    own = str(task_folder())

    def is_news(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not (
            ("overrides existing task" in said and own in said)
            or said.partition(": ")[2].startswith("Custom kwargs can")
        )

    for name in ("lm_eval.tasks._index", "lm_eval.api.task"):
        logging.getLogger(name).addFilter(is_news)


def _spelled_as_lm_evals(arg: str) -> str:
    """--model-args as --model_args."""
    name, equals, value = arg.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else arg
