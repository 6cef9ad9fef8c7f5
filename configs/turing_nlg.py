"""Turing-NLG 17B: GPT-2's architecture at 78 layers.

Paper: Rosset 2020, Turing-NLG: A 17-billion-parameter language model by Microsoft (blog):
width 4,256, 28 heads, 512 rows of 1,024 tokens, 300,000 steps, a learning rate of 1.5e-4
after 3,200 steps of warm-up and a cosine over 500,000.
Expected: 17B parameters (17.2B counted).
Left open, and taken: Adam at betas 0.9 and 0.95, weight decay 0.1 and clipping at 1; the
cosine's floor of 0; GPT-2's vocabulary.
Hardware: 256 V100, mesh.tensor=4 and mesh.fsdp=64.
Command: python -m t5x_lite.train --config=configs/turing_nlg.py:17b --workdir=DIR
"""

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import PositionConfig

SIZES = {"17b": (78, 4256, 28)}
_TOKENS_A_STEP = 512 * 1024


def run(size: str | None = "17b") -> RunConfig:
    """The pre-training run."""
    num_layers, embed_dim, num_heads = _common.size_of(SIZES, size, "turing_nlg")
    model = _common.decoder_only(
        embed_dim, num_layers, _common.gpt2_block(embed_dim, num_heads), vocab_size=50257,
        position=PositionConfig("learned", max_length=1024), init=_common.gpt2_init(num_layers))
    return _common.language_model(
        f"turing_nlg_{size}", model, length=1024, batch_size=512, tokens=300_000 * _TOKENS_A_STEP,
        learning_rate=1.5e-4, warmup_steps=3200, decay_tokens=500_000 * _TOKENS_A_STEP, floor=0.0)


def get_config(size: str | None = "17b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
