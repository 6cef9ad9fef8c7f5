"""OLMo 2: LLaMA's block with norms behind the sub-layers, and over all queries and all keys.

Paper: Walsh et al. 2025 (arXiv:2501.00656), tables 1 and 3 and section 3: rotary base 500,000, a vocabulary of
100,278 (100,352 rows of the embedding), every kernel drawn with deviation 0.02, z-loss 1e-5, AdamW
at betas 0.9 and 0.95, 2,000 steps of warm-up, a cosine over 5T tokens, rows of 4,096, clipping at 1.
Expected (released checkpoints, with all digits): 1b 1,484,916,736, 7b 7,298,617,344, 13b
13,716,198,400, 32b 32,234,279,936.
Taken, not checked against the paper: rates, batches and tokens of the sizes, those of 1b above all.
Command: python -m t5x_lite.train --config=configs/olmo.py:1b --workdir=DIR
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


@dataclasses.dataclass(frozen=True)
class Size:
    """One published size; heads have 128 features."""

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    rows: int               # of 4,096 tokens in a batch
    learning_rate: float
    tokens: float


SIZES = {
    "1b": Size(16, 2048, 8192, 16, 16, 512, 4e-4, 4e12),
    "7b": Size(32, 4096, 11008, 32, 32, 1024, 3e-4, 4e12),
    "13b": Size(40, 5120, 13824, 40, 40, 2048, 9e-4, 5e12),
    "32b": Size(64, 5120, 27648, 40, 8, 2048, 6e-4, 6e12),
}
NORM = NormConfig("rms", epsilon=1e-6)


def model(size: Size) -> ModelConfig:
    """The architecture."""
    attention = AttentionConfig(size.num_heads, 128, size.num_kv_heads, qk_norm=True,
                                qk_norm_over="all", qk_norm_config=NORM)
    block = BlockConfig(attention, mlp=MLPConfig(size.mlp_dim, activation="silu"))
    return _common.decoder_only(
        size.embed_dim, size.num_layers, block, vocab_size=100_352,
        position=PositionConfig("rotary", rotary_base=500_000.0), norm=NORM,
        residual="post_inside", tie_logits=False,
        init=InitConfig(kernel="fixed", embedding_std=0.02, scale_query=False))


def run(size: str | None = "1b") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "olmo")
    return _common.language_model(
        f"olmo_2_{size}", model(s), length=4096, batch_size=s.rows, tokens=s.tokens,
        learning_rate=s.learning_rate, warmup_steps=2000, decay_tokens=max(5e12, s.tokens),
        z_loss=1e-5, accumulation=8)


def get_config(size: str | None = "1b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
