"""`a3 adapt` and `a3 merge`."""

from pathlib import Path
from typing import Annotated

import typer

from .common import Base


def adapt(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A YAML file that describes one run.", show_default=False)],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print data sources, stages, memory, cost and some rows; train nothing.")
    ] = False,
    accelerate_configs: Annotated[
        Path, typer.Option(help="With --dry-run: folder of accelerate configs to estimate memory for.")
    ] = Path("accelerate_configs"),
    tflops: Annotated[
        float, typer.Option(help="With --dry-run: TFLOP/s that a GPU reaches; 400 is about 40% of an H100 in bfloat16.")
    ] = 400.0,
) -> int:
    """Adapt a pretrained LLaMA as RECIPE says. Any setting of the recipe can be overridden: --learning_rate 1e-4.

    After Ctrl-C or a crash, the same command resumes from the last checkpoint.
    """
    from a3_hf.training import dry_run as plan
    from a3_hf.training import run
    from a3_hf.training.recipes import parse_recipe

    if not dry_run:
        return run.run(parse_recipe(recipe, context.args))
    if not accelerate_configs.is_dir():
        raise ValueError(f"accelerate_configs={str(accelerate_configs)!r}: expected a folder that exists")
    if tflops <= 0:
        raise ValueError(f"tflops={tflops}: expected a number above 0")
    plan.dry_run(parse_recipe(recipe, context.args), accelerate_configs=accelerate_configs, tflops=tflops)
    return 0


def merge(
    adapter: Annotated[str, typer.Argument(help="An adapter: a folder or a hub name.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)],
    base: Base = None,
) -> None:
    """Merge an adapter into its base and write one plain checkpoint to OUTPUT."""
    from a3_hf.adapters import checkpoints

    checkpoints.merge(adapter, output, base=base)
    print(f"The model is in {output}.")


def export(
    adapter: Annotated[str, typer.Argument(help="An adapter: a folder or a hub name.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)],
    base: Base = None,
) -> None:
    """Write an adapter as vLLM's --lora-modules take it to OUTPUT."""
    from a3_hf.adapters.export import export

    export(adapter, output, base=base)
    print(f"The adapter is in {output}.")
