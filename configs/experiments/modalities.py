"""Loss over compute for digits, code and text: one ladder, three kinds of tokens.

Papers: Henighan et al. 2020 (arXiv:2010.14701): images, video, text and code fall alike with compute;
Hoffmann et al. 2022 for the budgets' several sizes.
The recipe, sizes and budgets are ladder.py's rules and the same for all; rows have 64 tokens: the 64 greys of a
digit, 64 bytes of Python's sources, 64 bytes of its documentation.
Expected: docs/experiments.md.
Command: python -m t5x_lite.experiment --config=configs/experiments/modalities.py --workdir=runs/modalities
"""

import math
import pathlib
from collections.abc import Sequence

from configs.experiments import ladder
from t5x_lite import experiment
from t5x_lite.experiment import Run
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.scaling import ladders

SHOWN = ("*/loss",)
OVER, LOG_AXES = "FLOPs", "xy"
ARMS = {"digits": "digits", "code": "lm", "text": "text"}   # arm -> argument of ladder.py
LADDER = ladders.Ladder(budgets=(1e9, 6e9, 3.6e10), sizes=3, ratio=60.0, unit=4)


def get_runs() -> tuple[Run, ...]:
    """The ladder's runs on each kind of tokens; a stage is a budget and a width."""
    return tuple(Run(arm, rung.seed, rung.config, rung.arm) for arm, argument in ARMS.items()
                 for rung in ladders.rungs(ladder.run(argument), LADDER))


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """A table: the lowest held-out bits a token of each budget, and the width that has them."""
    found = experiment.final_values(runs, workdir)
    lines = ["Lowest held-out bits a token of each budget's sizes (width):", "",
             "| FLOPs | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    for budget in LADDER.budgets:
        cells = []
        for arm in ARMS:
            losses = [(loss / math.log(2), run.config.model.embed_dim) for run in runs
                      if run.arm == arm and run.stage.startswith(f"c{budget:.3g}_") and run.folder in found
                      and (loss := reporting_runs.value(found[run.folder], SHOWN[0])) is not None]
            cells.append("{:.3f} ({})".format(*min(losses)) if losses else "–")
        lines.append(f"| {budget:.3g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
