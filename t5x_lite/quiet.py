"""Lines that libraries print on standard error by themselves, whatever their log level is."""

import contextlib
import dataclasses
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO

# JAX's CUDA plugin on a machine without a GPU, which a plan for GPUs needs it on.
_NOISE = (b"cudart_stub.cc", b"All log messages before absl::InitializeLog()")
# libtpu on a machine without a TPU, which `plan` needs it on.
NO_TPU = (b"Failed to find host bounds", b"Logging before InitGoogle()", b"common_lib.cc",
          b"=== Source Location Trace", b"libtpu_init_utils.cc")


# What an NVIDIA driver leaves on a Linux machine, WSL2's last.
NVIDIA = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg")


def expect_no_cuda(exists: Callable[[str], bool] = os.path.exists) -> None:
    """Where there is no NVIDIA driver, JAX's CUDA plugin is to describe GPUs alone, without looking for CUDA's
    libraries: it would log a traceback for each one that it misses. With a driver their lack must be said."""
    if not any(map(exists, NVIDIA)):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


@dataclasses.dataclass(eq=False)
class _Held:
    """Standard error while blocks run, perhaps of several threads: the first begins to hold it, the last
    gives it back. (Each for itself would give back what the other put in its place.)"""

    real: int   # a file descriptor
    file: IO[bytes]
    noises: list[Callable[[bytes], bool]] = dataclasses.field(default_factory=list)
    blocks: int = 0
    whole: bool = False   # nothing is dropped

    def end(self) -> None:
        """Puts standard error back and writes to it what was held, without noise."""
        sys.stderr.flush()
        os.dup2(self.real, 2)
        os.close(self.real)
        self.file.seek(0)
        for line in self.file:
            if self.whole or not any(is_noise(line) for is_noise in self.noises):
                os.write(2, line)
        self.file.close()


_lock = threading.RLock()
_now: _Held | None = None


@contextlib.contextmanager
def holding(is_noise: Callable[[bytes], bool], *, whole_if_failed: bool = False) -> Iterator[None]:
    """Keeps standard error, C++'s and other threads' too, until the block ends, and then drops the noise
    in it; whole_if_failed: none of it where the block fails."""
    held = _begin(is_noise)
    failed = True
    try:
        yield
        failed = False
    finally:
        _end(held, failed and whole_if_failed)


def _begin(is_noise: Callable[[bytes], bool]) -> _Held | None:
    global _now
    with _lock:
        if _now is None:
            sys.stderr.flush()
            try:
                real = os.dup(2)
            except OSError:   # closed, as under pythonw
                return None
            _now = _Held(real, tempfile.TemporaryFile())
            os.dup2(_now.file.fileno(), 2)
        _now.noises.append(is_noise)
        _now.blocks += 1
        return _now


def _end(held: _Held | None, whole: bool) -> None:
    global _now
    with _lock:
        if held is None or held is not _now:   # given back before
            return
        held.blocks -= 1
        held.whole |= whole
        if held.blocks == 0:
            _now = None
            held.end()


def give_back() -> None:
    """Ends the holding at once: of a process that leaves with an error while another thread holds
    standard error, the error would else be lost."""
    global _now
    with _lock:
        held, _now = _now, None
        if held is not None:
            held.end()


def stderr(*more: bytes) -> contextlib.AbstractContextManager[None]:
    """`holding` without what JAX's and TPU's libraries say; more: what lines of further noise hold."""
    return holding(lambda line: any(noise in line for noise in (*_NOISE, *more)))
