"""Switch Transformers: T5 whose every other MLP is a mixture with one expert a token.

Paper: Fedus, Zoph & Shazeer 2021 (arXiv:2101.03961), table 9; base and large as the released
checkpoints have them (ReLU, tied logits, 3072 and 4096 wide).
Expected: base_8 0.62B, base_128 7.4B, base_256 14.7B, large_128 26.3B, xxl 395B, c 1.6T.
Left open by the paper: table 9 gives xxl 64 experts, with which it would have 201B; the
released one has 128, which gives the stated 395B. c has a mixture in every layer.
Hardware: base_8 on one accelerator; xxl and c on a pod with mesh.expert.
Command: python -m t5x_lite.train --config=configs/switch.py:base_8 --workdir=DIR
"""

import dataclasses

from configs import _t5
from t5x_lite.config import RunConfig, to_config_dict
from t5x_lite.layers.mlp import MLPConfig
from t5x_lite.layers.moe import MoEConfig
from t5x_lite.models import ModelConfig, SegmentConfig, StackConfig

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


def run(size: str | None = "base_8") -> RunConfig:
    """The pre-training run of one size."""
    return _t5.pretraining(f"switch_{size}", model(_t5.size_of(SIZES, size, "switch")),
                           batch_size=2048, num_steps=500_000)


def get_config(size: str | None = "base_8"):
    """The locked ConfigDict of `run`."""
    return to_config_dict(run(size))
