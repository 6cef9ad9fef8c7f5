"""When a run is saved, what is kept, and where it resumes from.

    WORKDIR/checkpoints/
        1200/                           a committed step, see format.py
        best                            no folder: a name for the best step, see best.py
        1300.orbax-checkpoint-tmp-…/    what an interrupted save leaves: removed by the next run
        1250.unreadable/                a committed step that could not be read: set aside, kept
        1280.suspect/                   one whose parameters gave no finite loss: set aside, kept

In a bucket, where no folder can be renamed, a step is written under its own name and
commit_success.txt in it comes last: a step without that object counts as half-written.

`Checkpointer` belongs to the one job that trains in a workdir, and holds its lock (lock.py). Anything else (eval, infer,
init_from) reads through the module's functions, which never write, rename or delete. In a
job of several processes every process makes the same calls.
"""

import dataclasses
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from t5x_lite import files
from t5x_lite.checkpoints import format as checkpoint_format, lock
from t5x_lite.checkpoints.best import BEST
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.checkpoints.format import Record, Restored, Unreadable
from t5x_lite.errors import UserError, nearest
from t5x_lite.parallel import disk

_log = logging.getLogger(__name__)

_COMMITTED = "commit_success.txt"   # what orbax writes last into a step
_HALF_WRITTEN = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
# Orbax's own limit, 600 s, is short for a large model on a slow shared disk.
_COMMIT_TIMEOUT_SECONDS = 3600


# --- finding checkpoints (reads only) ------------------------------------------------------


def _absolute(path: os.PathLike | str) -> epath.Path:
    return epath.Path(files.absolute(path))


def _step_paths(path: os.PathLike | str) -> dict[int, epath.Path]:
    """{step: folder} of the committed checkpoints at `path`, in rising order.

    `path` is a workdir, its checkpoints/ folder, the folder of one step, or checkpoints/best.
    """
    folder = _absolute(path)
    if folder.name == BEST and folder.parent.name == "checkpoints":
        return _best(folder.parent)
    if folder.name.isdigit() and (folder / "record").exists():
        return _committed([folder])
    root = folder / "checkpoints" if (folder / "checkpoints").exists() else folder
    return _committed(root.iterdir()) if root.exists() else {}


def _committed(folders: Iterable[epath.Path]) -> dict[int, epath.Path]:
    """{step: folder} of those that are a step, and whole, in rising order."""
    steps = [folder for folder in folders if re.fullmatch(r"0|[1-9]\d*", folder.name)]
    with futures.ThreadPoolExecutor(16) as several:   # a bucket takes its time to answer
        whole = [*several.map(ocp.path.step.is_path_finalized, steps)]
    found = {int(f.name): f for f, is_whole in zip(steps, whole, strict=True) if is_whole}
    return dict(sorted(found.items()))


def all_steps(path: os.PathLike | str) -> list[int]:
    """The committed steps at a workdir, a checkpoints folder or a step's folder, rising."""
    return list(_step_paths(path))


def _candidates(path: os.PathLike | str, step: int | str) -> dict[int, epath.Path]:
    """The folders to try for `step` ("last", "best" or a number), newest first."""
    steps = _step_paths(path)
    if not steps:
        raise UserError(
            f"no checkpoint at {path}: expected a workdir of t5x_lite.train (it has "
            "checkpoints/STEP/ in it) or the folder of one step. A run that was stopped before "
            "its first save has none.")
    if step == "last":
        return dict(reversed(steps.items()))
    if step == BEST:
        return _best(path)
    if step not in steps:
        raise UserError(f"{path} has no checkpoint of step {step!r}: it has {_list(steps)}, "
                        f"or say 'last' or 'best'.{nearest(step, steps)}")
    return {step: steps[step]}


def _best(path: os.PathLike | str) -> dict[int, epath.Path]:
    """{step: folder} of the best checkpoint, by the record of the newest one."""
    step = (read_record(path).progress.get(BEST) or {}).get("step")
    if step is None:
        raise UserError(f"{path} has no best checkpoint: its run followed no metric (set "
                        "checkpoint.best=loss, say, in training), or none was finite yet. Say 'last', "
                        f"or one of {_list(_step_paths(path))}.")
    if step not in _step_paths(path):
        raise UserError(f"{path}: the best step, {step}, was not kept: checkpoint.best keeps it. It has "
                        f"{_list(_step_paths(path))}.")
    return {step: _step_paths(path)[step]}


def _list(steps: Iterable[int]) -> str:
    steps = list(steps)
    shown: list = steps if len(steps) <= 12 else [*steps[:4], "…", *steps[-7:]]
    return ", ".join(map(str, shown))


