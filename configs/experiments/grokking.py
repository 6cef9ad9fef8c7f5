"""Grokking: addition modulo 97 is learned by heart first, and understood long after.

Paper: Power et al. 2022 (arXiv:2201.02177): a small decoder-only transformer, AdamW with weight decay
1 and beta2 0.98, a constant rate of 1e-3 after 10 steps of warm-up; Nanda et al. 2023
(arXiv:2301.05217) for one layer. Here one layer of width 64 and 45 % of the pairs.
Expected: with weight decay 1, 99 % of the training pairs are right at step 2,100 and of the held-out ones at
3,850 (one seed, docs/experiments.md).
Command: python -m t5x_lite.experiment --config=configs/experiments/grokking.py --workdir=runs/grokking
"""

import pathlib
from collections.abc import Sequence

from t5x_lite import experiment
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

SHOWN = ("*/accuracy", "*/loss")
LOG_AXES = "x"
ARMS = {"decay_1": 1.0, "decay_0": 0.0}   # weight decay
SEEDS = (0, 1)
STEPS = 5000
LEARNED = 0.99      # accuracy


def model(width: int, layers: int) -> ModelConfig:
    """A decoder of the bytes that tasks/integers.py writes."""
    block = BlockConfig(AttentionConfig(num_heads=4, head_dim=width // 4), None,
                        MLPConfig(mlp_dim=4 * width, gated=False))
    decoder = StackConfig((SegmentConfig((block,), layers),), causal=True,
                          position=PositionConfig("rotary"), scan=False)
    return ModelConfig("decoder_only", vocab_size=384, embed_dim=width, encoder=None, decoder=decoder)


def run(task: str, length: int, steps: int, seed: int, decay: float, width: int = 64, layers: int = 1
        ) -> RunConfig:
    """A run on `length` integers and one target, at a constant rate."""
    return RunConfig(
        name=task, model=model(width, layers), objective=ObjectiveConfig("lm", z_loss=0.0),
        data=DataConfig(train=task, validation=task, vocabulary="byt5", inputs_length=length,
                        targets_length=length + 2, num_shards=1, shuffle_buffer=5000),
        optimizer=OptimizerConfig(
            "adamw", ScheduleConfig("constant * linear_warmup", 1e-3, warmup_steps=10),
            beta2=0.98, weight_decay=decay),
        train=TrainConfig(num_steps=steps, global_batch_size=256, seed=seed, log_every=50),
        eval=EvalConfig(every=50, batch_size=512, num_examples=2048, metrics=False),
        checkpoint=CheckpointConfig(every=steps, keep_last=1))


def get_config(arg: str | None = None):
    """The locked ConfigDict of the first arm."""
    return to_config_dict(get_runs()[0].config)


def get_runs() -> tuple[Run, ...]:
    """Both weight decays, two seeds each."""
    return tuple(Run(arm, seed, run("modular_addition", 2, STEPS, seed, decay))
                 for seed in SEEDS for arm, decay in ARMS.items())


def first_step(curve: Sequence[tuple[int, float]], level: float) -> int | None:
    """The step of the first value of at least `level`."""
    return next((step for step, value in curve if value >= level), None)


def conclude(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """A table: the steps at which training pairs and held-out ones are right."""
    lines = [f"First step with an accuracy of {LEARNED:.0%} (–: not reached):", "",
             "| arm | seed | training pairs | held-out pairs |", "|---|---|---|---|"]
    for run in runs:
        path = workdir / run.folder / "metrics.jsonl"
        steps = [first_step(experiment.curve(path, metric), LEARNED)
                 for metric in ("train/accuracy", "eval/*/accuracy")]
        lines.append(f"| {run.arm} | {run.seed} | " + " | ".join(
            "–" if step is None else str(step) for step in steps) + " |")
    return "\n".join(lines) + "\n"
