"""A Switch model of 8 experts against the dense model of equal FLOPs a token, three seeds.

Paper: Fedus, Zoph & Shazeer 2021 (arXiv:2101.03961), section 3.1: the sparse model reaches
the dense one's quality in fewer steps.
Expected: under 30 minutes on 2 CPU cores; results.md says at which step each seed of the
Switch arm first reached the dense arm's final held-out loss.
Command: python -m t5x_lite.experiment --config=configs/experiments/switch_vs_dense.py \\
    --workdir=runs/switch_vs_dense
"""

import pathlib
from collections.abc import Sequence

from configs import quickstart
from t5x_lite import config as configs
from t5x_lite import experiment
from t5x_lite.experiment import Run

SHOWN = ("all/loss", "all/accuracy")
SEEDS = (0, 1, 2)
_STEPS = 300


def get_runs() -> tuple[Run, ...]:
    """Dense and Switch with the quickstart's data and recipe, shortened."""
    runs = []
    for seed in SEEDS:
        for arm, argument in (("dense", None), ("switch", "moe")):
            config = quickstart.run(argument)
            for path, value in (("train.seed", seed), ("train.num_steps", _STEPS),
                                ("optimizer.schedule.total_steps", _STEPS),
                                ("eval.every", 20), ("eval.num_batches", 4),
                                ("eval.samples", 0), ("checkpoint.every", 100)):
                config = configs.replace(config, path, value)
            runs.append(Run(arm, seed, config))
    return tuple(runs)


def first_step_at(curve: Sequence[tuple[int, float]], loss: float) -> int | None:
    """The first evaluated step whose loss is at most `loss`."""
    return next((step for step, value in curve if value <= loss), None)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """The steps each arm needed to the dense arm's mean final loss, by seed."""
    def curve(run):
        return experiment.curve(workdir / run.folder / "metrics.jsonl", "eval/all/loss")
    dense = [curve(r)[-1][1] for r in runs if r.arm == "dense" and curve(r)]
    if not dense:
        return "The dense arm has not run yet.\n"
    target = sum(dense) / len(dense)
    lines = [f"Steps to the dense arm's mean final loss, {target:.4f}:", ""]
    for run in runs:
        step = first_step_at(curve(run), target)
        reached = f"step {step}" if step else f"not in {run.config.train.num_steps} steps"
        lines.append(f"- {run.arm}, seed {run.seed}: {reached}")
    return "\n".join(lines) + "\n"
