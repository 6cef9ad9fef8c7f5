"""Batch sizes that grow over a run, as pure functions of the step."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from t5x_lite.errors import UserError, at_least


@dataclasses.dataclass(frozen=True)
class BatchRampConfig:
    """Batch size by stages: ((batch_size in sequences, number of steps), …), then the full one.

    PaLM: ((512, 50_000), (1024, 65_000)) and a full batch of 2048. Gopher 280B: one stage at
    3M tokens, then 6M. GPT-3's and MT-NLG's linear ramps: see `linear_ramp`. All is integer
    arithmetic on the step, so a resumed run computes what an uninterrupted one did.
    """

    stages: tuple[tuple[int, int], ...] = ()

    def __post_init__(self):
        for i, (batch_size, steps) in enumerate(self.stages):
            at_least(f"train.batch_ramp.stages[{i}][0]", batch_size, 1, "It is a batch size.")
            at_least(f"train.batch_ramp.stages[{i}][1]", steps, 1, "It is a number of steps.")


def linear_ramp(start: int, increment: int, full: int, ramp_sequences: int) -> BatchRampConfig:
    """From `start` to `full` in steps of `increment`, equal shares of `ramp_sequences` each.

    MT-NLG 530B: linear_ramp(32, 32, 1920, 12e9 tokens / 2048). The last share's rounding is
    at most one batch a stage.
    """
    if increment < 1 or (full - start) % increment or not 0 < start <= full:
        raise UserError(f"batch ramp from {start} to {full} in steps of {increment}: the "
                        f"increment must be positive and divide the difference {full - start}.")
    sizes = range(start, full, increment)
    return BatchRampConfig(tuple(
        (size, max(1, round(ramp_sequences / len(sizes) / size))) for size in sizes))


def _boundaries(ramp: BatchRampConfig) -> Sequence[int]:
    """The step at which each stage ends."""
    ends, step = [], 0
    for _, steps in ramp.stages:
        step += steps
        ends.append(step)
    return ends


def batch_size_at(ramp: BatchRampConfig, full: int, step: int) -> int:
    """Sequences in the batch of this step (counted from 0)."""
    stage = bisect.bisect_right(_boundaries(ramp), step)
    return ramp.stages[stage][0] if stage < len(ramp.stages) else full


def sequences_before(ramp: BatchRampConfig, full: int, step: int) -> int:
    """Sequences in all batches before this step; times the length, the tokens seen."""
    seen, left = 0, step
    for batch_size, steps in ramp.stages:
        seen += batch_size * min(steps, left)
        left -= min(steps, left)
    return seen + full * left


def steps_for(ramp: BatchRampConfig, full: int, sequences: int) -> int:
    """The fewest steps that see at least this many sequences (token budgets to train.num_steps)."""
    done = 0
    for batch_size, steps in ramp.stages:
        if sequences <= batch_size * steps:
            return done + -(-sequences // batch_size)
        done, sequences = done + steps, sequences - batch_size * steps
    return done + -(-sequences // full)


def batch_unit(ramp: BatchRampConfig, full: int) -> int:
    """The greatest batch size that divides every stage's: what a loader can deliver at a time."""
    return math.gcd(full, *(batch_size for batch_size, _ in ramp.stages))
