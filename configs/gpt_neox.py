"""GPT-NeoX-20B: attention and MLP in parallel, rotary positions on a quarter of each head.

Paper: Black et al. 2022 (arXiv:2204.06745), section 2: 44 layers, width 6,144, 64 heads,
AdamW at betas 0.9 and 0.95, weight decay 0.01, clipping at 1, 0.97e-4 with 1% of warm-up and a
cosine to a tenth over 150,000 steps of 3.15M tokens. Kernels are drawn at sqrt(2 / 5d) (Nguyen
& Salazar 2019), those that end a branch at 2 / (layers sqrt(d)).
Expected: 20.6B parameters (20,554,567,680, of which 19.9B outside the embeddings).
Taken: 1,536 rows of 2,048 tokens; the paper's 1,538 do not divide among hosts.
Hardware: 96 A100, mesh.tensor=2, mesh.stage=4.
Command: python -m t5x_lite.train --config=configs/gpt_neox.py:20b --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import InitConfig, PositionConfig

SIZES = {"20b": (44, 6144, 64)}


def run(size: str | None = "20b") -> RunConfig:
    """The pre-training run."""
    num_layers, embed_dim, num_heads = _common.size_of(SIZES, size, "gpt_neox")
    std = (2 / (5 * embed_dim)) ** 0.5
    model = _common.decoder_only(
        embed_dim, num_layers, _common.gpt2_block(embed_dim, num_heads), vocab_size=50432,
        position=PositionConfig("rotary", rotary_fraction=0.25), residual="parallel_two_norms",
        tie_logits=False, init=InitConfig(
            kernel="fixed", kernel_std=std, embedding_std=std, scale_query=False,
            output_factor=2 / (num_layers * embed_dim ** 0.5) / std))
    return _common.language_model(
        f"gpt_neox_{size}", model, length=2048, batch_size=1536, tokens=150_000 * 1536 * 2048,
        learning_rate=0.97e-4, warmup_steps=1500, accumulation=4,
        optimizer=dataclasses.replace(_common.ADAMW, weight_decay=0.01))


def get_config(size: str | None = "20b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
