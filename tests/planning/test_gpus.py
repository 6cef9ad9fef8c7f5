"""GPUs that are described: what their compiler is told, what it says, and what it cannot know."""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from t5x_lite import quiet
from t5x_lite.build import build
from t5x_lite.config import replace
from t5x_lite.cost import hardware, hlo
from t5x_lite.errors import UserError
from t5x_lite.layers import attention_implementations, dispatch, grouped
from t5x_lite.layers.config import MLPConfig, MoEConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import gpus, make, rehearse, search, show
from t5x_lite.planning.make import make_plan
from tests import tiny_config
from tests.planning.test_plan import HIDDEN, LAYERS, VOCAB, WIDTH, by_kind, lm

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYER = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN   # weights of a layer's six kernels
needs_plugin = pytest.mark.skipif(
    bool(gpus.lacks()), reason=f'{gpus.lacks()}: pip install -c constraints.txt ".[plan_gpu]"')


@functools.cache
def planned(topology: str, **changes) -> make.Plan:
    """The plan of lm(fsdp=4, tensor=2) with fields changed, on GPUs that are compiled for."""
    config = lm(data=1, fsdp=4, tensor=2)
    for path, value in changes.items():
        config = replace(config, path.replace("__", "."), value)
    return make_plan(config, rehearse.topology(topology))


# --- What needs no compiler -------------------------------------------------------------------

@pytest.mark.parametrize("name", gpus.TARGETS)
def test_every_gpu_of_the_table_is_described(name):
    text = gpus.description(name)
    chip, target = hardware.lookup(name), gpus.TARGETS[name]
    assert f"device_memory_size: {chip.usable_hbm_bytes[1]}\n" in text
    assert f"core_count: {target.cores} " in text and text.count("{") == text.count("}")
    # Shared memory of a block: all of a core's, without 1 KiB for each block since Ampere.
    kept = 0 if name == "v100" else 1024
    assert f"optin: {target.shared_bytes_per_core - kept}\n" in text
    # Cores x fp32 units x a multiply-add each at the boost clock is the data sheet's peak.
    if "fp32" in chip.peak_flops:
        peak = target.cores * target.fp32_units * 2 * target.clock_ghz * 1e9
        assert peak == pytest.approx(chip.peak_flops["fp32"], rel=0.01)
    assert chip.device_kinds[0] in text
    assert gpus.TARGETS.keys() == set(rehearse.GPUS)


