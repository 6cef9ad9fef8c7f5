"""One writer a workdir: WORKDIR/run.lock, held by process 0 of the job that trains there.

A lock of the file system (flock) goes with the process that holds it, however that ends. Where the
file system has none, or has locks that another host does not see (Lustre's localflock), the file
itself serves: its holder writes the time into it every HEARTBEAT seconds, and a holder on another
host that has not been heard of for STALE seconds counts as gone. Hosts' clocks may differ by less
than that; a time further ahead is no time to reckon with, and what tells life is that it changes.

A bucket has no locks. There an object serves in the same way, which is written only as long as
nobody else has written it: of two that take it at once one gets it, and a holder that was taken for
gone (its machine slept, or lost the network) learns of that by its next sign of life.

A job that was put back into the queue may start while the old one still ends: a start waits for it,
for a bounded time.
"""

import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from t5x_lite import buckets, files
from t5x_lite.errors import UserError

HEARTBEAT = 10.0   # seconds between two signs of life
STALE = 60.0       # … after so many without one the holder is gone
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def hold(workdir: os.PathLike | str, wait_seconds: float, say: Callable[[str], None]) -> "_Lock":
    """The lock of a workdir, held. Raises UserError, see _Lock."""
    kind = ObjectLock if files.is_url(workdir) else WorkdirLock
    return kind(workdir, wait_seconds, say)


