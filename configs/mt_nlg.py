"""Megatron-Turing NLG 530B: GPT-2's architecture at 105 layers.

Paper: Smith et al. 2022 (arXiv:2201.11990), section 2.3: width 20,480, 128 heads, rows of
2,048 tokens, batches from 32 to 1,920 rows in steps of 32 over the first 12B tokens; 5e-5
after 1B tokens of warm-up, a cosine to a tenth over 340B tokens, 270B tokens trained; Adam at
betas 0.9 and 0.95, weight decay 0.1, clipping at 1; kernels drawn at 4e-3.
Expected: 530B parameters (529.6B counted with Megatron's vocabulary of 51,200 rows).
Hardware: 280 A100 a replica: mesh.tensor=8, mesh.stage=35, data parallel beyond.
Command: python -m t5x_lite.train --config=configs/mt_nlg.py:530b --workdir=DIR
"""

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import PositionConfig

SIZES = {"530b": (105, 20480, 128)}


def run(size: str | None = "530b") -> RunConfig:
    """The pre-training run."""
    num_layers, embed_dim, num_heads = _common.size_of(SIZES, size, "mt_nlg")
    model = _common.decoder_only(
        embed_dim, num_layers, _common.gpt2_block(embed_dim, num_heads), vocab_size=51200,
        position=PositionConfig("learned", max_length=2048),
        init=_common.gpt2_init(num_layers, std=4e-3))
    return _common.language_model(
        f"mt_nlg_{size}", model, length=2048, batch_size=1920, tokens=270e9, learning_rate=5e-5,
        warmup_tokens=1e9, decay_tokens=340e9, batch_ramp=_common.ramp(32, 32, 1920, 12e9, 2048))


def get_config(size: str | None = "530b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
