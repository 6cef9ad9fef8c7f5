"""Rehearsals: compiled for TPUs that are not here, for simulated CPUs, and without a compiler."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from t5x_lite.build import build
from t5x_lite.config import RunConfig, replace
from t5x_lite.cost import hardware
from t5x_lite.errors import UserError
from t5x_lite.layers.config import AttentionConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel.pipeline_schedules import PipelineConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import make, rehearse, search, show
from t5x_lite.planning.make import make_plan
from t5x_lite.planning.rehearse import Compiled
from t5x_lite.training.objectives import ObjectiveConfig
from tests import tiny, tiny_config

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS, WIDTH, HIDDEN, VOCAB, LENGTH, ROWS = 3, 128, 256, 256, 128, 64
KEYS = {"fits", "argument_bytes", "temp_bytes", "peak_bytes", "model_flops", "collectives",
        "bound_seconds", "bound_mfu"}


def lm(**mesh: int) -> RunConfig:
    """A decoder-only run with full rematerialisation in bf16: its tiles are whole ones."""
    block = BlockConfig(AttentionConfig(num_heads=4, head_dim=32), None,
                        MLPConfig(mlp_dim=HIDDEN, gated=False))
    stack = StackConfig((SegmentConfig((block,), LAYERS),), causal=True, remat="full",
                        position=PositionConfig("rotary"))
    base = tiny.seq2seq()
    return dataclasses.replace(
        base, precision="bf16", objective=ObjectiveConfig("lm"), mesh=MeshConfig(**mesh),
        model=ModelConfig("decoder_only", vocab_size=VOCAB, embed_dim=WIDTH, encoder=None,
                          decoder=stack),
        data=dataclasses.replace(base.data, targets_length=LENGTH),
        train=dataclasses.replace(base.train, global_batch_size=ROWS))


def counted(name: str) -> rehearse.Topology:
    """GPUs that nothing compiles for, as without the extra plan_gpu."""
    return rehearse.topology(name, count_only=True)


SPLIT = {"data": 1, "fsdp": 4, "tensor": 2}
BY_HAND_FLOPS = 3 * ROWS * LENGTH * (   # forward and twice that backward
    LAYERS * (2 * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN) + 4 * LENGTH * WIDTH)
    + 2 * WIDTH * VOCAB)
# Of a causal row's LENGTH keys a query sees (LENGTH + 1) / 2: the others may be skipped.
LEAST_FLOPS = BY_HAND_FLOPS - 3 * ROWS * LENGTH * LAYERS * 4 * WIDTH * (LENGTH - 1) / 2


@functools.cache
def planned(topology: str, num_slices: int = 1, accumulation: int = 1) -> make.Plan:
    """The plan of lm() split by fsdp=4 and tensor=2."""
    if not topology.startswith(("cpu", "h100", "v100")):
        pytest.importorskip("libtpu", reason="pip install libtpu to compile for TPUs here")
    config = replace(lm(**SPLIT), "train.accumulation", accumulation)
    return make_plan(config, rehearse.topology(topology, num_slices, count_only=True))


def by_kind(plan: make.Plan) -> dict:
    return {(line.kind, line.axes): line for line in plan.collectives}


@pytest.mark.parametrize("topology, hbm", [("v5e:2x4", 15.75), ("v4:2x2x2", 30.75)])
def test_a_step_compiled_for_eight_tpus(topology, hbm):
    plan = planned(topology)
    assert plan.fits is True and plan.compiled.note == ""
    assert plan.topology.num_chips == 8 and plan.topology.hbm_bytes == hbm * 2**30
    # Forward and recomputation gather the six bf16 kernels of each layer, the loss the output
    # projection once, each split over tensor=2 already.
    gathers = by_kind(plan)["all-gather", ("fsdp",)]
    layer = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
    assert gathers.calls_per_step == LAYERS * 2 * 6 + 1
    assert gathers.bytes_per_step == LAYERS * 2 * layer + VOCAB * WIDTH
    # Megatron: two sums over tensor a layer in each of forward, recomputation and backward; one
    # more for the embedding's lookup, one for the loss, one of a few bytes for norms, and one of the
    # look whether the updated state is finite.
    reduces = by_kind(plan)["all-reduce", ("tensor",)]
    assert reduces.calls_per_step == LAYERS * 6 + 4
    assert not any(line.replaces_gather or line.network == "dcn" for line in plan.collectives)
    assert plan.model_flops == BY_HAND_FLOPS
    assert plan.roofline.compute_seconds == pytest.approx(
        LEAST_FLOPS / 8 / plan.topology.chip.peak_flops["bf16"])
    assert 0 < plan.roofline.bound_mfu < 1
    # The compiler pads small arrays to tiles.
    assert sum(plan.arguments.values()) <= plan.argument_bytes < 2 * sum(plan.arguments.values())
    assert plan.peak_bytes >= plan.argument_bytes + plan.temp_bytes


@pytest.mark.parametrize("accumulation, size", [(1, 2), (2, 4)])
def test_between_two_slices_only_gradients_travel_once_a_step(accumulation, size):
    plan = planned("v5e:2x4", 2, accumulation)
    assert plan.program.mesh.shape["slice"] == 2 and plan.topology.num_chips == 16
    between = [line for line in plan.collectives if line.network == "dcn"]
    assert {(line.kind, line.axes) for line in between} == {("all-reduce", ("slice",))}
    # Gradients split over fsdp=4 and tensor=2, norms whole: in bf16 as the layers make them, in
    # float32 once micro-batches were added up. The embedding's, this small, may cross unsplit.
    gradients = size * plan.program.num_params / 8
    assert gradients <= sum(line.bytes_per_step for line in between) < 1.3 * gradients


def test_simulated_cpus_need_no_libtpu():
    plan = planned("cpu:8")
    assert plan.fits is True and plan.temp_bytes > 0
    assert by_kind(plan)["all-gather", ("fsdp",)].calls_per_step >= LAYERS * 2 * 6
    assert plan.roofline.bound_seconds is None and plan.cost is None
    text = show.screen(plan)
    assert "FITS, compiled in" in text and "all-gather" in text


def test_gpus_give_what_needs_no_compiler():
    plan = planned("h100:8")
    assert plan.fits is None and plan.collectives is None and plan.temp_bytes is None
    assert plan.argument_bytes == sum(plan.arguments.values())
    assert plan.roofline.compute_seconds == pytest.approx(LEAST_FLOPS / 8 / 989.4e12)
    assert plan.roofline.model_seconds == pytest.approx(BY_HAND_FLOPS / 8 / 989.4e12)
    hours = 4 * BY_HAND_FLOPS / 989.4e12 / make.DEFAULT_MFU / 3600   # the run has 4 steps
    assert plan.cost.chip_hours == pytest.approx(hours)
    assert plan.cost.megawatt_hours == pytest.approx(hours * 700 * 1.10 / 1e6)
    assert "FITS OR NOT: unknown" in show.screen(plan)


def test_a_v100_has_no_bfloat16_units():
    v100 = counted("v100:8")
    plan = make_plan(lm(**SPLIT), v100)
    assert any("no bfloat16 units: use --config.precision=fp16" in note for note in plan.notes)
    half = make_plan(replace(lm(**SPLIT), "precision", "fp16"), v100)
    assert half.roofline.bound_seconds and not any("units" in note for note in half.notes)


def test_described_gpus_have_a_host_to_offload_to():
    whole = planned("h100:8")
    config = replace(lm(**SPLIT), "sharding.offload_optimizer", True)
    plan = make_plan(config, counted("h100:8"))
    assert plan.host_bytes + plan.arguments["opt_state"] == whole.arguments["opt_state"]
    assert plan.host_bytes > 0.9 * whole.arguments["opt_state"]


def test_on_cpus_too_offloaded_state_is_beside_the_arguments():
    config = replace(tiny.seq2seq(), "sharding.offload_optimizer", True)
    plan = make_plan(config, rehearse.topology("cpu:2"))
    assert plan.host_bytes > 0.9 * plan.arguments["params"]
    assert plan.argument_bytes == sum(plan.arguments.values()) + 4   # the step's number
    metrics = plan.peak_bytes - plan.argument_bytes - plan.temp_bytes
    assert 0 <= metrics < 2000
    assert plan.compiled.host_argument_bytes == plan.host_bytes


def test_a_plan_for_gpus_where_no_cudnn_is_counts_other_attention():
    long = replace(lm(**SPLIT), "data.targets_length", 2048)   # where cuDNN's would be taken
    plan = make_plan(long, counted("h100:8"))
    assert plan.activation_bytes > 0
    assert any("without cuDNN's attention" in note for note in plan.notes)


def test_frozen_weights_take_less_time_and_are_not_written():
    whole = planned("h100:8")
    config = replace(lm(**SPLIT), "peft", PeftConfig("lora", rank=4))
    plan = make_plan(config, counted("h100:8"))
    kernels = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    # No weight gradients of the layers, nor of the tied logits; nor input gradients of layer 1.
    first = 2 * kernels / LAYERS + 8 * LENGTH * WIDTH
    saved = ROWS * LENGTH * (2 * kernels + 2 * WIDTH * VOCAB + first)
    assert plan.model_flops == BY_HAND_FLOPS - saved
    assert plan.roofline.compute_seconds < 0.75 * whole.roofline.compute_seconds
    frozen = rehearse.frozen_bytes(plan.program)
    assert 0.9 * plan.arguments["params"] < frozen < plan.arguments["params"]
    moved = plan.roofline.hbm_seconds * plan.topology.chip.hbm_bytes_per_second
    assert moved == pytest.approx(sum(plan.arguments.values()) * 2
                                  - plan.arguments["batch"] - frozen)


@pytest.mark.parametrize("schedule, again", [("gpipe", 1), ("1f1b", 3)])
def test_a_pipeline_shows_its_bubble_and_its_bound_waits_for_it(schedule, again):
    config = replace(lm(data=2, stage=3), "model.decoder.pipeline", PipelineConfig(schedule, 6))
    config = replace(config, "train.global_batch_size", 60)
    plan = make_plan(config, counted("h100:6"))
    logits = 3 * 60 * LENGTH * 2 * WIDTH * VOCAB
    layers = LEAST_FLOPS * 60 / ROWS - logits
    busy = 6 / (6 + 3 - 1)    # micro-batches of 6 of as many ticks and 3 - 1 more
    assert plan.roofline.compute_seconds == pytest.approx(
        (layers / busy + logits) / 6 / 989.4e12)
    text, found = show.screen(plan), show.to_json(plan)
    assert f"{schedule}, 6 micro-batches, 25.0% of the stages' time idle" in text
    assert found["pipeline"]["decoder"]["bubble"] == pytest.approx(1 - busy)
    # Full rematerialisation repeats the forward pass once, 1f1b twice more.
    forward = (BY_HAND_FLOPS * 60 / ROWS - logits) / 3
    assert found["recomputed_flops"] == pytest.approx(again * forward)
    assert "recomputed" in text


def test_published_runs_are_derived_to_5_percent():
    """Every derived figure of the table stands beside the published one."""
    text = show.published()
    for name, derived in (("GPT-3", "14.77 (14.8)"), ("Switch Transformer", "178.9 (179)"),
                          ("Evolved Transformer", "3.2")):
        assert name in text and derived in text
    off = [float(share) for share in re.findall(r"([0-9.]+)% +│\n", text)]
    assert len(off) == 6 and max(off) < 5
    assert "355 GPU-years (355)" in text


def test_options_take_the_place_of_the_table():
    given = make.Assumptions(mfu=0.5, watts=100.0, pue=2.0, kg_per_kwh=0.3,
                                 kg_per_kwh_net=0.1, dollars_per_chip_hour=3.0)
    cost = make_plan(lm(**SPLIT), counted("h100:8"), given).cost
    assert cost.power_source == "given"
    assert cost.megawatt_hours == pytest.approx(cost.chip_hours * 200 / 1e6)
    assert cost.tonnes_co2e_gross == pytest.approx(3 * cost.tonnes_co2e_net)
    assert cost.tonnes_co2e_net == pytest.approx(0.1 * cost.megawatt_hours)
    assert cost.dollars == pytest.approx(3 * cost.chip_hours)


def test_the_command_prints_one_json_object_and_nothing_else(tmp_path):
    text = tiny_config.write_text(tmp_path / "text.txt")
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.plan", f"--config=tests/tiny_config.py:{text}",
         "--topology=cpu:2", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert KEYS <= found.keys()
    assert found["mesh"] == {"data": 2} and found["fits"] is True
    assert {line["kind"] for line in found["collectives"]} == {"all-reduce"}
    assert result.stdout.count("\n") == 1


def test_a_plan_is_one_process_wherever_it_runs():
    """Not one of a Slurm step's: it would wait for the others. And --published has JSON too."""
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1",
            "SLURM_STEP_NODELIST": "no-host-[1-2]"}
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.plan", "--published", "--json"], cwd=ROOT,
        env={**os.environ, **step}, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert found["gpt3_gpu_years"] == pytest.approx(355, rel=0.005)
    for run in found["runs"]:
        assert run["derived"]["megawatt_hours"] == pytest.approx(run["megawatt_hours"], rel=0.05)
    assert len(found["runs"]) == 6


