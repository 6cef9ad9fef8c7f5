"""States that the device never holds whole: parameters in the host's memory, moments on disk.

Bits are compared in a process whose processor is told to have no fused multiply-add: which of a program's
multiplications and additions it fuses is XLA's choice, and another for the same sum in another program.
"""

import dataclasses
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.build import build
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.checkpoints.manager import Checkpointer
from t5x_lite.config import ShardingConfig, replace, to_json
from t5x_lite.errors import UserError
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel import disk
from t5x_lite.parallel.sharding import MeshConfig
from tests import tiny

STEPS = 3
CASES = [   # optimizer, devices on fsdp, micro-batches, remat, clipping (0: none)
    ("adamw", 1, 1, "full", 0.1), ("adamw", 4, 2, "dots", 0.0), ("adafactor", 4, 2, "full", 0.1),
    ("adafactor", 1, 1, "save:mlp_hidden", 0.0)]


def of(offload, folder="", name="adamw", fsdp=1, accumulation=1, remat="full", clip=0.0):
    base = tiny.seq2seq(remat=remat, dropout=0.1)
    optimizer = dataclasses.replace(base.optimizer, name=name, weight_decay=0.1, clip_norm=clip)
    return dataclasses.replace(
        base, optimizer=optimizer, mesh=MeshConfig(data=1, fsdp=fsdp),
        sharding=ShardingConfig(offload=offload, offload_folder=str(folder)),
        train=dataclasses.replace(base.train, accumulation=accumulation))


def on_disk_or_not(nested):
    return {p: np.array(x.whole() if disk.is_on_disk(x) else x) for p, x in tree.flatten(nested).items()}


def steps(program, state, seeds):
    """(the state, metrics of each step) after a step on the batch of each seed."""
    step, found = program.jit_train_step(), []
    with program.activate():
        for seed in seeds:
            state, sums = step(state, {name: jax.device_put(x, program.batch_sharding)
                                       for name, x in tiny.batch(seed=seed).items()})
            found.append({name: np.asarray(pair) for name, pair in sums.items()})
    return state, found


def trained(config):
    program = build(config, jax.devices()[:config.mesh.fsdp])
    state, found = steps(program, program.init_state(), range(STEPS))
    return on_disk_or_not(state), found


