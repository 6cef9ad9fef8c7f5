"""What the TPU compiler makes of a mixture of experts: tokens travel, experts stay.

Compiled by libtpu for chips that are not here. The model is small and in bf16, with dims that
are whole tiles, so that bytes can be counted.
"""

import dataclasses
import math

import pytest

from t5x_lite import build as build_lib, tree
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig, MoEConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import rehearse
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig

WIDTH, HIDDEN, EXPERTS, ROWS, LENGTH = 256, 1024, 8, 16, 128
BF16 = 2


def compiled(topology: str, slices: int, dropless: bool = False, **mesh: int):
    """(program, its compiled step): a dense layer and one with a mixture, AdamW."""
    pytest.importorskip("libtpu", reason="pip install libtpu to compile for TPUs here")
    dense = BlockConfig(AttentionConfig(num_heads=4, head_dim=64), None, MLPConfig(mlp_dim=512))
    sparse = dataclasses.replace(dense, moe=MoEConfig(
        num_experts=EXPERTS, router="top_2", dropless=dropless, mlp=MLPConfig(mlp_dim=HIDDEN)))
    stack = StackConfig((SegmentConfig((dense, sparse), 1),), causal=True, scan=False,
                        position=PositionConfig("rotary"))
    program = build_lib.build(RunConfig(
        model=ModelConfig("decoder_only", vocab_size=512, embed_dim=WIDTH, encoder=None,
                          decoder=stack),
        objective=ObjectiveConfig("lm"), data=DataConfig(targets_length=LENGTH),
        optimizer=OptimizerConfig(name="adamw"), precision="bf16",
        train=TrainConfig(global_batch_size=ROWS), mesh=MeshConfig(**{"data": 1, **mesh})),
        rehearse.topology(topology, slices).devices)
    return program, rehearse.compile_step(program)


def exchanged(step, kind: str):
    """The collectives of a kind that move tokens' features, not counts."""
    return [c for c in step.collectives if c.kind == kind and c.bytes_per_device > 4096]


def assert_experts_stay(step, mesh) -> None:
    """Expert kernels are gathered over fsdp, and nothing as large as one of them over expert."""
    local = EXPERTS // mesh["expert"] * WIDTH * HIDDEN // mesh.get("tensor", 1) * BF16
    gathers = exchanged(step, "all-gather")
    assert [c.axes for c in gathers if c.bytes_per_device == local] == [("fsdp",)] * 3
    over_expert = local * mesh["expert"] // mesh["fsdp"]
    assert all(c.bytes_per_device < over_expert for c in gathers if "expert" in c.axes)


@pytest.mark.parametrize("dropless", [False, True])
def test_tokens_travel_and_experts_stay(dropless):
    """To the experts and back, and the same for the gradients: no other exchange over expert."""
    mesh = {"fsdp": 2, "expert": 4, "tensor": 2}
    program, step = compiled("v5e:4x4", 1, dropless, **mesh)
    kind = "ragged-all-to-all" if dropless else "all-to-all"
    tokens = exchanged(step, kind)
    assert [c.axes for c in tokens] == [("expert",)] * 4
    if not dropless:
        # An expert has room for 1.25 * 128 / 8 tokens of each of a device's two sequences.
        assert {c.bytes_per_device for c in tokens} == {EXPERTS * 2 * 20 * WIDTH * BF16}
        assert not exchanged(step, "ragged-all-to-all")
    assert_experts_stay(step, mesh)
    state = tree.flatten(program.abstract_state["params"])
    for moment in ("mu", "nu"):
        state |= tree.flatten({moment: program.abstract_state["opt_state"][moment]})
    experts = [x for path, x in state.items() if "/experts/" in path]
    assert len(experts) == 3 * 3
    for x in experts:
        shard = x.sharding.shard_shape(x.shape)
        assert shard[1] == EXPERTS // 4 and x.size == math.prod(shard) * 16


def test_tokens_stay_on_their_slice():
    """Each slice has all experts: what crosses between slices is the gradients' sum."""
    mesh = {"slice": 2, "fsdp": 2, "expert": 4}
    _, step = compiled("v5e:2x4", 2, **mesh)
    tokens = exchanged(step, "all-to-all")
    assert [(c.axes, c.network) for c in tokens] == [(("expert",), "fast")] * 4
    assert {c.kind for c in step.collectives if c.network == "dcn"} == {"all-reduce"}
    assert_experts_stay(step, mesh)