def read_record(path: os.PathLike | str, step: int | str = "last") -> Record:
    """The record of a checkpoint without its arrays: config, and what shapes it holds.

    Raises UserError where there is none, none is readable, or its format is from the future.
    """
    return _first_readable(path, step, checkpoint_format.read_record)


def restore_params(path: os.PathLike | str, abstract_params: Mapping, step: int | str = "last", *,
                   partial: bool = False, averaged: bool = True) -> tuple[dict, Record]:
    """Reads parameters only, for evaluation, inference and init_from.

    Args:
      path: a workdir, its checkpoints folder, or the folder of one step.
      abstract_params: nested dict of jax.ShapeDtypeStruct with shardings (none: one device).
        A dtype that differs from the stored one is cast to after reading.
      step: "last" (falls back to an older one, with a message, where it is unreadable), "best" or N.
      partial: the checkpoint may hold parameters that are not asked for.
      averaged: their moving average, where the run kept one (train.ema_decay).

    Returns:
      (params, record): arrays placed by the shardings of abstract_params, and the Record.

    Raises:
      UserError: no (readable) checkpoint, or it holds other parameters than asked for.
    """
    return _first_readable(
        path, step, lambda folder: checkpoint_format.read_params(
            folder, abstract_params, partial, averaged))


def _first_readable(path, step, read: Callable[[epath.Path], Any]):
    """read(folder) of the newest candidate that can be read; the others are logged."""
    failures = {}
    for number, folder in _candidates(path, step).items():
        try:
            return read(folder)
        except Unreadable as error:
            failures[number] = error
            _say(logging.WARNING, "checkpoint %s is unreadable (%s)", folder, error)
    raise _none_readable(path, failures)


def _none_readable(path, failures: Mapping[int, Unreadable]) -> UserError:
    reasons = "\n".join(f"  {number}: {error}" for number, error in failures.items())
    return UserError(f"no checkpoint at {path} can be read:\n{reasons}\n"
                     "Nothing was changed or deleted. Restore the files from a copy, or start "
                     "again in a new --workdir.")


@dataclasses.dataclass
class _Retention:
    """Orbax's preservation policy: the last ones, every k-th, the newest that is verified, and the
    best."""

    config: CheckpointConfig
    verified: int | None = None
    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """For each checkpoint, oldest first, whether it stays."""
        del context
        first_of_last = len(checkpoints) - self.config.keep_last
        every = self.config.keep_every
        return [i >= first_of_last or info.step in (self.verified, self.best)
                or (every is not None and info.step % every == 0)
                for i, info in enumerate(checkpoints)]