def compare(offload, folder, case):
    """Asserts that STEPS steps are the ordinary ones bit for bit; called in a process of its own.

    Of parameters in the host's memory the gradients' norm is a sum in another order.
    """
    expected, metrics = trained(of("none", "", *case))
    state, found = trained(of(offload, folder, *case))
    free = {"grad_norm"} if offload == "params_host" else set()
    exact = not (free and case[-1])
    for got, want in zip(found, metrics, strict=True):
        assert got.keys() == want.keys()
        for name in want.keys() - (free if exact else want.keys()):
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
        np.testing.assert_allclose(got["grad_norm"], want["grad_norm"], rtol=1e-6)
    assert state.keys() == expected.keys()
    for path, want in expected.items():
        if exact:
            np.testing.assert_array_equal(state[path], want, err_msg=path)
        else:
            np.testing.assert_allclose(state[path], want, rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("offload", ["optimizer_disk", "params_host"])
def test_steps_equal_the_ordinary_ones_bit_for_bit(offload, case, tmp_path):
    program = f"from tests.training import test_layerwise as t; t.compare({offload!r}, {str(tmp_path)!r}, {case!r})"
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_max_isa=SSE4_2"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1200,
                          env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """(program, state on disk after two steps, its values, metrics)."""
    program = build(of("optimizer_disk", tmp_path_factory.mktemp("scratch"), clip=0.1, fsdp=4), jax.devices()[:4])
    state, metrics = steps(program, program.init_state(), [0, 1])
    return program, state, on_disk_or_not(state), metrics


@pytest.mark.slow
def test_two_steps_on_disk_equal_the_ordinary_ones_closely(on_disk):
    """Close, and not the same: see above. The parameters of the first step are those of any run."""
    _, _, values, metrics = on_disk
    program = build(of("none", clip=0.1, fsdp=4), jax.devices()[:4])
    state, expected = steps(program, program.init_state(), [0, 1])
    for name, pair in expected[0].items():
        np.testing.assert_allclose(metrics[0][name], pair, rtol=1e-5, err_msg=name)
    tiny.assert_close(tree.unflatten(values), jax.tree.map(np.asarray, state), 1e-4)


def test_moments_are_in_files_that_have_no_name(on_disk):
    program, state, values, _ = on_disk
    moments = disk.kept(state)
    assert {x.path.split("/")[1] for x in moments} == {"mu", "nu"}
    assert {x.path for x in moments} == {p for p, x in values.items() if p.startswith("opt_state/") and x.ndim}
    assert not os.listdir(program.config.sharding.offload_folder)
    arrays = jax.tree.leaves(state)   # what the devices hold: no moment
    assert len(arrays) == len(program.table) + 2   # step and count


def test_a_checkpoint_is_the_truth_and_resumes_bit_for_bit(on_disk, tmp_path):
    """What stands in the files after the save is nothing to the run that resumes; a run with the state
    on the devices goes on from the same checkpoint."""
    program, state, values, _ = on_disk
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(2, state, {}, to_json(program.config))
        whole, metrics = steps(program, state, [2, 3])
        whole = on_disk_or_not(whole)
        resumed = checkpointer.restore_latest(program.abstract_state).state
        for path, x in on_disk_or_not(resumed).items():
            np.testing.assert_array_equal(x, values[path], err_msg=path)
        again, same = steps(program, resumed, [2, 3])
        jax.tree.map(np.testing.assert_array_equal, (whole, metrics), (on_disk_or_not(again), same))
        plain = build(of("none", clip=0.1, fsdp=4), jax.devices()[:4])
        for path, x in on_disk_or_not(checkpointer.restore_latest(plain.abstract_state).state).items():
            np.testing.assert_array_equal(x, values[path], err_msg=path)


def an_array(folder, shape=(4, 2)):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return disk.OnDisk("opt_state/mu/w", shape, np.dtype("float32"), place, str(folder))


def test_pieces_are_read_ahead_and_never_before_they_are_written(tmp_path, monkeypatch):
    """Three passes over four layers, with a disk that is slow to write: each finds what the last left."""
    array = an_array(tmp_path)
    array.fill(np.zeros((4, 2), np.float32))
    visits = disk.Visits([(layer, [array], layer) for layer in range(4)])
    write = disk.OnDisk.write_part
    monkeypatch.setattr(disk.OnDisk, "write_part", lambda *args: (time.sleep(0.02), write(*args)))
    for turn in range(3):
        for layer in range(4):
            value, = visits.take(layer)
            assert value.tolist() == [[turn * (layer + 1)] * 2]
            assert len(visits._reading) <= disk.AHEAD and len(visits._writing) <= disk.BEHIND
            visits.put(layer, [value + layer + 1])
    assert array.whole()[:, 0].tolist() == [3, 6, 9, 12]
    array.fill(np.ones((4, 2), np.float32))   # a restored checkpoint: what was read ahead is void
    assert visits.take(0)[0].tolist() == [[1, 1]]


def test_what_cannot_be_is_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="offload_folder is empty.*set --config.sharding.offload_folder"):
        an_array("").whole()
    with pytest.raises(UserError, match="offload_folder='/no/such'.*No such file.*exists"):
        an_array("/no/such").whole()
    with pytest.raises(UserError, match=r"GiB left, and opt_state/mu/w needs 16384.00 more: free some"):
        an_array(tmp_path, (2**20, 2**22)).whole()
    with pytest.raises(UserError, match="sharding.offload='disk'.*one of none, optimizer_host"):
        of("disk")
    one = jax.devices()[:1]
    for offload, field, value, match in (
            ("optimizer_disk", "train.bad_steps", "skip", "bad_steps=skip.*set train.bad_steps=stop"),
            ("optimizer_disk", "precision", "bf16_params_sr", "bf16_params_sr.*set precision=bf16"),
            ("params_host", "precision", "fp16", "precision=fp16: set precision=bf16"),
            ("params_host", "model.decoder.remat", "none", "decoder.remat=none.*decoder.remat=full"),
            ("params_host", "model.encoder.scan", False, "encoder.scan=False: set model.encoder.scan=True"),
            ("params_host", "peft", PeftConfig("lora"), "peft.method=lora: set"),
            ("params_host", "sharding.zero", 2, "sharding.zero=2: set sharding.zero=3")):
        with pytest.raises(UserError, match=f"offload={offload} cannot be combined with .*{match}"):
            build(replace(of(offload, tmp_path), field, value), one)
    with pytest.raises(UserError, match="mesh.stage=2: set mesh.stage=1"):
        build(replace(of("optimizer_disk", tmp_path), "mesh", MeshConfig(data=1, stage=2)), jax.devices()[:2])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for offload in ("optimizer_disk", "params_host"):
        with pytest.raises(UserError, match=f"offload={offload} .* 2 processes: set sharding.offload=optimizer_host"):
            build(of(offload, tmp_path), one)


def test_parameters_and_gradients_of_stacks_are_in_the_hosts_memory():
    program = build(of("params_host", accumulation=2), jax.devices()[:1])
    kinds = {p: x.sharding.memory_kind for p, x in tree.flatten(program.abstract_state["params"]).items()}
    assert {kind for p, kind in kinds.items() if "/segment_" in p} == {"pinned_host"}
    assert "pinned_host" not in {kind for p, kind in kinds.items() if "/segment_" not in p}
    state, found = steps(program, program.init_state(), [0])
    assert {p: x.sharding.memory_kind for p, x in tree.flatten(state["params"]).items()
            if "/segment_" in p} == {p: kind for p, kind in kinds.items() if "/segment_" in p}
    assert found[0]["finite"].tolist() == [1, 1]
    plain = build(of("none", accumulation=2), jax.devices()[:1])   # closely: bits are compared above, in minutes
    expected, wanted = steps(plain, plain.init_state(), [0])
    np.testing.assert_allclose(found[0]["grad_norm"], wanted[0]["grad_norm"], rtol=1e-5)
    tiny.assert_close(jax.tree.map(np.asarray, state), jax.tree.map(np.asarray, expected), 1e-4)
