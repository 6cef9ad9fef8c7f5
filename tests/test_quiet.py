"""What libraries print is held back; what is wrong is never lost."""

import os
import subprocess
import sys

import pytest

from t5x_lite import quiet
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
    with quiet.holding(lambda line: b"noise" in line):
        os.write(2, b"noise\nnews\n")
    assert capfd.readouterr().err == "news\n"
    with pytest.raises(KeyError), quiet.holding(lambda line: b"noise" in line,
                                                  whole_if_failed=True):
        os.write(2, b"noise\nnews\n")
        raise KeyError
    assert capfd.readouterr().err == "noise\nnews\n"


def test_blocks_of_two_threads_that_overlap_give_back_what_was_there(capfd):
    first, second = (quiet.holding(lambda line, word=word: word in line) for word in (b"one", b"two"))
    first.__enter__()
    second.__enter__()
    os.write(2, b"one\ntwo\nthree\n")
    first.__exit__(None, None, None)
    os.write(2, b"two\nfour\n")
    assert capfd.readouterr().err == ""
    second.__exit__(None, None, None)
    os.write(2, b"one\n")
    assert capfd.readouterr().err == "three\nfour\none\n"


def test_what_is_given_back_stays_given_back(capfd):
    block = quiet.holding(lambda line: b"noise" in line)
    block.__enter__()
    os.write(2, b"noise\nnews\n")
    quiet.give_back()
    quiet.give_back()
    os.write(2, b"noise\n")
    block.__exit__(None, None, None)
    assert capfd.readouterr().err == "news\nnoise\n"


@pytest.mark.parametrize(("there", "set_to"), [((), "1"), (("/dev/dxg",), None), (("/dev/nvidia0",), None)])
def test_cuda_is_looked_for_where_a_driver_is(monkeypatch, there, set_to):
    monkeypatch.setattr(quiet.os, "environ", {})
    quiet.expect_no_cuda(exists=lambda path: path in there)
    assert quiet.os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") == set_to
