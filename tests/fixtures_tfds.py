"""Fixtures of the tasks' tests: the registered zoo, its files, data sets of TFDS offline."""

import runpy
import sys

import pytest

from t5x_lite.data import tasks as data_tasks
from tests.helpers import shared_data, shared_tool


@pytest.fixture(scope="session")
def registered():
    """seqio's TaskRegistry with every task of the zoo."""
    data_tasks.tensorflow_side()
    import seqio

    import tasks
    tasks.register_all()
    return seqio.TaskRegistry


@pytest.fixture
def files(monkeypatch):
    """Tasks read the fine-tuning files and T5's vocabulary that stand beside the repository."""
    monkeypatch.setenv("T5X_LITE_FILES", str(shared_data("finetune")))
    monkeypatch.setenv("T5X_LITE_T5_VOCAB", str(shared_data(
        "vocab/cc_all.32000.100extra.sentencepiece.model")))


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory):
    """An offline TFDS_DATA_DIR, made by the shared tool from openly licensed text."""
    folder = tmp_path_factory.mktemp("tfds")
    tool, source = shared_tool("make_tfds_dir.py"), shared_data("corpora").parent
    data_tasks.tensorflow_side()
    argv, sys.argv = sys.argv, [str(tool), str(source), str(folder)]
    try:
        runpy.run_path(str(tool), run_name="__main__")
    finally:
        sys.argv = argv
    return folder


@pytest.fixture
def offline_tfds(tfds_dir, monkeypatch):
    import seqio
    monkeypatch.setenv("T5X_LITE_T5_VOCAB", str(shared_data(
        "vocab/cc_all.32000.100extra.sentencepiece.model")))
    seqio.set_tfds_data_dir_override(str(tfds_dir))
    yield
    seqio.set_tfds_data_dir_override(None)
