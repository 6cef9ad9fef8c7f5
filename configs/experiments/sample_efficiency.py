"""Larger models learn more of the same tokens; the shape matters little at one number of parameters.

Paper: Kaplan et al. 2020 (arXiv:2001.08361), figures 2 and 5. Causal LMs of the bytes of your own Python
installation: four sizes, and four shapes of about 109,000 parameters (with the head, without embeddings),
all on the same 1.2 million tokens in the same order, none tuned.
Expected: not run yet. Each size needs fewer steps than the one below it to that one's last loss; the
shapes end within some per cent of each other, as in the paper.
Command: python -m t5x_lite.experiment --config=configs/experiments/sample_efficiency.py \\
    --workdir=runs/sample_efficiency
"""

import itertools
import pathlib
from collections.abc import Sequence

from configs.experiments import ladder, switch_vs_dense
from t5x_lite import experiment
from t5x_lite.experiment import Run

SHOWN = ("*/loss",)
LOG_AXES = "xy"
SEEDS = (0, 1)
STEPS, ROWS = 600, 32
SIZES = {"size_8k": (16, 1), "size_25k": (32, 1), "size_123k": (64, 2), "size_370k": (96, 3)}
SHAPES = {"shape_32x8": (32, 8), "shape_44x4": (44, 4), "shape_60x2": (60, 2), "shape_80x1": (80, 1)}


def get_runs() -> tuple[Run, ...]:
    """Sizes and shapes as {arm: (width, layers)}."""
    return tuple(Run(arm, seed, ladder.small(*shape, steps=STEPS, rows=ROWS, seed=seed, evaluations=20))
                 for seed in SEEDS for arm, shape in {**SIZES, **SHAPES}.items())


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Steps of each size to the last loss of the one below it, and the shapes' last losses."""
    curves = {(run.arm, run.seed): experiment.curve(workdir / run.folder / "metrics.jsonl",
                                                    "eval/*/loss") for run in runs}
    lines = [f"Steps to the last loss of the next smaller size, of {STEPS}:", ""]
    for (smaller, larger), seed in itertools.product(itertools.pairwise(SIZES), SEEDS):
        below, curve = curves[smaller, seed], curves[larger, seed]
        if below and curve:
            step = switch_vs_dense.step_at(curve, below[-1][1])
            lines.append(f"- {larger}, seed {seed}: " + ("not reached" if step is None else f"{step:.0f}"))
    ends = [curves[arm, seed][-1][1] for arm in SHAPES for seed in SEEDS if curves[arm, seed]]
    if ends:
        lines += ["", f"Shapes end between {min(ends):.4f} and {max(ends):.4f}, "
                      f"{max(ends) / min(ends) - 1:.1%} apart."]
    return "\n".join(lines) + "\n"
