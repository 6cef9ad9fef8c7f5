"""Gemma 2, and the text models of Gemma 3: local and global layers, norms on both sides, GeGLU.

Papers: Gemma Team 2024 (arXiv:2408.00118), table 1: rows of 8,192 tokens, a vocabulary of 256k, local
windows of 4,096 in every other layer, logits capped at 50 in attention and at 30; 2T, 8T and 13T
tokens. Gemma Team 2025 (arXiv:2503.19786), section 2: five local layers (1,024; 512 in 270m and 1b)
to a global one, rotary base 10,000 in local and 1M in global layers, a norm over each head's
queries and keys in place of the caps; 2T, 4T, 12T and 14T tokens.
Expected (tables 1 and 2 of Gemma 2, table 1 of Gemma 3; embeddings + the rest): 2_2b 590M + 2,024M,
2_9b 918M + 8,324M, 2_27b 1,180M + 26,047M, 3_1b 302M + 698M, 3_4b 675M + 3,209M, 3_12b 1,012M +
10,759M, 3_27b 1,416M + 25,600M; 3_270m 170M + 100M (its model card).
3_4b, 3_12b and 3_27b have the frequencies of their global layers divided by 8, for 128k tokens.
Left open by the papers, and taken: batch, rate, schedule and AdamW's settings are LLaMA 2's; small
models were distilled, here they learn from texts. 3_270m's 6T tokens are its model card's.
Command: python -m t5x_lite.train --config=configs/gemma.py:3_1b --workdir=DIR
"""

import dataclasses
import math

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
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig, segments_of


@dataclasses.dataclass(frozen=True)
class Size:
    """One published size."""

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float      # the logits are divided by its root
    window: int
    vocab_size: int
    tokens: float
    factor: float = 1.0     # of the global layers' rotary positions


SIZES = {
    "2_2b": Size(26, 2304, 9216, 8, 4, 256, 256, 4096, 256_000, 2e12),
    "2_9b": Size(42, 3584, 14336, 16, 8, 256, 256, 4096, 256_000, 8e12),
    "2_27b": Size(46, 4608, 36864, 32, 16, 128, 144, 4096, 256_000, 13e12),
    "3_270m": Size(18, 640, 2048, 4, 1, 256, 256, 512, 262_144, 6e12),
    "3_1b": Size(26, 1152, 6912, 4, 1, 256, 256, 512, 262_144, 2e12),
    "3_4b": Size(34, 2560, 10240, 8, 4, 256, 256, 1024, 262_208, 4e12, 8.0),
    "3_12b": Size(48, 3840, 15360, 16, 8, 256, 256, 1024, 262_208, 12e12, 8.0),
    "3_27b": Size(62, 5376, 21504, 32, 16, 128, 168, 1024, 262_208, 14e12, 8.0),
}
NORM = NormConfig("rms", epsilon=1e-6, scale_offset=1.0)


def model(size: Size, is_third: bool) -> ModelConfig:
    """The architecture."""
    full = local = PositionConfig("rotary", rotary_base=10_000.0)
    if is_third:
        full = PositionConfig("rotary", rotary_base=1e6)
    if size.factor > 1:
        full = dataclasses.replace(full, rotary_scaling=RotaryScalingConfig("linear", size.factor))
    attention = AttentionConfig(
        size.num_heads, size.head_dim, size.num_kv_heads, scale=size.query_scale ** -0.5,
        qk_norm=is_third, qk_norm_config=NORM, logit_softcap=0.0 if is_third else 50.0)
    mlp = MLPConfig(size.mlp_dim, activation="gelu_tanh")
    globally = BlockConfig(attention, mlp=mlp)
    locally = BlockConfig(dataclasses.replace(attention, window=size.window), mlp=mlp,
                          position=local if is_third else None)
    period = 6 if is_third else 2   # the last of so many layers is global
    blocks = [locally if (i + 1) % period else globally for i in range(size.num_layers)]
    stack = StackConfig(segments_of(blocks), causal=True, position=full, norm=NORM,
                        residual="sandwich", remat="full")
    return ModelConfig(
        "decoder_only", vocab_size=size.vocab_size, embed_dim=size.embed_dim, encoder=None,
        decoder=stack, tie_logits=True, embedding_scale=math.sqrt(size.embed_dim),
        logits_softcap=0.0 if is_third else 30.0,
        init=InitConfig(kernel="fixed", embedding_std=0.02, scale_query=False))


def run(size: str | None = "3_1b") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "gemma")
    made = model(s, is_third=(size or "").startswith("3"))
    run = _common.language_model(
        f"gemma_{size}", made, length=8192, batch_size=512, tokens=s.tokens, learning_rate=3e-4,
        warmup_steps=2000, accumulation=8)
    return _common.replicated_kv_heads(run) if s.num_kv_heads == 1 else run


def get_config(size: str | None = "3_1b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
