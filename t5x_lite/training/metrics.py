"""Metrics as sums and counts, never averages of averages; and where they are written.

A step returns {name: (sum, count)}. Sums of steps, micro-batches, tasks and devices add up;
only what is shown is divided. metrics.jsonl and TensorBoard receive the same lines.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from t5x_lite.errors import UserError

Sums = Mapping[str, tuple[Any, Any]]


def add(a: Sums, b: Sums) -> dict[str, tuple[float, float]]:
    """Sums of both by name; a name in one of them only keeps its value."""
    total = {name: (float(s), float(c)) for name, (s, c) in a.items()}
    for name, (s, c) in b.items():
        old_sum, old_count = total.get(name, (0.0, 0.0))
        total[name] = (old_sum + float(s), old_count + float(c))
    return total


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
    """The lines of a metrics.jsonl, in order.

    Raises:
        UserError: no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: is that the workdir of a run?")
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: pathlib.Path) -> list[str]:
    """Lines that were written to their end; a kill may leave a part of the last one."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class MetricsWriter:
    """WORKDIR/metrics.jsonl and WORKDIR/tensorboard, written by process 0 only.

    A run that resumes from `resume_step` goes over the steps after it again: their lines are
    dropped, so that every step stands once, whatever was killed in between.
    """

    def __init__(self, workdir: os.PathLike | str, resume_step: int = 0):
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step]
            new = path.with_suffix(".jsonl.new")
            new.write_text("".join(kept))
            os.replace(new, path)
        from tensorboardX import SummaryWriter  # imports torch where that is installed
        self._file = open(path, "a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, stamp: Mapping[str, float], values: Mapping[str, float],
              prefix: str = "") -> None:
        """One line: the stamp (step, tokens_seen, …) and the values, their names prefixed.

        Values that are not finite become null, which JSON can hold.
        """
        if self._file is None:
            return
        named = {prefix + name: float(v) for name, v in values.items()}
        shown = {name: v if math.isfinite(v) else None for name, v in named.items()}
        self._file.write(json.dumps({**stamp, **shown}) + "\n")
        self._file.flush()
        for name, value in named.items():
            self._board.add_scalar(name, value, int(stamp["step"]))
        self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None:
            self._file.close()
            self._board.close()
