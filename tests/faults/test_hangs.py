"""What hangs ends with EXIT_STUCK and says where; peers that die or disagree end with a line."""

import os
import signal
import threading
import time

import pytest

from t5x_lite.cli import EXIT_PEER
from t5x_lite.running.clock import EXIT_STUCK
from tests import tiny_config
from tests.faults import mini

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")


def stuck(workdir, process, phase, lines=None):
    status, rest = mini.end(process) if lines is None else lines
    shown = "\n".join(rest)
    assert status == EXIT_STUCK, shown
    assert f"error: watchdog: {phase} has taken more than train.watchdog.{phase}=" in rest[-1], shown
    assert "the run is at step" in rest[-1]
    assert "thread MainThread:" in (workdir / "watchdog-0.txt").read_text()


def test_a_fifo_that_nobody_writes_to(text, tmp_path):
    """In the place of a file that a start reads. (A FIFO of text is refused at the door.)"""
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    process = mini.begin(text, tmp_path / "run", "train.watchdog.start=40")
    stuck(tmp_path / "run", process, "start")


def test_a_save_that_does_not_end(text, tmp_path):
    """The folder of the save is a pipe to nowhere: orbax waits for ever."""
    code = ("import sys, time; from t5x_lite.checkpoints import format; "
            "format.RecordHandler._write = lambda *_: _hang(); "
            "exec('async def _hang():\\n    time.sleep(1000)'); "
            "from t5x_lite.running import clock; sys.argv[0] = 't5x_lite.train'; "
            "import runpy; runpy.run_module('t5x_lite.train', run_name='__main__', alter_sys=False)")
    args = mini.command(text, tmp_path / "run", "train.watchdog.save=8", "train.num_steps=100000",
                        "checkpoint.every=2", "eval.every=100000")
    args[1:3] = ["-c", code]
    import subprocess
    process = subprocess.Popen(args, cwd=mini.ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHONPATH": str(mini.ROOT)})
    stuck(tmp_path / "run", process, "save")


def test_a_peer_that_is_stopped(text, tmp_path):
    processes = mini.begin_two(text, tmp_path / "run", "train.num_steps=100000", "train.log_every=1",
                               "train.watchdog.step=10", "eval.every=100000",
                               "checkpoint.every=100000")
    mini.wait_for(processes[0], "step 3/")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        stuck(tmp_path / "run", processes[0], "step")
    finally:
        processes[1].send_signal(signal.SIGKILL)
        processes[1].communicate()


def test_a_peer_that_dies(text, tmp_path):
    processes = mini.begin_two(text, tmp_path / "run", "train.num_steps=100000", "train.log_every=1",
                               "eval.every=100000", "checkpoint.every=100000")
    mini.wait_for(processes[0], "step 3/")
    processes[1].send_signal(signal.SIGKILL)
    status, lines = mini.end(processes[0])
    processes[1].communicate()
    assert status == EXIT_PEER or status < 0, lines
    assert lines[-1].startswith("error: ") and "the run goes on from its last checkpoint" in lines[-1]


@pytest.mark.parametrize(("flag", "words"), [
    ("optimizer.schedule.base_learning_rate=0.9",
     "optimizer.schedule.base_learning_rate: 0.01 in process 0, 0.9 in process 1"),
    ("checkpoint.every=4", "checkpoint.every: 3 in process 0, 4 in process 1"),
])
def test_processes_that_disagree(text, tmp_path, flag, words):
    found = mini.two(text, tmp_path / "run", "checkpoint.every=3", each=((), (flag,)))
    for status, lines in found:
        assert status == 2, lines
        assert any(words in line for line in lines), lines


def test_a_second_start_is_refused_or_waits(text, tmp_path):
    flags = ("train.num_steps=100000", "eval.every=100000", "checkpoint.every=2")
    first = mini.begin(text, tmp_path / "run", *flags)
    mini.wait_for(first, r"step \d")
    status, lines = mini.end(mini.begin(text, tmp_path / "run", *flags,
                                        "checkpoint.wait_for_workdir=1"))
    assert status == 2 and f"in use: process {first.pid} on host" in "\n".join(lines), lines
    second = mini.begin(text, tmp_path / "run", *flags)
    time.sleep(1)
    threading.Timer(8.0, first.send_signal, (signal.SIGTERM,)).start()
    assert mini.end(first)[0] == 0
    mini.wait_for(second, r"step \d")
    second.send_signal(signal.SIGINT)
    status, lines = mini.end(second)
    assert status == 0 and any("stopped by SIGINT after step" in line for line in lines), lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(text, tmp_path, number):
    """In the start it leaves at once; later it saves; a second one does not wait."""
    process = mini.begin(text, tmp_path / "start")
    mini.wait_for(process, "started from")
    process.send_signal(number)
    status, lines = mini.end(process)
    assert status == 128 + number and len(lines) <= 9, lines
    assert lines[-1].startswith(f"error: stopped by {number.name} at once; no step was taken")
    process = mini.begin(text, tmp_path / "run", "train.num_steps=100000", "eval.every=100000",
                         "checkpoint.every=100000")
    mini.wait_for(process, "step 5/")
    process.send_signal(number)
    status, lines = mini.end(process)
    assert status == 0, lines
    assert any(line.startswith(f"stopped by {number.name} after step") for line in lines), lines
    assert "Traceback" not in "\n".join(lines)
