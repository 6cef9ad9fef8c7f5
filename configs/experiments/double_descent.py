"""Epoch-wise double descent: held-out error falls, rises while noisy labels are learned, and falls again.

Paper: Nakkiran et al. 2019 (arXiv:1912.02292), section 6: with 10 to 20 % of the labels wrong a model
large enough to fit them has its worst error about when it comes to; without noise there is no such peak.
Here 2,000 sequences of 12 letters in 10 classes (tasks/integers.py), a decoder of one layer, AdamW
without weight decay at a constant rate, 250 epochs.
Expected: not run yet. With 20 % noise the held-out error has a minimum early and a maximum after it; in
how far it falls again is open.
Command: python -m t5x_lite.experiment --config=configs/experiments/double_descent.py \\
    --workdir=runs/double_descent
"""

import pathlib
from collections.abc import Sequence

from configs.experiments import grokking
from t5x_lite import experiment
from t5x_lite.config import to_config_dict
from t5x_lite.experiment import Run

SHOWN = ("*/accuracy", "*/loss")
LOG_AXES = "x"
ARMS = {"noise": "noisy_classes", "clean": "noisy_classes_clean"}
SEEDS = (0, 1)
STEPS = 2000    # of 256 rows: 256 epochs


def get_config(arg: str | None = None):
    """The locked ConfigDict of the first arm."""
    return to_config_dict(get_runs()[0].config)


def get_runs() -> tuple[Run, ...]:
    """With noisy labels and without."""
    return tuple(Run(arm, seed, grokking.run(task, 12, STEPS, seed, decay=0.0))
                 for seed in SEEDS for arm, task in ARMS.items())


def turns(curve: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """(step, error) of the first descent's minimum, of the maximum after it, and of the minimum after
    that: the largest rise of the curve. A curve that never rises turns at its minimum alone."""
    rises = [(late - early, -early, i, j) for i, (_, early) in enumerate(curve)
             for j, (_, late) in enumerate(curve) if j >= i]
    _, _, low, high = max(rises)
    again = min(range(high, len(curve)), key=lambda i: curve[i][1])
    return curve[low], curve[high], curve[again]


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """A table of each run's turns."""
    lines = ["Held-out error (step): the minimum before the largest rise, the maximum that it leads to, "
             "the minimum after that.", "", "| arm | seed | first minimum | maximum | second minimum |",
             "|---|---|---|---|---|"]
    for run in runs:
        accuracy = experiment.curve(workdir / run.folder / "metrics.jsonl", "eval/*/accuracy")
        errors = [(step, 1 - value) for step, value in accuracy]
        cells = [f"{error:.1%} ({step})" for step, error in turns(errors)] if errors else ["–"] * 3
        lines.append(f"| {run.arm} | {run.seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
