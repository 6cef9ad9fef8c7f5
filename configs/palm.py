"""PaLM: parallel layers, multi-query attention, SwiGLU, rotary positions, no biases, tied logits.

Paper: Chowdhery et al. 2022 (arXiv:2204.02311), table 1 and section 5: Adafactor without
factoring, which is Adam scaled by each matrix's size, 1e-2 for 10,000 steps and then
1/sqrt(step), first moment 0.9, second moment 1 - step^-0.8, clipping at 1, weight decay of the
squared learning rate, z-loss 1e-4, no dropout, rows of 2,048 tokens, 780B tokens; 540b in
batches of 512 rows for 50,000 steps, 1,024 until 115,000, then 2,048.
Expected: 8.63B, 62.50B and 540.35B parameters, the scales of the norms left out.
Left open by the paper, and taken: 8b and 62b grow their batches (256 to 512, 512 to 1,024 rows,
table 1) after 50,000 steps.
Hardware: 540b on two TPU v4 pods, mesh.tensor=12 and mesh.fsdp=256 in each.
Command: python -m t5x_lite.train --config=configs/palm.py:8b --workdir=DIR
"""

import dataclasses

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.models.config import BlockConfig
from t5x_lite.training.batch_ramp import BatchRampConfig
from t5x_lite.training.methods import AdafactorConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class Size:
    """One row of table 1."""

    num_layers: int
    num_heads: int
    embed_dim: int
    batch_size: int
    stages: tuple[tuple[int, int], ...]


SIZES = {
    "8b": Size(32, 16, 4096, 512, ((256, 50_000),)),
    "62b": Size(64, 32, 8192, 1024, ((512, 50_000),)),
    "540b": Size(118, 48, 18432, 2048, ((512, 50_000), (1024, 65_000))),
}
OPTIMIZER = OptimizerConfig(name="adafactor", momentum=0.9, clip_norm=1.0, weight_decay=1.0,
                            weight_decay_lr_exponent=2.0, adafactor=AdafactorConfig(factored=False))


def run(size: str | None = "8b") -> RunConfig:
    """The pre-training run of one size."""
    s = _common.size_of(SIZES, size, "palm")
    block = BlockConfig(AttentionConfig(num_heads=s.num_heads, head_dim=256, num_kv_heads=1),
                        mlp=MLPConfig(mlp_dim=4 * s.embed_dim, activation="silu"))
    model = _common.decoder_only(
        s.embed_dim, s.num_layers, block, vocab_size=256_000, position=PositionConfig("rotary"),
        norm=NormConfig("layer"), residual="parallel", logits_scale=s.embed_dim ** -0.5,
        init=InitConfig(scale_query=False))
    return _common.replicated_kv_heads(_common.language_model(
        f"palm_{size}", model, length=2048, batch_size=s.batch_size, tokens=780e9,
        learning_rate=1.0, warmup_steps=10_000, factors="constant * rsqrt_decay",
        optimizer=OPTIMIZER, batch_ramp=BatchRampConfig(s.stages), z_loss=1e-4))


def get_config(size: str | None = "8b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
