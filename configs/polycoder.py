"""PolyCoder 2.7B: GPT-2's architecture on code in twelve languages.

Paper: Xu et al. 2022 (arXiv:2202.13169), table 3 and section 4: 32 layers, width 2,560, rows of
2,048 tokens, a vocabulary of 50,257, AdamW at 1.6e-4, 150,000 steps of 262k tokens, 1,600 of warm-up.
Expected: 2.7B parameters.
Taken, not checked against the paper: 32 heads as GPT-3 2.7B has, betas 0.9 and 0.999, a cosine to
a tenth.
Hardware: 8 RTX 8000 for six weeks.
Command: python -m t5x_lite.train --config=configs/polycoder.py:2_7b --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.position import PositionConfig

SIZES = {"2_7b": (32, 2560, 32)}


def run(size: str | None = "2_7b") -> RunConfig:
    """The pre-training run."""
    num_layers, embed_dim, num_heads = _common.size_of(SIZES, size, "polycoder")
    model = _common.decoder_only(
        embed_dim, num_layers, _common.gpt2_block(embed_dim, num_heads), vocab_size=50_257,
        position=PositionConfig("learned", max_length=2048), init=_common.gpt2_init(num_layers))
    return _common.language_model(
        f"polycoder_{size}", model, length=2048, batch_size=128, tokens=150_000 * 128 * 2048,
        learning_rate=1.6e-4, warmup_steps=1600,
        optimizer=dataclasses.replace(_common.ADAMW, beta2=0.999))


def get_config(size: str | None = "2_7b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
