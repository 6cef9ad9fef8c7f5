"""T5 1.1: gated GELU, untied logits, no dropout in pre-training.

Paper: Raffel et al. 2020 (arXiv:1910.10683) with the gated MLPs of Shazeer 2020
(arXiv:2002.05202); sizes as in the public checkpoints, which Xue et al. 2021 (mT5,
arXiv:2010.11934, section 3) describe.
Expected: small 77M, base 248M, large 783M, xl 2.85B, xxl 11.1B parameters.
Hardware: small on one accelerator; xxl on 64 TPU v3 or more with mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/t5_1_1.py:small --workdir=DIR
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
    """The pre-training run of one size: 2,048 rows a step for 1M steps."""
    model = _t5.model(_common.size_of(SIZES, size, "t5_1_1"),
                      mlp=MLPConfig(activation="gelu_tanh", gated=True), tie_logits=False,
                      dropout_rate=0.0)
    # Of xxl 128 rows at a time; docs/rehearsals.md has 8 H100 with 256.
    return _t5.pretraining(f"t5_1_1_{size}", model, batch_size=2048, num_steps=1_000_000,
                           accumulation=16 if size == "xxl" else 1)


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
