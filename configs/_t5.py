"""What T5 and its descendants share: two stacks of equal blocks and the pre-training recipe."""

import dataclasses

from configs._common import mesh, segment
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """The dimensions of one published size."""

    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    num_layers: int                # of the encoder, and of the decoder …
    num_decoder_layers: int = 0    # … unless it has so many


def model(size: Size, *, mlp: MLPConfig, tie_logits: bool, dropout_rate: float,
          vocab_size: int = 32128, position: PositionConfig = PositionConfig()) -> ModelConfig:
    """The encoder-decoder: relative position biases shared by a stack's layers, RMSNorm before
    each sub-layer, attention without scaling (folded into the queries' initial values)."""
    attention = AttentionConfig(num_heads=size.num_heads, head_dim=size.head_dim, scale=1.0,
                                dropout_rate=dropout_rate)
    mlp = dataclasses.replace(mlp, mlp_dim=size.mlp_dim, dropout_rate=dropout_rate)

    def stack(cross: AttentionConfig | None) -> StackConfig:
        depth = size.num_decoder_layers if cross else 0
        return StackConfig(
            segments=segment(depth or size.num_layers, BlockConfig(attention, cross, mlp)),
            causal=cross is not None, dropout_rate=dropout_rate, position=position,
            remat="full" if size.embed_dim >= 1024 else "none")

    return ModelConfig(
        # By default the public vocabulary's 32,100 pieces and sentinels, padded to 128.
        vocab_size=vocab_size, embed_dim=size.embed_dim, encoder=stack(None),
        decoder=stack(attention),
        tie_logits=tie_logits, logits_scale=size.embed_dim ** -0.5 if tie_logits else 1.0)


def pretraining(name: str, model_config: ModelConfig, *, batch_size: int, num_steps: int,
                inputs_length: int = 512, targets_length: int = 114,
                train: str = "c4_span_corruption", vocabulary: str = "",
                accumulation: int = 1) -> RunConfig:
    """Denoising of C4, T5's unless `train` says otherwise: Adafactor at 1/sqrt(max(step, 10^4))."""
    return RunConfig(
        name=name, model=model_config, precision="bf16",
        data=DataConfig(train=train, validation=train, vocabulary=vocabulary, num_shards=64,
                        inputs_length=inputs_length, targets_length=targets_length),
        optimizer=OptimizerConfig(name="adafactor", schedule=ScheduleConfig(
            factors="constant * rsqrt_decay", base_learning_rate=1.0, warmup_steps=10_000)),
        train=TrainConfig(num_steps=num_steps, global_batch_size=batch_size,
                          accumulation=accumulation, log_every=100),
        mesh=mesh(model_config.embed_dim),
        eval=EvalConfig(every=5000, num_examples=50 * batch_size),
        checkpoint=CheckpointConfig(every=5000, keep_last=3))
