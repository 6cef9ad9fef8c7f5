"""Transfer from English to Python: how much source is a model worth that has read documentation?

Paper: Hernandez et al. 2021 (arXiv:2102.01293): the effective data transferred D_T is what a model from
scratch would have needed beside the D_F that it was fine-tuned on; D_T = k D_F^alpha N^beta, with alpha .18
from text to Python. Here a causal LM of 37,000 parameters reads a million bytes of the documentation of
your own Python installation, and is then trained on 8 kB to 2 MB of its source, as is one from scratch; at
each size the lowest held-out loss of the run counts.
Expected: 39 to 95 kB at 8 to 128 kB; above, the loss lies below all from scratch, so that nothing is known.
Command: python -m t5x_lite.experiment --config=configs/experiments/transfer.py --workdir=runs/transfer
and then: python -m t5x_lite.scaling fit --law=hernandez --table=runs/transfer/transferred.csv \\
    --fix=beta=0 --bootstrap=200
"""

import csv
import math
import pathlib
from collections.abc import Sequence

from configs.experiments import ladder
from t5x_lite import experiment
from t5x_lite.experiment import Run
from t5x_lite.scaling import ladders
from tasks import python_parts

SHOWN = ("*/loss",)
LOG_AXES = "x"
SEEDS = (0, 1)
SHAPE, STEPS, BEFORE = (32, 2), 1500, 1000     # (width, layers); steps of 16 rows of 64 bytes
ARMS = ("scratch", "transfer")


def get_runs() -> tuple[Run, ...]:
    """Arm transfer reads documentation first; a stage for each size of the target set."""
    def small(task: str, steps: int, seed: int):
        return ladder.small(*SHAPE, steps=steps, seed=seed, task=task, evaluations=25)
    runs = []
    for seed in SEEDS:
        runs.append(Run("transfer", seed, small("python_docs_causal_lm", BEFORE, seed), "docs"))
        for name in python_parts.PARTS:
            for arm in ARMS:
                runs.append(Run(arm, seed, small(f"source_{name}_causal_lm", STEPS, seed), name,
                                after="docs" if arm == "transfer" else ""))
    return tuple(runs)


def data_for(loss: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Bytes from scratch to that loss: on lines between (log bytes, log loss) of falling losses; None
    outside of them."""
    for (less, high), (more, low) in zip(curve, curve[1:], strict=False):
        if low <= loss <= high and low < high:
            share = math.log(high / loss) / math.log(high / low)
            return less * (more / less) ** share
    return None


def outside(loss: float, curve: Sequence[tuple[float, float]]) -> str:
    """What can be said of the data for a loss of which `data_for` knows none."""
    if loss < min(low for _, low in curve):
        return f"above {curve[-1][0]:,}"
    return f"below {curve[0][0]:,}" if loss > curve[0][1] else "–"


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Effective data by size of the target set; writes transferred.csv for the fit."""
    best = {}
    for run in runs:
        curve = experiment.curve(workdir / run.folder / "metrics.jsonl", "eval/*/loss")
        if curve and run.stage in python_parts.PARTS:
            best[run.arm, run.seed, run.stage] = min(loss for _, loss in curve)
    lines = ["| seed | bytes of source | from scratch | after documentation | effective bytes | transferred |",
             "|---|---|---|---|---|---|"]
    rows, beyond = [], 0
    for seed in SEEDS:
        scratch = [(size, best["scratch", seed, name]) for name, size in python_parts.PARTS.items()
                   if ("scratch", seed, name) in best]
        for name, size in python_parts.PARTS.items():
            if any((arm, seed, name) not in best for arm in ARMS):
                continue
            alone, tuned = (best[arm, seed, name] for arm in ARMS)
            effective = data_for(tuned, scratch)
            gained = effective - size if effective else None
            if gained and gained > 0:
                rows.append((ladders.kernels(runs[0].config.model), size, gained))
            beyond += effective is None
            cells = [outside(tuned, scratch), "–"] if effective is None else [
                f"{effective:,.0f}", f"{gained:,.0f}"]
            lines.append(f"| {seed} | {size:,} | {alone:.3f} | {tuned:.3f} | " + " | ".join(cells) + " |")
    if beyond:
        lines += ["", f"{beyond} of {len(lines) - 2} lie outside of the losses from scratch and are not in "
                      "transferred.csv: where those are the largest gains, a fit gives too small an alpha."]
    with open(workdir / "transferred.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("params", "tokens", "tokens_transferred"))
        writer.writerows(rows)
    return "\n".join(lines) + "\n"
