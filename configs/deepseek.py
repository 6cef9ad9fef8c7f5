"""DeepSeek-V2 and V2-Lite: latent attention, and fine-grained experts of which two are shared.

Paper: DeepSeek-AI 2024 (arXiv:2405.04434), sections 2 and 3.1, appendix B: latents of 512 features, heads of 128
+ 64 (with position), a dense first layer, 6 of 160 (V2-Lite: 64) experts a token beside the shared
ones; V2's tokens go to 3 of 8 groups of experts at most, and its gates are multiplied by 16; rows of 4,096
tokens, a vocabulary of 102,400, 8.1T (5.7T) tokens, AdamW at betas 0.9 and 0.95, weight decay 0.1,
clipping at 1, 2,000 steps of warm-up to 2.4e-4 (4.2e-4), kernels drawn with deviation 0.006.
Expected: v2_lite 15.7B parameters, 2.4B active a token; v2 236B, 21B active. (Lite's 2.4B are
2,451M without the embedding table, whose digits are cut off, not rounded.)
The rotary frequencies are scaled for 128k tokens, as of the released checkpoints.
Taken instead of the paper's: a cosine to a tenth for its two drops by 0.316 at 80 and 90 %, one
batch of 9,216 (Lite: 4,608) rows without V2's ramp, one balance loss for its three, no dropped tokens.
Hardware: docs/rehearsals.md counts 16 H100; mesh.expert splits the experts.
Command: python -m t5x_lite.train --config=configs/deepseek.py:v2_lite --workdir=DIR
"""

import dataclasses
import math

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    LatentConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
    RotaryScalingConfig,
)
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig, segments_of
from t5x_lite.parallel.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One published size."""

    num_layers: int
    embed_dim: int
    mlp_dim: int           # of the dense first layer
    num_heads: int
    query_rank: int
    num_experts: int
    expert_dim: int
    gate_scale: float
    groups: tuple[int, int]   # of experts: in all, and of a token at most
    mscale: float             # YaRN's
    rows: int
    learning_rate: float
    tokens: float


SIZES = {
    "v2_lite": Size(27, 2048, 10944, 16, 0, 64, 1408, 1.0, (1, 1), 0.707, 4608, 4.2e-4, 5.7e12),
    "v2": Size(60, 5120, 12288, 128, 1536, 160, 1536, 16.0, (8, 3), 0.707, 9216, 2.4e-4, 8.1e12),
}


def model(size: Size) -> ModelConfig:
    """The architecture."""
    scaling = RotaryScalingConfig("yarn", 40.0, 4096, feature_factor=1.0)
    growth = 0.1 * size.mscale * math.log(40) + 1.0    # of attention's scale, squared
    attention = AttentionConfig(
        size.num_heads, 192, kind="latent", scale=192 ** -0.5 * growth ** 2,
        latent=LatentConfig(512, size.query_rank, rotary_dim=64, value_dim=128))
    dense = BlockConfig(attention, mlp=MLPConfig(size.mlp_dim, activation="silu"))
    groups, most = size.groups
    sparse = dataclasses.replace(dense, moe=MoEConfig(
        num_experts=size.num_experts, mlp=MLPConfig(size.expert_dim, activation="silu"),
        router="top_k", top_k=6, renormalize=False, gate_scale=size.gate_scale, dropless=True,
        shared_experts=2, expert_groups=groups, max_groups=most, balance_weight=0.001))
    stack = StackConfig(
        segments_of([dense] + [sparse] * (size.num_layers - 1)), causal=True, remat="full",
        position=PositionConfig("rotary", rotary_interleaved=True, rotary_scaling=scaling),
        norm=NormConfig("rms", epsilon=1e-6))
    return ModelConfig(
        "decoder_only", vocab_size=102_400, embed_dim=size.embed_dim, encoder=None, decoder=stack,
        tie_logits=False, init=InitConfig(kernel="fixed", kernel_std=0.006, embedding_std=0.006,
                                          scale_query=False))





def run(size: str | None = "v2_lite") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "deepseek")
    run = _common.language_model(
        f"deepseek_{size}", model(s), length=4096, batch_size=s.rows, tokens=s.tokens,
        learning_rate=s.learning_rate, warmup_steps=2000, accumulation=16)
    return dataclasses.replace(run, mesh=MeshConfig(data=1, fsdp=-1))   # no device holds it whole


def get_config(size: str | None = "v2_lite"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
