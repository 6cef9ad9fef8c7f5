"""ByT5: mT5 over UTF-8 bytes, with an encoder three times as deep as the decoder.

Paper: Xue et al. 2022 (arXiv:2105.13626), section 3: 1M steps of 1,024 rows of 1,024 bytes,
spans of 20 bytes on average, otherwise mT5's recipe. The vocabulary is 256 bytes, 3 special
tokens and 125 sentinels.
Expected: small 300M, base 582M, large 1.23B, xl 3.74B, xxl 12.9B parameters.
Data: C4 as bytes stands in for mC4.
Hardware: small on a few accelerators; xxl on 64 TPU v3 or more with mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/byt5.py:small --workdir=DIR
"""

from configs import _common, _t5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import MLPConfig

SIZES = {
    "small": _t5.Size(1472, 3584, 6, 64, 12, 4),
    "base": _t5.Size(1536, 3968, 12, 64, 18, 6),
    "large": _t5.Size(1536, 3840, 16, 64, 36, 12),
    "xl": _t5.Size(2560, 6720, 32, 64, 36, 12),
    "xxl": _t5.Size(4672, 12352, 64, 64, 36, 12),
}


def run(size: str | None = "small") -> RunConfig:
    """The pre-training run of one size."""
    model = _t5.model(_common.size_of(SIZES, size, "byt5"), mlp=MLPConfig(), tie_logits=False,
                      dropout_rate=0.0, vocab_size=384)
    return _t5.pretraining(f"byt5_{size}", model, batch_size=1024, num_steps=1_000_000,
                           inputs_length=1024, targets_length=189,
                           train="c4_span_corruption_byt5")


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
