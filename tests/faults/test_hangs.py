"""What hangs ends with EXIT_STUCK and says where; peers that die or disagree end with a line."""

import os
import signal
import socket
import subprocess
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


@pytest.fixture(autouse=True)
def as_in_a_shell():
    """Under nohup this process ignores SIGHUP, and what it starts would inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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


def begin_with(patch, text, workdir, *flags):
    """mini.begin of a training in which this code ran first."""
    code = (f"import sys; {patch}; sys.argv[0] = 't5x_lite.train'; import runpy; "
            "runpy.run_module('t5x_lite.train', run_name='__main__', alter_sys=False)")
    args = mini.command(text, workdir, *flags)
    args[1:3] = ["-c", code]
    return subprocess.Popen(args, cwd=mini.ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT,
                            env={**os.environ, "PYTHONPATH": str(mini.ROOT)})


# The folder of the save is a pipe to nowhere: orbax waits for ever.
STUCK_SAVE = ("import time; from t5x_lite.checkpoints import format; "
              "format.RecordHandler._write = lambda *_: _hang(); "
              "exec('async def _hang():\\n    time.sleep(1000)')")


def test_a_save_that_does_not_end(text, tmp_path):
    process = begin_with(STUCK_SAVE, text, tmp_path / "run", "train.watchdog.save=8",
                         "train.num_steps=100000", "checkpoint.every=2", "eval.every=100000")
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


def test_processes_whose_settings_disagree(text, tmp_path):
    """A variable that JAX reads. (Bytes of data files are in tests/data/test_readers.py.)"""
    first, second = mini.begin_two(
        text, tmp_path / "run",
        environments=({}, {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"}))
    for process in (first, second):
        status, lines = mini.end(process)
        assert status == 2 and any("jax_default_matmul_precision: 'None' in process 0, 'bfloat16' in "
                                   "process 1" in line for line in lines), lines


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
    assert [line for line in lines if number.name in line][0] == (
        f"{number.name}: saving after this step; once more to leave at once")
    again = mini.begin(text, tmp_path / "run", "train.num_steps=1000")   # what it saved is there
    assert mini.wait_for(again, "resumed from step|started from")[-1].startswith("resumed from step")
    again.kill()
    again.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_second_signal_does_not_wait_for_the_save(text, tmp_path, number):
    process = begin_with(STUCK_SAVE, text, tmp_path / "run", "train.num_steps=100000",
                         "eval.every=100000", "checkpoint.every=100000")
    mini.wait_for(process, "step 5/")
    process.send_signal(number)
    mini.wait_for(process, f"{number.name}: saving after this step")
    began = time.monotonic()
    process.send_signal(number)
    status, lines = mini.end(process)
    assert status == 128 + number and time.monotonic() - began < 20, lines
    assert lines[-1] == (f"error: stopped by {number.name} at once; what came after the last "
                         "checkpoint is lost. The same command goes on from there.")
    assert "Traceback" not in "\n".join(lines)


# --- nobody at the coordinator's address ------------------------------------------------------------

@pytest.mark.parametrize(("address", "process", "status", "says"), [
    ("127.0.0.1:{port}", 1, EXIT_PEER, "process 0 of this run does not answer at 127.0.0.1:{port} "
                                      "within 5 s (Connection refused)"),
    ("no-such-host.invalid:{port}", 1, EXIT_PEER, "does not answer at no-such-host.invalid:{port}"),
    ("127.0.0.1:{port}", 0, -signal.SIGABRT, "not all of the 2 processes of this run met at "
                                            "127.0.0.1:{port} within 5 s"),
    ("localhost", 1, 2, "coordinator address 'localhost' (flags): must be host:port"),
])
def test_an_absent_coordinator(text, tmp_path, address, process, status, says):
    """A bounded wait, and a line of ours at the end, behind JAX's dump where it makes one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = begin_with("from t5x_lite.parallel import processes; processes.SECONDS_TO_JOIN = 5",
                       text, tmp_path / "run",
                       f"--coordinator_address={address.format(port=port)}", "--num_processes=2",
                       f"--process_id={process}")
    found, lines = mini.end(began, 120)
    assert found == status, lines
    assert lines[-1].startswith("error: ") and says.format(port=port) in lines[-1]
    assert status == 2 or "start all processes again" in lines[-1].lower()
