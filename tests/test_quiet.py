"""What libraries print is held back; what is wrong is never lost."""

import os
import subprocess
import sys

import pytest

from tests.test_imports import ROOT

LEAVE = """
import os, threading, time
from t5x_lite import cli, quiet
from t5x_lite.errors import UserError
started = threading.Event()
def hold():
    with quiet.stderr(b"noise"):
        os.write(2, b"a noise\\nof another thread\\n")
        started.set()
        time.sleep(60)
threading.Thread(target=hold, daemon=True).start()
started.wait()
cli.ahead.busy = lambda: BUSY
def fail():
    raise ERROR("the vocabulary is not there")
cli._guarded(fail)
"""


@pytest.mark.parametrize(("busy", "error", "status"), [
    ("True", "UserError", 2), ("False", "UserError", 2), ("False", "ValueError", 1)])
def test_an_error_is_said_while_another_thread_holds_standard_error(busy, error, status):
    """Of a run whose thread imports TensorFlow as its main one finds what is wrong."""
    code = LEAVE.replace("BUSY", busy).replace("ERROR", error)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == status, done.stderr
    assert "the vocabulary is not there" in done.stderr and "of another thread" in done.stderr
    assert "a noise" not in done.stderr


def test_noise_is_dropped_and_all_is_shown_where_the_block_fails(capfd):
    from t5x_lite import quiet
    with quiet.holding(lambda line: b"noise" in line):
        os.write(2, b"noise\nnews\n")
    assert capfd.readouterr().err == "news\n"
    with pytest.raises(KeyError), quiet.holding(lambda line: b"noise" in line,
                                                  whole_if_failed=True):
        os.write(2, b"noise\nnews\n")
        raise KeyError
    assert capfd.readouterr().err == "noise\nnews\n"
    quiet.give_back()
    assert not quiet._held
