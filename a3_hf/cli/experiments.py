"""`a3 experiment`."""

from pathlib import Path
from typing import Annotated

import typer


def experiment(
    name: Annotated[str, typer.Argument(help="A file in recipes/experiments, or a path.", show_default=False)],
    size: Annotated[str, typer.Option(help="Size of the experiment: smoke, cpu or gpu.")] = "cpu",
    jobs: Annotated[int, typer.Option(help="Number of runs at a time, on a CPU.")] = 1,
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/experiments"),
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the result.", show_default="eval/results/NAME; for other sizes NAME-SIZE"),
    ] = None,
) -> int:
    """Train and measure a grid of runs; write the result, its table and plots. Resumes after an interruption."""
    from a3_hf.experiments.grid import read_experiment
    from a3_hf.experiments.runner import MEASURES, run

    plan = read_experiment(name, size=size, runs=runs, known_measures=MEASURES)
    folder = plan.name if size == "cpu" else f"{plan.name}-{size}"
    command = f"a3 experiment {name} --size {size} --jobs {jobs}"
    return run(plan, output or Path("eval/results") / folder, jobs=jobs, command=command)
