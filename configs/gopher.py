"""Gopher: RMSNorm and Transformer-XL's relative positions, tied logits.

Paper: Rae et al. 2021 (arXiv:2112.11446), table 1 and section 3.1: 300B tokens in rows of
2,048, 1,500 steps of warm-up, a cosine to a tenth, clipping at 1 (7.1b and 280b: 0.25); 280b
doubles its batch from 3M to 6M tokens. Positions: Dai et al. 2019 (arXiv:1901.02860).
Expected: 44M, 117M, 417M, 1.4B, 7.1B and 280B parameters.
Left open by the paper, and taken: Adam's betas of 0.9 and 0.95 without weight decay; GELU MLPs
four times as wide, no biases; 280b doubles its batch after 150B tokens. Batches of 0.25M, 2M,
3M and 6M tokens are 128, 1,024, 1,536 and 3,072 rows.
Hardware: 280b on 4,096 TPU v3 with mesh.tensor and mesh.stage.
Command: python -m t5x_lite.train --config=configs/gopher.py:44m --workdir=DIR
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
)
from t5x_lite.models.config import BlockConfig, ModelConfig
from t5x_lite.training.batch_ramp import BatchRampConfig, steps_for


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of table 1; the batch in rows of 2,048 tokens."""

    num_layers: int
    num_heads: int
    head_dim: int
    embed_dim: int
    learning_rate: float
    batch_size: int
    clip_norm: float = 1.0


SIZES = {
    "44m": Size(8, 16, 32, 512, 6e-4, 128),
    "117m": Size(12, 12, 64, 768, 6e-4, 128),
    "417m": Size(12, 12, 128, 1536, 2e-4, 128),
    "1_4b": Size(24, 16, 128, 2048, 2e-4, 128),
    "7_1b": Size(32, 32, 128, 4096, 1.2e-4, 1024, 0.25),
    "280b": Size(80, 128, 128, 16384, 4e-5, 3072, 0.25),
}


def model(size: Size) -> ModelConfig:
    """The architecture, which Chinchilla shares."""
    block = BlockConfig(AttentionConfig(num_heads=size.num_heads, head_dim=size.head_dim),
                        mlp=MLPConfig(mlp_dim=4 * size.embed_dim, gated=False))
    return _common.decoder_only(
        size.embed_dim, size.num_layers, block, vocab_size=32000,
        position=PositionConfig("transformer_xl"), norm=NormConfig("rms"),
        init=InitConfig(embedding_std=0.02, scale_query=False))


def doubled_after(tokens: float, full: int) -> BatchRampConfig:
    """Half of the full batch for the first so many tokens."""
    return BatchRampConfig(((full // 2, steps_for(BatchRampConfig(), full // 2,
                                                  round(tokens / 2048))),))


def run(size: str | None = "44m") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "gopher")
    return _common.language_model(
        f"gopher_{size}", model(s), length=2048, batch_size=s.batch_size, tokens=300e9,
        learning_rate=s.learning_rate, warmup_steps=1500,
        batch_ramp=doubled_after(150e9, 3072) if size == "280b" else None,
        optimizer=dataclasses.replace(_common.ADAMW, name="adam", weight_decay=0.0,
                                      clip_norm=s.clip_norm))


def get_config(size: str | None = "44m"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
