"""LaMDA 137B: a decoder with T5's relative positions and gated GELU.

Paper: Thoppilan et al. 2022 (arXiv:2201.08239), section 3: 64 layers, width 8,192, MLPs of
65,536, 128 heads of 128, 2.81T tokens in batches of 256k.
Expected: 137B parameters outside the embeddings.
Left open by the paper, and taken: T5's RMSNorm, Adafactor and 1/sqrt(step) with 10,000 steps of
warm-up, rows of 1,024 tokens, untied logits over 32,000 tokens.
Hardware: 1,024 TPU v3 with mesh.tensor and mesh.fsdp.
Command: python -m t5x_lite.train --config=configs/lamda.py:137b --workdir=DIR
"""

from configs import _common
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import AttentionConfig, MLPConfig, NormConfig, PositionConfig
from t5x_lite.models.config import BlockConfig
from t5x_lite.training.methods import OptimizerConfig

SIZES = {"137b": (64, 8192, 65536, 128)}


def run(size: str | None = "137b") -> RunConfig:
    """The pre-training run."""
    num_layers, embed_dim, mlp_dim, num_heads = _common.size_of(SIZES, size, "lamda")
    block = BlockConfig(AttentionConfig(num_heads=num_heads, head_dim=128, scale=1.0),
                        mlp=MLPConfig(mlp_dim=mlp_dim))
    model = _common.decoder_only(
        embed_dim, num_layers, block, vocab_size=32000, position=PositionConfig("t5_bias"),
        norm=NormConfig("rms"), tie_logits=False)
    return _common.language_model(
        f"lamda_{size}", model, length=1024, batch_size=256, tokens=2.81e12, learning_rate=1.0,
        warmup_steps=10_000, factors="constant * rsqrt_decay",
        optimizer=OptimizerConfig(name="adafactor"), z_loss=1e-4)


def get_config(size: str | None = "137b"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
