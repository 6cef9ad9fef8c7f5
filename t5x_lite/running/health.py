"""Which steps are bad, and what a run does about them.

A step is bad where the state after it holds a NaN or an infinity, where its loss is one, or where
its loss is far above the losses before it (train.spike_bound, as OLMo's and levanter's skip-step).
train.bad_steps says what follows: "stop" ends the run before anything of the step is saved; "skip"
leaves parameters and optimizer as they were, decided on the device, and stops only after
train.max_bad_steps bad steps in a row. Under fp16 an overflow is part of the method and lowers the
loss scale; it is bad only where the scale can fall no further.

The bound for step n is made from the losses up to step n - 2, all that the host has read when it
dispatches step n: it does not depend on when a run saves, evaluates or resumes.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite.models.blocks import LOAD_ENTROPY

SPIKE_WINDOW = 128    # losses that the bound is made from …
SPIKE_FEWEST = 32     # … and without so many there is none
# A normal distribution's standard deviation over its median absolute deviation.
_SIGMA = 1.4826
# Load entropy of a mixture, as a share of a uniform load's, below which a run warns: 8 experts
# of which two share everything have a third.
COLLAPSED = 0.5


def spike_bound(losses: Sequence[float], factor: float) -> float:
    """The median of the last SPIKE_WINDOW losses plus `factor` robust standard deviations.

    Infinite where factor is 0 (off) or fewer than SPIKE_FEWEST losses are known. The median and
    the median absolute deviation are not moved by the spikes themselves.
    """
    if not factor or len(losses) < SPIKE_FEWEST:
        return math.inf
    recent = losses[-SPIKE_WINDOW:]
    middle = statistics.median(recent)
    spread = statistics.median(abs(x - middle) for x in recent)
    # Losses that hardly move have no spread to speak of: 1 % of the loss is no spike.
    return middle + factor * max(_SIGMA * spread, 0.01 * abs(middle))


@dataclasses.dataclass(frozen=True)
class Step:
    """What the host reads of one step."""

    number: int
    loss: float
    finite: bool                 # the state after the step holds finite numbers only
    bound: float                 # what the loss was allowed to be
    grad_norm: float = 0.0
    skipped: bool = False        # parameters and optimizer were left as they were
    loss_scale: float | None = None   # fp16's, before the step

    @classmethod
    def read(cls, number: int, sums: Mapping[str, Any], bound: float) -> "Step":
        """The step from its metrics {name: (sum, count)} on the host."""
        value = lambda name, default: float(sums[name][0]) if name in sums else default
        nats, tokens = (float(x) for x in sums["loss"])
        return cls(number, nats / tokens if tokens else math.nan, bool(value("finite", 1.0)),
                   bound, value("grad_norm", 0.0), bool(value("skipped", 0.0)),
                   value("loss_scale", None))

    def fault(self, lowest_scale: float) -> str | None:
        """What is wrong with the step; None where it is good.

        lowest_scale: loss_scale.minimum, below which fp16's scale does not fall.
        """
        scaled = self.loss_scale is not None
        if not math.isfinite(self.loss):
            return f"the loss of step {self.number} is {self.loss}"
        if not self.finite or not (scaled or math.isfinite(self.grad_norm)):
            return (f"the update of step {self.number} is not finite (its loss is {self.loss:.4g}, "
                    f"its gradient norm {self.grad_norm:.3g})")
        if self.loss > self.bound:
            return (f"the loss of step {self.number}, {self.loss:.4g}, is above the "
                    f"{self.bound:.4g} that train.spike_bound allows")
        if scaled and self.skipped and self.loss_scale <= lowest_scale:
            return (f"the gradients of step {self.number} overflow float16 at a loss scale of "
                    f"{self.loss_scale:g}, which is loss_scale.minimum")
        return None

    @property
    def remedy(self) -> str:
        """What a user may do about a bad step."""
        if self.loss_scale is not None and self.skipped:
            return "Lower loss_scale.minimum, or use precision=bf16 or float32."
        return ("Lower optimizer.schedule.base_learning_rate (or lengthen its warm-up), set "
                "optimizer.clip_norm=1.0, use precision=float32, or leave such steps out with "
                "train.bad_steps=skip, and run the same command.")

    @property
    def speaks_against_the_state_before(self) -> bool:
        """Whether the parameters that the step began with give no finite loss or gradients."""
        scaled = self.loss_scale is not None
        return not math.isfinite(self.loss) or not (scaled or math.isfinite(self.grad_norm))


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with a step, and whether the run must stop for it."""

    what: str
    stops: bool


class Health:
    """Judges the steps of a run one by one; its memory goes into every checkpoint.

    Args:
        train: config.TrainConfig.
        lowest_scale: loss_scale.minimum.
        memory: what `memory()` gave at the checkpoint that the run resumes from.
    """

    def __init__(self, train: Any, lowest_scale: float, memory: Mapping[str, Any] | None = None):
        memory = memory or {}
        self._train, self._lowest = train, lowest_scale
        self._losses: list[float] = list(memory.get("losses", ()))
        self._last_step = memory.get("last_step", 0)
        self.in_a_row = memory.get("bad_in_a_row", 0)
        self.bad = memory.get("bad_steps", 0)
        self.skipped = memory.get("skipped_steps", 0)
        self.seen = memory.get("seen_steps", 0)

    def memory(self) -> dict[str, Any]:
        """What a resumed run needs in order to judge as this one goes on to, as JSON values."""
        return {"losses": self._losses[-SPIKE_WINDOW - 1:], "last_step": self._last_step,
                "bad_in_a_row": self.in_a_row, "bad_steps": self.bad,
                "skipped_steps": self.skipped, "seen_steps": self.seen}

    def bound(self, step: int) -> float:
        """What the loss of `step`, which is about to start, may be."""
        if not self._train.spike_bound:
            return math.inf
        newest_is_too_new = self._last_step >= step - 1
        losses = self._losses[:-1] if newest_is_too_new else self._losses
        return spike_bound(losses, self._train.spike_bound)

    def judge(self, step: Step) -> Fault | None:
        """Counts the step; what is wrong with it, None where it is good."""
        fault = step.fault(self._lowest)
        self.seen += 1
        self.skipped += step.skipped
        if fault is None:
            self.in_a_row = 0
            if self._train.spike_bound and not step.skipped:
                self._losses = [*self._losses[-SPIKE_WINDOW:], step.loss]
                self._last_step = step.number
            return None
        self.bad += 1
        self.in_a_row += 1
        if self.in_a_row > 1:
            fault += f" ({self.in_a_row} bad steps in a row)"
        return Fault(fault, not step.skipped or self.in_a_row >= self._train.max_bad_steps)


class Experts:
    """Warns once of every layer whose experts have collapsed."""

    def __init__(self):
        self._warned: set[str] = set()

    def warning(self, step: int, means: Mapping[str, float]) -> str | None:
        """The warning that the means of a line of metrics call for; None: nothing new.

        step: the line's.
        """
        layers = {name.removeprefix(f"{LOAD_ENTROPY}/").replace("_", " layer "): mean
                  for name, mean in means.items() if name.startswith(f"{LOAD_ENTROPY}/")}
        fresh = {layer: mean for layer, mean in layers.items()
                 if mean < COLLAPSED and layer not in self._warned}
        if not fresh:
            return None
        self._warned |= fresh.keys()
        listed = ", ".join(f"{layer} {mean:.2f}" for layer, mean in fresh.items())
        return (f"warning: at step {step} few experts get nearly all tokens (load entropy, "
                f"1 where even: {listed}); raise moe.balance_weight or moe.jitter, or lower "
                f"the learning rate")
