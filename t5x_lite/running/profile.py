"""A trace of a few steps, train.profile_steps=10:13, that xprof and TensorBoard's profile plugin open.

It stands in WORKDIR/profile/plugins/profile/steps_10_13/, a file a process, whether WORKDIR is a
folder of this machine, one that several machines share, or in a bucket.
"""

import pathlib
import re
import socket
import tempfile
from typing import Any

import jax

from t5x_lite import files, log
from t5x_lite.errors import refuse


def parse(text: str) -> range:
    """The steps that "FIRST:LAST" names, both included; none of "".

    Raises:
        UserError: not two numbers with 1 <= FIRST <= LAST.
    """
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})|", text)
    first, last = (int(n or 0) for n in match.groups()) if match else (1, 0)
    if not match or (text and not 1 <= first <= last):
        raise refuse("train.profile_steps", text, "FIRST:LAST with 1 <= FIRST <= LAST, 10:13, or empty")
    return range(first, last + 1) if text else range(0)


class Profile:
    """Traces the steps; to be left as a context, so that a run that ends within them keeps its trace.

    Args:
        text: as `parse` takes it.
        workdir: of the run.
    """

    def __init__(self, text: str, workdir: files.Path | str):
        self._steps = parse(text)
        self._folder = files.path(workdir) / "profile"
        self._traced: tempfile.TemporaryDirectory | None = None   # while a trace is made

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before(self, step: int, state: Any) -> None:
        """To be called before a step is dispatched, with the state that it begins with, for which it
        waits where the trace begins or ends."""
        if (step in self._steps) == (self._traced is not None):
            return
        jax.block_until_ready(state)
        if self._traced is not None:
            self._stop()
            return
        self._traced = tempfile.TemporaryDirectory(prefix="t5x_lite_profile_")
        jax.profiler.start_trace(self._traced.name)

    def _stop(self) -> None:
        """Ends the trace and puts it where those of the other processes are. JAX would name it by
        host and second, so that processes of one host would write one file, or stand apart."""
        if self._traced is None:
            return
        traced, self._traced = self._traced, None
        jax.profiler.stop_trace()
        session = self._folder / "plugins" / "profile" / f"steps_{self._steps[0]}_{self._steps[-1]}"
        name = f"{socket.gethostname()}_{jax.process_index()}.xplane.pb"
        if not files.is_url(session):
            session.mkdir(parents=True, exist_ok=True)
        with traced as folder:
            for file in pathlib.Path(folder).rglob("*.xplane.pb"):
                files.write_bytes(session / name, file.read_bytes())
        log.say(f"a trace of steps is in {self._folder}: xprof --logdir={self._folder}")
