"""The best evaluation so far by one metric: which checkpoint stays for it, and when a run stops early.

A metric is written as metrics.jsonl has it without "eval/": `TASK/loss`, `TASK/metric/em`. The task may
be left out where one task has the metric, or all together have (`loss`); so may "metric/". DIRECTIONS
says whether less or more is better; of others the user says it: `min:NAME`, `max:NAME`.

An evaluation improves only by a finite value that is strictly better than the best: of equal ones the
earliest stays, and NaN or an infinity never improves but counts as an evaluation.
"""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_lite.errors import UserError, nearest

BEST = "best"   # in place of a step's number, and in a record's progress
_OWN = "metric/"   # before the metrics of a task's own functions
_TOGETHER = "all"   # the metrics over all tasks
_SIGNS = {"min": -1, "max": 1}

# {metric, as a pattern: -1 where less is better, 1 where more is}.
DIRECTIONS = {
    **dict.fromkeys(("loss", "perplexity", "bits_per_byte"), -1),
    **dict.fromkeys((
        "accuracy", "accuracy_by_length", "auc_pr", "auc_roc", "bleu", "em", "exact_match", "f1",
        "f1_by_ranking", "last_word_accuracy", "matthews_corrcoef", "mean_*class_f1",
        "pearson_corrcoef", "rouge1", "rouge2", "rougeLsum", "sequence_accuracy", "span_f1",
        "spearman_corrcoef"), 1)}


def parse(metric: str) -> tuple[str, int]:
    """(name, -1 where less is better or 1 where more is) of what a config says.

    Raises:
        UserError: a metric that DIRECTIONS has not, without min: or max: before it.
    """
    before, colon, name = metric.partition(":")
    if colon and before in _SIGNS and name:
        return name, _SIGNS[before]
    last = metric.rsplit("/", 1)[-1]
    for pattern, sign in DIRECTIONS.items():
        if fnmatch.fnmatchcase(last, pattern):
            return metric, sign
    raise UserError(
        f"checkpoint.best={metric!r}: whether less or more of {last!r} is better is not known. Write "
        f"min:{last} or max:{last}, or one of {', '.join(DIRECTIONS)}.{nearest(last, DIRECTIONS)}")


def find(name: str, held_out: Mapping[str, Mapping[str, float]]) -> float:
    """The value of a metric in {task: {metric: value}}.

    Raises:
        UserError: there is none of that name, or several tasks have one, listing those that there are.
    """
    values = {f"{task}/{metric}": value for task, metrics in held_out.items()
              for metric, value in metrics.items()}
    short = {path: path.replace(f"/{_OWN}", "/") for path in values}
    asked = name.replace(_OWN, "", 1)
    # The whole path first, then the metric of all tasks together, then of the task that has it.
    matches = (lambda p: p == name, lambda p: short[p] == asked,
               lambda p: p == f"{_TOGETHER}/{name}",
               lambda p: p.endswith(f"/{name}"), lambda p: short[p].endswith(f"/{asked}"))
    fitting = next(filter(None, (list(filter(fits, values)) for fits in matches)), [])
    if len(fitting) == 1:
        return values[fitting[0]]
    if fitting:
        raise UserError(f"checkpoint.best={name!r} is the metric of several tasks: say which, "
                        f"{' or '.join(fitting)}.")
    raise UserError(f"checkpoint.best={name!r}: no evaluation gives that metric. There are "
                    f"{', '.join(values)}.{nearest(name, values)}")


@dataclasses.dataclass
class Best:
    """The best evaluation of a run so far."""

    metric: str                  # as the config says; "": none is followed
    value: float | None = None
    step: int | None = None      # None: no evaluation has had a finite value
    since: int = 0               # evaluations after the best one

    @classmethod
    def resumed(cls, metric: str, memory: Mapping[str, Any] | None, saved: list[int] | None
                ) -> "Best":
        """Goes on from what `memory` gave. It begins anew where that was another metric's, or where
        the best is to be kept and its step is none of those saved.

        saved: the steps whose checkpoints there are; None: they do not matter.
        """
        if not metric:
            return cls("")
        parse(metric)
        if not memory or memory["metric"] != metric:
            return cls(metric)
        if saved is not None and memory["step"] is not None and memory["step"] not in saved:
            return cls(metric)
        return cls(**memory)

    def memory(self) -> dict[str, Any]:
        """What stands in the checkpoint, as JSON values."""
        return dataclasses.asdict(self)

    def check(self, held_out: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """The evaluation, as it is. Raises UserError where it has no such metric."""
        if self.metric:
            find(parse(self.metric)[0], held_out)
        return held_out

    def see(self, step: int, held_out: Mapping[str, Mapping[str, float]]) -> bool:
        """Counts the evaluation of a step; whether it is the best so far.

        Raises:
            UserError: as `find`.
        """
        if not self.metric:
            return False
        name, sign = parse(self.metric)
        value = _agreed(float(find(name, held_out)))
        if math.isfinite(value) and (self.value is None or sign * value > sign * self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    def calls_for_a_save(self, step: int, held_out: Mapping[str, Mapping[str, float]], keep: bool,
                         patience: int) -> bool:
        """As `see`, but whether the state must be saved now: it is the best and is to be kept, or the
        run is over."""
        improved = self.see(step, held_out)
        return (keep and improved) or self.is_over(patience)

    def is_over(self, patience: int) -> bool:
        """Whether so many evaluations brought nothing better; never with 0."""
        return 0 < patience <= self.since

    def why_over(self, step: int, patience: int) -> str:
        """What a run that ends early after `step` says."""
        return (f"stopped early after step {step}: {self.since} evaluations brought nothing better "
                f"(eval.stop_after={patience})")

    def line(self) -> str:
        """What a run says of it at the end."""
        if self.step is None:
            return f"no evaluation gave a finite {self.metric}"
        return f"the best {self.metric} is {self.value:.6g}, of step {self.step}"


def _agreed(value: float) -> float:
    """Process 0's value on every process: all must save and stop at the same step."""
    if jax.process_count() == 1:
        return value
    bits = np.array(value, np.float64).reshape(1).view(np.uint32)
    return float(np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)[0])


def is_over(progress: Mapping[str, Any], patience: int) -> bool:
    """Whether the run of a checkpoint's record ended early, by what its progress holds."""
    memory = progress.get(BEST)
    return memory is not None and Best(**memory).is_over(patience)
