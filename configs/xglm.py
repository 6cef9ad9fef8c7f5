"""XGLM 7.5B: a multilingual GPT with sinusoidal positions and 256k tokens.

Paper: Lin et al. 2021 (arXiv:2112.10668): 32 layers, width 4,096, MLPs of 16,384, rows of
2,048 tokens, 500B tokens of 30 languages.
Expected: 7.5B parameters.
Left open here, and taken: GPT-3's recipe for its 6.7B model (1.2e-4, 2M tokens a batch, AdamW)
with 2,000 steps of warm-up; sinusoids as Vaswani et al. 2017 define them, counted from 2.
Hardware: 256 A100 with mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/xglm.py:7_5b --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import PositionConfig

SIZES = {"7_5b": (32, 4096, 32)}


def run(size: str | None = "7_5b") -> RunConfig:
    """The pre-training run."""
    num_layers, embed_dim, num_heads = _common.size_of(SIZES, size, "xglm")
    block = _common.gpt2_block(embed_dim, num_heads)
    block = dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, activation="gelu"))
    model = _common.decoder_only(
        embed_dim, num_layers, block, vocab_size=256_008,
        position=PositionConfig("sinusoidal", offset=2), embedding_scale=embed_dim ** 0.5,
        init=_common.gpt2_init(num_layers))
    return _common.language_model(
        f"xglm_{size}", model, length=2048, batch_size=1024, tokens=500e9, learning_rate=1.2e-4,
        warmup_steps=2000)


def get_config(size: str | None = "7_5b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
