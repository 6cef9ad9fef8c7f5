"""Supervised fine-tuning on conversations: the loss is on the assistant's answers alone.

Paper: Ouyang et al. 2022 (arXiv:2203.02155), section 3.5; templates are those of the tokenizer, as
transformers' apply_chat_template renders them (t5x_lite/data/chats.py).

On conversations of yours, from a checkpoint of Hugging Face's, with its own tokenizer and template:

    python -m t5x_lite.train --config=configs/hf.py:MODEL_FOLDER --workdir=DIR \
        --config.data.train=chats.jsonl --config.data.packing=True --config.data.targets_length=2048

This config is a small run that shows it: a decoder of 0.2 million parameters, from scratch, on
conversations of three questions about sums (tasks/chat_sums.py), with bytes and the plain template.
Command: python -m t5x_lite.train --config=configs/chat.py --workdir=runs/chat
Expected: not run to its end yet.
"""

from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

_STEPS = 600


def run() -> RunConfig:
    """The run as dataclasses."""
    block = BlockConfig(AttentionConfig(num_heads=4, head_dim=16), None, MLPConfig(mlp_dim=256))
    decoder = StackConfig(segments=(SegmentConfig((block,), 2),), causal=True,
                          position=PositionConfig("rotary"), scan=False)
    return RunConfig(
        name="chat", model=ModelConfig(architecture="decoder_only", vocab_size=384, embed_dim=64,
                                       encoder=None, decoder=decoder),
        objective=ObjectiveConfig(name="lm"),
        data=DataConfig(train="chat_sums", validation="chat_sums", vocabulary="byt5", packing=True,
                        inputs_length=96, targets_length=256, num_shards=4),
        optimizer=OptimizerConfig(name="adamw", schedule=ScheduleConfig(
            factors="constant * linear_warmup * linear_to_floor", base_learning_rate=4e-3,
            warmup_steps=50, floor_fraction=0.02)),
        train=TrainConfig(num_steps=_STEPS, global_batch_size=16, log_every=50),
        eval=EvalConfig(every=300, num_examples=100),
        checkpoint=CheckpointConfig(every=300, keep_last=1))


def get_config():
    """The locked ConfigDict of `run`."""
    return to_config_dict(run())
