"""The configs that a search tries."""

import dataclasses

import pytest

from configs import llama, switch
from t5x_lite.build import build
from t5x_lite.config import replace
from t5x_lite.errors import UserError
from t5x_lite.layers.config import MoEConfig
from t5x_lite.planning import rehearse, remedies
from tests.planning.test_plan import lm


def with_layers(layers: int, moe: MoEConfig | None = None, **mesh: int):
    """A small decoder-only run of so many layers, 64 rows a step."""
    base = lm(**mesh)
    stack = base.model.decoder
    block = dataclasses.replace(stack.segments[0].blocks[0], moe=moe)
    segment = dataclasses.replace(stack.segments[0], blocks=(block,), repeats=layers)
    return replace(base, "model.decoder", dataclasses.replace(stack, segments=(segment,)))


def split(config):
    return tuple(getattr(config.mesh, axis) for axis in remedies.SPLIT)


def test_meshes_are_the_ways_to_split_the_devices_in_turn():
    """Of 8 devices: data, fsdp and tensor; stages that divide 6 layers; no experts."""
    found = [split(config) for _, config in remedies.meshes(with_layers(6, data=-1), 8)]
    staged = [shape for shape in found if shape[4] > 1]
    assert staged == [(1, 4, 1, 1, 2)] and found.index(staged[0]) < 4
    plain = [shape[:3] for shape in found if shape[4] == 1]
    assert plain[:3] == [(4, 1, 2), (2, 1, 4), (1, 8, 1)] and (1, 1, 8) in plain
    assert all(shape[3] == 1 for shape in found)


def test_a_pipeline_gets_the_micro_batches_that_its_rows_allow():
    config = with_layers(4, data=8)
    found = {c.mesh.stage: c for _, c in remedies.meshes(config, 8) if c.mesh.stage > 1}
    assert found.keys() == {2, 4}
    assert found[4].model.decoder.pipeline.num_microbatches == 16
    assert found[4].mesh.fsdp == 2
    few = replace(config, "train.global_batch_size", 16)
    found = {c.mesh.stage: c for _, c in remedies.meshes(few, 8) if c.mesh.stage > 1}
    assert found[2].model.decoder.pipeline.num_microbatches == 4
    flags = next(f for f, c in remedies.meshes(config, 8) if c.mesh.stage == 4)
    assert flags.endswith("--config.mesh.stage=4 "
                          "--config.model.decoder.pipeline.num_microbatches=16")


def test_experts_are_split_where_there_are_mixtures_and_they_divide():
    mixture = with_layers(3, MoEConfig(num_experts=12), data=8)
    found = [split(config) for _, config in remedies.meshes(mixture, 8)]
    assert [shape for shape in found if shape[3] > 1] == [(1, 2, 1, 4, 1), (1, 4, 1, 2, 1)]
    assert found.index((1, 2, 1, 4, 1)) < 3
    assert not any(shape[3] > 1 for shape in map(split, (
        c for _, c in remedies.meshes(with_layers(3, data=8), 8))))


@pytest.mark.parametrize("config", [llama.run("2_7b"), switch.run("base_8")],
                         ids=lambda config: config.name)
def test_what_is_proposed_can_mostly_be_built(config):
    """On 16 GPUs: of every kind of mesh at least one is not refused."""
    machine = rehearse.topology("h100:16")
    kinds = set()
    for _, proposed in list(remedies.meshes(config, 16))[:8]:
        try:
            sizes = build(proposed, machine.devices).mesh.shape
        except UserError:   # 12 heads in 8 parts
            continue
        kinds |= {axis for axis in remedies.SPLIT if sizes[axis] > 1}
    mixture = any(b.moe for s in config.model.decoder.segments for b in s.blocks)
    assert kinds >= {"tensor", "fsdp", "stage"} | ({"expert"} if mixture else set())


def test_remedies_end_with_offloading_on_a_mesh_that_splits_everything():
    lines = list(remedies.remedies(with_layers(3, data=8), 8))
    assert [line for line, _ in lines if "accumulation" in line] == [
        f"--config.train.accumulation={n}" for n in (2, 8)]
    flags, config = lines[-2]
    assert flags == "--config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.tensor=1 " \
                    "--config.sharding.offload_optimizer=True"
    assert config.sharding.offload_optimizer and config.mesh.fsdp == 8
    assert lines[-1][0] == "--config.model.decoder.remat=offload:layer_input"
