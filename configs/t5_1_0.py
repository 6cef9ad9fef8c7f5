"""T5 1.0: ReLU MLPs, logits tied to the embedding, dropout 0.1.

Paper: Raffel et al. 2020 (arXiv:1910.10683), sections 2.1 and 3.7; 3b and 11b as there.
Expected: small 60M, base 220M, large 770M (738M counted), 3b 2.8B, 11b 11B parameters.
Hardware: small on one accelerator; 11b on 64 TPU v3 or more with mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/t5_1_0.py:small --workdir=DIR
"""

from configs import _common, _t5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import MLPConfig

SIZES = {
    "small": _t5.Size(512, 2048, 8, 64, 6),
    "base": _t5.Size(768, 3072, 12, 64, 12),
    "large": _t5.Size(1024, 4096, 16, 64, 24),
    "3b": _t5.Size(1024, 16384, 32, 128, 24),
    "11b": _t5.Size(1024, 65536, 128, 128, 24),
}


def run(size: str | None = "small") -> RunConfig:
    """The pre-training run of one size: 128 rows a step for 2^19 steps."""
    model = _t5.model(_common.size_of(SIZES, size, "t5_1_0"),
                      mlp=MLPConfig(activation="relu", gated=False), tie_logits=True,
                      dropout_rate=0.1)
    return _t5.pretraining(f"t5_1_0_{size}", model, batch_size=128, num_steps=2 ** 19)


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