class _Lock:
    """Holds a workdir until it is released, or until this process ends.

    Attributes:
        before: host, pid, start and last sign of life ("alive", both in Unix seconds) of the holder
            before; {} if there was none or it ended in good order.
        lost: who holds the workdir now that this process was taken for gone; None: this one does.
    """

    def __init__(self, workdir: os.PathLike | str, wait_seconds: float,
                 say: Callable[[str], None] = print):
        """Waits up to wait_seconds for another holder to end.

        Raises:
            UserError: the workdir is in use, or cannot be written to.
        """
        self._workdir = os.fspath(workdir)
        self.before: dict[str, Any] = {}
        self.lost: dict[str, Any] | None = None
        self._closed = threading.Event()
        self._turn = threading.Lock()   # of the two threads that write
        self._seen: tuple[Any, float] = (None, 0.0)   # a time ahead of ours, and since when it stands
        self._start = time.time()
        try:
            self._open()
        except files.failures() as error:
            raise _cannot_write(workdir, error) from error
        try:
            self._acquire(wait_seconds, say)
        except BaseException:
            self._close()
            raise
        threading.Thread(target=self._beat, name="workdir lock", daemon=True).start()

    def _open(self) -> None:
        """Makes what the lock is held by."""

    def _close(self) -> None:
        """Gives it back to the system."""

    def _take(self) -> dict[str, Any] | None:
        """What is known of another holder; None where the lock is now ours, `before` is set and the
        first sign of life is given."""
        raise NotImplementedError

    def _sign(self) -> None:
        """Gives a sign of life. What it raises of `failures` or ValueError is left to the next."""
        raise NotImplementedError

    def _clear(self) -> None:
        """Leaves the word that this process has ended in good order."""
        raise NotImplementedError

    def _acquire(self, wait_seconds: float, say: Callable[[str], None]) -> None:
        deadline, said = time.monotonic() + wait_seconds, False
        while (holder := self._take()) is not None:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self._workdir} is in use: {describe(holder)} trains there. Stop it, wait "
                    f"for its end, or choose another --workdir. (checkpoint.wait_for_workdir="
                    f"{wait_seconds:g} is how many seconds a start waits for it.)")
            if not said:
                say(f"{self._workdir} is in use by {describe(holder)}: waiting up to "
                    f"{wait_seconds:g} s for its end")
                said = True
            time.sleep(min(1.0, max(0.05, deadline - time.monotonic())))

    def _content(self) -> str:
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(),
                           "start": self._start, "alive": time.time()})

    def _lives(self, holder: dict[str, Any]) -> bool:
        """Whether a holder's signs of life, and on this very host its process, say so."""
        age = _age(holder)
        if age < -STALE:
            if holder["alive"] != self._seen[0]:
                self._seen = holder["alive"], time.monotonic()
            return time.monotonic() - self._seen[1] < 3 * HEARTBEAT
        return age < STALE and not _is_gone(holder)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT) and self.lost is None:
            try:
                with self._turn:
                    self._sign()
            except files.failures(ValueError):   # a full disk, no network, or closed meanwhile
                continue

    def release(self) -> None:
        """Lets others write; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            with self._turn:
                if self.lost is None:
                    self._clear()
        finally:
            self._close()


class WorkdirLock(_Lock):
    """The lock of a folder of a file system."""

    def _open(self) -> None:
        self.path = pathlib.Path(self._workdir) / "run.lock"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+", encoding="utf-8")

    def _close(self) -> None:
        self._file.close()   # and with it the lock

    def _take(self) -> dict[str, Any] | None:
        locks = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                return self._found()
            locks = False
        holder = self._found()
        elsewhere = holder.get("host") != socket.gethostname()
        if holder and (elsewhere or not locks) and self._lives(holder):
            if locks:
                fcntl.flock(self._file, fcntl.LOCK_UN)
            return holder
        self.before = holder
        self._sign()
        return None

    def _found(self) -> dict[str, Any]:
        try:
            return _parsed(self.path.read_bytes())
        except OSError:
            return {}

    def _sign(self) -> None:
        # In place, because a lock belongs to the file and not to its name.
        self._clear()
        self._file.write(self._content() + "\n")
        self._file.flush()

    def _clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()


class ObjectLock(_Lock):
    """The lock of a folder in a bucket."""

    def _open(self) -> None:
        self._object = files.path(self._workdir) / "run.lock"
        self._generation = 0
        self._mine = secrets.token_hex(8)   # two processes of one container may have the same id

    def _take(self) -> dict[str, Any] | None:
        try:
            content, generation = buckets.read(self._object)
            holder = _parsed(content)
            if holder and self._lives(holder):
                return holder
            taken = buckets.replace(self._object, self._signed(), generation)
        except files.failures() as error:
            raise _cannot_write(self._workdir, error) from error
        if taken is None:   # another start was faster
            return _parsed(buckets.read(self._object)[0])
        self.before, self._generation = holder, taken
        return None

    def _signed(self) -> bytes:
        return json.dumps({**json.loads(self._content()), "lock": self._mine}).encode()

    def _sign(self) -> None:
        taken = buckets.replace(self._object, self._signed(), self._generation, HEARTBEAT)
        if taken is not None:
            self._generation = taken
            return
        content, generation = buckets.read(self._object)
        holder = _parsed(content)
        if holder.get("lock") == self._mine:   # a sign of life whose answer was lost
            self._generation = generation
        else:
            self.lost = holder

    def _clear(self) -> None:
        try:
            buckets.replace(self._object, b"", self._generation, HEARTBEAT)
        except files.failures():
            pass   # out of reach: whoever comes next waits until this one counts as gone


def _cannot_write(workdir: os.PathLike | str, error: BaseException) -> UserError:
    return files.refusal(error, workdir, (
        f"cannot write to {workdir}: {files.explain(error, workdir)}. Choose another --workdir."))


def _parsed(content: bytes) -> dict[str, Any]:
    """The holder as a lock names it; {} where it names none that can be read."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _age(holder: dict[str, Any]) -> float:
    alive = holder.get("alive")
    if not isinstance(alive, (int, float)) or abs(alive) >= 1e12:
        return float("inf")
    return time.time() - alive


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder on this very host has no process any more."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def describe(holder: dict[str, Any]) -> str:
    """"process 12 on host a, started 2026-11-29 06:40:01"."""
    try:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("start", "")))
    except (TypeError, ValueError, OverflowError, OSError):   # not a time, or none of a calendar
        when = "at a time unknown"
    return (f"process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}, "
            f"started {when}")
