"""`a3 eval` (lm-eval's command line, and measurements that lm-eval lacks) and `a3 report`."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from . import measures

HELP = """\
Usage: a3 eval --model a3|a3_ar|hf --model_args pretrained=PATH,… --tasks NAME,… [any option of lm_eval]
       a3 eval ppl|judge|needle|calibration …   (each has --help)

The first form is lm-eval's command line, with two more models and the tasks of a3_hf/evaluation/tasks:
  a3     an A3 model, an adapter, or a LLaMA used as one: order=, group_size=, num_orders=, decoding=, and any option of
         A3GenerationConfig
  a3_ar  a LLaMA, or the content stream of an A3 checkpoint or adapter:
         infilling=prefix|suffix_prompt|best_of|psm|spm, fim_tokens=
  --metadata data_dir=FOLDER   read the tasks from local files instead of the hub (a3_hf/evaluation/tasks/README.md)
  --output_path FOLDER         write the results, for `a3 report FOLDER`
  --use_cache PATH             resume an interrupted run
  --include_path FOLDER        use other tasks instead of this package's
  --seed N                     lm-eval's seed, for few-shot examples and the samples of a3_ar and hf; the seed of a3 is
                               seed= in --model_args
`a3 eval run --help` shows all options of lm-eval. Options are written with hyphens or underscores."""


def evaluate(context: typer.Context) -> None:
    """Run lm-eval with the models a3 and a3_ar and this package's tasks, or measure: ppl, judge, needle, calibration.

    `a3 eval --help` lists the models, tasks and measurements; all other arguments are lm-eval's.
    """
    run(context.args)


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
    if args[0] in {command.callback.__name__ for command in measures.app.registered_commands}:
        measures.app(args=args, prog_name="a3 eval")
        return
    from a3_hf.evaluation.lm_harness.command import evaluate

    if args in (["--tasks", "list"], ["--tasks=list"]):  # as in older releases of lm-eval
        args = ["ls", "tasks"]
    evaluate([_underscored(arg) for arg in args])


def _underscored(arg: str) -> str:
    """Returns an option with underscores: --model-args becomes --model_args."""
    name, equals, value = arg.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else arg


def report(
    folder: Annotated[Path, typer.Argument(help="The --output_path of `a3 eval`.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="Folder for report.md and its plots.", show_default="FOLDER")
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots as PNG files.")] = True,
) -> None:
    """Write the results in FOLDER as tables and plots, with the paper's figures."""
    from a3_hf.evaluation.reporting.report import write_report

    print(f"The report is {write_report(folder, output, plots=plots)}.")
