"""Switch Transformers: T5 whose every other MLP is a mixture with one expert a token.

Paper: Fedus, Zoph & Shazeer 2021 (arXiv:2101.03961), table 9; base and large as the released
checkpoints have them (ReLU, tied logits, 3072 and 4096 wide).
Expected: base_8 0.62B, base_128 7.4B, base_256 14.7B, large_128 26.3B, xxl 395B, c 1.6T.
Left open by the paper: table 9 gives xxl 64 experts, with which it would have 201B; the
released one has 128, which gives the stated 395B. c has a mixture in every layer.
Hardware: base_8 on one accelerator; xxl and c on a pod with mesh.expert.
Command: python -m t5x_lite.train --config=configs/switch.py:base_8 --workdir=DIR
Fine-tuning: SIZE_finetune, with --config.init_from=PRETRAINED --config.data.train=TASK; see
`finetuning`.
"""

import dataclasses
import functools

from configs import _common, _t5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.config import MLPConfig, MoEConfig
from t5x_lite.models.config import ModelConfig, SegmentConfig, StackConfig
from t5x_lite.training.methods import GroupConfig
from t5x_lite.training.schedules import ScheduleConfig

_RELU = MLPConfig(activation="relu", gated=False)
_GATED = MLPConfig(activation="gelu_tanh", gated=True)


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A T5 and its mixtures."""

    dense: _t5.Size
    num_experts: int
    every: int = 2                  # one mixture in so many layers
    mlp: MLPConfig = _RELU
    tie_logits: bool = True


_BASE = _t5.Size(768, 3072, 12, 64, 12)
SIZES = {
    **{f"base_{n}": Sparse(_BASE, n) for n in (8, 16, 32, 64, 128, 256)},
    "large_128": Sparse(_t5.Size(1024, 4096, 16, 64, 24), 128),
    "xxl": Sparse(_t5.Size(4096, 10240, 64, 64, 24), 128, mlp=_GATED, tie_logits=False),
    "c": Sparse(_t5.Size(2080, 6144, 32, 64, 15), 2048, every=1),
}


def sparsify(stack: StackConfig, moe: MoEConfig, every: int) -> StackConfig:
    """The stack of equal blocks with `moe` in place of every `every`-th MLP."""
    (segment,) = stack.segments
    (block,) = segment.blocks
    moe = dataclasses.replace(moe, mlp=block.mlp)
    period = (block,) * (every - 1) + (dataclasses.replace(block, moe=moe),)
    whole, rest = divmod(segment.repeats, every)
    segments = (SegmentConfig(period, whole),)
    if rest:
        segments += (SegmentConfig((block,), rest),)
    return dataclasses.replace(stack, segments=segments)


def model(size: Sparse) -> ModelConfig:
    """Top-1 routing: capacity factor 1.25 in training and 2 in evaluation, jitter 0.01, load
    balancing at 0.01 (sections 2.2 and 2.4)."""
    dense = _t5.model(size.dense, mlp=size.mlp, tie_logits=size.tie_logits, dropout_rate=0.0)
    moe = MoEConfig(num_experts=size.num_experts, router="switch", capacity_factor=1.25,
                    eval_capacity_factor=2.0, jitter=0.01, balance_weight=0.01)
    # So many experts leave less than a token each of a sequence of 114: one is the least.
    if size.num_experts > 114:
        moe = dataclasses.replace(moe, expert_capacity=_capacity(size.num_experts))
    return dataclasses.replace(dense, encoder=sparsify(dense.encoder, moe, size.every),
                               decoder=sparsify(dense.decoder, moe, size.every))


def _capacity(num_experts: int) -> int:
    """1.25 x 512 tokens / experts, at least 1."""
    return max(1, round(1.25 * 512 / num_experts))


def finetuning(run: RunConfig, *, dropout: float = 0.1, expert_dropout: float = 0.4,
               frozen_routers: bool = True, auxiliary_losses: bool = False) -> RunConfig:
    """A run that fine-tunes the model of a pre-training run on a small task.

    Args:
        dropout, expert_dropout: outside the experts and in their hidden layers (Switch section
            2.4, table 4).
        frozen_routers: routers stay as they were pre-trained: no update, no optimizer state.
        auxiliary_losses: whether load balancing and the router z-loss stay on.
    """
    def block(config):
        drop = functools.partial(dataclasses.replace, dropout_rate=dropout)
        moe = config.moe
        if moe is not None:
            moe = dataclasses.replace(
                moe, jitter=0.0, mlp=dataclasses.replace(moe.mlp, dropout_rate=expert_dropout))
            if not auxiliary_losses:
                moe = dataclasses.replace(moe, balance_weight=0.0, z_weight=0.0)
        cross = config.cross_attention
        return dataclasses.replace(
            config, self_attention=drop(config.self_attention), mlp=drop(config.mlp), moe=moe,
            cross_attention=None if cross is None else drop(cross))

    def stack(config):
        return config and dataclasses.replace(config, dropout_rate=dropout, segments=tuple(
            dataclasses.replace(s, blocks=tuple(map(block, s.blocks))) for s in config.segments))

    routers = (GroupConfig(".*/router/.*", frozen=True),) if frozen_routers else ()
    return dataclasses.replace(
        run, name=f"{run.name}_finetune",
        model=dataclasses.replace(run.model, encoder=stack(run.model.encoder),
                                  decoder=stack(run.model.decoder)),
        optimizer=dataclasses.replace(
            run.optimizer, groups=(*routers, *run.optimizer.groups),
            schedule=ScheduleConfig(factors="constant", base_learning_rate=1e-3)),
        train=dataclasses.replace(run.train, num_steps=16_000, global_batch_size=128),
        eval=dataclasses.replace(run.eval, every=1000),
        checkpoint=dataclasses.replace(run.checkpoint, every=1000))


def run(size: str | None = "base_8") -> RunConfig:
    """The pre-training run of one size, or with _finetune behind it its fine-tuning."""
    if size and size.endswith("_finetune"):
        return finetuning(run(size.removesuffix("_finetune")))
    return _t5.pretraining(f"switch_{size}", model(_common.size_of(SIZES, size, "switch")),
                           batch_size=2048, num_steps=500_000)


def get_config(size: str | None = "base_8"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
