"""mT5: T5 1.1 over 101 languages and a vocabulary of 250,000 pieces.

Paper: Xue et al. 2021 (arXiv:2010.11934), section 3.2: 1M steps of 1,024 rows of 1,024 tokens,
Adafactor at 1/sqrt(max(step, 10^4)), no dropout in pre-training.
Expected: small 300M, base 580M, large 1.2B, xl 3.7B, xxl 13B parameters.
Data: C4 in T5's vocabulary stands in for mC4; give your own with data.train or data.train_files.
Hardware: small on a few accelerators; xxl on 64 TPU v3 or more with mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/mt5.py:small --workdir=DIR
"""

from configs import _common, _t5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import MLPConfig

SIZES = {
    "small": _t5.Size(512, 1024, 6, 64, 8),
    "base": _t5.Size(768, 2048, 12, 64, 12),
    "large": _t5.Size(1024, 2816, 16, 64, 24),
    "xl": _t5.Size(2048, 5120, 32, 64, 24),
    "xxl": _t5.Size(4096, 10240, 64, 64, 24),
}


def run(size: str | None = "small") -> RunConfig:
    """The pre-training run of one size."""
    model = _t5.model(_common.size_of(SIZES, size, "mt5"), mlp=MLPConfig(), tie_logits=False,
                      dropout_rate=0.0, vocab_size=250_112)
    return _t5.pretraining(f"mt5_{size}", model, batch_size=1024, num_steps=1_000_000,
                           inputs_length=1024, targets_length=229)


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
