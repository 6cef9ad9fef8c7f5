"""One writer a workdir: by the system's lock, and by signs of life where there is none."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from t5x_lite.checkpoints import lock
from t5x_lite.checkpoints.lock import WorkdirLock
from t5x_lite.errors import UserError


def holder(path):
    return json.loads((path / "run.lock").read_text())


def test_a_second_writer_is_refused_with_the_firsts_name(tmp_path):
    first = WorkdirLock(tmp_path, 0.0)
    assert first.before == {}
    said = []
    with pytest.raises(UserError, match=rf"in use: process {os.getpid()} on host "
                                        rf"{socket.gethostname()}, started 20"):
        WorkdirLock(tmp_path, 0.2, said.append)
    assert len(said) == 1 and "waiting up to 0.2 s" in said[0]
    first.release()
    first.release()
    second = WorkdirLock(tmp_path, 0.0)
    assert second.before == {}   # ended in good order
    second.release()


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path):
    code = (f"import os; from t5x_lite.checkpoints.lock import WorkdirLock; "
            f"WorkdirLock({str(tmp_path)!r}, 0.0); os.kill(os.getpid(), 9)")
    child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -9
    found = WorkdirLock(tmp_path, 0.0)
    assert found.before["alive"] >= found.before["start"] > time.time() - 120
    found.release()


@pytest.mark.parametrize("locks", [True, False])
def test_another_hosts_signs_of_life_count_for_a_while(tmp_path, monkeypatch, locks):
    if not locks:
        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")
        monkeypatch.setattr(lock.fcntl, "flock", none)
    path = tmp_path / "run.lock"
    alive = {"host": "elsewhere", "pid": 7, "start": time.time() - 99, "alive": time.time()}
    path.write_text(json.dumps(alive))
    with pytest.raises(UserError, match="process 7 on host elsewhere"):
        WorkdirLock(tmp_path, 0.0)
    path.write_text(json.dumps({**alive, "alive": time.time() - 2 * lock.STALE}))
    found = WorkdirLock(tmp_path, 0.0)
    assert found.before["pid"] == 7 and holder(tmp_path)["pid"] == os.getpid()
    if not locks:   # this very process holds it now, by its signs of life alone
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            WorkdirLock(tmp_path, 0.0)
    found.release()


@pytest.mark.parametrize("content", ["", "null", "[]", "{", '{"host": 3, "pid": "x", "alive": "y"}',
                                     '{"alive": NaN}', '{"alive": 1e300}', '{"alive": 1%s}' % ("0" * 400),
                                     "[" * 100_000, "\0"])
def test_what_the_file_holds_never_stops_a_start(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    lock = WorkdirLock(tmp_path, 0.0)
    assert holder(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert (tmp_path / "run.lock").read_text() == ""


def test_a_clock_that_is_far_ahead_tells_life_by_its_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.2)
    ahead = {"host": "elsewhere", "pid": "x", "start": float("nan"), "alive": time.time() + 9999}
    (tmp_path / "run.lock").write_text(json.dumps(ahead))
    with pytest.raises(UserError, match="process x on host elsewhere, started at a time unknown"):
        WorkdirLock(tmp_path, 0.1)
    found = WorkdirLock(tmp_path, 30.0)   # silent for three heartbeats
    assert found.before["host"] == "elsewhere" and holder(tmp_path)["pid"] == os.getpid()
    found.release()


@pytest.mark.parametrize("pid", ["x", -1, 0, 10**30, None])
def test_a_process_that_cannot_be(tmp_path, monkeypatch, pid):
    """On this host, where there are no locks of the system."""
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(lock.fcntl, "flock", none)
    (tmp_path / "run.lock").write_text(json.dumps(
        {"host": socket.gethostname(), "pid": pid, "start": 1e300, "alive": time.time()}))
    if pid == 10**30:
        WorkdirLock(tmp_path, 0.0).release()
        return
    with pytest.raises(UserError, match=f"process {pid} on host"):
        WorkdirLock(tmp_path, 0.0)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*file"):
        WorkdirLock(tmp_path / "file", 0.0)


def test_waits_for_the_one_that_ends(tmp_path):
    first = open(tmp_path / "run.lock", "a+")
    fcntl.flock(first, fcntl.LOCK_EX)
    import threading
    threading.Timer(3.0, first.close).start()
    said = []
    lock = WorkdirLock(tmp_path, 30.0, said.append)
    assert first.closed and len(said) == 1 and "waiting up to 30 s" in said[0]
    lock.release()
