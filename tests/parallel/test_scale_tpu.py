"""What the TPU compiler makes of ZeRO, sequence parallelism, slices, pipelines and offloading.

Compiled by libtpu for chips that are not here: memory and collectives are the real ones. The
model is small and in bf16, with dims that are whole tiles, so that bytes can be counted.
"""

import dataclasses

import pytest

from t5x_lite import build as build_lib
from t5x_lite.config import RunConfig, ShardingConfig, TrainConfig
from t5x_lite.cost import hlo
from t5x_lite.data.config import DataConfig
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.parallel.pipeline_schedules import PipelineConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import rehearse, traffic
from t5x_lite.training import state
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig

WIDTH, VOCAB, LENGTH = 256, 512, 128


def lm(mesh, *, rows=16, layers=2, zero=3, accumulation=1, sequence_parallel=False, offload="none",
       remat="full", pipeline=None, width=WIDTH) -> RunConfig:
    """A decoder-only run with AdamW: 4 bytes a parameter, 8 of optimizer state."""
    block = BlockConfig(AttentionConfig(num_heads=4, head_dim=width // 4), None,
                        MLPConfig(mlp_dim=4 * width))
    stack = StackConfig((SegmentConfig((block,), layers),), causal=True, remat=remat,
                        position=PositionConfig("rotary"), pipeline=pipeline or PipelineConfig())
    return RunConfig(
        model=ModelConfig("decoder_only", vocab_size=VOCAB, embed_dim=width, encoder=None,
                          decoder=stack),
        objective=ObjectiveConfig("lm"), data=DataConfig(targets_length=LENGTH),
        optimizer=OptimizerConfig(name="adamw"), precision="bf16",
        train=TrainConfig(global_batch_size=rows, accumulation=accumulation),
        mesh=MeshConfig(**{"data": 1, **mesh}),
        sharding=ShardingConfig(zero=zero, sequence_parallel=sequence_parallel,
                                offload=offload))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled train step."""

    program: build_lib.Program
    found: rehearse.Compiled

    @property
    def collectives(self) -> tuple[hlo.Collective, ...]:
        return self.found.collectives

    def bytes(self, kind: str, axis: str, network: str = "fast", above: int = 4096) -> int:
        """Of all collectives of this kind along this axis a step; scalars and norms apart."""
        return sum(c.bytes_per_step for c in self.collectives if c.kind == kind
                   and c.axes == (axis,) and c.network == network and c.bytes_per_device > above)


def compiled(config: RunConfig, slices: int = 1) -> Compiled:
    """The train step on so many slices of v5e:2x4."""
    pytest.importorskip("libtpu", reason="pip install libtpu to compile for TPUs here")
    devices = rehearse.topology("v5e:2x4", slices).devices
    program = build_lib.build(config, devices)
    return Compiled(program, rehearse.compile_step(program))


# --- ZeRO -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_splits_what_it_says(zero):
    """Bytes of the arguments on one of 8 devices, and how two micro-batches' gradients travel."""
    step = compiled(lm({"fsdp": 8}, zero=zero, accumulation=2))
    n, devices = step.program.num_params, 8
    batch = state.num_bytes_per_device(step.program.abstract_batch())
    expected = (4 * n if zero < 3 else 4 * n / devices) + 8 * n / devices + batch
    assert step.found.argument_bytes == pytest.approx(expected, rel=0.01)

    layers = n - 2 * VOCAB * WIDTH   # the embedding and the head may be reduced as one
    reduced = step.bytes("all-reduce", "fsdp")
    scattered = step.bytes("reduce-scatter", "fsdp")
    gathered = step.bytes("all-gather", "fsdp")
    if zero == 1:
        # Whole gradients, summed in bf16 on every device in each of two micro-batches.
        assert reduced >= 2 * 2 * layers * 0.8
    else:
        assert scattered >= 2 * 2 * layers * 0.99
        assert reduced < 2 * 2 * (n - layers)
    if zero == 3:
        # Forward, and recomputation for backward, gather bf16 weights in both micro-batches.
        assert gathered >= 2 * 2 * 2 * layers * 0.99
    else:
        # New float32 parameters are gathered once a step, and nothing before.
        assert gathered == pytest.approx(4 * n, rel=0.01)


# --- sequence parallelism ---------------------------------------------------------------------------

def test_sequence_parallel_norms_replace_all_reduces():
    """All-reduces of activations become a reduce-scatter and an all-gather each, of as many bytes."""
    plain = compiled(lm({"fsdp": 2, "tensor": 4}))
    split = compiled(lm({"fsdp": 2, "tensor": 4}, sequence_parallel=True))
    assert plain.bytes("all-reduce", "tensor") > 0
    assert plain.bytes("reduce-scatter", "tensor") == 0
    assert split.bytes("all-reduce", "tensor", above=8192) == 0
    assert split.bytes("reduce-scatter", "tensor") > 0.9 * plain.bytes("all-reduce", "tensor")
    assert split.bytes("all-gather", "tensor") > 0.9 * plain.bytes("all-reduce", "tensor")


# --- slices -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_cross_between_slices_once_a_step(accumulation):
    """Each device's 1/8 of the gradients, in float32 under accumulation, else as they arise."""
    step = compiled(lm({"slice": 2, "fsdp": 8}, rows=32, accumulation=accumulation), slices=2)
    crossing = [c for c in step.collectives if c.network == "dcn" and c.bytes_per_device > 4096]
    assert {c.kind for c in crossing} == {"all-reduce"}
    total = sum(c.bytes_per_step for c in crossing)
    width = 4 if accumulation > 1 else 2
    # The embedding's gradient is whole where it is scattered: it may cross before it is split.
    assert width * step.program.num_params / 8 * 0.95 <= total
    assert total <= width * step.program.num_params / 8 + 4 * VOCAB * WIDTH


@pytest.mark.parametrize("mesh, settings", [
    ({"fsdp": 8}, {"zero": 1, "accumulation": 2}),
    pytest.param({"data": 8}, {"accumulation": 2}, marks=pytest.mark.slow),
    ({"stage": 2, "fsdp": 4}, {"layers": 4, "pipeline": PipelineConfig("gpipe", 4)})])
def test_between_slices_each_device_sends_its_share_of_the_gradients(mesh, settings):
    """Also where a slice's devices hold them alike, and where a pipeline's ticks make them."""
    step = compiled(lm({"slice": 2, **mesh}, rows=64, **settings), slices=2)
    crossing = [c for c in step.collectives if c.network == "dcn" and c.bytes_per_device > 4096]
    assert {(c.kind, c.count_per_step) for c in crossing} == {("all-reduce", 1)}
    total = sum(c.bytes_per_step for c in crossing)
    share = 4 * step.program.num_params / 8
    # The tables are split over fsdp and not over the stages. Since the step looks whether what it
    # made is finite (steps.make_train_step), libtpu no longer splits the embedding's gradient over
    # the stages before it crosses: half of what a device holds of it more, whatever the look reads.
    held = 4 * VOCAB * WIDTH / mesh["fsdp"] if "stage" in mesh else 0
    assert total == pytest.approx(share + held * (1 - 1 / mesh.get("stage", 1)), rel=0.02)


# --- pipelines --------------------------------------------------------------------------------------

def test_a_pipeline_sends_micro_batches_and_no_weights():
    config = lm({"stage": 4, "tensor": 2}, layers=4, rows=32, pipeline=PipelineConfig("gpipe", 8))
    step = compiled(config)
    assert {c.kind for c in step.collectives if "stage" in c.axes
            and c.bytes_per_device > 8 * VOCAB * WIDTH} <= {"all-reduce"}
    sent = [c for c in step.collectives if c.kind == "collective-permute"
            and c.bytes_per_device >= 32 // 8 * LENGTH * WIDTH * 2]
    # 11 ticks: a stage's hand-over, the ring that feeds and the ring that drains, both ways.
    assert sum(c.count_per_step for c in sent) >= 3 * 11


@pytest.mark.slow
def test_1f1b_keeps_as_much_whatever_the_number_of_micro_batches():
    """16 more micro-batches of one size: GPipe keeps as many more inputs a stage, 1F1B none; both
    hold the batch outside of the stages, a quarter as much a tensor."""
    rows = 64   # of a micro-batch: so many that the buffers are in HBM and not in VMEM
    micro_batch = rows // 2 * LENGTH * WIDTH * 2

    def grown(schedule):
        few, many = (compiled(lm({"stage": 4, "data": 2}, layers=4, rows=rows * m,
                                 pipeline=PipelineConfig(schedule, m))) for m in (4, 20))
        return (many.found.temp_bytes - few.found.temp_bytes) / micro_batch

    gpipe, one_f_one_b = grown("gpipe"), grown("1f1b")
    assert gpipe >= 16
    assert one_f_one_b <= gpipe - 12
    assert one_f_one_b <= 3 * 16 / 4


# --- host memory --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_offloaded_optimizer_state_leaves_the_device():
    """Its 8 bytes a parameter are the host's; temporaries grow by about a layer's share."""
    here = compiled(lm({"fsdp": 8}, layers=8, width=1024)).found
    away = compiled(lm({"fsdp": 8}, layers=8, width=1024, offload="optimizer_host"))
    state_bytes = traffic.kept(away.program).host
    assert state_bytes == pytest.approx(8 * away.program.num_params / 8, rel=0.01)
    assert here.host_argument_bytes == 0
    assert away.found.host_argument_bytes == pytest.approx(state_bytes, rel=0.01)
    saved = here.argument_bytes - away.found.argument_bytes
    assert saved == pytest.approx(state_bytes, rel=0.01)
    assert away.found.temp_bytes - here.temp_bytes < saved / 4


@pytest.mark.slow
def test_parameters_and_gradients_leave_the_device_with_it():
    """L2L: of a stack's 16 bytes a parameter (4 of parameters, 4 of gradients, 8 of optimizer state)
    the device holds a layer's."""
    here = compiled(lm({"fsdp": 8}, layers=8, width=1024)).found
    away = compiled(lm({"fsdp": 8}, layers=8, width=1024, offload="params_host", accumulation=2))
    kept = traffic.kept(away.program)
    assert kept.host_params == pytest.approx(4 * away.program.num_params / 8, rel=0.02)
    assert away.found.host_argument_bytes == pytest.approx(kept.host, rel=0.01)
    assert away.found.argument_bytes < 0.05 * here.argument_bytes
    assert away.found.peak_bytes < 0.5 * here.peak_bytes


@pytest.mark.slow
def test_gradients_beside_a_disk_compile_without_the_optimizer_state():
    here = compiled(lm({"fsdp": 8}, layers=8, width=1024)).found
    away = compiled(lm({"fsdp": 8}, layers=8, width=1024, offload="optimizer_disk"))
    kept = traffic.kept(away.program)
    assert kept.disk == pytest.approx(8 * away.program.num_params, rel=0.01)   # of all devices
    assert here.argument_bytes - away.found.argument_bytes == pytest.approx(kept.disk / 8, rel=0.02)


@pytest.mark.slow
def test_offloaded_activations_leave_the_device():
    rows = 2048   # so many that the buffers are in HBM and not in VMEM
    kept, sent = (compiled(lm({"fsdp": 8}, layers=8, rows=rows, remat=remat)).found
                  for remat in ("save:mlp_hidden", "offload:mlp_hidden"))
    hidden = 8 * rows // 8 * LENGTH * 4 * WIDTH * 2
    assert (kept.host_temp_bytes, sent.host_temp_bytes) == (0, hidden)
    # Of 8 layers those of one or two are on their way.
    assert kept.temp_bytes - sent.temp_bytes > hidden * 6 / 8
