"""Lines that libraries print on standard error by themselves, whatever their log level is."""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import IO

# JAX's CUDA plugin on a machine without a GPU, which a plan for GPUs needs it on.
_NOISE = (b"cudart_stub.cc", b"All log messages before absl::InitializeLog()")
# libtpu on a machine without a TPU, which `plan` needs it on.
NO_TPU = (b"Failed to find host bounds", b"Logging before InitGoogle()", b"common_lib.cc",
          b"=== Source Location Trace", b"libtpu_init_utils.cc")


@dataclasses.dataclass(eq=False)
class _Held:
    """Standard error while a block runs: what it was, and where it goes until then."""

    real: int   # a file descriptor
    file: IO[bytes]
    is_noise: Callable[[bytes], bool]

    def end(self, whole: bool = False) -> None:
        """Puts standard error back and writes to it what was held, without noise unless whole."""
        sys.stderr.flush()
        os.dup2(self.real, 2)
        os.close(self.real)
        self.file.seek(0)
        for line in self.file:
            if whole or not self.is_noise(line):
                os.write(2, line)
        self.file.close()


_held: list[_Held] = []


@contextlib.contextmanager
def holding(is_noise: Callable[[bytes], bool], *, whole_if_failed: bool = False) -> Iterator[None]:
    """Keeps standard error, C++'s and other threads' too, until the block ends, and then drops the noise
    in it; whole_if_failed: none of it where the block fails."""
    sys.stderr.flush()
    try:
        held = _Held(os.dup(2), tempfile.TemporaryFile(), is_noise)
    except OSError:   # closed, as under pythonw
        yield
        return
    os.dup2(held.file.fileno(), 2)
    _held.append(held)
    failed = True
    try:
        yield
        failed = False
    finally:
        if held in _held:
            _held.remove(held)
            held.end(whole=failed and whole_if_failed)


def give_back() -> None:
    """Ends every holding: of a process that leaves with an error while another thread holds it, the
    error would else be lost."""
    while _held:
        _held.pop().end()


def stderr(*more: bytes) -> contextlib.AbstractContextManager[None]:
    """`holding` without what JAX's and TPU's libraries say; more: what lines of further noise hold."""
    return holding(lambda line: any(noise in line for noise in (*_NOISE, *more)))
