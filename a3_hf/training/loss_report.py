"""Report of a finished run's losses: a table after each stage, and a plot over tokens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from transformers import TrainerState

from .schedule import AdaptiveSchedule, Schedule


def loss_names(entry: Mapping[str, float]) -> list[str]:
    """Returns the names of an evaluation's losses in a log entry: `eval_loss_…` of each order, or `eval_loss` if there are no
    orders; empty for other entries.
    """
    return [name for name in entry if name.startswith("eval_loss_")] or [name for name in entry if name == "eval_loss"]


def losses_table(state: TrainerState, schedule: Schedule | AdaptiveSchedule | None) -> Table | None:
    """Returns a table of the evaluation losses, nats per token, before training and after each stage; without a schedule,
    before and after training. None if nothing was evaluated.
    """
    measured = {entry["step"]: entry for entry in state.log_history if loss_names(entry)}
    names = list(dict.fromkeys(name for entry in measured.values() for name in loss_names(entry)))
    table = Table(title="loss per order, nats per token")
    table.add_column("after")
    table.add_column("step", justify="right")
    for name in names:
        table.add_column(_shown(name), justify="right")
    rows = [("(start)", 0)]
    if schedule is None:
        rows.append(("(end)", state.max_steps))
    else:
        rows += [(stage.name, end) for stage, end in zip(schedule.stages, schedule.ends, strict=True)]
    for label, step in rows:
        if step in measured:
            table.add_row(label, str(step), *(f"{measured[step][name]:.4f}" for name in names))
    return table if table.row_count else None


def plot_losses(
    log_history: Sequence[Mapping[str, float]],
    path: Path,
    *,
    stages: Sequence[str],
    ends: Sequence[int],
    tokens_per_step: int,
) -> bool:
    """Draws a PNG: the evaluation losses and the training loss, nats per token, over tokens trained on, with a line at the end
    of each stage.

    Args:
        log_history: `TrainerState.log_history`.
        stages: names of the stages.
        ends: the step at which each ends.
        tokens_per_step: tokens of an update step, over all ranks.

    Returns:
        False if no loss was logged, so that nothing is drawn.
    """
    from matplotlib.figure import Figure  # an extra

    training = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    measured = [entry for entry in log_history if loss_names(entry)]
    if not training and not measured:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training, strict=True)
        axes.plot([step * tokens_per_step for step in steps], losses, color="lightgrey", label="training")
    for name in loss_names(measured[0]) if measured else ():
        tokens = [entry["step"] * tokens_per_step for entry in measured]
        axes.plot(tokens, [entry[name] for entry in measured], marker="o", markersize=3, label=_shown(name))
    start = 0
    for name, end in zip(stages, ends, strict=True):
        axes.axvline(end * tokens_per_step, color="grey", linestyle=":")
        middle = (start + end) / 2 * tokens_per_step
        axes.text(middle, 1.01, name, transform=axes.get_xaxis_transform(), ha="center")
        start = end
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _shown(name: str) -> str:
    return name.removeprefix("eval_loss_").removeprefix("eval_")
