"""BERT: a bidirectional encoder, LayerNorm after each sub-layer, masked language modelling.

Paper: Devlin et al. 2019 (arXiv:1810.04805), section 3 and appendix A.2: 256 rows of 512 tokens
for 1M steps, Adam at 1e-4 and betas 0.9 and 0.999, weight decay 0.01, 10,000 steps of warm-up,
a linear decay, dropout 0.1, exact GELU. 15 % of the tokens are to be named: 80 % of these are
masked, 10 % are others, 10 % stay (data/denoising.py).
Expected: base 110M, large 340M parameters (109.5M and 335.2M counted, with the masked-LM head
and without the pooler of next-sentence prediction, which is left out).
Taken: all steps in rows of 512 tokens (the paper's first nine tenths are rows of 128). C4 stands
in for books and Wikipedia; the vocabulary of 30,522 word pieces is not shipped: give its
tokenizer.json, or set model.vocab_size=32128 for T5's.
Hardware: base on one accelerator, large on eight.
Command: python -m t5x_lite.train --config=configs/bert.py:base --workdir=DIR \\
    --config.data.vocabulary=tokenizer.json
"""

from configs import _common
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    NormConfig,
    PositionConfig,
)
from t5x_lite.models.config import BlockConfig, ModelConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16)}


def run(size: str | None = "base") -> RunConfig:
    """The pre-training run of one size."""
    num_layers, embed_dim, num_heads = _common.size_of(SIZES, size, "bert")
    block = BlockConfig(
        AttentionConfig(num_heads=num_heads, head_dim=embed_dim // num_heads, use_bias=True,
                        use_out_bias=True, dropout_rate=0.1),
        mlp=MLPConfig(mlp_dim=4 * embed_dim, activation="gelu", gated=False, use_bias=True))
    encoder = StackConfig(
        segments=_common.segment(num_layers, block), residual="post", dropout_rate=0.1,
        position=PositionConfig("learned", max_length=512), embedding_norm=True, final_norm=False,
        norm=NormConfig("layer", epsilon=1e-12, use_bias=True),
        remat="full" if embed_dim >= 1024 else "none")
    model = ModelConfig(
        "encoder_only", vocab_size=30522, embed_dim=embed_dim, encoder=encoder, decoder=None,
        tie_logits=True, logits_bias=True, head_transform="gelu", token_types=2,
        init=InitConfig(kernel="fixed", embedding_std=0.02, scale_query=False))
    return RunConfig(
        name=f"bert_{size}", model=model, precision="bf16",
        objective=ObjectiveConfig(name="mlm", z_loss=0.0),
        data=DataConfig(train="c4_bert", validation="c4_bert", inputs_length=512, num_shards=64),
        optimizer=OptimizerConfig(name="adamw", weight_decay=0.01, eps=1e-6, schedule=ScheduleConfig(
            factors="constant * linear_warmup * linear_to_floor", base_learning_rate=1e-4,
            warmup_steps=10_000, floor_fraction=0.0)),
        train=TrainConfig(num_steps=1_000_000, global_batch_size=256, log_every=100),
        eval=EvalConfig(every=5000, num_examples=50 * 256),
        checkpoint=CheckpointConfig(every=5000, keep_last=3))


def get_config(size: str | None = "base"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
