"""What SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR2 do to a run.

The first of them asks the run to save after the step in progress and to leave; a second one leaves at
once. Before the first step there is nothing to save, so the first one leaves at once as well. A
thread reads the signals, because Python's own handlers wait for the main thread to return from C++,
which takes minutes in a compilation. A signal that the caller ignores (nohup's SIGHUP) stays ignored.

    exit status   after a save 0, or what T5X_LITE_STOPPED_STATUS says: launchers set 77, so as to tell
                  a run that is to go on from one that has finished; 128 + the signal's number (143,
                  130, 129, 140) where it left at once

SIGUSR2 is what submitit sends ahead of a job's time limit.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping

import jax
from jax.experimental import multihost_utils

from t5x_lite import log
from t5x_lite.errors import refuse
from t5x_lite.parallel import processes

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def stopped_status(environ: Mapping[str, str]) -> int:
    """The exit status of a run that saved because a signal asked it to stop.

    Raises:
        UserError: T5X_LITE_STOPPED_STATUS is no number from 0 to 125.
    """
    value = environ.get("T5X_LITE_STOPPED_STATUS", "0")
    if not value.isdecimal() or int(value) > 125:
        raise refuse("T5X_LITE_STOPPED_STATUS", value, "a number from 0 to 125")
    return int(value)


class Stopped(SystemExit):
    """The end of a run that saved because a signal asked it to stop; `name` is the signal's."""

    def __init__(self, status: int, name: str):
        super().__init__(status)
        self.name = name


class Stop:
    """Whether a signal asks the run to save and leave; a context around the run.

    Attributes:
        begun: set once the run takes steps, so that there is something to save.
        name: of the signal that asked, "" where none has.
    """

    def __init__(self, leave: Callable[[int], None] = os._exit):
        self.begun = False
        self.name = ""
        self._leave = leave
        self._previous: dict[int, object] = {}
        self._ends: tuple[int, int] | None = None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self   # Python lets the main thread alone handle signals
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._ends = reading, writing
        self._wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._read, args=(reading,), name="signals", daemon=True).start()
        for number in self._handled():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, lambda *_: None)
        return self

    def end(self, step: int) -> Stopped:
        """What a run that was asked to stop ends with, said to the user; `step` is saved."""
        log.say(f"stopped by {self.name or 'SIGTERM'} after step {step}, which is saved; "
                f"the same command goes on from there")
        return Stopped(stopped_status(os.environ), self.name)

    def __exit__(self, *_) -> None:
        if self._ends is None:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._ends[1])   # ends the thread

    def _handled(self) -> tuple[signal.Signals, ...]:
        # With several processes JAX's coordination service owns SIGTERM, so that all of them
        # stop at the same step; the other signals are passed on to it.
        several = jax.distributed.is_initialized() and jax.process_count() > 1
        return ASKING[1:] if several else ASKING

    def _read(self, end: int) -> None:
        with contextlib.closing(os.fdopen(end, "rb", buffering=0)) as pipe:
            while numbers := pipe.read(1):
                self._asked(signal.Signals(numbers[0]))

    def _asked(self, number: signal.Signals) -> None:
        if number not in self._previous:
            return
        if self.begun and not self.name:
            self.name = number.name
            print(f"{number.name}: saving after this step; once more to leave at once",
                  file=sys.__stderr__, flush=True)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.begun:
            lost = "what came after the last checkpoint is lost"
        else:
            lost = "no step was taken, and nothing is lost"
        print(f"error: stopped by {number.name} at once; {lost}. The same command goes on from "
              "there.", file=sys.__stderr__, flush=True)
        processes.said_last_words()
        self._leave(128 + number)

    def now(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer in every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return bool(self.name)
