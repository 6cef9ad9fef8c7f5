"""DeepNet: 100 + 100 layers, LayerNorm after each sub-layer, stable by DeepNorm.

Paper: Wang et al. 2022 (arXiv:2203.00555), figure 2 and section 5: residuals times alpha,
kernels of values, outputs and MLPs times beta at the start; the multilingual translation model
of 200 layers, width 1,024, MLPs of 4,096, 16 heads.
Expected: 3.2B parameters.
Left open here, and taken: a vocabulary of 256,000, shared by both sides and the logits, which
the count implies; Adam at betas 0.9 and 0.98, 5e-4 after 6,000 steps, then 1/sqrt(step),
dropout 0.1, sinusoidal positions; span corruption of C4 stands in for translation.
Hardware: 32 A100 with mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/deepnet.py:3_2b --workdir=DIR
"""

import dataclasses

from configs import _common, _t5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import AttentionConfig, InitConfig, MLPConfig, PositionConfig
from t5x_lite.models.blocks import deepnorm_constants
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig

SIZES = {"3_2b": (100, 1024, 4096, 16)}


def run(size: str | None = "3_2b") -> RunConfig:
    """The training run."""
    num_layers, embed_dim, mlp_dim, num_heads = _common.size_of(SIZES, size, "deepnet")
    attention = AttentionConfig(num_heads=num_heads, head_dim=embed_dim // num_heads,
                                use_bias=True, use_out_bias=True, dropout_rate=0.1)
    mlp = MLPConfig(mlp_dim=mlp_dim, activation="relu", gated=False, use_bias=True)
    init = InitConfig(kernel="fan_avg", embedding_std=embed_dim ** -0.5, scale_query=False)

    def stack(cross: AttentionConfig | None, alpha: float, beta: float) -> StackConfig:
        return StackConfig(
            segments=_common.segment(num_layers, BlockConfig(attention, cross, mlp)),
            causal=cross is not None, residual="deepnorm", residual_alpha=alpha,
            init=dataclasses.replace(init, value_factor=beta), norm=_common.LAYER_NORM,
            position=PositionConfig("sinusoidal"), final_norm=False, dropout_rate=0.1,
            remat="full")

    encoder, decoder = deepnorm_constants(num_layers, num_layers)
    model = ModelConfig(
        vocab_size=256_000, embed_dim=embed_dim, encoder=stack(None, *encoder),
        decoder=stack(attention, *decoder), tie_logits=True, embedding_scale=embed_dim ** 0.5,
        init=init)
    run = _t5.pretraining(f"deepnet_{size}", model, batch_size=1024, num_steps=100_000)
    return dataclasses.replace(run, optimizer=OptimizerConfig(
        name="adam", beta2=0.98, clip_norm=1.0, schedule=ScheduleConfig(
            factors="constant * linear_warmup * rsqrt_normalized_decay", base_learning_rate=5e-4,
            warmup_steps=6000)))


def get_config(size: str | None = "3_2b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
