"""A user's own tasks/ and configs/ beside ours, as they stand in the working folder."""

import os
import pathlib
import subprocess
import sys
import threading

import pytest

from t5x_lite import packages

ROOT = pathlib.Path(__file__).resolve().parents[1]

USE = """
from t5x_lite import cli, packages
from t5x_lite.data import tasks
from t5x_lite.data.config import DataConfig
names = tasks.task_names(DataConfig(task_modules="tasks.mine"))
assert "squad" in names and "mine" in names and "c4_span_corruption" in names
import tasks.mine, tasks.glue
assert cli._find_config("--config=configs/own.py") == "--config=configs/own.py"
found = cli._find_config("--config=configs/quickstart.py").partition("=")[2]
assert found != "configs/quickstart.py" and found.endswith("configs/quickstart.py"), found
import configs.own, configs.quickstart
configs.quickstart.get_config()
print("both are there")
"""
MINE = """
import seqio
from t5x_lite.data import text_to_text
text_to_text.register("mine", seqio.FunctionDataSource(lambda split, shuffle_files: None, ["train"]),
                      lambda dataset: dataset)
"""


def run(folder, code=USE) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, text=True,
                          capture_output=True, timeout=300, check=False)


def test_packages_of_the_same_names_are_both_found(tmp_path):
    for name, module, content in (("tasks", "mine.py", MINE), ("configs", "own.py", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / module).write_text(content)
    done = run(tmp_path)
    assert done.stdout == "both are there\n", done.stderr[-2000:]


def test_modules_of_the_same_name_are_refused(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/__init__.py").touch()
    (tmp_path / "tasks/glue.py").touch()
    done = run(tmp_path, "from t5x_lite import packages\npackages.join('tasks')")
    assert "has modules of the same names as t5x_lite's own tasks: glue. Rename" in done.stderr


@pytest.mark.parametrize("name", ["tasks", "configs"])
def test_ours_alone_is_itself(name):
    assert packages.join(name) is sys.modules[name]
    assert packages.folders(name) == [ROOT / name]


def test_lean_imports_do_without_what_is_named():
    code = """
import gc, sys
from t5x_lite import packages
with packages.lean("colorsys", "json"):
    import importlib.util
    assert not gc.isenabled() and importlib.util.find_spec("colorsys") is None
    try:
        import colorsys
    except ImportError:
        colorsys = None
    import json   # it was there before
assert colorsys is None and gc.isenabled()
import colorsys
"""
    subprocess.run([sys.executable, "-c", "import json\n" + code], check=True)


def test_matplotlib_is_asked_for_where_it_is_used(tmp_path):
    code = ("import sys\nsys.modules['matplotlib'] = None\nimport t5x_lite.train\n"
            "from t5x_lite.errors import UserError\nfrom t5x_lite.reporting import figure\n"
            "try: figure.drawn([], 'train/loss')\nexcept UserError as error: print(error)")
    done = run(tmp_path, code)
    assert "curves need matplotlib: pip install 't5x_lite[plots]'." in done.stdout, done.stderr


def test_a_run_without_tensorboard_says_so_and_goes_on(tmp_path):
    code = ("import sys\nsys.modules['tensorboardX'] = None\nfrom t5x_lite.training import metrics\n"
            f"with metrics.MetricsWriter({str(tmp_path)!r}, 0) as writer: "
            "writer.write({'step': 1}, {'loss': 2.0}, 'train/')")
    done = run(tmp_path, code)
    assert "need tensorboardX: pip install 't5x_lite[tensorboard]'" in done.stdout, done.stderr
    assert "train/loss" in (tmp_path / "metrics.jsonl").read_text()


def test_lazy_imports_of_one_thread_are_none_of_anothers():
    """TFDS's import has them while another thread compiles; code in JAX imports as it runs."""
    from etils import epy
    packages.keep_lazy_imports_apart()
    packages.keep_lazy_imports_apart()
    entered, done, found = threading.Event(), threading.Event(), []

    def other():
        entered.wait(10)
        try:
            from email.message import Message
            found.append(Message)
        except BaseException as error:
            found.append(error)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with epy.lazy_imports():
        import wave
        entered.set()
        assert done.wait(10)
        import sndhdr_that_is_not_there
    thread.join()
    assert found[0].__name__ == "Message" and isinstance(found[0], type)
    assert type(wave).__name__ == "LazyModule" and wave.open is not None
    assert type(sndhdr_that_is_not_there).__name__ == "LazyModule"
    import json
    assert json.loads("1") == 1
