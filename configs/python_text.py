"""A 5-million-parameter T5 1.1 pre-trained on the text of your own Python installation.

Paper: Raffel et al. 2020 (arXiv:1910.10683), the 1.1 variant (gated GELU, untied logits);
span corruption of 15 % of the tokens in spans of 3.
Expected: 400 steps in under 5 minutes on 2 CPU cores; the held-out loss, 3.90 nats a token, ends below
the unigram entropy of its targets, 5.16. What it fills in is rarely right after so little text; the
experiments of configs/experiments/ compare methods on it.
Command: python -m t5x_lite.train --config=configs/python_text.py --workdir=runs/python_text
`configs/python_text.py:moe` trains a Switch model of the same FLOPs a token.
"""

from configs import switch
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig, to_config_dict
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.layers.config import AttentionConfig, MLPConfig, MoEConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

_ATTENTION = AttentionConfig(num_heads=4, head_dim=64, scale=1.0)
_MLP = MLPConfig(mlp_dim=512)
_LAYERS = 2    # few and wide: small products waste a CPU
_STEPS = 400


ARGUMENTS = (None, "moe")


def run(arg: str | None = None) -> RunConfig:
    """The run as dataclasses; "moe" makes every other MLP a Switch mixture of 8 experts."""
    if arg not in ARGUMENTS:
        raise UserError(f"configs/python_text.py:{arg}: the argument may be moe, or none given.")
    encoder = StackConfig(segments=(SegmentConfig((BlockConfig(_ATTENTION, None, _MLP),), _LAYERS),),
                          scan=False)
    decoder = StackConfig(
        segments=(SegmentConfig((BlockConfig(_ATTENTION, _ATTENTION, _MLP),), _LAYERS),),
        causal=True, scan=False)
    if arg == "moe":
        moe = MoEConfig(num_experts=8, router="switch", jitter=0.01)
        encoder, decoder = switch.sparsify(encoder, moe, 2), switch.sparsify(decoder, moe, 2)
    return RunConfig(
        name="python_text" if arg is None else f"python_text_{arg}",
        model=ModelConfig(vocab_size=4096, embed_dim=256, encoder=encoder, decoder=decoder),
        objective=ObjectiveConfig(name="seq2seq"),
        data=DataConfig(train="python_span_corruption", validation="python_span_corruption",
                        inputs_length=128, targets_length=32, num_shards=4),
        optimizer=OptimizerConfig(
            name="adafactor",
            schedule=ScheduleConfig(factors="constant * linear_warmup * linear_to_floor",
                                    base_learning_rate=0.03, warmup_steps=40,
                                    floor_fraction=0.02)),
        train=TrainConfig(num_steps=_STEPS, global_batch_size=32, log_every=20),
        eval=EvalConfig(every=200, num_examples=16 * 32, samples=3),
        checkpoint=CheckpointConfig(every=200, keep_last=2))


def get_config(arg: str | None = None):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(arg))