def test_jax_may_allocate_a_share_of_a_gpus_memory(monkeypatch):
    h100 = rehearse.topology("h100:8", count_only=True)
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    whole = hardware.lookup("h100").usable_hbm_bytes[1]
    assert h100.hbm_bytes == int(0.75 * whole)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".92")
    assert h100.hbm_bytes == int(0.92 * whole)
    for bad in ("much", "0", "-1"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", bad)
        with pytest.raises(UserError, match=f"FRACTION={bad!r}: must be a number above 0"):
            _ = h100.hbm_bytes
    # A TPU's is libtpu's own figure, whatever is set for GPUs.
    assert dataclasses.replace(h100, chip=hardware.lookup("v5e")).hbm_bytes == 15.75 * 2**30


def test_without_the_plugin_or_ptxas_the_reason_is_said(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(gpus.importlib.util, "find_spec",
                        lambda name: None if name.startswith("jax_plugins") else found(name))
    assert "plugin is not installed" in gpus.lacks()
    plan = make_plan(lm(data=1, fsdp=8), rehearse.topology("h100:8"))
    assert plan.compiled is None and plan.fits is None
    assert any("[cpu,plan_gpu]" in note for note in plan.notes)
    monkeypatch.setattr(gpus, "_spec", lambda name: name == gpus.PLUGIN)
    monkeypatch.setattr(gpus, "_wheels_ptxas", lambda: False)
    monkeypatch.setattr(gpus.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpus.pathlib.Path, "exists", lambda path: False)
    assert gpus.lacks() == "there is no ptxas"


def test_noise_is_dropped_and_complaints_are_not(capfd):
    with pytest.raises(ValueError), quiet.stderr():
        os.write(2, b"I0000 cudart_stub.cc:31] Could not find cuda drivers\nE0000 a fault\n")
        raise ValueError
    assert capfd.readouterr().err == "E0000 a fault\n"


def test_a_config_without_a_mesh_is_planned_with_all_devices_on_fsdp():
    eight = rehearse.topology("h100:8", count_only=True)
    plan = make_plan(lm(), eight)
    assert plan.config.mesh == MeshConfig(data=1, fsdp=8)
    assert "states no mesh" in plan.notes[0] and "--config.mesh.fsdp=8" in plan.notes[0]
    stated = make_plan(lm(data=8), eight)
    assert stated.program.mesh.shape["data"] == 8 and "states no mesh" not in str(stated.notes)
    # A width of 4 x 31 divides by 4 only; one device needs no mesh; nor does what train simulates.
    odd = replace(lm(), "model.embed_dim", 124)
    assert make_plan(odd, eight).config.mesh == MeshConfig(data=2, fsdp=4)
    for topology in (rehearse.topology("h100:1", count_only=True), rehearse.topology("cpu:8")):
        assert make.with_mesh(lm(), topology) == (lm(), "")


# --- What the compiler says -------------------------------------------------------------------

@needs_plugin
@pytest.mark.parametrize("topology", [
    "h100:8", pytest.param("a100-80g:8", marks=pytest.mark.slow)])
def test_a_step_compiled_for_eight_gpus(topology):
    plan = planned(topology)
    assert plan.fits is True and plan.topology.compiler == "XLA:GPU"
    assert plan.compiled.temp_bytes > 0 and plan.peak_bytes >= plan.argument_bytes
    assert sum(plan.arguments.values()) <= plan.argument_bytes < 1.1 * sum(plan.arguments.values())
    # Forward and recomputation gather the six bf16 kernels of each layer at once, split over
    # tensor=2 already; and once the embedding, which the logits are tied to.
    gathers = by_kind(plan)["all-gather", ("fsdp",)]
    assert gathers.bytes_per_step == LAYERS * 2 * LAYER * 2 // 2 + VOCAB * WIDTH * 2
    # Their gradients return to where the weights are.
    scatters = by_kind(plan)["reduce-scatter", ("fsdp",)]
    assert scatters.bytes_per_step == LAYERS * LAYER * 2 // 2 + VOCAB * WIDTH
    # Megatron: two sums over tensor a layer in each of forward, recomputation and backward.
    assert by_kind(plan)["all-reduce", ("tensor",)].calls_per_step >= LAYERS * 6
    assert {line.network for line in plan.collectives} == {"nvlink"}
    assert plan.roofline.fast_seconds > 0 and plan.roofline.dcn_seconds == 0
    assert any("not autotuned" in note for note in plan.notes)
    found = show.to_json(plan)
    assert found["compiler"] == "XLA:GPU" and found["fits"] is True


@needs_plugin
@pytest.mark.slow
def test_between_machines_collectives_take_infiniband():
    config = replace(lm(data=2, fsdp=8), "train.global_batch_size", 64)
    plan = make_plan(config, rehearse.topology("h100:16"))
    networks = {line.axes: line.network for line in plan.collectives}
    assert networks["fsdp",] == "nvlink"
    assert all(network == "infiniband" for axes, network in networks.items() if "data" in axes)
    assert plan.roofline.dcn_seconds > 0


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v100:8", "a100-40g:8", "h200:8", "b200:12"])
def test_every_gpu_of_the_table_is_compiled_for(topology):
    count = int(topology.partition(":")[2])
    config = dataclasses.replace(lm(data=1, fsdp=4, tensor=count // 4), precision="fp16")
    config = replace(config, "model.decoder.segments", tuple(
        dataclasses.replace(segment, repeats=1) for segment in config.model.decoder.segments))
    if count == 12:
        config = replace(config, "mesh", MeshConfig(data=3, fsdp=4))
        config = replace(config, "train.global_batch_size", 48)
    plan = make_plan(config, rehearse.topology(topology))
    assert plan.fits is True and plan.collectives and plan.topology.num_chips == count


@needs_plugin
def test_a_dropless_mixture_costs_what_its_rows_do_whatever_the_experts():
    """jax.lax.ragged_dot would compute, and keep, every expert's product for every row."""
    rows, width, hidden = 4096, 128, 512
    device = jax.sharding.SingleDeviceSharding(rehearse.topology("h100:1").devices[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=device)

    def gradients(weights, x_MD, sizes_E):
        def first(dense, x):
            return (dense(x, "wi"),)

        def second(dense, pre, choice, shared):
            return dense(jnp.sin(pre[0]), "wo")

        def total(weights, x_MD):
            choice = jnp.zeros(x_MD.shape[0], jnp.int32)
            y = grouped.grouped(first, second, weights, x_MD, choice, (), sizes_E)
            return jnp.sum(y.astype(jnp.float32))
        return jax.grad(total, argnums=(0, 1))(weights, x_MD)

    length = dispatch.packed_rows(rows)
    for experts in (2, 16):
        weights = {"wi.kernel": shape(experts, width, hidden),
                   "wo.kernel": shape(experts, hidden, width)}
        arguments = weights, shape(length, width), shape(experts, dtype=jnp.int32)
        with gpus.compiling_for(rehearse.topology("h100:1").devices[0]):
            step = jax.jit(gradients).lower(*arguments).compile()
        computed = length + (1 + experts) * grouped.tile_rows(length, experts)
        products = 5   # forward wi; backward wo's two and wi's two (pre-activations were kept)
        at_most = products * 2 * computed * width * hidden
        assert 0.5 * at_most < hlo.matmul_flops(step.as_text()) <= at_most
        # Float32 sums of one expert's gradients, and rows, not rows of every expert.
        rows_bytes = length * (2 * width + 2 * hidden) * 2
        assert step.memory_analysis().temp_size_in_bytes < 3 * rows_bytes


@needs_plugin
@pytest.mark.slow
def test_a_dropless_step_on_eight_gpus_multiplies_no_more_for_more_experts():
    """The products of a device in the whole compiled step, with two of 4 experts for a token and of 8."""
    def products(experts):
        mixture = MoEConfig(num_experts=experts, router="top_2", dropless=True,
                            mlp=MLPConfig(mlp_dim=HIDDEN))
        config = replace(lm(data=1, fsdp=8), "train.global_batch_size", 64)
        config = replace(config, "model.decoder.segments", tuple(
            dataclasses.replace(segment, blocks=tuple(
                dataclasses.replace(block, moe=mixture) for block in segment.blocks))
            for segment in config.model.decoder.segments))
        topology = rehearse.topology("h100:8")
        with topology.compiling():
            program = build(config, topology.devices)
            with program.activate():
                step = program.largest_program().lower(program.abstract_state,
                                                       program.abstract_batch())
                compiled, _, temp = rehearse.compile_lowered(step, "gpu")
        return hlo.matmul_flops(compiled.as_text()), temp
    few, many = products(4), products(8)
    # Dense over experts it would be twice as much of what the mixtures take.
    assert many[0] < 1.25 * few[0]


@needs_plugin
@pytest.mark.slow
def test_offloaded_state_is_counted_though_the_compiler_does_not_see_it():
    whole = planned("h100:8")
    plan = planned("h100:8", sharding__offload_optimizer=True)
    assert plan.host_bytes > 0.9 * whole.arguments["opt_state"]
    assert plan.argument_bytes == whole.argument_bytes - plan.host_bytes
    assert plan.peak_bytes == whole.peak_bytes - plan.host_bytes
    assert any("does not see the host's memory" in note for note in plan.notes)
    assert "not counted here, in the host's" in show.screen(plan)


@needs_plugin
@pytest.mark.slow
def test_cudnns_attention_is_compiled_for_what_the_described_gpu_can():
    long = {"data__targets_length": 1024, "train__global_batch_size": 8}
    before = attention_implementations.cudnn_lacks()
    plan = planned("h100:8", **long)
    assert any("workspace of cuDNN's attention" in note for note in plan.notes)
    assert attention_implementations.cudnn_lacks() == before   # of this process, as it was
    # Volta has no kernel, so that the attention is another and no workspace is left out.
    volta = make_plan(replace(plan.config, "precision", "fp16"), rehearse.topology("v100:8"))
    assert not any("workspace" in note for note in volta.notes)
    assert volta.temp_bytes > 0


@needs_plugin
@pytest.mark.slow
def test_more_than_there_is_does_not_fit_and_a_search_compiles(monkeypatch):
    plan = planned("h100:8")
    whole = hardware.lookup("h100").usable_hbm_bytes[1]
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", str((plan.peak_bytes - 2) / whole))
    assert plan.fits is False   # no error of the compiler's says so
    tight = make_plan(plan.config, plan.topology)
    assert any("XLA_CLIENT_MEM_FRACTION" in note for note in tight.notes)
    trials = search.search(tight, most_compilations=1)
    assert trials[1].plan.compiled is not None and trials[1].changes.endswith("accumulation=2")
    assert trials[1].plan.peak_bytes < plan.peak_bytes and trials[1].plan.fits


@needs_plugin
@pytest.mark.slow
def test_a_search_leaves_out_what_the_compiler_cannot_see(monkeypatch):
    tried = []

    def refuse(config, topology, assumptions):
        tried.append(config)
        raise UserError("no")
    monkeypatch.setattr(search, "make_plan", refuse)
    plan = planned("h100:8")
    too_large = dataclasses.replace(plan.compiled, fits=False)
    trials = search.search(dataclasses.replace(plan, compiled=too_large))
    assert tried and not any(c.model.decoder.remat.startswith("offload") for c in tried)
    assert any("not tried" in trial.outcome for trial in trials)


@needs_plugin
@pytest.mark.slow
def test_the_command_prints_a_plan_and_no_lines_of_the_plugin(tmp_path):
    text = tiny_config.write_text(tmp_path / "text.txt")
    # Of an environment that names the CPU, JAX would not ask the plugin for more than its lines.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.plan", f"--config=tests/tiny_config.py:{text}",
         "--topology=h100:2"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "FITS, compiled in" in result.stdout and "by XLA:GPU" in result.stdout


@needs_plugin
@pytest.mark.slow
@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia"), reason="there is a GPU here")
def test_a_machine_with_the_plugin_and_no_gpu_still_trains_on_the_cpu(tmp_path):
    text = tiny_config.write_text(tmp_path / "text.txt")
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.train", f"--config=tests/tiny_config.py:{text}",
         f"--workdir={tmp_path / 'run'}", "--config.train.num_steps=1"], cwd=ROOT,
        env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "cpu" in result.stdout
    own = ("started from scratch", "attention: ")
    assert all(line.startswith(own) for line in result.stderr.splitlines()), result.stderr
