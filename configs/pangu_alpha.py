"""PanGu-alpha: Chinese language models of up to 200 billion parameters.

Paper: Zeng et al. 2021 (arXiv:2104.12369), 2.6B: 32 layers, width 2,560, 40 heads; 207.0B: 64 layers,
width 16,384, 128 heads; MLPs four times as wide, a vocabulary of 40,000, rows of 1,024 tokens.
Expected: 2.6B and 207B parameters.
Not built: the query layer, a last layer whose queries come of the position instead of the hidden
state. It has the matrices of the others and one more table of positions; an ordinary layer stands
in its place, which changes the function and not the cost.
Taken, not checked against the paper: batch, rate, tokens, AdamW's settings, 1 % of warm-up and a
cosine to a tenth. 13.1B is left out: the shape given for it counts 12.8B without the query layer.
Hardware: 200b on 2,048 Ascend 910, mesh.tensor=8, mesh.stage=16.
Command: python -m t5x_lite.train --config=configs/pangu_alpha.py:2_6b --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.position import PositionConfig

# (layers, width, heads, rows a batch, learning rate, tokens)
SIZES = {
    "2_6b": (32, 2560, 40, 512, 1e-4, 70_000 * 512 * 1024),
    "200b": (64, 16384, 128, 2048, 2e-5, 19_000 * 2048 * 1024),
}


def run(size: str | None = "2_6b") -> RunConfig:
    """The pre-training run of one size."""
    num_layers, embed_dim, num_heads, rows, rate, tokens = _common.size_of(
        SIZES, size, "pangu_alpha")
    model = _common.decoder_only(
        embed_dim, num_layers, _common.gpt2_block(embed_dim, num_heads), vocab_size=40_000,
        position=PositionConfig("learned", max_length=1024), init=_common.gpt2_init(num_layers))
    return _common.language_model(
        f"pangu_alpha_{size}", model, length=1024, batch_size=rows, tokens=tokens,
        learning_rate=rate, warmup_tokens=tokens / 100,
        optimizer=dataclasses.replace(_common.ADAMW, weight_decay=0.01))


def get_config(size: str | None = "2_6b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
