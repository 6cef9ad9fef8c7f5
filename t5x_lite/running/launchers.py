"""Where the runs of an experiment run: one row of LAUNCHERS a kind, none of which knows what a run is.

    local       one after another in this process (experiment.py does that itself)
    local:N     N at a time on this machine, each a process with its share of the GPUs
    slurm       all at once, each a job of a Slurm cluster, by submitit (extra [slurm])

A task is finished when its own `finished` says so, whatever a process or a job answered: after a kill
the same command goes on with what is not. A task that needs another starts after it.

On the first Ctrl-C or SIGTERM here, the processes of local:N are asked to save and to stop, and waited
for; a second Ctrl-C lets them leave at once. Jobs of a cluster go on: the same command waits for them again.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from t5x_lite import files, log
from t5x_lite.errors import UserError, at_least, one_of
from t5x_lite.parallel import processes
from t5x_lite.running import signals

STOPPED = 77   # the exit status of a task that saved because it was asked to stop
MODULE = "t5x_lite.experiment"   # what runs a task, by its arguments
FOLDER = "launched"   # what tasks print, and which jobs there are
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to run."""

    name: str
    arguments: tuple[str, ...]        # of MODULE as a command, which runs it alone
    finished: Callable[[], bool]
    needs: str = ""                   # the task that must have finished before; "": none


class Launcher(Protocol):
    """Starts tasks somewhere and looks after them. A handle is a string that outlives this process."""

    slots: int | None   # tasks at a time; None: any number

    def start(self, task: Task, slot: int) -> str:
        """Starts it; returns its handle."""

    def is_alive(self, handle: str) -> bool:
        """Whether it waits or runs."""

    def log_of(self, handle: str) -> pathlib.Path:
        """The file with what it printed."""

    def reason(self, handle: str) -> str:
        """Why a task ended that has not finished, in a line."""

    def stop(self, handles: Sequence[str]) -> str:
        """Asks them to save and stop, or leaves them; says what becomes of them."""


# --- processes of this machine --------------------------------------------------------------------

class LocalPool:
    """N processes at a time."""

    def __init__(self, folder: pathlib.Path, argument: str, options: Mapping[str, Any]):
        if not argument.isdecimal():
            raise UserError(f"--launcher=local:{argument}: must be a number of runs at a time.")
        if options:
            raise UserError(f"options of a cluster ({', '.join(options)}) are for --launcher=slurm.")
        self.slots = int(at_least("--launcher=local:N", int(argument), 1))
        if processes.has_tpu(os.environ):
            raise UserError("--launcher=local:N on a TPU host: a run takes all of its chips. Use "
                            "--launcher=local, or --shard=i/n on several hosts.")
        self._gpus = _gpus()
        if self._gpus and len(self._gpus) < self.slots:
            raise UserError(f"--launcher=local:{self.slots}: there are {len(self._gpus)} GPUs, and a "
                            "run needs one of its own.")
        self._folder = folder
        self._running: dict[str, subprocess.Popen] = {}

    def start(self, task: Task, slot: int) -> str:
        """Starts a process in a session of its own, which a terminal's Ctrl-C does not reach."""
        path = self._folder / f"{task.name.replace('/', '.')}.txt"
        environment = {**os.environ, "T5X_LITE_STOPPED_STATUS": str(STOPPED)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[slot::self.slots])
        with open(path, "ab") as out:
            self._running[str(path)] = subprocess.Popen(
                [sys.executable, "-u", "-m", MODULE, *task.arguments], stdout=out,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                start_new_session=True)
        return str(path)

    def is_alive(self, handle: str) -> bool:
        """False also of a process that an earlier life of this program had started."""
        return handle in self._running and self._running[handle].poll() is None

    def log_of(self, handle: str) -> pathlib.Path:
        """See Launcher."""
        return pathlib.Path(handle)

    def reason(self, handle: str) -> str:
        """See Launcher."""
        status = self._running[handle].returncode
        if status == STOPPED:
            return "stopped by a signal, and saved"
        return f"exit status {status}: {_last_words(self.log_of(handle))}"

    def stop(self, handles: Sequence[str]) -> str:
        """Hands SIGTERM on and waits; Ctrl-C meanwhile is handed on as another."""
        log.say("asking the runs to save and to stop")
        for _ in range(2):
            for handle in filter(self.is_alive, handles):
                self._running[handle].send_signal(signal.SIGTERM)
            with contextlib.suppress(KeyboardInterrupt):
                for handle in handles:
                    self._running[handle].wait()
                break
        return "all runs have stopped"


