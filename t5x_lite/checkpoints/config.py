"""When a run is saved and what is kept: the fields of a config's section `checkpoint`."""

import dataclasses

from t5x_lite.checkpoints import best
from t5x_lite.errors import Count, at_least


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. The last step of a run is always saved."""

    every: Count = 1000  # steps between two checkpoints
    keep_last: int = 3  # the newest ones that stay
    keep_every: int | None = None  # steps divisible by this stay for good
    # A metric whose best evaluation so far is saved and stays beside those, for --step=best: loss,
    # TASK/loss, em, … (best.DIRECTIONS), or min:NAME, max:NAME of your own; "": none.
    best: str = ""
    async_save: bool = True  # write in the background while training goes on
    # Seconds that a start waits for another job in the same workdir to end (see lock.py).
    wait_for_workdir: float = 60.0

    def __post_init__(self):
        if self.best:
            best.parse(self.best)
        for name, lowest in (("every", 1), ("keep_last", 1), ("keep_every", 1),
                             ("wait_for_workdir", 0)):
            value = getattr(self, name)
            if value is not None:
                at_least(f"checkpoint.{name}", value, lowest)
