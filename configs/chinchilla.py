"""Chinchilla 70B: Gopher's architecture, a quarter of its size on almost five times the tokens.

Paper: Hoffmann et al. 2022 (arXiv:2203.15556), table 4: 80 layers, 64 heads of 128, width
8,192, 1e-4, batches of 1.5M and, from midway, 3M tokens, 1.4T tokens, AdamW.
Expected: 70B parameters.
Left open by the paper, and taken: Gopher's warm-up of 1,500 steps and cosine to a tenth, weight
decay 0.1. Batches of 1.5M and 3M tokens are 768 and 1,536 rows.
Hardware: 4,096 TPU v3 or v4 with mesh.tensor and mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/chinchilla.py:70b --workdir=DIR
"""

from configs import _common, gopher
from t5x_lite.config import RunConfig, to_config_dict

SIZES = {"70b": gopher.Size(80, 64, 128, 8192, 1e-4, 1536)}


def run(size: str | None = "70b") -> RunConfig:
    """The pre-training run."""
    s = _common.size_of(SIZES, size, "chinchilla")
    return _common.language_model(
        f"chinchilla_{size}", gopher.model(s), length=2048, batch_size=s.batch_size, tokens=1.4e12,
        learning_rate=s.learning_rate, warmup_steps=1500,
        batch_ramp=gopher.doubled_after(0.7e12, s.batch_size))


def get_config(size: str | None = "70b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
