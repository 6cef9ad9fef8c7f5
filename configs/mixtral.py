"""Mixtral 8x7B: a decoder whose every MLP is 8 SwiGLU experts, two of them a token.

Paper: Jiang et al. 2024 (arXiv:2401.04088), section 2.
Expected: 46.7B parameters, 12.9B of them active a token.
Left open by the paper: the training recipe; AdamW as LLaMA 2's here.
Hardware: 8 GPUs of 80 GiB to serve, a pod with mesh.expert to train.
Command: python -m t5x_lite.train --config=configs/mixtral.py:8x7b --workdir=DIR
"""

from configs import _common
from t5x_lite.config import RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig


def run(size: str | None = "8x7b") -> RunConfig:
    """The model of the paper with a causal language-modelling run."""
    if size != "8x7b":
        raise UserError(f"configs/mixtral.py:{size}: no such size. Sizes: 8x7b.")
    expert = MLPConfig(mlp_dim=14336, activation="silu", gated=True)
    block = BlockConfig(
        self_attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        mlp=expert,
        moe=MoEConfig(num_experts=8, mlp=expert, router="top_k", top_k=2, dropless=True,
                      balance_weight=0.02))
    decoder = StackConfig(
        segments=(SegmentConfig((block,), 32),), causal=True, remat="full",
        position=PositionConfig(kind="rotary", rotary_base=1e6), norm=NormConfig(epsilon=1e-5))
    return RunConfig(
        name="mixtral_8x7b", precision="bf16",
        model=ModelConfig(
            architecture="decoder_only", vocab_size=32000, embed_dim=4096, encoder=None,
            decoder=decoder,
            init=InitConfig(kernel="fixed", embedding_std=0.02, scale_query=False)),
        objective=ObjectiveConfig(name="lm"),
        data=DataConfig(train="c4_causal_lm", validation="c4_causal_lm", targets_length=4096,
                        packing=True, num_shards=64),
        optimizer=OptimizerConfig(name="adamw", clip_norm=1.0, weight_decay=0.1, beta2=0.95,
                                  schedule=ScheduleConfig(
                                      factors="constant * linear_warmup * cosine_to_floor",
                                      base_learning_rate=3e-4, warmup_steps=2000)),
        # 128 rows at a time: docs/rehearsals.md has 32 H100.
        train=TrainConfig(num_steps=500_000, global_batch_size=1024, accumulation=8,
                          log_every=100),
        mesh=_common.mesh(4096))


def get_config(size: str | None = "8x7b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
