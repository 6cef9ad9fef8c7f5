"""Lines that libraries print on standard error by themselves, whatever their log level is."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator

# JAX's CUDA plugin on a machine without a GPU, which a plan for GPUs needs it on.
_NOISE = (b"cudart_stub.cc", b"All log messages before absl::InitializeLog()")
# libtpu on a machine without a TPU, which `plan` needs it on.
NO_TPU = (b"Failed to find host bounds", b"Logging before InitGoogle()", b"common_lib.cc",
          b"=== Source Location Trace", b"libtpu_init_utils.cc")


@contextlib.contextmanager
def stderr(*more: bytes) -> Iterator[None]:
    """Keeps standard error, C++'s too, until the block ends, and then drops the noise in it.

    more: what lines of further noise hold.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:   # closed, as under pythonw
        yield
        return
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if not any(noise in line for noise in (*_NOISE, *more)):
                    os.write(2, line)
