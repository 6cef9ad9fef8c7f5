"""LLaMA 2, 3, 3.1 and 3.2: RMSNorm, SwiGLU, rotary positions, grouped key/value heads, no biases.

Papers: Touvron et al. 2023 (arXiv:2307.09288), section 2.2: AdamW at betas 0.9 and 0.95,
epsilon 1e-5, 2,000 steps of warm-up, a cosine to a tenth, weight decay 0.1, clipping at 1, 4M
tokens a batch in rows of 4,096, 2T tokens. Grattafiori et al. 2024 (arXiv:2407.21783), section
3: a vocabulary of 128k, rotary base 500,000; 405b at 8e-5, 8,000 steps of warm-up, a cosine to
a hundredth, batches of 4M tokens, 8M from 252M tokens on and 16M from 2.87T on, 15.6T tokens.
Expected: 2_7b 6.74B, 2_13b 13.02B, 2_34b 33.7B, 2_70b 68.98B, 3_8b 8.03B, 3_70b 70.55B,
3_1_405b 405.85B, 3_2_1b 1.24B, 3_2_3b 3.21B parameters; 3_1_* and 3_2_* scale the rotary
frequencies for 128k tokens, and 3_2_* tie the logits to the embedding.
Left open by the papers, and taken: 2_34b, which was never released, as Code LLaMA 34B's shape;
3_8b and 3_70b at the paper's peak rates (3e-4, 1.5e-4) with 405b's batches and tokens, all in
rows of 8,192, so that 405b's first 252M tokens are the only ones in shorter rows there; 3_2_1b and
3_2_3b, which were distilled, at 3_8b's recipe.
Hardware: 2_7b on 64 A100 with mesh.fsdp=64; 3_1_405b on 16,384 H100, mesh.tensor=8, mesh.stage=16.
Command: python -m t5x_lite.train --config=configs/llama.py:2_7b --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    NormConfig,
    PositionConfig,
    RotaryScalingConfig,
)
from t5x_lite.models.config import BlockConfig, ModelConfig
from t5x_lite.training.batch_ramp import BatchRampConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One published size."""

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    learning_rate: float
    version: str


SIZES = {
    "2_7b": Size(32, 4096, 11008, 32, 32, 3e-4, "2"),
    "2_13b": Size(40, 5120, 13824, 40, 40, 3e-4, "2"),
    "2_34b": Size(48, 8192, 22016, 64, 8, 1.5e-4, "2"),
    "2_70b": Size(80, 8192, 28672, 64, 8, 1.5e-4, "2"),
    "3_8b": Size(32, 4096, 14336, 32, 8, 3e-4, "3"),
    "3_70b": Size(80, 8192, 28672, 64, 8, 1.5e-4, "3"),
    "3_1_8b": Size(32, 4096, 14336, 32, 8, 3e-4, "3.1"),
    "3_1_70b": Size(80, 8192, 28672, 64, 8, 1.5e-4, "3.1"),
    "3_1_405b": Size(126, 16384, 53248, 128, 8, 8e-5, "3.1"),
    "3_2_1b": Size(16, 2048, 8192, 32, 8, 3e-4, "3.2"),
    "3_2_3b": Size(28, 3072, 8192, 24, 8, 3e-4, "3.2"),
}


_FACTORS = {"3.1": 8.0, "3.2": 32.0}   # of the rotary frequencies' scaling


def model(size: Size) -> ModelConfig:
    """The architecture."""
    position = PositionConfig("rotary", rotary_base=10_000.0 if size.version == "2" else 500_000.0)
    if size.version in _FACTORS:
        position = dataclasses.replace(position, rotary_scaling=RotaryScalingConfig(
            "llama3", factor=_FACTORS[size.version], original_length=8192, low_frequency=1.0, high_frequency=4.0))
    block = BlockConfig(
        AttentionConfig(num_heads=size.num_heads, head_dim=size.embed_dim // size.num_heads,
                        num_kv_heads=size.num_kv_heads),
        mlp=MLPConfig(mlp_dim=size.mlp_dim, activation="silu"))
    return _common.decoder_only(
        size.embed_dim, size.num_layers, block,
        vocab_size=32_000 if size.version == "2" else 128_256, position=position,
        norm=NormConfig("rms", epsilon=1e-5), tie_logits=size.version == "3.2",
        init=InitConfig(kernel="fixed", embedding_std=0.02, scale_query=False))


def run(size: str | None = "2_7b") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "llama")
    optimizer = dataclasses.replace(_common.ADAMW, eps=1e-5)
    # 64 rows of version 2 at a time (docs/rehearsals.md: 2_7b on 8 H100), 64 to 256 of version 3,
    # which was not rehearsed.
    if s.version == "2":
        return _common.language_model(
            f"llama_{size}", model(s), length=4096, batch_size=1024, tokens=2e12,
            learning_rate=s.learning_rate, warmup_steps=2000, optimizer=optimizer,
            accumulation=16)
    # 4M tokens are 512 rows; 252M tokens end after 60 such steps, 2.87T after 342,101 of 1,024.
    stages = BatchRampConfig(((512, 60), (1024, 342_101)))
    return _common.language_model(
        f"llama_{size}", model(s), length=8192, batch_size=2048, tokens=15.6e12,
        learning_rate=s.learning_rate, warmup_steps=8000, floor=0.01, optimizer=optimizer,
        batch_ramp=stages, accumulation=8)


def get_config(size: str | None = "2_7b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
