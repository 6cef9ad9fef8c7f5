"""One writer a workdir: WORKDIR/run.lock, held by process 0 of the job that trains there.

A lock of the file system (flock) goes with the process that holds it, however that ends. Where the
file system has none, or has locks that another host does not see (Lustre's localflock), the file
itself serves: its holder writes the time into it every HEARTBEAT seconds, and a holder on another
host that has not been heard of for STALE seconds counts as gone. Hosts' clocks may differ by less
than that.

A job that was put back into the queue may start while the old one still ends: `hold` waits for it,
for a bounded time.
"""

import errno
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from t5x_lite.errors import UserError

HEARTBEAT = 10.0   # seconds between two signs of life
STALE = 60.0       # … after so many without one the holder is gone
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class WorkdirLock:
    """Holds a workdir until it is released, or until this process ends.

    Attributes:
        before: host, pid, start and last sign of life ("alive", both in Unix seconds) of the holder
            before; {} if there was none or it ended in good order.
    """

    def __init__(self, workdir: os.PathLike | str, wait_seconds: float,
                 say: Callable[[str], None] = print):
        """Waits up to wait_seconds for another holder to end.

        Raises:
            UserError: the workdir is in use, or cannot be written to.
        """
        self.path = pathlib.Path(workdir) / "run.lock"
        self._closed = threading.Event()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to {workdir}: {error}. Choose another "
                            "--workdir.") from error
        try:
            self.before = self._acquire(wait_seconds, say)
        except BaseException:
            self._file.close()
            raise
        self._start = time.time()
        self._write()
        threading.Thread(target=self._beat, name="workdir lock", daemon=True).start()

    def _acquire(self, wait_seconds: float, say: Callable[[str], None]
                 ) -> dict[str, Any]:
        deadline, said = time.monotonic() + wait_seconds, False
        while (holder := self._holder()) is not None:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self.path.parent} is in use: {describe(holder)} trains there. Stop it, wait "
                    f"for its end, or choose another --workdir. (checkpoint.wait_for_workdir="
                    f"{wait_seconds:g} is how many seconds a start waits for it.)")
            if not said:
                say(f"{self.path.parent} is in use by {describe(holder)}: waiting up to "
                    f"{wait_seconds:g} s for its end")
                said = True
            time.sleep(min(1.0, max(0.05, deadline - time.monotonic())))
        return self._content()

    def _holder(self) -> dict[str, Any] | None:
        """What is known of another holder; None where the lock is now ours."""
        locks = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                return self._content()
            locks = False
        holder = self._content()
        elsewhere = holder.get("host") != socket.gethostname()
        if holder and (elsewhere or not locks) and _age(holder) < STALE and not self._is_gone(holder):
            if locks:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            return holder
        return None

    def _is_gone(self, holder: dict[str, Any]) -> bool:
        """Whether a holder on this very host has no process any more."""
        if holder.get("host") != socket.gethostname():
            return False
        try:
            os.kill(int(holder.get("pid", 0)) or os.getpid(), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False

    def _content(self) -> dict[str, Any]:
        """The holder as the file names it; {} where it names none that can be read."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self) -> None:
        content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(),
                              "start": self._start, "alive": time.time()})
        # In place, because a lock belongs to the file and not to its name.
        self._file.seek(0)
        self._file.truncate()
        self._file.write(content + "\n")
        self._file.flush()

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT):
            try:
                self._write()
            except (OSError, ValueError):   # a full disk, or closed meanwhile: the next may go
                continue

    def release(self) -> None:
        """Lets others write; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            self._file.seek(0)
            self._file.truncate()
        finally:
            self._file.close()   # and with it the lock


def _age(holder: dict[str, Any]) -> float:
    alive = holder.get("alive")
    return time.time() - alive if isinstance(alive, (int, float)) else float("inf")


def describe(holder: dict[str, Any]) -> str:
    """"process 12 on host a, started 2026-11-29 06:40:01"."""
    started = holder.get("start")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)) \
        if isinstance(started, (int, float)) else "at a time unknown"
    return (f"process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}, "
            f"started {when}")
