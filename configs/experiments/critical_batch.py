"""The critical batch grows as the loss falls: a sweep of batches, each at the best of three rates.

Papers: McCandlish et al. 2018 (arXiv:1812.06162), equation 2.11: steps S = S_min + E_min / batch to one loss,
B_crit = E_min / S_min; Kaplan et al. 2020 (arXiv:2001.08361), section 5.1: B_crit = B* / L^(1/alpha_B), with
alpha_B about .21. A causal LM of 25,000 parameters on the bytes of your own Python installation, AdamW at a
constant rate after warm-up. Runs of 16 rows and more also measure the gradient noise scale.
Expected: a critical batch of 19 rows at a loss of 2.8 and 43 at 2.3, one seed; every best rate is the largest.
Command: python -m t5x_lite.experiment --config=configs/experiments/critical_batch.py \\
    --workdir=runs/critical_batch
and then, of each loss L in sweep.csv: python -m t5x_lite.scaling fit --law=steps_of_batch \\
    --table=runs/critical_batch/sweep.csv --columns=batch=rows,steps=steps --where=loss=L
and over the losses, from the line of each in critical.csv: python -m t5x_lite.scaling fit \\
    --law=critical_batch --table=runs/critical_batch/critical.csv
"""

import csv
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from configs.experiments import ladder, switch_vs_dense
from t5x_lite import config as configs, experiment
from t5x_lite.experiment import Run
from t5x_lite.scaling import fits, laws, tables
from t5x_lite.training.schedules import ScheduleConfig

SHOWN = ("*/loss", "*/accuracy")
OVER, LOG_AXES = "tokens", "x"
STEPS = {4: 3000, 16: 1500, 64: 600, 256: 240}     # {rows: steps}
RATES = (0.5, 1.0, 2.0)     # times 0.004 (rows / 16)^1/2
LOSSES = (3.2, 3.0, 2.8, 2.6, 2.5, 2.4, 2.3)


def get_runs() -> tuple[Run, ...]:
    """Arm "ROWS_FACTOR"."""
    return tuple(Run(f"{rows}_{factor:g}", 0, _run(rows, steps, factor))
                 for rows, steps in STEPS.items() for factor in RATES)


def _run(rows: int, steps: int, factor: float):
    rate = 0.004 * factor * (rows / 16) ** 0.5
    config = ladder.small(32, 1, steps=steps, rows=rows, evaluations=30)
    config = configs.replace(config, "optimizer.schedule", ScheduleConfig(
        "constant * linear_warmup", rate, warmup_steps=max(10, 400 // rows)))
    return dataclasses.replace(config, train=dataclasses.replace(
        config.train, accumulation=4, noise_scale=True) if rows >= 16 else config.train)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Steps of each batch to each loss, at its best rate, and the critical batch of each loss; writes
    sweep.csv for the fits and critical.csv, what they give.

    A loss that a run's first evaluation is below already was reached at a step that nobody knows: no row.
    """
    rows, lines = [], ["Steps to a held-out loss at the best of the rates (its factor):", "",
                       "| loss | " + " | ".join(f"{n} rows" for n in STEPS) + " |",
                       "|---" * (len(STEPS) + 1) + "|"]
    for loss in LOSSES:
        found = {n: _fewest(runs, workdir, n, loss) for n in STEPS}
        rows += [(loss, n, cell[0]) for n, cell in found.items() if isinstance(cell, tuple)]
        lines.append(f"| {loss} | " + " | ".join(map(_said, found.values())) + " |")
    _write(workdir / "sweep.csv", ("loss", "rows", "steps"), rows)
    critical = [(loss, *_critical([row[1:] for row in rows if row[0] == loss])) for loss in LOSSES
                if sum(row[0] == loss for row in rows) > 2]
    _write(workdir / "critical.csv", ("loss", "S_min", "E_min", "batch"), critical)
    lines += ["", "| loss | S_min, steps | E_min, rows | critical batch, rows |", "|---" * 4 + "|"]
    lines += [f"| {loss} | {steps:.0f} | {least:.0f} | {batch:.1f} |"
              for loss, steps, least, batch in critical]
    return "\n".join(lines) + "\n"


def _critical(points: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """S_min, E_min and their ratio of (rows, steps) to one loss."""
    batch, steps = np.array(points, float).T
    found = fits.fit(laws.LAWS["steps_of_batch"], tables.Table({"batch": batch, "steps": steps}))
    return found.parameters["S_min"], found.parameters["E_min"], found.exponents["B_crit"]


def _write(path: pathlib.Path, names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def _said(cell: tuple[float, float] | int | None) -> str:
    if cell is None:
        return "–"
    return f"at most {cell}" if isinstance(cell, int) else f"{cell[0]:.0f} ({cell[1]:g})"


def _fewest(runs: Sequence[Run], workdir: pathlib.Path, rows: int, loss: float
            ) -> tuple[float, float] | int | None:
    """(steps, factor of the rate); the first evaluation's step if it is below already; None: never."""
    found, first = [], []
    for run in runs:
        if run.config.train.global_batch_size != rows:
            continue
        curve = experiment.curve(workdir / run.folder / "metrics.jsonl", "eval/*/loss")
        if curve and curve[0][1] <= loss:
            first.append(curve[0][0])
        elif (step := switch_vs_dense.step_at(curve, loss)) is not None:
            found.append((step, float(run.arm.split("_")[1])))
    return min(first) if first else min(found, default=None)