def _gpus() -> list[str]:
    """The GPUs that processes may be given, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None or "cuda" not in os.environ.get("JAX_PLATFORMS", "cuda"):
        return [name for name in (visible or "").split(",") if name]
    there = pathlib.Path("/proc/driver/nvidia/gpus")
    return [str(i) for i, _ in enumerate(there.iterdir())] if there.is_dir() else []


def _last_words(path: pathlib.Path) -> str:
    """The line of a log that says what went wrong: the last error, else the last line."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    said = [line for line in lines if line.strip()]
    errors = [line for line in said if re.match(r"(error: |\w*(Error|Exception)\b)", line)]
    return (errors or said or ["it printed nothing"])[-1].strip()[:300]


# --- jobs of a cluster ----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ClusterJob:
    """What submitit runs on a node, in each of the job's processes: the experiment's own command.

    Ahead of the time limit submitit's Slurm sends SIGUSR2: the run saves and leaves, and the job goes
    back into the queue under the same number. SIGTERM (scancel, preemption) saves and leaves as well;
    whether the job comes back is then Slurm's business.
    """

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        os.environ["T5X_LITE_STOPPED_STATUS"] = str(STOPPED)
        sys.argv = [MODULE, *self.arguments]
        try:
            runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
        except signals.Stopped as stopped:
            if stopped.name == signal.SIGUSR2.name:
                self._requeue()
            raise
        except SystemExit as end:
            if end.code not in (None, 0):
                raise

    @staticmethod
    def _requeue() -> None:
        if int(os.environ.get("SLURM_PROCID", "0")) == 0:
            job = os.environ["SLURM_JOB_ID"]
            print(f"saved ahead of the time limit: back into the queue as job {job}", flush=True)
            subprocess.run(["scontrol", "requeue", job], check=True)

    def checkpoint(self, *_):
        """What submitit asks for where SIGUSR2 comes before the run has begun: the same again."""
        import submitit
        return submitit.helpers.DelayedSubmission(self)


class Slurm:
    """A job a task, by submitit; the options are those of its AutoExecutor (timeout_min, nodes,
    tasks_per_node, gpus_per_node, mem_gb, slurm_partition, …)."""

    slots = None

    def __init__(self, folder: pathlib.Path, argument: str, options: Mapping[str, Any]):
        if argument:
            raise UserError(f"--launcher=slurm:{argument}: slurm takes no number; limit it by the "
                            "cluster's own options.")
        if shutil.which("sbatch") is None:
            raise UserError("--launcher=slurm: there is no sbatch here; start this command on a "
                            "login node of the cluster.")
        try:
            import submitit
        except ImportError as error:
            raise UserError("--launcher=slurm needs submitit: pip install 't5x_lite[slurm]'.") from error
        self._folder = folder
        self._executor = submitit.AutoExecutor(folder=folder / "%j", cluster="slurm",
                                               slurm_max_num_timeout=10_000)
        try:
            self._executor.update_parameters(**{"timeout_min": 24 * 60, "stderr_to_stdout": True,
                                                **options})
        except (NameError, TypeError, ValueError) as error:
            raise UserError(f"options of --launcher=slurm: {error}") from error

    def start(self, task: Task, slot: int) -> str:
        """Submits a job; its handle is its number."""
        self._executor.update_parameters(name=task.name.replace("/", "."))
        try:
            return self._executor.submit(ClusterJob(task.arguments)).job_id
        except Exception as error:   # submitit's own class, around what sbatch said
            raise UserError(f"sbatch refuses {task.name}: {error}") from error

    def is_alive(self, handle: str) -> bool:
        """Whether Slurm's queue has the job; without accounting there is nobody else to ask."""
        asked = subprocess.run(["squeue", "--noheader", f"--jobs={handle}", "--format=%T"],
                               capture_output=True, text=True)
        gone = asked.returncode != 0 and "Invalid job id" in asked.stderr
        return not gone and (asked.returncode != 0 or bool(asked.stdout.strip()))

    def log_of(self, handle: str) -> pathlib.Path:
        """What its first process printed."""
        return self._folder / handle / f"{handle}_0_log.out"

    def reason(self, handle: str) -> str:
        """See Launcher."""
        return f"job {handle}: {_last_words(self.log_of(handle))}"

    def stop(self, handles: Sequence[str]) -> str:
        """Leaves them."""
        return (f"jobs {' '.join(handles)} go on: the same command waits for them again, scancel ends "
                "them")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of launcher."""

    # Of the folder for its files, what stands behind the colon, and the cluster's options.
    make: Callable[[pathlib.Path, str, Mapping[str, Any]], Launcher]
    here: bool = False     # with nothing behind the colon: in this very process, one after another
    options: str = ""      # what an experiment's config calls the options of its cluster


LAUNCHERS: dict[str, Kind] = {
    "local": Kind(LocalPool, here=True),
    "slurm": Kind(Slurm, options="SLURM"),
}


def kind_of(text: str) -> Kind:
    """The row of "local:2". Raises UserError where there is none."""
    return LAUNCHERS[one_of("--launcher", text.partition(":")[0], LAUNCHERS)]


def is_here(text: str) -> bool:
    """Whether the runs are to run in this process. Raises UserError for an unknown launcher."""
    return kind_of(text).here and ":" not in text


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """{"timeout_min": 600} of "timeout_min=600"; a value is JSON or else a string.

    Raises:
        UserError: a text without "=".
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--slurm={text}: must be option=value.")
        try:
            found[name] = json.loads(value)
        except ValueError:   # no JSON: a plain word
            found[name] = value
    return found