class Checkpointer:
    """Saves to and resumes from one workdir; every process of the job makes one.

    Making it locks the workdir, and logs and clears away what an interrupted save left behind.

    Attributes:
        before: what is known of the job before in this workdir, if it ended without a word (see
            WorkdirLock.before).
    """

    def __init__(self, workdir: os.PathLike | str, config: CheckpointConfig):
        """Raises UserError: another job writes there, or the folder cannot be written to."""
        self.directory = _absolute(workdir) / "checkpoints"
        self._saving: int | None = None
        self._saving_since = 0.0
        self._lock: lock._Lock | None = None
        self._agree(lambda: self._take_lock(workdir, config.wait_for_workdir))
        self.before: dict[str, Any] = self._lock.before if self._lock is not None else {}
        # Not by Orbax, whose thread may still be at it when another Checkpointer is made.
        self._agree(self._remove_half_written)
        self._retention = _Retention(config)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._retention,
            enable_async_checkpointing=config.async_save, cleanup_tmp_directories=False,
            async_options=ocp.AsyncOptions(timeout_secs=_COMMIT_TIMEOUT_SECONDS),
            save_root_metadata=False)
        try:
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except files.failures() as error:
            self._release()
            raise _cannot_write(self.directory, error) from error

    def _take_lock(self, workdir: os.PathLike | str, wait: float) -> None:
        self._lock = lock.hold(files.absolute(workdir), wait,
                               lambda line: _say(logging.WARNING, "%s", line))

    def _remove_half_written(self) -> None:
        for found in ocp.path.step.all_temporary_paths(self.directory):
            folder = found.get()
            if _HALF_WRITTEN.fullmatch(folder.name):
                _say(logging.WARNING, "%s is a half-written checkpoint of an interrupted run: "
                     "skipped and removed", folder)
                folder.rmtree()

    def _agree(self, change: Callable[[], Any]) -> None:
        """Has process 0 change the workdir; where that fails, every process raises UserError."""
        problem = None
        if jax.process_index() == 0:
            try:
                change()
            except files.failures() as error:
                problem = _cannot_write(self.directory, error)
            except UserError as error:
                problem = error
        failed = problem is not None
        if jax.process_count() > 1:
            failed = bool(multihost_utils.broadcast_one_to_all(np.array(failed)))
        if failed:
            self._release()
            raise problem or UserError("process 0 cannot use the workdir; it says why.")

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_):
        self.close()

    def all_steps(self) -> list[int]:
        """The steps committed to disk, rising; a save in progress is not among them."""
        return all_steps(self.directory)

    def latest(self) -> int | None:
        """The newest step committed to disk."""
        return max(self.all_steps(), default=None)

    def saving_since(self) -> float | None:
        """When the save in progress began, as time.monotonic counts; None: there is none."""
        busy = self._saving is not None and self._manager.is_saving_in_progress()
        return self._saving_since if busy else None

    def verify(self, step: int) -> None:
        """Says that the state of `step` was seen to be good (the step after it had a finite
        loss): the newest such checkpoint is kept, whatever keep_last says."""
        if step == self._saving or step in self._manager.all_steps():
            self._retention.verified = step

    @property
    def verified(self) -> int | None:
        """The newest checkpoint that `verify` was told of."""
        return self._retention.verified

    def keep_best(self, step: int | None) -> None:
        """Says which step stays as the best one, whatever keep_last says; None: no step does."""
        self._retention.best = step

    def save(self, step: int, state: Any, iterator_states: Mapping[int, bytes], config_json: str,
             progress: Mapping[str, Any] | None = None):
        """Starts one commit of everything; every process calls it with the same step.

        Returns once the state may be donated to the next step. Call it only after the loss
        of `step` was read as finite. Waits first for the save before it. Does nothing where
        the step is saved already (a run that is stopped right after a periodic save).

        Args:
          step: the number of steps taken.
          state: pytree of jax.Arrays on the mesh, and of OnDisk, with which the save is waited for.
          iterator_states: {virtual shard: state} of the shards that this process reads.
          config_json: the resolved config.
          progress: JSON values, see format.Record.

        Raises:
          UserError: this save, or the one before it, could not be written; or another job has taken
            the workdir over.
        """
        self.wait()
        self._check_lock()
        if step in self._manager.all_steps():
            return
        self._saving, self._saving_since = step, time.monotonic()
        try:
            self._manager.save(step, force=True, args=checkpoint_format.save_args(
                step, state, iterator_states, config_json,
                {**(progress or {}), "verified": self.verified}))
            if disk.kept(state):   # the next step writes over it
                self._manager.wait_until_finished()
        except files.failures() as error:
            raise self._not_written(error) from error

    def wait(self):
        """Blocks until the save in progress, if any, is committed.

        Raises UserError if it could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except files.failures(ValueError) as error:  # tensorstore's own errors are ValueErrors
            raise self._not_written(error) from error

    def _check_lock(self) -> None:
        if self._lock is not None and self._lock.lost is not None:
            raise UserError(
                f"{self.directory.parent} was taken over by {lock.describe(self._lock.lost)}, "
                f"because this process was not heard of for {lock.STALE:g} s; nothing more is "
                "written. Leave the workdir to that one, or stop it and start this command again.")

    def _not_written(self, error: BaseException) -> UserError:
        why, fix = checkpoint_format.brief(error), "Free some space and run"
        if files.is_url(self.directory):
            why, fix = files.explain(error, self.directory), "Run"
        try:
            last = f"The last good one is of step {self.latest()}. "
        except files.failures():   # what could not be written may be out of reach for readers too
            last = ""
        return files.refusal(error, self.directory, (
            f"the checkpoint of step {self._saving} could not be written to {self.directory}: {why}. "
            f"{last}{fix} the same command again: it resumes from there."))

    def restore(self, step: int, abstract_state: Any) -> Restored:
        """Reads one step, on any mesh and any number of processes.

        Args:
          step: a committed step.
          abstract_state: pytree of jax.ShapeDtypeStruct whose shardings say where to place
            the arrays, whatever mesh saved them.

        Raises:
          UserError: no such step, unreadable, another model's, or of a future format.
        """
        self.wait()
        (folder,) = _candidates(self.directory, step).values()
        try:
            return checkpoint_format.read_step(folder, abstract_state)
        except Unreadable as error:
            raise _none_readable(self.directory, {step: error}) from error

    def restore_latest(self, abstract_state: Any,
                       frozen_fn: Callable[[], Mapping] | None = None) -> Restored | None:
        """Reads the newest readable step; None where nothing was ever committed.

        frozen_fn: gives the parameters that checkpoints refer to (see format.py).

        An unreadable newer step is logged and set aside as STEP.unreadable, for training
        will come by that step again and save it anew.

        Raises:
          UserError: another model's, of a future format, or checkpoints exist and none can
            be read (starting from scratch would bury them).
        """
        self.wait()
        failures = {}
        for step, folder in reversed(_step_paths(self.directory).items()):
            try:
                restored = checkpoint_format.read_step(folder, abstract_state, frozen_fn)
            except Unreadable as error:
                failures[step] = error
                _say(logging.WARNING, "checkpoint %s is unreadable (%s): using the one before",
                     folder, error)
                continue
            self._set_aside(list(failures), "unreadable")
            # Of a checkpoint that is older than the marks: what stands before it was gone on from.
            before = max((s for s in self.all_steps() if s < step), default=None)
            self._retention.verified = restored.record.progress.get("verified", before)
            return restored
        if failures:
            raise _none_readable(self.directory, failures)
        return None

    def suspect(self, first: int) -> list[int]:
        """Sets the checkpoints of `first` and of later steps aside as STEP.suspect, because the
        parameters in them gave no finite loss: a run that went on from them would meet the same
        again. Returns their steps.
        """
        self.wait()
        steps = [step for step in self.all_steps() if step >= first]
        self._set_aside(steps, "suspect")
        return steps

    def _set_aside(self, steps: Sequence[int], why: str):
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                names = (f"{step}.{why}{suffix}" for suffix in ("", *range(2, 1000)))
                free = next(n for n in names if not (self.directory / n).exists())
                files.rename(self.directory / str(step), self.directory / free, _COMMITTED)
        multihost_utils.sync_global_devices("t5x_lite: checkpoints set aside")
        self._manager.reload()

    def close(self):
        """Waits for the save in progress, frees orbax's threads and unlocks the workdir."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._release()


