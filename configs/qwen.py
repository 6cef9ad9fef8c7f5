"""Qwen 3, dense and with experts: LLaMA's block with a norm over each head's queries and keys.

Paper: Qwen Team 2025 (arXiv:2505.09388), tables 1 and 2: heads of 128 features, a vocabulary of
151,669 (151,936 rows of the embedding), logits tied up to 4b, 36T tokens, the first 30T in rows of
4,096; of the mixtures 128 experts, 8 a token, none shared.
Expected (released checkpoints, with all digits): 0_6b 596,049,920, 1_7b 1,720,574,976, 4b
4,022,468,096, 8b 8,190,735,360, 14b 14,768,307,200, 32b 32,762,123,264, 30b_a3b 30,532,122,624 (3.3B
active), 235b_a22b 235,093,634,560 (22B active).
Left open by the paper, and taken: batch, rate, schedule and AdamW's settings are LLaMA 2's, the
weight of load balancing is transformers' default; small models were distilled after pre-training.
Command: python -m t5x_lite.train --config=configs/qwen.py:0_6b --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.models.config import BlockConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One published size."""

    num_layers: int
    embed_dim: int
    mlp_dim: int            # of mixtures, an expert's
    num_heads: int
    num_kv_heads: int = 8
    tied: bool = False
    num_experts: int = 0    # 0: dense


SIZES = {
    "0_6b": Size(28, 1024, 3072, 16, tied=True),
    "1_7b": Size(28, 2048, 6144, 16, tied=True),
    "4b": Size(36, 2560, 9728, 32, tied=True),
    "8b": Size(36, 4096, 12288, 32),
    "14b": Size(40, 5120, 17408, 40),
    "32b": Size(64, 5120, 25600, 64),
    "30b_a3b": Size(48, 2048, 768, 32, 4, num_experts=128),
    "235b_a22b": Size(94, 4096, 1536, 64, 4, num_experts=128),
}
NORM = NormConfig("rms", epsilon=1e-6)


def model(size: Size) -> ModelConfig:
    """The architecture."""
    mlp = MLPConfig(size.mlp_dim, activation="silu")
    mixture = MoEConfig(num_experts=size.num_experts, mlp=mlp, router="top_k", top_k=8,
                        dropless=True, balance_weight=0.001) if size.num_experts else None
    attention = AttentionConfig(size.num_heads, 128, size.num_kv_heads, qk_norm=True,
                                qk_norm_config=NORM)
    return _common.decoder_only(
        size.embed_dim, size.num_layers, BlockConfig(attention, mlp=mlp, moe=mixture),
        vocab_size=151_936, position=PositionConfig("rotary", rotary_base=1e6), norm=NORM,
        tie_logits=size.tied,
        init=InitConfig(kernel="fixed", embedding_std=0.02, scale_query=False))


def run(size: str | None = "0_6b") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "qwen")
    return _common.language_model(
        f"qwen_3_{size}", model(s), length=4096, batch_size=1024, tokens=36e12,
        learning_rate=3e-4, warmup_steps=2000, accumulation=16)


def get_config(size: str | None = "0_6b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
