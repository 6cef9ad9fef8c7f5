"""What the presets share: sizes by name, decoder-only models, runs that count tokens."""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, ShardingConfig, TrainConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError, nearest
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.parallel.sharding import DEFAULT_RULES, MeshConfig
from t5x_lite.training.batch_ramp import BatchRampConfig, batch_unit, linear_ramp, steps_for
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

T = TypeVar("T")
LAYER_NORM = NormConfig("layer", epsilon=1e-5, use_bias=True)
ADAMW = OptimizerConfig(name="adamw", beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0)


def size_of(sizes: Mapping[str, T], name: str | None, family: str) -> T:
    """The size of this name. Raises UserError listing the sizes there are."""
    if name not in sizes:
        raise UserError(f"configs/{family}.py:{name}: no such size.{nearest(name, sizes)} "
                        f"Sizes: {', '.join(sizes)}.")
    return sizes[name]


def mesh(embed_dim: int) -> MeshConfig:
    """All devices on fsdp from a width of 4,096 on, which no device holds whole; data below.

    docs/rehearsals.md says on which machines the large presets fit so. A width such as GPT-3
    13B's 5,140 divides by few numbers of devices, and is left to the user.
    """
    large = embed_dim >= 4096 and embed_dim % 128 == 0
    return MeshConfig(data=1, fsdp=-1) if large else MeshConfig()


def segment(num_layers: int, *blocks: BlockConfig) -> tuple[SegmentConfig, ...]:
    """One segment that repeats the blocks until there are num_layers."""
    assert num_layers % len(blocks) == 0, (num_layers, len(blocks))
    return (SegmentConfig(blocks, num_layers // len(blocks)),)


def decoder_only(embed_dim: int, num_layers: int, *blocks: BlockConfig, vocab_size: int,
                 position: PositionConfig, norm: NormConfig = LAYER_NORM, residual: str = "pre",
                 tie_logits: bool = True, dropout_rate: float = 0.0,
                 init: InitConfig = InitConfig(), **model) -> ModelConfig:
    """A causal stack of equal blocks (or of a few that alternate)."""
    stack = StackConfig(segments=segment(num_layers, *blocks), causal=True, position=position,
                        norm=norm, residual=residual, dropout_rate=dropout_rate,
                        remat="full" if embed_dim >= 1024 else "none")
    return ModelConfig("decoder_only", vocab_size=vocab_size, embed_dim=embed_dim, encoder=None,
                       decoder=stack, tie_logits=tie_logits, init=init, **model)


def gpt2_block(embed_dim: int, num_heads: int, *, head_dim: int = 0, dropout_rate: float = 0.0,
               window: int = 0) -> BlockConfig:
    """GELU MLP four times as wide, biases everywhere."""
    attention = AttentionConfig(num_heads=num_heads, head_dim=head_dim or embed_dim // num_heads,
                                use_bias=True, use_out_bias=True, dropout_rate=dropout_rate,
                                window=window)
    return BlockConfig(attention, mlp=MLPConfig(mlp_dim=4 * embed_dim, gated=False, use_bias=True))


def gpt2_init(num_layers: int, std: float = 0.02) -> InitConfig:
    """Normal kernels of one deviation; those that end a residual branch are divided by the root
    of the number of branches (Radford et al. 2019, section 2.3)."""
    return InitConfig(kernel="fixed", kernel_std=std, embedding_std=std, position_std=std / 2,
                      output_factor=(2 * num_layers) ** -0.5, scale_query=False)


def ramp(start: int, increment: int, full: int, tokens: float, length: int) -> BatchRampConfig:
    """Batches that grow in equal steps over a number of tokens."""
    return linear_ramp(start, increment, full, round(tokens / length))


def language_model(name: str, model: ModelConfig, *, length: int, batch_size: int, tokens: float,
                   learning_rate: float, warmup_tokens: float = 0.0, warmup_steps: int = 0,
                   decay_tokens: float = 0.0, floor: float = 0.1, factors: str = "",
                   accumulation: int = 1,
                   optimizer: OptimizerConfig = ADAMW, batch_ramp: BatchRampConfig | None = None,
                   z_loss: float = 0.0) -> RunConfig:
    """A causal language model trained on so many tokens.

    C4 in T5's vocabulary stands in for corpora that are not public; name your own with
    data.train or data.train_files.

    Args:
        batch_size: rows of `length` tokens, once the ramp is over.
        warmup_tokens, decay_tokens: the latter from the start of training; 0 is all tokens.
        floor: share of the learning rate at the end of the decay.
        factors: of the schedule, see training/schedules.py; "" is warm-up and a cosine to the floor.
    """
    batch_ramp = batch_ramp or BatchRampConfig()

    def steps(count: float) -> int:
        return steps_for(batch_ramp, batch_size, math.ceil(count / length))

    num_steps = steps(tokens)
    schedule = ScheduleConfig(
        factors=factors or "constant * linear_warmup * cosine_to_floor",
        base_learning_rate=learning_rate, floor_fraction=floor,
        warmup_steps=warmup_steps or steps(warmup_tokens),
        total_steps=steps(decay_tokens) if decay_tokens else 0)   # 0: train.num_steps
    unit = batch_unit(batch_ramp, batch_size)
    return RunConfig(
        name=name, model=model, precision="bf16",
        objective=ObjectiveConfig(name="lm", z_loss=z_loss),
        data=DataConfig(train="c4_causal_lm", validation="c4_causal_lm", targets_length=length,
                        num_shards=math.gcd(unit, 64)),
        optimizer=dataclasses.replace(optimizer, schedule=schedule),
        train=TrainConfig(num_steps=num_steps, global_batch_size=batch_size,
                          accumulation=accumulation, batch_ramp=batch_ramp, log_every=100),
        mesh=mesh(model.embed_dim),
        eval=EvalConfig(every=5000, num_examples=50 * batch_size),
        checkpoint=CheckpointConfig(every=5000, keep_last=3))


def replicated_kv_heads(run: RunConfig) -> RunConfig:
    """The run with the key and value heads of multi-query attention on every device: one head
    cannot be split over mesh.tensor."""
    rules = {**DEFAULT_RULES, "kv_heads": (), "act_kv_heads": ()}
    return dataclasses.replace(run, sharding=ShardingConfig(rules=rules))
