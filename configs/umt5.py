"""umT5: mT5 with a relative position bias of its own in every layer, trained with UniMax sampling.

Paper: Chung et al. 2023 (arXiv:2304.09151): mT5's sizes over a vocabulary of 256,000 pieces.
Expected: small 307M, base 592M, xl 3.77B, xxl 12.97B parameters: counted as in the released
checkpoints, because the paper names sizes only.
Left open here, and taken: mT5's recipe; C4 in T5's vocabulary stands in for the refreshed mC4.
Hardware: small on a few accelerators; xxl on 64 TPU v3 or more with mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/umt5.py:small --workdir=DIR
"""

from configs import _common, _t5, mt5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import MLPConfig, PositionConfig

SIZES = {name: mt5.SIZES[name] for name in ("small", "base", "xl", "xxl")}


def run(size: str | None = "small") -> RunConfig:
    """The pre-training run of one size."""
    model = _t5.model(_common.size_of(SIZES, size, "umt5"), mlp=MLPConfig(), tie_logits=False,
                      dropout_rate=0.0, vocab_size=256_384, position=PositionConfig(per_layer=True))
    return _t5.pretraining(f"umt5_{size}", model, batch_size=1024, num_steps=1_000_000,
                           inputs_length=1024, targets_length=229)


def get_config(size: str | None = "small"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
