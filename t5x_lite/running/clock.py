"""Where a run's time goes, and the watchdog that ends a run which hangs.

A run is always in one phase: start (until the first step is dispatched), compile (that step),
data (waiting for a batch), step (waiting for the device), evaluation, save (waiting for a
checkpoint). The same phases say what the time was spent on (goodput: the share in which steps ran)
and what is stuck: train.watchdog has a deadline for each. Past it a thread prints which phase it is,
where the run and its data stand and the Python stacks of all threads, writes the same into
WORKDIR/watchdog-PROCESS.txt and ends the process with EXIT_STUCK, so that a scheduler restarts it.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from t5x_lite import files
from t5x_lite.errors import at_least
from t5x_lite.parallel import processes

EXIT_STUCK = 75   # sysexits.h's EX_TEMPFAIL: the same command may work

PHASES = ("start", "compile", "data", "step", "evaluation", "save")
LOST = "lost"     # what was trained after the last checkpoint before a restart


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """Seconds that a phase of a run may take before the run counts as stuck; 0: no deadline."""

    start: float = 7200.0        # data opened, the checkpoint read, the first step compiled
    step: float = 3600.0         # one step, or one line of metrics, on the devices
    data: float = 3600.0         # one batch
    save: float = 7200.0         # one checkpoint, from its begin to its commit
    evaluation: float = 14400.0  # one evaluation

    def __post_init__(self):
        for field in dataclasses.fields(self):
            at_least(f"train.watchdog.{field.name}", getattr(self, field.name), 0,
                     "0 means no deadline.")

    def deadline(self, phase: str) -> float:
        """Seconds that the phase may take, 0 for ever."""
        return self.start if phase == "compile" else getattr(self, phase)


def lost_seconds(before: Mapping[str, Any], memory: Mapping[str, Any]) -> float:
    """How long the life before this one trained for nothing: after its last checkpoint.

    before: Checkpointer.before. memory: the progress of the checkpoint that the run resumes from.
    """
    if not before.get("alive"):
        return 0.0
    return max(0.0, before["alive"] - max(memory.get("saved_at", 0.0), before.get("start", 0.0)))


class Clock:
    """The seconds that a run has spent in each phase, its earlier lives included.

    Args:
        since: when it began, as `now` counts; None: now.
        now: a monotonic clock.
    """

    def __init__(self, since: float | None = None, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._seconds = dict.fromkeys((*PHASES, LOST), 0.0)
        self.phase, self.since = "start", now() if since is None else since

    def add(self, seconds: Mapping[str, float]) -> None:
        """Adds what is known of earlier lives."""
        for name, value in seconds.items():
            if name in self._seconds:
                self._seconds[name] += value

    def enter(self, phase: str) -> None:
        """Ends the present phase; a watchdog's deadline begins anew."""
        now = self._now()
        self._seconds[self.phase] += now - self.since
        self.phase, self.since = phase, now

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """The block is in this phase; what follows it is in the one before."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """{phase: seconds}, the present one up to now."""
        return {**self._seconds,
                self.phase: self._seconds[self.phase] + self._now() - self.since}

    def goodput(self) -> float:
        """The share of all seconds in which steps ran."""
        seconds = self.seconds()
        return seconds["step"] / max(sum(seconds.values()), 1e-9)

    def line(self) -> str:
        """"goodput 87.1 %: 3 s start, …" of what took a second or more."""
        shown = ", ".join(f"{value:,.0f} s {name}" for name, value in self.seconds().items()
                          if value >= 0.5)
        return f"goodput {self.goodput():.1%}{': ' if shown else ''}{shown}"

    def metrics(self) -> dict[str, float]:
        """For a line of metrics.jsonl: goodput, and the seconds of all phases and of every one."""
        return {"goodput": round(self.goodput(), 6),
                "seconds": round(sum(self.seconds().values()), 3),
                **{f"seconds/{name}": round(value, 3) for name, value in self.seconds().items()}}


@dataclasses.dataclass
class Where:
    """Where a run stands, for the watchdog."""

    step: int = 0
    rows: int = 0

    def __call__(self) -> str:
        return f"the run is at step {self.step}, {self.rows:,} rows of its data taken"


class Watchdog:
    """Watches a Clock in a thread of its own until it is closed.

    Args:
        saving_since: when the save that runs in the background began, on the clock's monotonic
            time; None while there is none.
        where: says where the run and its data stand, in a line.
        leave: ends the process with a status.
    """

    def __init__(self, config: WatchdogConfig, clock: Clock, workdir: files.Path, *,
                 where: Callable[[], str], process: int = 0,
                 saving_since: Callable[[], float | None] = lambda: None,
                 leave: Callable[[int], None] = os._exit, now: Callable[[], float] = time.monotonic):
        self._config, self._clock, self._workdir = config, clock, files.path(workdir)
        self._where, self._process = where, process
        self.saving_since = saving_since
        self._leave, self._now = leave, now
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def _watch(self) -> None:
        deadlines = [getattr(self._config, f.name) for f in dataclasses.fields(self._config)]
        shortest = min((d for d in deadlines if d), default=0.0)
        pause = min(max(shortest / 20, 0.05), 5.0)
        while not self._closed.wait(pause):
            stuck = self.stuck()
            if stuck is not None:
                self._end(*stuck)
                return

    def stuck(self) -> tuple[str, float] | None:
        """(phase, its deadline) of what has taken too long; None where nothing has."""
        now, phase, since = self._now(), self._clock.phase, self._clock.since
        deadline = self._config.deadline(phase)
        if deadline and now - since > deadline:
            return phase, deadline
        saving = self.saving_since()
        if saving is not None and self._config.save and now - saving > self._config.save:
            return "save", self._config.save
        return None

    def _end(self, phase: str, deadline: float) -> None:
        field = "start" if phase == "compile" else phase
        line = (f"watchdog: {phase} has taken more than train.watchdog.{field}={deadline:g} seconds; "
                f"{self._where()}. Process {self._process} ends with status {EXIT_STUCK}: the same "
                f"command goes on from the last checkpoint.")
        text = f"{line}\n\n{stacks()}"
        # The disk may be what is stuck: it gets a thread and ten seconds.
        writer = threading.Thread(target=self._write, args=(text,), daemon=True)
        writer.start()
        # Not sys.stderr, which an import or a quiet library may have exchanged meanwhile.
        print(f"{stacks()}\nerror: {line}", file=sys.__stderr__, flush=True)
        writer.join(10.0)
        processes.said_last_words()
        self._leave(EXIT_STUCK)

    def _write(self, text: str) -> None:
        self._workdir.mkdir(parents=True, exist_ok=True)
        files.write_whole(self._workdir / f"watchdog-{self._process}.txt", text)


def stacks() -> str:
    """The Python stacks of all threads, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return "\n".join(f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
                     for ident, frame in frames)
