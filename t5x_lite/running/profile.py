"""A trace of a few steps, train.profile_steps=10:13, that xprof and TensorBoard's profile plugin open.

It stands in WORKDIR/profile/plugins/profile/TIME/, a file a process.
"""

import os
import re
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
        workdir: of the run, a folder of this machine where there is anything to trace.
    """

    def __init__(self, text: str, workdir: os.PathLike | str):
        self._steps, self._on = parse(text), False
        self._folder = files.local(files.path(workdir) / "profile", "train.profile_steps: --workdir") \
            if text else None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def before(self, step: int, state: Any) -> None:
        """To be called before a step is dispatched, with the state that it begins with, for which it
        waits where the trace begins or ends."""
        if (step in self._steps) == self._on:
            return
        jax.block_until_ready(state)
        if self._on:
            self._stop()
            return
        jax.profiler.start_trace(self._folder)
        self._on = True

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            log.say(f"a trace of steps is in {self._folder}: xprof --logdir={self._folder}")
