"""Muon against AdamW over compute: four budgets, each a width and a number of steps, two seeds.

Paper: Jordan et al. 2024 and Liu et al. 2025 (arXiv:2502.16982), which reports about half of AdamW's
compute. Data and objective are those of ladder.py:lm, a causal LM of the bytes of your own Python
installation, with two layers. Muon's steps have AdamW's size (muon.consistent_rms 0.2), so that one grid
of learning rates serves both arms; both have mup (model.base_width 32), so that it serves every width.
Expected: at one rate and one seed no difference can be told (0.86 of muon's compute, .65 to 1.13); three
CPU-minutes of starts and as much of steps a rate and seed. docs/experiments.md. Not run whole yet.
Command: python -m t5x_lite.experiment --config=configs/experiments/muon_vs_adamw.py \\
    --workdir=runs/muon_vs_adamw
and then: python -m t5x_lite.scaling compare --arms=runs/muon_vs_adamw/adamw,runs/muon_vs_adamw/muon
"""

import dataclasses
from collections.abc import Sequence

from configs.experiments import ladder
from t5x_lite import config as configs
from t5x_lite.experiment import Run
from t5x_lite.models.parametrization import grown
from t5x_lite.training.methods import MuonConfig, OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig

BUDGETS = ((32, 200), (48, 280), (64, 400), (96, 560))   # (width, steps)
SEEDS = (0, 1)
RATES = (0.004, 0.008, 0.016)
ARMS = ("adamw", "muon")
BASE_WIDTH, LAYERS = 32, 2


def get_runs() -> tuple[Run, ...]:
    """Every budget, rate and seed of both arms."""
    return runs(BUDGETS, SEEDS, RATES)


def runs(budgets: Sequence[tuple[int, int]], seeds: Sequence[int], rates: Sequence[float]
         ) -> tuple[Run, ...]:
    """The same for other settings."""
    return tuple(Run(arm, seed, _run(arm, width, steps, rate, seed), f"{width}_{steps}_{rate:g}")
                 for width, steps in budgets for rate in rates for seed in seeds for arm in ARMS)


def _run(arm: str, width: int, steps: int, rate: float, seed: int):
    config = ladder.run("lm")
    deep = configs.replace(config.model, "decoder.segments", tuple(
        dataclasses.replace(s, repeats=LAYERS) for s in config.model.decoder.segments))
    model = dataclasses.replace(grown(deep, width), parametrization="mup", base_width=BASE_WIDTH)
    schedule = ScheduleConfig("constant * linear_warmup * linear_to_floor", rate,
                              warmup_steps=max(1, steps // 10), floor_fraction=0.02)
    optimizer = OptimizerConfig(arm, schedule, clip_norm=1.0, beta2=0.98,
                                muon=MuonConfig(consistent_rms=0.2))
    config = dataclasses.replace(config, name=f"{arm}_{width}", model=model, optimizer=optimizer)
    for path, value in (("train.seed", seed), ("train.num_steps", steps), ("eval.every", steps),
                        ("eval.num_examples", 512), ("eval.samples", 0),
                        ("checkpoint.every", steps), ("checkpoint.keep_last", 1)):
        config = configs.replace(config, path, value)
    return config
