import pytest
from transformers.utils import is_matplotlib_available

from a3_hf.training.loss_report import plot_losses
from a3_hf.training.trainer import EVALUATION_ORDERS

STAGES = {"stages": ["ar", "permute"], "ends": [10, 30], "tokens_per_step": 1000}


def history():
    logged = []
    for step in (0, 10, 30):
        logged.append({"step": step, **{f"eval_loss_{name}": 7.0 - step / 10 for name in EVALUATION_ORDERS}})
        logged.append({"step": step + 1, "loss": 6.5 - step / 10, "group_size": 1})
    return [*logged, {"step": 30, "train_loss": 4.0}]


@pytest.mark.skipif(not is_matplotlib_available(), reason="needs matplotlib")
def test_every_order_is_drawn_over_tokens_with_the_stages(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    assert plot_losses(history(), tmp_path / "losses.png", **STAGES)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    for name in EVALUATION_ORDERS:
        assert lines[name] == ([0, 10000, 30000], [7.0, 6.0, 4.0])
    assert lines["training"] == ([1000, 11000, 31000], [6.5, 5.5, 3.5])
    boundaries = [xs[0] for label, (xs, _) in lines.items() if label.startswith("_")]
    assert boundaries == [10000, 30000]
    assert [text.get_text() for text in axes.texts] == ["ar", "permute"]


@pytest.mark.skipif(not is_matplotlib_available(), reason="needs matplotlib")
def test_without_a_curriculum_there_is_one_loss_and_no_stage(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    logged = [{"step": step, "eval_loss": 7.0 - step} for step in (0, 2)]
    assert plot_losses(logged, tmp_path / "losses.png", stages=[], ends=[], tokens_per_step=10)
    (line,) = drawn[0].axes[0].lines
    assert (line.get_label(), list(line.get_xdata()), list(line.get_ydata())) == ("loss", [0, 20], [7.0, 5.0])


@pytest.mark.skipif(not is_matplotlib_available(), reason="needs matplotlib")
def test_nothing_logged_is_nothing_drawn(tmp_path):
    assert not plot_losses([{"step": 3, "train_loss": 4.0}], tmp_path / "losses.png", **STAGES)
    assert not list(tmp_path.iterdir())
