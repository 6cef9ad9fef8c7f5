"""The notebooks run from top to bottom, are stored without outputs, and hold no logic of their own."""

import os
import pathlib
import subprocess
import sys

import pytest

nbformat = pytest.importorskip("nbformat")

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# What the cell tagged "parameters" is set to here, so that a page takes seconds.
SMALL = {
    "1_quickstart": {"STEPS": 8},
    "2_finetune_lora": {"STEPS": 6, "BASE_STEPS": 4},
    "3_closed_book_qa": {"OVERRIDES": ["train.num_steps=4", "eval.every=4", "checkpoint.every=4",
                                       "eval.num_batches=1"], "ARMS": "none"},
    "4_scaling_laws": {"BUDGETS": "1e9,3e9", "SIZES": 3, "PREDICT": 0},
    "6_compare": {"BUDGETS": ((32, 2), (32, 12)), "SEEDS": (0, 1), "RATES": (0.004,)},
    "5_plan_a_pod": {"TOPOLOGIES": ("v5e:2x2",), "GPUS": ()},
}


def read(file):
    return nbformat.read(file, as_version=4)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_stored_without_outputs(file):
    book = read(file)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    assert "colab-badge" in book.cells[0].source
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in book.cells) == 1
    assert "%pip install" in book.cells[1].source


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs(file, tmp_path):
    from nbclient import NotebookClient
    book = read(file)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(f"\n{k} = {v!r}" for k, v in SMALL[file.stem].items())
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "",
                   "JAX_PLATFORMS": "cpu"}
    client = NotebookClient(book, timeout=900, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in shown), "nothing was drawn"
    errors = [o for o in shown if o.output_type == "stream" and "Traceback" in o.text]
    assert not errors


OWN = """
import logging, warnings
mine = logging.getLogger("mine")
before = (logging.getLogger().level, mine.level, mine.handlers[:], warnings.showwarning)
from t5x_lite import experiment, interactive, train
from t5x_lite.planning import chart
from t5x_lite.reporting import figure, page
interactive.cli.show_own_lines()
assert (logging.getLogger().level, mine.level, mine.handlers[:], warnings.showwarning) == before
warnings.warn("a warning of one's own")
mine.warning("a line of one's own")
"""


def test_a_notebooks_own_warnings_and_loggers_are_as_they_were():
    done = subprocess.run([sys.executable, "-c", OWN], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "UserWarning: a warning of one's own" in done.stderr and "a line of one's own" in done.stderr