def folder_of(workdir: os.PathLike | str) -> pathlib.Path:
    """Where the launcher's own files are: WORKDIR/launched, or of a bucket ./launched/BUCKET/PATH, for
    processes write what they print on a disk."""
    if files.is_url(workdir):
        return pathlib.Path(FOLDER, os.fspath(workdir).partition("://")[2]).absolute()
    return (pathlib.Path(workdir) / FOLDER).absolute()


def make(text: str, workdir: os.PathLike | str, options: Mapping[str, Any]) -> Launcher:
    """The launcher that "local:2" or "slurm" names.

    Raises:
        UserError: no such launcher, or one that cannot work here.
    """
    folder = folder_of(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    return kind_of(text).make(folder, text.partition(":")[2], options)


# --- all of them ----------------------------------------------------------------------------------

class _Asked(Exception):
    """A signal asks for the end."""


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def asked(number, _):
        raise _Asked(signal.Signals(number).name)

    before = {n: signal.signal(n, asked) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(tasks: Sequence[Task], launcher: Launcher, workdir: os.PathLike | str
            ) -> dict[str, str]:
    """Starts every task that is not finished as soon as it may, and waits; {name: why it failed}.

    Raises:
        SystemExit: a signal asked for the end.
    """
    watch = _Watch(tasks, launcher, _Ledger(folder_of(workdir) / "jobs.json"))
    for task, handle in watch.running.items():
        log.say(f"{task.name}: runs since before; see {launcher.log_of(handle)}")
    try:
        with _signals_raise():
            while watch.waiting or watch.running:
                watch.look()
                if watch.running:
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
    except _Asked as asked:
        log.say(f"{asked}: {launcher.stop(watch.handles())}; the same command goes on")
        raise SystemExit(signals.stopped_status(os.environ)) from None
    except BaseException:
        launcher.stop(watch.handles())
        raise
    return watch.failures


class _Watch:
    """Which tasks wait, run and failed."""

    def __init__(self, tasks: Sequence[Task], launcher: Launcher, ledger: "_Ledger"):
        self._launcher, self._ledger = launcher, ledger
        known = {task: ledger.handles[task.name] for task in tasks if task.name in ledger.handles}
        self.running = {task: handle for task, handle in known.items() if launcher.is_alive(handle)}
        self.waiting = [task for task in tasks if task not in self.running]
        self.failures: dict[str, str] = {}   # {name: why}
        self._slots = {task: i for i, task in enumerate(self.running)}

    def handles(self) -> list[str]:
        """Of what runs."""
        return list(self.running.values())

    def look(self) -> None:
        """Takes those that ended off, and starts those whose time has come."""
        ended = [t for t, handle in self.running.items() if not self._launcher.is_alive(handle)]
        for task in ended:
            self._end(task)
        for task in list(self.waiting):
            if self._may_start(task):
                self._start(task)

    def _may_start(self, task: Task) -> bool:
        """Whether it is time; takes what is finished, or never can start, off the list."""
        if task.finished():
            log.say(f"{task.name}: finished before")
            self.waiting.remove(task)
            return False
        if task.needs in self.failures:
            self.failures[task.name] = f"not started: it needs {task.needs}"
            self.waiting.remove(task)
            return False
        if any(other.name == task.needs for other in (*self.waiting, *self.running)):
            return False
        return self._launcher.slots is None or len(self.running) < self._launcher.slots

    def _start(self, task: Task) -> None:
        self.waiting.remove(task)
        taken = self._slots.values()
        slot = next(i for i in range(len(taken) + 1) if i not in taken)
        self._slots[task] = slot
        self.running[task] = self._launcher.start(task, slot)
        self._ledger.write(task.name, self.running[task])
        log.say(f"{task.name}: started; see {self._launcher.log_of(self.running[task])}")

    def _end(self, task: Task) -> None:
        handle = self.running.pop(task)
        del self._slots[task]
        if task.finished():
            log.say(f"{task.name}: finished")
            return
        why = f"{self._launcher.reason(handle)}; see {self._launcher.log_of(handle)}"
        self.failures[task.name] = why
        log.say(f"{task.name}: FAILED, {why}")


class _Ledger:
    """Which handle each task has, for the next life of this program."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.handles: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}

    def write(self, name: str, handle: str) -> None:
        """Adds one."""
        self.handles[name] = handle
        files.write_whole(self._path, json.dumps(self.handles, indent=1) + "\n")