def test_json_of_a_plan_without_a_compiler():
    found = json.loads(json.dumps(show.to_json(planned("h100:8"))))
    assert KEYS <= found.keys()
    assert found["collectives"] is None and found["bound_by"] in ("compute", "HBM")


def test_activations_follow_rematerialisation_and_accumulation():
    def kept(**changes):
        config = replace(tiny.seq2seq(remat=changes.get("remat", "none")), "train.accumulation",
                         changes.get("accumulation", 1))
        return rehearse.activation_bytes(build(config, jax.devices()[:1]))
    whole = kept()
    assert kept(remat="full") < kept(remat="dots") < whole
    assert whole / 2 <= kept(accumulation=2) < 0.6 * whole


# --- Search -----------------------------------------------------------------------------------

def fake_compiler(monkeypatch, temp_bytes):
    """compile_step replaced: `temp_bytes(config, mesh)` of temporaries and no collectives."""
    def compile_step(program):
        temp = temp_bytes(program.config, dict(program.mesh.shape))
        arguments = sum(rehearse.argument_bytes(program).values())
        return Compiled(0.0, True, temp, arguments, arguments, arguments + temp, ())
    monkeypatch.setattr(rehearse, "compile_step", compile_step)


def small_machine(hbm_bytes: int) -> rehearse.Topology:
    """Eight devices of a chip with this much memory, "compiled for" by fake_compiler."""
    described = counted("h100:8")
    chip = dataclasses.replace(hardware.lookup("h100"), hbm_bytes=hbm_bytes, interconnect=None,
                               usable_hbm_bytes={}, name="small")
    return dataclasses.replace(described, chip=chip, compiler="fake")


