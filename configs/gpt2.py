"""GPT-2: learned positions, LayerNorm before each sub-layer, biases, tied logits.

Paper: Radford et al. 2019, Language Models are Unsupervised Multitask Learners. Its table 2
gives 117M, 345M, 762M and 1542M; the authors' repository corrects the first to 124M, and the
released checkpoints have 124M, 355M, 774M and 1558M parameters, as counted here.
Expected: small 124M, medium 355M, large 774M, xl 1558M parameters.
Left open by the paper, and taken: the learning rates and Adam of GPT-3's models of these
sizes, 300B tokens; the batch of 512 rows is the paper's.
Hardware: small on one accelerator.
Command: python -m t5x_lite.train --config=configs/gpt2.py:small --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import PositionConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One column of table 2."""

    num_layers: int
    embed_dim: int
    num_heads: int
    learning_rate: float


SIZES = {
    "small": Size(12, 768, 12, 6e-4),
    "medium": Size(24, 1024, 16, 3e-4),
    "large": Size(36, 1280, 20, 2.5e-4),
    "xl": Size(48, 1600, 25, 2e-4),
}


def run(size: str | None = "small") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "gpt2")
    model = _common.decoder_only(
        s.embed_dim, s.num_layers,
        _common.gpt2_block(s.embed_dim, s.num_heads, dropout_rate=0.1),
        vocab_size=50257, position=PositionConfig("learned", max_length=1024), dropout_rate=0.1,
        init=_common.gpt2_init(s.num_layers))
    return _common.language_model(
        f"gpt2_{size}", model, length=1024, batch_size=512, tokens=300e9,
        learning_rate=s.learning_rate, warmup_tokens=375e6)


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
