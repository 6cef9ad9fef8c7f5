"""LSTM, convolution, gMLP and Transformer over compute: causal LMs of Python's bytes at equal FLOPs.

Papers: Kaplan et al. 2020 (arXiv:2001.08361), figure 7: LSTMs fall behind Transformers as contexts and
compute grow; Liu et al. 2021 (arXiv:2105.08050): gMLP keeps up.
Two layers, rows of 64 bytes. Every arm has the width, the steps, the tokens and the FLOPs a token of the
Transformer: what its mixer spends less is given to its MLP. No arm was tuned, all have one learning rate.
Expected: docs/experiments.md.
Command: python -m t5x_lite.experiment --config=configs/experiments/mixers.py --workdir=runs/mixers
and then: python -m t5x_lite.scaling compare --arms=runs/mixers/transformer,runs/mixers/lstm
"""

import dataclasses
from collections.abc import Sequence

from configs.experiments import ladder
from t5x_lite.cost import flops
from t5x_lite.experiment import Run
from t5x_lite.layers.config import MixerConfig, PositionConfig
from t5x_lite.models.config import ModelConfig

SHOWN = ("*/loss",)
OVER, LOG_AXES = "FLOPs", "xy"
BUDGETS = ((24, 100), (40, 170), (64, 280))   # (width, steps)
SEEDS = (0, 1)
ARMS = {"transformer": MixerConfig(), "lstm": MixerConfig("lstm"), "conv": MixerConfig("conv", taps=16),
        "gmlp": MixerConfig("gmlp", max_length=64)}
LAYERS, ROWS, RATE = 2, 32, 0.008


def get_runs() -> tuple[Run, ...]:
    """Every budget and seed of all arms."""
    return runs(BUDGETS, SEEDS)


def runs(budgets: Sequence[tuple[int, int]], seeds: Sequence[int]) -> tuple[Run, ...]:
    """The same for other settings."""
    return tuple(Run(arm, seed, _run(arm, width, steps, seed), f"{width}_{steps}")
                 for seed in seeds for width, steps in budgets for arm in ARMS)


def _run(arm: str, width: int, steps: int, seed: int):
    config = ladder.small(width, LAYERS, steps=steps, seed=seed, rows=ROWS, rate=RATE, evaluations=1)
    model = with_mixer(config.model, ARMS[arm], config.data.targets_length)
    return dataclasses.replace(config, name=f"{arm}_{width}", model=model)


def with_mixer(model: ModelConfig, mixer: MixerConfig, length: int) -> ModelConfig:
    """A decoder with this mixer in every block, and MLPs so wide that a row costs as much as before."""
    [segment] = model.decoder.segments
    [block] = segment.blocks
    position = model.decoder.position if mixer.kind == MixerConfig().kind else PositionConfig("none")

    def made(mlp_dim: int) -> ModelConfig:
        mlp = dataclasses.replace(block.mlp, mlp_dim=mlp_dim)
        one = dataclasses.replace(block, mixer=mixer, mlp=mlp)
        decoder = dataclasses.replace(model.decoder, position=position, segments=(
            dataclasses.replace(segment, blocks=(one,)),))
        return dataclasses.replace(model, decoder=decoder)

    def cost(model: ModelConfig) -> float:
        return flops.forward_flops(model, 1, 0, length).total

    each = cost(made(2)) - cost(made(1))
    return made(max(1, round(block.mlp.mlp_dim + (cost(model) - cost(made(block.mlp.mlp_dim))) / each)))
