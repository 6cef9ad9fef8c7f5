"""Metrics as sums and counts, never averages of averages; and where they are written.

A step returns {name: (sum, count)}. Sums of steps, micro-batches, tasks and devices add up;
only what is shown is divided. metrics.jsonl and TensorBoard receive the same lines.
"""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from t5x_lite import files, log, packages
from t5x_lite.errors import UserError
from t5x_lite.training.trackers import Trackers

Sums = Mapping[str, tuple[Any, Any]]
METRIC = "metric/"   # before the names of a task's own metrics, beside the model's loss and accuracy


def add(a: Sums, b: Sums) -> dict[str, tuple[Any, float]]:
    """Sums of both by name; a name in one of them only keeps its value. A sum may be an array."""
    total = {name: (_double(s), float(c)) for name, (s, c) in a.items()}
    for name, (s, c) in b.items():
        old_sum, old_count = total.get(name, (0.0, 0.0))
        total[name] = (old_sum + _double(s), old_count + float(c))
    return total


def _double(x: Any) -> Any:
    """A number or an array in float64, so that many small parts add up."""
    return np.asarray(x, np.float64) if np.ndim(x) else float(x)


def divide(sums: Sums) -> dict[str, float]:
    """{name: sum / count}; NaN where nothing was counted."""
    return {name: float(s) / float(c) if float(c) else math.nan for name, (s, c) in sums.items()}


def perplexity(nats: float, tokens: float) -> float:
    """exp of the mean loss a token; infinite where that overflows, NaN of no tokens."""
    mean = nats / tokens if tokens else math.nan
    return math.inf if mean > 700 else math.exp(mean)


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """The loss of a text in bits, over its UTF-8 bytes: comparable across vocabularies."""
    return nats / math.log(2.0) / num_bytes


def read_metrics(path: os.PathLike | str) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl that can be read, in order.

    A power loss may leave NUL bytes or half a line, an editor other bytes: such lines are left
    out. Logs never stop a run.

    Raises:
        UserError: no such file.
    """
    file = files.path(path)
    if not file.is_file():
        raise UserError(f"{path} does not exist: is that the workdir of a run?")
    return [json.loads(line) for line in _good_lines(file)[0]]


def last_usage(workdir: files.Path) -> Mapping[str, float]:
    """What a run had used by the last line of metrics.jsonl that says so, for a checkpoint of before it
    kept that; {} on other processes than the main one."""
    path = workdir / "metrics.jsonl"
    lines = read_metrics(path) if log.is_main() and path.is_file() else []
    return next((line for line in reversed(lines) if "chip_hours" in line), {})


def _good_lines(path: files.Path) -> tuple[list[bytes], int]:
    """(lines that hold a JSON object with a step, how many others there are)."""
    lines = path.read_bytes().split(b"\n")
    good = [line for line in lines[:-1] if _step_of(line) is not None]
    torn = lines[-1] != b""   # a kill may leave a part of the last line
    return good, len(lines) - 1 - len(good) + torn


def _step_of(line: bytes) -> int | None:
    """The step that a line of metrics.jsonl speaks of; None where it is damaged."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    step = fields.get("step") if isinstance(fields, dict) else None
    return step if type(step) is int else None


class MetricsWriter:
    """WORKDIR/metrics.jsonl and WORKDIR/tensorboard, written by process 0 only.

    A run that resumes from `resume_step` goes over the steps after it again: their lines are
    dropped, so that every step stands once, whatever was killed in between. Lines that cannot be
    read or written are named once and left out; the run goes on.

    In a bucket the lines appear every half a minute (files.Growing), and with `sync`, which a run calls
    before it saves: what a checkpoint comes after is never missing.

    Args:
        trackers: are shown the same lines, and closed with this.
    """

    def __init__(self, workdir: os.PathLike | str, resume_step: int = 0,
                 trackers: Trackers | None = None):
        self._file = self._board = self._folder = None
        self._trackers = trackers
        self._torn = self._complained = False
        if jax.process_index() != 0:
            return
        self._folder = files.Growing(workdir, self._complain)
        try:
            path = self._folder.bring("metrics.jsonl")
            if path.exists():
                _drop_after(path, resume_step)
            self._file = open(path, "ab", buffering=0)
        except files.failures() as error:
            self._complain(error)
        try:
            with packages.lean("torch"):   # of which it would take 2 s for converting tensors
                board = packages.needed("tensorboardX", "tensorboard", "the files of tensorboard/")
            self._board = board.SummaryWriter(str(self._folder.folder / "tensorboard"),
                                              purge_step=resume_step + 1)
        except UserError as error:
            log.say(f"{error} The run goes on without them; metrics.jsonl has the same.")
        except OSError as error:
            self._complain(error)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, stamp: Mapping[str, float], values: Mapping[str, float],
              prefix: str = "") -> None:
        """One line: the stamp (step, tokens_seen, …) and the values, their names prefixed.

        Values that are not finite become null, which JSON can hold.
        """
        named = {prefix + name: float(v) for name, v in values.items()}
        shown = {name: v if math.isfinite(v) else None for name, v in named.items()}
        if self._file is not None:
            self._append((json.dumps({**stamp, **shown}) + "\n").encode())
        if self._board is not None:
            self._show(int(stamp["step"]), named)
        if self._trackers is not None:
            self._trackers.write(int(stamp["step"]), {**stamp, **shown})

    def _append(self, line: bytes) -> None:
        # The end of a line that a full disk cut short makes one damaged line of it, not two.
        try:
            written = self._file.write(b"\n" + line if self._torn else line)
            self._torn = written < len(line)
        except OSError as error:
            self._torn = True
            self._complain(error)

    def _show(self, step: int, named: Mapping[str, float]) -> None:
        try:
            for name, value in named.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError as error:
            self._complain(error)

    def sync(self) -> None:
        """All lines up to now are in the workdir when this returns, if they can be written at all."""
        if self._folder is not None:
            self._folder.sync()

    def _complain(self, error: BaseException) -> None:
        if not self._complained:
            log.say(f"warning: metrics cannot be written ({error}); the run goes on without")
        self._complained = True

    def close(self) -> None:
        """Flushes and closes the files, and the trackers' runs."""
        if self._trackers is not None:
            self._trackers.close()
        for file in filter(None, (self._file, self._board)):
            try:
                file.close()
            except OSError as error:
                self._complain(error)
        if self._folder is not None:
            self._folder.close()


def inherit(source: os.PathLike | str, workdir: files.Path) -> None:
    """Copies the lines of the run that a branch starts from, so that the branch's curve begins where
    its parameters do; MetricsWriter then leaves out what that run wrote after the branch.

    source: a workdir, its checkpoints folder or the folder of one step.
    """
    folder = files.path(files.absolute(source))
    places = [parent / "metrics.jsonl" for parent in (folder, *folder.parents[:2])]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        log.say(f"warning: {source} has no metrics.jsonl; the branch's begins with the branch")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_bytes(workdir / "metrics.jsonl", found.read_bytes())


def _drop_after(path: files.Path, resume_step: int) -> None:
    """Leaves in a metrics.jsonl what can be read and belongs to a step up to this one."""
    good, damaged = _good_lines(path)
    if damaged > 1 or (damaged and path.read_bytes().endswith(b"\n")):   # else a kill's torn end
        log.say(f"warning: {damaged} damaged lines of {path} are left out")
    kept = [line for line in good if _step_of(line) <= resume_step]
    files.write_whole(path, "".join(line.decode() + "\n" for line in kept))
