"""`a3 eval`: lm-eval's command line, or a measure beyond its tasks."""

from importlib.util import find_spec

HELP = """\
Usage: a3 eval --model a3|a3_ar|hf --model_args pretrained=PATH,… --tasks NAME,… [any option of lm_eval]
       a3 eval ppl|judge|needle|calibration …   (each has --help)

The first form is lm-eval's own command line, with two more models and the tasks of a3_hf/evaluation/tasks:
  a3     an A3 model, an adapter, or a LLaMA as one: order=, group_size=, num_orders=, decoding=, and any option of
         A3GenerationConfig
  a3_ar  a LLaMA, or the content stream of an A3 checkpoint: infilling=prefix|suffix_prompt|best_of
  --metadata data_dir=FOLDER   the tasks read local files instead of the hub (a3_hf/evaluation/tasks/README.md)
  --output_path FOLDER         for `a3 report FOLDER`
  --use_cache PATH             an interrupted run goes on where it was
  --include_path FOLDER        other tasks, in place of this package's
  --seed N                     lm-eval's: few-shot examples, and what a3_ar and hf sample; a3 takes seed= in --model_args
a3 eval run --help shows all of lm-eval's options; hyphens and underscores are alike."""


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
    from .measures import app

    args = [_underscored(arg) for arg in args]
    if args[0] in {command.name or command.callback.__name__ for command in app.registered_commands}:
        app(args=args, prog_name="a3 eval")
        return
    from a3_hf.evaluation.lm_harness.command import evaluate

    evaluate(args)


def _underscored(arg: str) -> str:
    """--model-args as --model_args."""
    name, equals, value = arg.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else arg
