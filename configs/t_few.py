"""T-Few: few-shot fine-tuning of (IA)^3 vectors with unlikelihood and length-normalised losses.

Paper: Liu et al. 2022 (arXiv:2205.05638): vectors l on keys, values and hidden MLP activations;
1,000 steps of 8 examples, Adafactor at 3e-3 with 60 steps of warm-up and a linear decay; the
model is T0 (T5 1.1 "LM-adapted", tuned on P3). Their vectors were also pre-trained on P3 for
100,000 steps: train data.train=<a P3 mixture> first and init_from that run.
Expected: 0.02 % of the numbers train (3b: 540,672); RAFT 75.8 % in the paper (11b, pre-trained).
Hardware: 3b on one accelerator of 32 GiB; 11b with mesh.fsdp=8.
Command: python -m t5x_lite.train --config=configs/t_few.py:3b --workdir=DIR \
    --config.init_from=hf:T0_3B --config.data.train=TASK_choices --config.data.validation=TASK
"""

from configs import _common, _t5, t5_1_1
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import MLPConfig
from t5x_lite.models.peft import PeftConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

SIZES = {"3b": t5_1_1.SIZES["xl"], "11b": t5_1_1.SIZES["xxl"]}
_STEPS = 1000


def run(size: str | None = "3b") -> RunConfig:
    """Tuning on the choices of a task; see tasks/rank_classification.py."""
    model = _t5.model(_common.size_of(SIZES, size, "t_few"),
                      mlp=MLPConfig(activation="gelu_tanh", gated=True), tie_logits=False,
                      dropout_rate=0.0)
    return RunConfig(
        name=f"t_few_{size}", model=model, precision="bf16", peft=PeftConfig("ia3"),
        objective=ObjectiveConfig(name="choices", z_loss=0.0),
        data=DataConfig(train="winogrande_choices", validation="winogrande",
                        inputs_length=512, targets_length=256, num_shards=8),
        optimizer=OptimizerConfig(name="adafactor", schedule=ScheduleConfig(
            factors="constant * linear_warmup * linear_to_floor", base_learning_rate=3e-3,
            warmup_steps=60, floor_fraction=0.0)),
        train=TrainConfig(num_steps=_STEPS, global_batch_size=8),
        eval=EvalConfig(every=_STEPS),
        checkpoint=CheckpointConfig(every=200, keep_last=2))


def get_config(size: str | None = "3b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
