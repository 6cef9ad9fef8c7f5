"""Pythia: GPT-NeoX's architecture in ten sizes, all trained on the same tokens in the same order.

Paper: Biderman et al. 2023 (arXiv:2304.01373), table 1 and section 2.1: the Pile, 143,000 steps of
1,024 rows of 2,048 tokens, Adam at betas 0.9 and 0.95, weight decay 0.01, clipping at 1, 1 % of
warm-up and a cosine to a tenth.
Expected: 70m 70,426,624, 160m 162,322,944, 410m 405,334,016, 1b 1,011,781,632, 1_4b 1,414,647,808,
2_8b 2,775,208,960, 6_9b 6,857,302,016, 12b 11,846,072,320 parameters; 14m and 31m came later.
The vocabulary is padded to a multiple of 128 rows a tensor-parallel shard, so that 6_9b and 12b
have more.
Left open: 14m and 31m have no paper; they take 70m's recipe.
Hardware: 70m on one GPU; 12b on 256 A100.
Command: python -m t5x_lite.train --config=configs/pythia.py:160m --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.linear import InitConfig
from t5x_lite.layers.position import PositionConfig

# (layers, width, heads, rows of the vocabulary, learning rate)
SIZES = {
    "14m": (6, 128, 4, 50304, 1e-3),
    "31m": (6, 256, 8, 50304, 1e-3),
    "70m": (6, 512, 8, 50304, 1e-3),
    "160m": (12, 768, 12, 50304, 6e-4),
    "410m": (24, 1024, 16, 50304, 3e-4),
    "1b": (16, 2048, 8, 50304, 3e-4),
    "1_4b": (24, 2048, 16, 50304, 2e-4),
    "2_8b": (32, 2560, 32, 50304, 1.6e-4),
    "6_9b": (32, 4096, 32, 50432, 1.2e-4),
    "12b": (36, 5120, 40, 50688, 1.2e-4),
}


def run(size: str | None = "160m") -> RunConfig:
    """The pre-training run of one size."""
    num_layers, embed_dim, num_heads, rows, rate = _common.size_of(SIZES, size, "pythia")
    std = (2 / (5 * embed_dim)) ** 0.5
    block = _common.gpt2_block(embed_dim, num_heads)
    block = dataclasses.replace(block, mlp=dataclasses.replace(block.mlp, activation="gelu"))
    model = _common.decoder_only(
        embed_dim, num_layers, block, vocab_size=rows, residual="parallel_two_norms",
        position=PositionConfig("rotary", rotary_fraction=0.25), tie_logits=False,
        init=InitConfig(kernel="fixed", kernel_std=std, embedding_std=std, scale_query=False,
                        output_factor=2 / (num_layers * embed_dim ** 0.5) / std))
    return _common.language_model(
        f"pythia_{size}", model, length=2048, batch_size=1024, tokens=143_000 * 1024 * 2048,
        learning_rate=rate, warmup_steps=1430,
        optimizer=dataclasses.replace(_common.ADAMW, weight_decay=0.01))


def get_config(size: str | None = "160m"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