def test_search_rematerialises_first_and_then_accumulates(monkeypatch):
    config = replace(lm(data=8), "model.decoder.remat", "none")
    fake_compiler(monkeypatch, lambda config, mesh: 2**30 // config.train.accumulation
                  // (4 if config.model.decoder.remat == "full" else 1))
    first = make_plan(config, small_machine(2**27 + 2**24))
    assert first.fits is False
    assert "--config.model.decoder.remat=full" in show.screen(first)
    trials = search.search(first)
    assert [t.changes for t in trials][:3] == [
        "as given", "--config.model.decoder.remat=full", "--config.train.accumulation=2"]
    assert [t.plan.fits for t in trials[:3]] == [False, False, True]
    found = make.best(trials).plan
    assert found.fits and found.config.model.decoder.remat == "full"
    assert found.config.train.accumulation == 2


def test_search_splits_a_state_that_is_too_large_without_compiling_what_cannot_fit(monkeypatch):
    compiled = []

    def temp_bytes(config, mesh):
        compiled.append(mesh)
        return 1000
    fake_compiler(monkeypatch, temp_bytes)
    config = lm(data=8)
    whole = rehearse.argument_bytes(build(config, jax.devices()[:8]))
    first = make_plan(config, small_machine(whole["params"] // 2))
    assert first.compiled is None and first.fits is False
    trials = search.search(first)
    assert make.best(trials).plan.fits
    assert compiled and all(mesh["fsdp"] * mesh["tensor"] > 2 for mesh in compiled)
    assert any(t.outcome.startswith("too large") for t in trials)
    text = show.screen(first, trials)
    assert "best: --config.mesh.data=" in text


def test_a_search_goes_on_where_the_compiler_fails_and_shows_each_trial(monkeypatch, caplog):
    def temp_bytes(config, mesh):
        if mesh["tensor"] > 1:
            raise jax.errors.JaxRuntimeError("INTERNAL: a fault of the compiler\nmore")
        return 1000
    fake_compiler(monkeypatch, temp_bytes)
    first = make_plan(lm(data=8), small_machine(2**30))
    with caplog.at_level("INFO", "t5x_lite.planning.search"):
        trials = search.search(first, most_compilations=4)
    failed = [t for t in trials if t.outcome == "the compiler failed: INTERNAL: a fault of the "
                                                "compiler"]
    assert failed and failed[0].plan is None
    assert sum("refused" not in trial.outcome for trial in trials) == 1 + 4
    assert [record.getMessage() for record in caplog.records] == [
        f"tried {trial.changes}: {trial.outcome}" for trial in trials]


def test_without_a_compiler_a_search_counts_the_state_alone(monkeypatch):
    monkeypatch.setattr(rehearse, "compile_step", lambda _: pytest.fail("compiled"))
    config = lm(data=8)
    whole = rehearse.argument_bytes(build(config, jax.devices()[:8]))
    small = dataclasses.replace(small_machine(whole["params"] // 2), compiler="")
    first = make_plan(config, small)
    assert first.fits is False
    trials = search.search(first)
    outcomes = [trial.outcome for trial in trials]
    assert outcomes[0].endswith("too large") and all(t.plan is None for t in trials[1:])
    assert 4 <= sum("leaves" in outcome for outcome in outcomes) <= 6
    text = show.screen(first, trials)
    assert "nothing that was tried fits" not in text
    assert "the state leaves room --config.mesh.data=" in text
    assert "…" not in text.partition("┃ outcome")[2].partition("the state leaves")[0]
    assert "To make it fit, in this order" in text
    roomy = dataclasses.replace(first, topology=counted("h100:8"))
    text = show.screen(roomy, search.search(roomy))
    assert "leaves room as it is" in text and "To make it fit" in text


# --- Errors, all before compiling -------------------------------------------------------------

@pytest.mark.parametrize("name, message", [
    ("v9:2x2", "no such topology.*v5e: 1x1 2x2 2x4"),
    ("v5e", "shape of the slice is missing, such as v5e:2x4.*v5e: 1x1"),
    ("H10", "did you mean 'h100'"), ("h100", "write h100:N"), ("V4:3x3x3", "v4 has no slice"),
    ("v5e:3x5", "no slice of that shape.*Known"), ("v4:2x2x3", "did you mean '2x2x"),
    ("h100:many", "h100:8"), ("cpu:0", "cpu:8"), ("cpu:99", "8 CPU devices"),
    ("h10:8", "did you mean 'h100'")])
def test_a_topology_that_does_not_exist(name, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        rehearse.topology(name)


def test_capitals_name_the_same_machine():
    assert rehearse.topology("H100:8") == counted("h100:8")


def test_slices_are_of_tpus_and_agree_with_the_mesh():
    with pytest.raises(UserError, match="for TPUs only"):
        rehearse.topology("h100:8", 2)
    with pytest.raises(UserError, match="mesh.slice=4 but --num_slices=1"):
        make_plan(lm(slice=4), counted("h100:8"))


def test_without_libtpu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(rehearse.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install .*\[cpu,plan\]'):
        rehearse.topology("v5e:2x4")


@pytest.mark.parametrize("mesh, message", [
    ({"data": 1, "fsdp": 3}, "needs 3 devices, but there are 8"),
    ({"data": 1, "tensor": 8}, "4 kv_heads cannot be split 8 ways"),
    ({"data": 1, "stage": 2, "fsdp": 4}, "model.decoder.*3")])
def test_what_the_mesh_cannot_be(mesh, message, monkeypatch):
    monkeypatch.setattr(rehearse, "compile_step", lambda _: pytest.fail("compiled"))
    with pytest.raises(UserError, match=message):
        make_plan(lm(**mesh), rehearse.topology("cpu:8"))


def test_assumptions_are_checked():
    for bad in ({"mfu": 0.0}, {"mfu": 40.0}, {"pue": 0.5}, {"watts": -1.0}):
        with pytest.raises(UserError, match=f"--{next(iter(bad))}="):
            make.Assumptions(**bad)


# --- What the compiler may do -----------------------------------------------------------------

@pytest.mark.parametrize("message, size", [
    ("Ran out of memory on HBM, the total memory required for HLO temporaries (564.56G) exceeds "
     "available HBM (15.75G).", 564.56 * 2**30),
    ("Ran out of memory in memory space hbm. Used 21.30G of 15.75G hbm.", 21.3 * 2**30),
    ("something else", None)])
def test_bytes_of_an_overflow(message, size):
    assert rehearse.needed_bytes(message) == (size and round(size))


class Broken:
    """A step that lowers, and then fails as libtpu may."""

    def __init__(self, error: str):
        self.error = error

    def activate(self):
        return contextlib.nullcontext()

    def largest_program(self):
        return self

    def abstract_batch(self):
        return None

    abstract_state = None
    mesh = types.SimpleNamespace(devices=np.array(jax.devices()))

    def lower(self, *_):
        return self

    def compile(self, compiler_options=None):
        raise jax.errors.JaxRuntimeError(self.error)

    as_text = compile


def test_more_memory_than_there_is_is_a_verdict_and_another_failure_is_not():
    found = rehearse.compile_step(Broken("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total "
                                         "memory required for HLO temporaries (3.0G) exceeds"))
    assert (found.fits, found.temp_bytes, found.collectives) == (False, 3 * 2**30, None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        rehearse.compile_step(Broken("INTERNAL: a fault of the compiler"))


def test_a_program_that_cannot_be_printed_is_still_a_plan():
    program = build(lm(data=8), jax.devices())
    found, note = rehearse._collectives(Broken("INTERNAL: no text\nmore"), program)
    assert found is None and note.endswith("INTERNAL: no text")
