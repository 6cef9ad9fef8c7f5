"""A Switch model of 8 experts against the dense model of equal FLOPs a token, three seeds.

Paper: Fedus, Zoph & Shazeer 2021 (arXiv:2101.03961), section 3.1: the sparse model reaches
the dense one's quality in fewer steps. Equal FLOPs as there: a token uses one expert as wide
as the dense MLP; router and spare capacity come on top. Both arms have the recipe of
configs/python_text.py, as it was chosen for the dense model; nothing was tuned for either arm here.
Expected: about 15 minutes on 2 CPU cores. In 240 steps (1.2 million tokens) no difference shows:
final losses of 4.16 to 4.20 (dense) and 4.16 to 4.23 (Switch), see docs/switch_vs_dense.png. The
paper's gains come with some hundred thousand times the tokens; for more steps:
--override=train.num_steps=N.
Command: python -m t5x_lite.experiment --config=configs/experiments/switch_vs_dense.py \\
    --workdir=runs/switch_vs_dense
"""

import itertools
import pathlib
from collections.abc import Sequence

from configs import python_text
from t5x_lite import config as configs, experiment
from t5x_lite.experiment import Run

SHOWN = ("*/loss", "*/accuracy")
SEEDS = (0, 1, 2)
_STEPS = 240


def get_runs() -> tuple[Run, ...]:
    """Dense and Switch with python_text's data and recipe, shortened."""
    runs = []
    for seed in SEEDS:
        for arm, argument in (("dense", None), ("switch", "moe")):
            config = python_text.run(argument)
            for path, value in (("train.seed", seed), ("train.num_steps", _STEPS),
                                ("eval.every", 20), ("eval.at_start", True), ("eval.num_batches", 4),
                                ("eval.samples", 0), ("checkpoint.every", 120)):
                config = configs.replace(config, path, value)
            runs.append(Run(arm, seed, config))
    return tuple(runs)


def step_at(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """The step at which the curve first falls to `loss`, on straight lines between evaluations."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss < high:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """A table of the steps that each arm and seed needed to the dense arm's mean final loss."""
    def curve(run):
        return experiment.curve(workdir / run.folder / "metrics.jsonl", "eval/*/loss")
    dense = [curve(r)[-1][1] for r in runs if r.arm == "dense" and curve(r)]
    if not dense:
        return "The dense arm has not run yet.\n"
    target = sum(dense) / len(dense)
    lines = [f"Steps to the dense arm's mean final loss, {target:.4f} (–: not reached):", "",
             "| arm | by seed | mean |", "|---|---|---|"]
    for arm, members in experiment.by_arm(runs).items():
        steps = [step_at(curve(run), target) for run in members]
        reached = [step for step in steps if step is not None]
        mean = f"{sum(reached) / len(reached):.0f}" if len(reached) == len(steps) else "–"
        shown = ", ".join("–" if step is None else f"{step:.0f}" for step in steps)
        lines.append(f"| {arm} | {shown} | {mean} |")
    return "\n".join(lines) + "\n"
