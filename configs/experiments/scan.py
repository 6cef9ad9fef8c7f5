"""SCAN's simple split: commands such as "jump around left twice" to sequences of actions.

Paper: Lake & Baroni 2018 (arXiv:1711.00350), experiment 1: a random split of all commands,
which sequence-to-sequence models learn almost perfectly.
Expected: over 95 % of the held-out sequences exactly right, under 20 minutes on 2 CPU cores.
Needs tasks_train_simple.txt and tasks_test_simple.txt of github.com/brendenlake/SCAN below
the folder that T5X_LITE_FILES names.
Command: T5X_LITE_FILES=DIR python -m t5x_lite.experiment --config=configs/experiments/scan.py \\
    --workdir=runs/scan
"""

from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.experiment import Run
from t5x_lite.layers.config import AttentionConfig, MLPConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig

SHOWN = ("scan_simple/metric/sequence_accuracy", "scan_simple/loss")
SEEDS = (0, 1, 2)
_STEPS = 2000


def _model() -> ModelConfig:
    attention, mlp, layers = AttentionConfig(num_heads=4, head_dim=32, scale=1.0), MLPConfig(256), 2
    return ModelConfig(
        vocab_size=512, embed_dim=128,
        encoder=StackConfig((SegmentConfig((BlockConfig(attention, None, mlp),), layers),),
                            scan=False),
        decoder=StackConfig((SegmentConfig((BlockConfig(attention, attention, mlp),), layers),),
                            causal=True, scan=False))


def get_runs() -> tuple[Run, ...]:
    """One arm, three seeds."""
    schedule = ScheduleConfig("constant * linear_warmup * linear_to_floor", 1e-3,
                              warmup_steps=200, floor_fraction=0.05)
    return tuple(Run("t5", seed, RunConfig(
        name="scan", model=_model(),
        data=DataConfig(train="scan_simple", validation="scan_simple", vocabulary="scan",
                        inputs_length=64, targets_length=64, packing=True,
                        num_shards=4),
        optimizer=OptimizerConfig("adamw", schedule, clip_norm=1.0, beta2=0.98),
        train=TrainConfig(num_steps=_STEPS, global_batch_size=32, seed=seed, log_every=50),
        eval=EvalConfig(every=1000, decode=DecodeConfig(max_length=50)),
        checkpoint=CheckpointConfig(every=500, keep_last=1))) for seed in SEEDS)
