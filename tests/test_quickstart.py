"""The notebook runs from its first cell to its last, offline."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A kernel `python3` of this interpreter, whatever others the machine has; and this checkout on its path."""
    from ipykernel.kernelspec import write_kernel_spec

    write_kernel_spec(tmp_path / "jupyter" / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), *filter(None, sys.path)]))


def test_the_quickstart_runs(tmp_path, kernels):
    folder = tmp_path / "clone" / "examples"
    folder.mkdir(parents=True)
    shutil.copy(EXAMPLES / "story_language.py", folder)
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    nbformat.validate(notebook)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()

    outputs = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") != "stderr"
    ]
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "query_embed" in text and "tensor([[0, 1, 2, 3, 4, 5, 6, 7]])" in text
    assert float(re.search(r"mean loss of the run: ([\d.]+)", text)[1]) < 3.5  # ln 119 = 4.8 before training
    assert re.search(r"someone hid a \w+ \w+ in the \w+ \. mia asked \w+ for help \.", text)
    assert float(re.search(r"([\d.]+) nats for a held-out story", text)[1]) > 0
    assert str(tmp_path) not in text and str(EXAMPLES.parent) not in text


def test_the_stored_notebook_has_no_outputs():
    cells = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4).cells
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