def _cannot_write(directory: os.PathLike | str, error: BaseException) -> UserError:
    return files.refusal(error, directory, (
        f"cannot make {directory}: {files.explain(error, directory)}. Choose a --workdir that can be "
        "written to."))


class Start(NamedTuple):
    """Where a run starts."""

    state: Any
    iterator_states: dict[int, bytes] | None   # None: the data start at their beginning
    record: Record | None                      # of the checkpoint that the run goes on from
    branched: bool = False                     # whether that is another run's


def restore_or_init(checkpointer: Checkpointer, abstract_state: Any, init_fn: Callable[[], Any],
                    init_from_fn: Callable[[], Any] | None = None,
                    frozen_fn: Callable[[], Mapping] | None = None,
                    branch_from: str = "") -> Start:
    """Where a run starts. The first of these that there is, which is also logged:

    1. the newest readable checkpoint in the run's own workdir: the run goes on. A preempted
       fine-tuning must not start over from the pre-trained model;
    2. the checkpoint of branch_from: the run goes on from another's as if it were its own;
    3. init_from_fn(), the state from another checkpoint, at step 0 and with a new optimizer;
    4. init_fn(), the state from the seed.

    Args:
      branch_from: a workdir, whose newest readable checkpoint is taken, or the folder of one step.
      frozen_fn: state["frozen"] of the first case, where the abstract state has it.

    Raises:
      UserError: see Checkpointer.restore_latest. Never falls from 1 to the others because the
        workdir's checkpoints are damaged.
    """
    restored = checkpointer.restore_latest(abstract_state, frozen_fn)
    if restored is not None:
        _say(logging.INFO, "resumed from step %s of %s", restored.record.step,
             checkpointer.directory)
        return Start(restored.state, restored.iterator_states, restored.record)
    if branch_from:
        restored = _branch(branch_from, abstract_state, frozen_fn)
        _say(logging.INFO, "branched from step %s of %s", restored.record.step, branch_from)
        return Start(restored.state, restored.iterator_states, restored.record, branched=True)
    if init_from_fn is not None:
        _say(logging.INFO, "started from init_from")
        return Start(init_from_fn(), None, None)
    _say(logging.INFO, "started from scratch")
    return Start(init_fn(), None, None)


def _branch(source: str, abstract_state: Any, frozen_fn: Callable[[], Mapping] | None) -> Restored:
    """The checkpoint that a branch begins with. Raises UserError where there is none."""
    step: int | str = "last"
    where = _absolute(source)
    if where.name.isdigit() and where.parent.name == "checkpoints":   # to list what else there is
        where, step = where.parents[1], int(where.name)
    return _first_readable(where, step, lambda folder: checkpoint_format.read_step(
        folder, abstract_state, frozen_fn))


def _say(level: int, message: str, *args):
    if jax.process_index() == 0:
        _log.log(level, message, *args)
