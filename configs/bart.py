"""BART: an encoder-decoder with learned positions and LayerNorm after each sub-layer.

Paper: Lewis et al. 2020 (arXiv:1910.13461), sections 2.1 and 5.1: GELU, 8,000 rows for 500,000
steps, text infilling of 30% of the tokens and permuted sentences, dropout off for the last
tenth of the steps.
Expected: base 140M, large 400M parameters, as the authors' repository gives them (139.4M and
406.3M counted).
Left open by the paper, and taken: Adam at betas 0.9 and 0.98, 4e-4 after 10,000 steps and a
linear decay, weight decay 0.01, rows of 512 tokens, dropout 0.1 throughout. C4 in T5's vocabulary
stands in for the paper's 160 GB and GPT-2's; data/denoising.py says how sentences end.
Hardware: base on eight accelerators.
Command: python -m t5x_lite.train --config=configs/bart.py:base --workdir=DIR
"""

from configs import _common
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, InitConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

SIZES = {"base": (6, 768, 12), "large": (12, 1024, 16)}


def run(size: str | None = "base") -> RunConfig:
    """The pre-training run of one size."""
    num_layers, embed_dim, num_heads = _common.size_of(SIZES, size, "bart")
    attention = AttentionConfig(num_heads=num_heads, head_dim=embed_dim // num_heads,
                                use_bias=True, use_out_bias=True, dropout_rate=0.1)
    mlp = MLPConfig(mlp_dim=4 * embed_dim, activation="gelu", gated=False, use_bias=True)

    def stack(cross: AttentionConfig | None) -> StackConfig:
        return StackConfig(
            segments=_common.segment(num_layers, BlockConfig(attention, cross, mlp)),
            causal=cross is not None, residual="post", norm=_common.LAYER_NORM, dropout_rate=0.1,
            position=PositionConfig("learned", max_length=1024, offset=2), embedding_norm=True,
            final_norm=False, remat="full" if embed_dim >= 1024 else "none")

    model = ModelConfig(
        vocab_size=50265, embed_dim=embed_dim, encoder=stack(None), decoder=stack(attention),
        tie_logits=True, init=InitConfig(kernel="fixed", embedding_std=0.02, scale_query=False))
    return RunConfig(
        name=f"bart_{size}", model=model, precision="bf16",
        objective=ObjectiveConfig(name="seq2seq", z_loss=0.0),
        data=DataConfig(train="c4_bart", validation="c4_bart", denoising="bart",
                        inputs_length=512, targets_length=512, num_shards=64),
        optimizer=OptimizerConfig(
            name="adamw", beta2=0.98, eps=1e-6, weight_decay=0.01, schedule=ScheduleConfig(
                factors="constant * linear_warmup * linear_to_floor", base_learning_rate=4e-4,
                warmup_steps=10_000, floor_fraction=0.0)),
        train=TrainConfig(num_steps=500_000, global_batch_size=8000, log_every=100),
        eval=EvalConfig(every=5000, num_examples=50 * 8000),
        checkpoint=CheckpointConfig(every=5000, keep_last=3))


def get_config(size: str | None = "base"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
