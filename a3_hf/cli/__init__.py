"""The command `a3`. Importing it imports neither torch nor transformers: commands do so when they run."""

from importlib.metadata import version
from typing import Annotated

import typer

from . import evaluation, experiments, generation, serving, training
from .common import APP_SETTINGS, PASS_ON, Command

app = typer.Typer(
    help="A3: any-order generation from a pretrained LLaMA. Options are written with hyphens or underscores.",
    **APP_SETTINGS,
)


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"a3 {version('a3-hf')}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(cls=Command, context_settings=PASS_ON)(training.adapt)
app.command(cls=Command)(generation.infill)
app.command(cls=Command)(generation.generate)
app.command(cls=Command)(generation.score)
app.command(cls=Command)(training.merge)
app.command(cls=Command)(training.export)
app.command(cls=Command)(serving.serve)
app.command("eval", cls=Command, context_settings={**PASS_ON, "help_option_names": []})(evaluation.evaluate)
app.command(cls=Command)(evaluation.report)
app.command(cls=Command)(experiments.experiment)
