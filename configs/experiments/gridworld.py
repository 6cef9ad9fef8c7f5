"""A gridworld from random walks: a model that is told a return, and asked for the best one.

Paper: Chen et al. 2021 (arXiv:2106.01345), with the return in front of the whole walk (tasks/gridworld.py).
Of the training walks 8 % are shortest paths, and 8 of the 18 cells have none.
Expected: docs/experiments.md has one seed of 200 steps; by greedy decoding imitation is as good there.
Arms: returns; blind, the same walks with one and the same return in front, which is imitation.
Command: python -m t5x_lite.experiment --config=configs/experiments/gridworld.py --workdir=runs/gridworld
"""

from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

SHOWN = ("*/shortest", "*/arrives", "*/loss")
ARMS = {"returns": "gridworld", "blind": "gridworld_blind"}
SEEDS = (0, 1, 2)
STEPS = 600
LONGEST = 40   # actions and cells of the longest walk


def run(task: str, seed: int) -> RunConfig:
    """A decoder of 0.1 million parameters on one task."""
    block = BlockConfig(AttentionConfig(num_heads=4, head_dim=16), None, MLPConfig(mlp_dim=256, gated=False))
    decoder = StackConfig((SegmentConfig((block,), 2),), causal=True, position=PositionConfig("rotary"),
                          scan=False)
    return RunConfig(
        name=task, model=ModelConfig("decoder_only", vocab_size=128, embed_dim=64, encoder=None,
                                     decoder=decoder),
        objective=ObjectiveConfig("lm", z_loss=0.0),
        data=DataConfig(train=task, validation=task, inputs_length=2, targets_length=LONGEST + 3,
                        num_shards=1, shuffle_buffer=2500),
        optimizer=OptimizerConfig("adamw", ScheduleConfig(
            "constant * linear_warmup * linear_to_floor", 3e-3, warmup_steps=30, floor_fraction=0.02),
            weight_decay=0.1),
        train=TrainConfig(num_steps=STEPS, global_batch_size=64, seed=seed, log_every=50),
        eval=EvalConfig(every=STEPS // 3, batch_size=24, decode=DecodeConfig(max_length=LONGEST)),
        checkpoint=CheckpointConfig(every=STEPS, keep_last=1))


def get_config():
    """The locked ConfigDict of the first arm."""
    return to_config_dict(get_runs()[0].config)


def get_runs() -> tuple[Run, ...]:
    """Both arms, three seeds each."""
    return tuple(Run(arm, seed, run(task, seed)) for seed in SEEDS for arm, task in ARMS.items())
