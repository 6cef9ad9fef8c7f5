"""GPT-3: GPT-2 with dense and locally banded attention in alternate layers.

Paper: Brown et al. 2020 (arXiv:2005.14165), table 2.1 and appendix B: Adam at betas 0.9 and
0.95, clipping at 1, weight decay 0.1; 375M tokens of warm-up, a cosine to a tenth over 260B
tokens, 300B tokens in all; batches growing linearly from 32k tokens over the first 4 to 12B.
Expected: 125M to 175B parameters as named, but 350m counts 356M; 175b takes 3.14e23 FLOPs.
Left open by the paper, and taken: a band of 256 keys; 4B, 8B and 12B tokens of batch ramp for
models below 2B, below 10B and above. In table 2.1 the heads of 1.3b (24 x 128) do not make
its width of 2048, so 16 are taken; those of 13b (40 x 128 = 5120, width 5140) are kept. Its
batch of 3.2M tokens is 1,536 rows.
Hardware: 175b on 1,024 A100 or TPU v4 with mesh.fsdp and mesh.tensor.
Command: python -m t5x_lite.train --config=configs/gpt3.py:125m --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import PositionConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of table 2.1; the batch in rows of 2,048 tokens."""

    num_layers: int
    embed_dim: int
    num_heads: int
    head_dim: int
    batch_size: int
    learning_rate: float
    ramp_tokens: float
    ramp_increment: int = 16


SIZES = {
    "125m": Size(12, 768, 12, 64, 256, 6e-4, 4e9),
    "350m": Size(24, 1024, 16, 64, 256, 3e-4, 4e9),
    "760m": Size(24, 1536, 16, 96, 256, 2.5e-4, 4e9),
    "1_3b": Size(24, 2048, 16, 128, 512, 2e-4, 4e9),
    "2_7b": Size(32, 2560, 32, 80, 512, 1.6e-4, 8e9),
    "6_7b": Size(32, 4096, 32, 128, 1024, 1.2e-4, 8e9, 48),
    "13b": Size(40, 5140, 40, 128, 1024, 1e-4, 12e9, 48),
    "175b": Size(96, 12288, 96, 128, 1536, 0.6e-4, 12e9, 80),
}


def run(size: str | None = "125m") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "gpt3")
    dense, banded = (_common.gpt2_block(s.embed_dim, s.num_heads, head_dim=s.head_dim,
                                        window=window) for window in (0, 256))
    model = _common.decoder_only(
        s.embed_dim, s.num_layers, dense, banded, vocab_size=50257,
        position=PositionConfig("learned", max_length=2048), init=_common.gpt2_init(s.num_layers))
    return _common.language_model(
        f"gpt3_{size}", model, length=2048, batch_size=s.batch_size, tokens=300e9,
        learning_rate=s.learning_rate, warmup_tokens=375e6, decay_tokens=260e9,
        batch_ramp=_common.ramp(16, s.ramp_increment, s.batch_size, s.ramp_tokens, 2048))


def get_config(size: str | None = "125m"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
