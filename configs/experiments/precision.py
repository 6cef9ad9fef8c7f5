"""The same small model under every precision policy, three seeds.

Papers: Rae et al. 2021 (arXiv:2112.11446), appendix C2: bfloat16 parameters lose to float32 ones,
stochastic rounding wins part of it back, a float32 copy in the optimizer state that is rounded
stochastically for every forward pass wins all of it; Micikevicius et al. 2018 (arXiv:1710.03740)
for fp16 with loss scaling, and 2022 (arXiv:2209.05433) for fp8.
Expected: about 27 minutes on 2 idle CPU cores, where 16 and 8 bits are imitated and slow. Nothing is
concluded about speed. results.md says how far each policy ends from float32, seed by seed.
Command: python -m t5x_lite.experiment --config=configs/experiments/precision.py \\
    --workdir=runs/precision
"""

import pathlib
from collections.abc import Sequence

from configs import python_text
from t5x_lite import config as configs, experiment
from t5x_lite.experiment import Run
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.training import precision

SHOWN = ("*/loss", "*/accuracy")
SEEDS = (0, 1, 2)
_STEPS = 600


def get_runs() -> tuple[Run, ...]:
    """The task of configs/python_text.py and a fraction of its model, with AdamW as in Gopher's study."""
    runs = []
    for seed in SEEDS:
        for name in precision.POLICIES:
            config = python_text.run()
            for path, value in (
                    ("name", "precision"), ("precision", name), ("model.embed_dim", 128),
                    ("train.seed", seed), ("train.num_steps", _STEPS),
                    ("train.global_batch_size", 16), ("data.inputs_length", 64),
                    ("data.targets_length", 24), ("optimizer.name", "adamw"),
                    ("optimizer.clip_norm", 1.0),
                    ("optimizer.schedule.base_learning_rate", 2e-3),
                    ("optimizer.schedule.warmup_steps", 30), ("loss_scale.growth_interval", 50),
                    ("eval.every", 100), ("eval.at_start", True), ("eval.num_batches", 16), ("eval.samples", 0),
                    ("checkpoint.every", _STEPS)):
                config = configs.replace(config, path, value)
            runs.append(Run(name, seed, config))
    return tuple(runs)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """Final held-out loss of each policy less float32's of the same seed."""
    ends = experiment.final_values(runs, workdir)
    final = {folder: reporting_runs.value(values, SHOWN[0]) for folder, values in ends.items()}
    lines = ["Final held-out loss less float32's of the same seed, nats a token:", ""]
    for name in precision.POLICIES:
        found = [final[run.folder] - final[f"float32/seed_{run.seed}"] for run in runs
                 if run.arm == name and run.folder in final
                 and f"float32/seed_{run.seed}" in final]
        if found and name != "float32":
            shown = ", ".join(f"{difference:+.4f}" for difference in found)
            lines.append(f"- {name}: {sum(found) / len(found):+.4f} ({shown})")
    return "\n".join(lines) + "\n"
