"""The losses of a run over its tokens, drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def plot_losses(
    log_history: Sequence[Mapping[str, float]],
    path: Path,
    *,
    stages: Sequence[str],
    ends: Sequence[int],
    tokens_per_step: int,
) -> bool:
    """Draws a PNG: nats per token under each evaluation order (without a curriculum, the one loss there is) and the training
    loss, over tokens trained on, with a line where a stage ends.

    Args:
        log_history: what the run logged, as in `TrainerState`.
        stages: the names of the stages.
        ends: the step at which each is over.
        tokens_per_step: of an update step, over all ranks.

    Returns:
        False where nothing was logged, so that there is nothing to draw.
    """
    from matplotlib.figure import Figure  # only where it is asked for: an extra

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
        label = name.removeprefix("eval_loss_").removeprefix("eval_")
        axes.plot(tokens, [entry[name] for entry in measured], marker="o", markersize=3, label=label)
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


def loss_names(entry: Mapping[str, float]) -> list[str]:
    """The losses of an evaluation, as logged: those of each order, `eval_loss_…`, or without orders `eval_loss`; none in
    what is no evaluation.
    """
    return [name for name in entry if name.startswith("eval_loss_")] or [name for name in entry if name == "eval_loss"]
