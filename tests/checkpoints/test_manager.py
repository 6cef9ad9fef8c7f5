import json
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from t5x_lite.checkpoints import digests, format as checkpoint_format, manager
from t5x_lite.checkpoints.manager import (
    CheckpointConfig,
    Checkpointer,
    restore_or_init,
    restore_params,
)
from t5x_lite.errors import UserError
from tests.checkpoints import checkpoint_worker as worker

ROOT = pathlib.Path(__file__).resolve().parents[2]


def place(tree, mesh, *spec):
    """Matrices by `spec`, everything else replicated."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(
        mesh, PartitionSpec(*spec) if x.ndim == 2 else PartitionSpec())), tree)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                        state)


def mesh_of(*shape):
    names = ("fsdp", "tensor")[:len(shape)]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(shape))


def adam_state(mesh, *spec):
    """A state with named tuples, bfloat16, int32 and a scalar."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"wi": {"kernel": jax.random.normal(keys[0], (16, 8))},
              "wo": {"kernel": jax.random.normal(keys[1], (8, 16), jnp.bfloat16)}}
    state = {"params": params, "opt_state": optax.adamw(1e-3).init(params), "step": jnp.int32(7)}
    return place(state, mesh, *spec)


def assert_same_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b),
                            strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def save_worker_steps(workdir, *steps, **config):
    mesh = worker.make_mesh()
    with Checkpointer(workdir, CheckpointConfig(**config)) as ckpt:
        for step in steps:
            ckpt.save(step, worker.make_state(mesh, step),
                      worker.iterator_states(step, range(worker.NUM_SHARDS)), '{"seed": 0}')


def files_below(folder):
    return {p: p.read_bytes() for p in sorted(pathlib.Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("saved")
    save_worker_steps(workdir, 1, 2)
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


# --- what is stored comes back -------------------------------------------------------------


@pytest.mark.parametrize("async_save", [True, False])
@pytest.mark.parametrize("shape,spec", [((1,), ("fsdp",)), ((8,), (None, "fsdp")),
                                        ((4, 2), ("fsdp", "tensor"))])
def test_everything_comes_back_on_another_mesh(tmp_path, shape, spec, async_save):
    state = adam_state(mesh_of(2, 4), "tensor", "fsdp")
    config = {"model": {"d": 8}, "rate": 0.1, "none": None}
    with Checkpointer(tmp_path, CheckpointConfig(async_save=async_save)) as ckpt:
        ckpt.save(7, state, {0: b"zero", 3: b"", 1: bytes(range(256))}, json.dumps(config))
        ckpt.wait()
        wanted = abstract(adam_state(mesh_of(*shape), *spec))
        found, iterator_states, record = ckpt.restore(7, wanted)
    assert_same_bits(found, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(found),
                                                        jax.tree.leaves(wanted), strict=True))
    assert list(iterator_states.items()) == [(0, b"zero"), (1, bytes(range(256))), (3, b"")]
    assert record.config == config and record.step == 7
    assert str(record.arrays["params/wo/kernel"]) == "bfloat16[8,16]"
    assert "opt_state/0/mu/wi/kernel" in record.arrays


@pytest.mark.parametrize("num_devices", [1, 8])
def test_donating_the_state_right_after_save_changes_nothing(tmp_path, num_devices):
    # On the CPU orbax may write straight from the arrays' memory: 64 MiB are still being
    # compressed while the next steps run in place.
    mesh = mesh_of(num_devices)
    make = jax.jit(lambda: {f"w{i}": jnp.full((1024, 4096), i + 0.5) for i in range(4)})
    state = place(make(), mesh, "fsdp")
    next_step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    next_step(place(make(), mesh, "fsdp"))  # compiled before the race
    with Checkpointer(tmp_path, CheckpointConfig()) as ckpt:
        wanted = abstract(state)
        ckpt.save(1, state, {}, "{}")
        for _ in range(3):
            state = next_step(state)
        jax.block_until_ready(state)
        ckpt.wait()
        restored = ckpt.restore(1, wanted).state
    assert_same_bits(restored, make())
    # What was restored may be donated as well.
    np.testing.assert_array_equal(next_step(restored)["w3"], np.full((1024, 4096), 8.0))


def test_digest_sees_a_flipped_bit_zeros_and_exchanged_blocks_but_no_mesh():
    x = jnp.arange(64.0).reshape(8, 8).astype(jnp.bfloat16)
    def digest_of(x):
        return int(digests.digests_of({"x": x}).bits["x"])

    digest = digest_of(x)
    for mesh, spec in ((mesh_of(8), ("fsdp",)), (mesh_of(4, 2), ("tensor", "fsdp"))):
        assert digest_of(place(x, mesh, *spec)) == digest
    for other in (x.at[3, 3].multiply(-1), x.at[4:].set(0), x[::-1], x[:, ::-1], x.T,
                  jnp.roll(x, 1, axis=0)):
        assert digest_of(other) != digest
    for dtype in (jnp.int8, jnp.int32, jnp.bool_, jnp.float8_e4m3fn, jnp.float32):
        assert digest_of(jnp.array([1, 0, 1], dtype)) != digest_of(jnp.array([1, 1, 0], dtype))


def test_keeps_the_last_and_every_kth(tmp_path):
    save_worker_steps(tmp_path, *range(1, 12), keep_last=2, keep_every=4)
    assert manager.all_steps(tmp_path) == [4, 8, 10, 11]


def test_saving_a_step_again_does_nothing(workdir):
    before = files_below(workdir)
    save_worker_steps(workdir, 2)
    assert files_below(workdir) == before


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    disk_is_free = threading.Event()
    write = checkpoint_format.RecordHandler._write

    async def write_slowly(*args):
        assert disk_is_free.wait(60)
        await write(*args)

    monkeypatch.setattr(checkpoint_format.RecordHandler, "_write", write_slowly)
    mesh = worker.make_mesh()
    with Checkpointer(tmp_path, CheckpointConfig()) as ckpt:
        ckpt.save(1, worker.make_state(mesh, 1), {}, "{}")
        assert ckpt.latest() is None  # not committed, and here we are
        disk_is_free.set()
        ckpt.wait()
        assert ckpt.latest() == 1


def test_what_orbax_complains_of_is_dropped_and_nothing_else(monkeypatch):
    passed = []
    monkeypatch.setattr(sys, "unraisablehook", passed.append)
    checkpoint_format.quiet_orbax()
    for folder in ("orbax", "elsewhere"):
        code = types.SimpleNamespace(co_filename=f"/lib/{folder}/read.py")
        sys.unraisablehook(types.SimpleNamespace(
            object=types.SimpleNamespace(cr_code=code), exc_value=Exception()))
        assert len(passed) == (folder == "elsewhere")
        for level in (logging.WARNING, logging.ERROR):
            record = logging.LogRecord("absl", level, f"/lib/{folder}/save.py", 1, "", (), None)
            kept = bool(logging.getLogger("absl").filter(record))
            assert kept == (folder == "elsewhere" or level == logging.ERROR)
        message = f"Task exception was never retrieved: /lib/{folder}/write.py"
        record = logging.LogRecord("asyncio", logging.ERROR, "/lib/a.py", 1, message, (), None)
        assert bool(logging.getLogger("asyncio").filter(record)) == (folder == "elsewhere")


def test_bad_config_names_the_field():
    with pytest.raises(UserError, match=r"checkpoint.keep_last=0: must be at least 1"):
        CheckpointConfig(keep_last=0)


# --- where a run starts --------------------------------------------------------------------


def test_order_of_resume_init_from_and_scratch(tmp_path, workdir):
    wanted = worker.abstract_state(worker.make_mesh())
    with Checkpointer(tmp_path / "new", CheckpointConfig()) as ckpt:
        assert restore_or_init(ckpt, wanted, lambda: "scratch")[:3] == ("scratch", None, None)
        assert restore_or_init(ckpt, wanted, lambda: "scratch", lambda: "other")[:3] == (
            "other", None, None)
    with Checkpointer(workdir, CheckpointConfig()) as ckpt:
        state, iterator_states, record, branched = restore_or_init(
            ckpt, wanted, lambda: "scratch", lambda: "other")
    assert not branched
    assert record.step == 2
    assert int(state["step"]) == 2
    assert iterator_states == worker.iterator_states(2, range(worker.NUM_SHARDS))


# --- parameters only -----------------------------------------------------------------------


def test_params_alone_from_a_workdir_a_checkpoints_folder_or_a_step(workdir):
    before = files_below(workdir)
    wanted = worker.abstract_state(worker.make_mesh())["params"]
    for path, step, found in ((workdir, "last", 2), (workdir / "checkpoints", 1, 1),
                              (workdir / "checkpoints" / "1", "last", 1)):
        params, record = restore_params(path, wanted, step)
        assert record.step == found == manager.read_record(path, step).step
        np.testing.assert_array_equal(params["mlp"]["wi"]["kernel"],
                                      worker.expected_state(found)["params/mlp/wi/kernel"])
    half_written = workdir / "checkpoints" / "3.orbax-checkpoint-tmp-9"
    half_written.mkdir()
    restore_params(workdir, wanted)
    assert files_below(workdir) == before and half_written.exists()


def test_params_are_cast_and_may_be_a_part(workdir):
    wanted = {"mlp": {"wi": {"kernel": jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)}}}
    params, _ = restore_params(workdir, wanted, partial=True)
    expected = worker.expected_state(2)["params/mlp/wi/kernel"]
    np.testing.assert_array_equal(params["mlp"]["wi"]["kernel"], expected.astype(jnp.bfloat16))
    with pytest.raises(UserError, match="extra     params/norm/scale"):
        restore_params(workdir, wanted)


def test_missing_checkpoints_are_named(tmp_path, workdir):
    with pytest.raises(UserError, match="no checkpoint at .*nowhere"):
        restore_params(tmp_path / "nowhere", {})
    with pytest.raises(UserError, match=r"no checkpoint of step 30: it has 1, 2, or say 'last'"):
        restore_params(workdir, {}, step=30)


# --- another model's, another version's ----------------------------------------------------


def test_another_models_checkpoint_is_an_error_that_shows_the_difference(workdir):
    wanted = worker.abstract_state(worker.make_mesh())
    mlp = wanted["params"].pop("mlp")
    kernel = mlp["wi"]["kernel"]
    wanted["params"]["mlp"] = {"wi_0": mlp["wi"]}
    wanted["params"]["norm"] = {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)}
    with Checkpointer(workdir, CheckpointConfig()) as ckpt, pytest.raises(UserError) as error:
        restore_or_init(ckpt, wanted, lambda: pytest.fail("started from scratch"))
    message = str(error.value)
    assert "missing   params/mlp/wi_0/kernel did you mean 'params/mlp/wi/kernel'?" in message
    assert "mismatch  params/norm/scale: expected float32[8], found bfloat16[8]" in message
    assert "--workdir" in message and len(message.splitlines()) < 12
    # Orbax would cut this one to fit.
    wider = {"mlp": {"wi": {"kernel": jax.ShapeDtypeStruct((32, 512), kernel.dtype)}}}
    with pytest.raises(UserError, match=r"expected float32\[32,512\], found float32\[64,512\]"):
        restore_params(workdir, wider, partial=True)


def test_a_format_from_the_future_is_an_error(workdir):
    path = workdir / "checkpoints" / "2" / "record" / "record.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    wanted = worker.abstract_state(worker.make_mesh())
    with Checkpointer(workdir, CheckpointConfig()) as ckpt:
        with pytest.raises(UserError, match="format 99; this t5x_lite reads formats up to 1"):
            ckpt.restore_latest(wanted)


# --- damage --------------------------------------------------------------------------------


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": flip_a_bit,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_gives_the_step_before_or_the_very_same_bits(
        saved, tmp_path, kind):
    wanted = worker.abstract_state(worker.make_mesh())
    files = [p.relative_to(saved) for p in files_below(saved / "checkpoints" / "2")]
    fell_back = 0
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        DAMAGE[kind](workdir / file)
        with Checkpointer(workdir, CheckpointConfig()) as ckpt:
            restored = ckpt.restore_latest(wanted)
            worker.check(restored, restored.record.step)
            fell_back += restored.record.step == 1
    assert fell_back >= 4  # iterators, record, the arrays' index and the arrays


def test_a_damaged_step_is_named_set_aside_and_saved_anew(workdir, caplog):
    (workdir / "checkpoints/2/record/iterators-0-of-1.npz").unlink()
    wanted = worker.abstract_state(worker.make_mesh())
    with Checkpointer(workdir, CheckpointConfig()) as ckpt:
        assert ckpt.restore_latest(wanted).record.step == 1
        assert "checkpoints/2 is unreadable (FileNotFoundError: 0 of 1 iter" in caplog.text
        assert ckpt.all_steps() == [1]
        assert (workdir / "checkpoints/2.unreadable/record/record.json").exists()
    save_worker_steps(workdir, 2, 3)
    with Checkpointer(workdir, CheckpointConfig()) as ckpt:
        worker.check(ckpt.restore(2, wanted), 2)
        worker.check(ckpt.restore_latest(wanted), 3)


def falls_back(workdir, caplog, *fragments):
    """Training and evaluation read step 1, and it is said why."""
    wanted = worker.abstract_state(worker.make_mesh())
    for read in (lambda: restore_params(workdir, wanted["params"])[1],
                 lambda: ckpt.restore_latest(wanted).record):
        caplog.clear()
        with Checkpointer(workdir, CheckpointConfig()) as ckpt:
            assert read().step == 1
        assert "is unreadable (" in caplog.text and "Traceback" not in caplog.text
        assert all(fragment in caplog.text for fragment in fragments), caplog.text


def test_files_of_another_checkpoint_are_noticed(saved, tmp_path, caplog):
    """Iterator states of another step, its record, a whole folder under another number."""
    for number, part in enumerate(("record/iterators-0-of-1.npz", "record", "state")):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        target = workdir / "checkpoints/2" / part
        if target.is_dir():
            shutil.rmtree(target)
            shutil.copytree(workdir / "checkpoints/1" / part, target)
        else:
            shutil.copyfile(workdir / "checkpoints/1" / part, target)
        wanted = worker.abstract_state(worker.make_mesh())
        with Checkpointer(workdir, CheckpointConfig()) as ckpt:
            worker.check(ckpt.restore_latest(wanted), 1)
        assert "belongs to another checkpoint" in caplog.text or number
    shutil.copytree(saved / "checkpoints/1", tmp_path / "copied/checkpoints/1")
    shutil.copytree(saved / "checkpoints/1", tmp_path / "copied/checkpoints/3")
    falls_back(tmp_path / "copied", caplog, "it is a copy of the checkpoint of step 1")


JSON_OF_OTHERS = ("null", "[]", "{}", "0", '"x"', '{"tree_metadata": null}', '{"arrays": null}',
                  '{"tree_metadata": {"(\'params\',)": {"key_metadata": null}}}',
                  '{"format_version": null}', '{"format_version": "1", "arrays": []}', "[" * 100_000,
                  "9" * 6000, "\x00", "\ufeff{}")


@pytest.mark.parametrize("name", ["record/record.json", "state/_METADATA"])
def test_json_that_is_whole_and_not_ours_gives_the_step_before(saved, tmp_path, name, caplog):
    for number, text in enumerate(JSON_OF_OTHERS):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        (workdir / "checkpoints/2" / name).write_text(text)
        falls_back(workdir, caplog)


def test_a_half_written_checkpoint_is_skipped_named_and_removed(workdir, caplog):
    half_written = workdir / "checkpoints" / "3.orbax-checkpoint-tmp-9"
    shutil.copytree(workdir / "checkpoints" / "2", half_written)
    mesh = worker.make_mesh()
    with Checkpointer(workdir, CheckpointConfig()) as ckpt:
        assert f"{half_written} is a half-written checkpoint" in caplog.text
        worker.check(ckpt.restore_latest(worker.abstract_state(mesh)), 2)
        assert ckpt.latest() == 2
    save_worker_steps(workdir, 3)
    assert not half_written.exists()


def test_where_nothing_can_be_read_the_run_stops_and_nothing_is_changed(workdir):
    for step in (1, 2):
        flip_a_bit(workdir / f"checkpoints/{step}/record/record.json")
    before = files_below(workdir)
    with Checkpointer(workdir, CheckpointConfig()) as ckpt, pytest.raises(UserError) as error:
        restore_or_init(ckpt, worker.abstract_state(worker.make_mesh()),
                        lambda: pytest.fail("started from scratch"))
    assert "no checkpoint at" in str(error.value)
    assert "\n  2: " in str(error.value) and "\n  1: " in str(error.value)
    assert files_below(workdir) == before


def test_a_full_disk_names_the_step_and_the_last_good_one(workdir):
    mesh = worker.make_mesh()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ckpt = Checkpointer(workdir, CheckpointConfig())
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        ckpt.save(3, worker.make_state(mesh, 3), {}, "{}")
        with pytest.raises(UserError) as error:
            ckpt.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "checkpoint of step 3 could not be written" in str(error.value)
    assert "The last good one is of step 2" in str(error.value)
    ckpt.close()
    with Checkpointer(workdir, CheckpointConfig()) as ckpt:
        worker.check(ckpt.restore_latest(worker.abstract_state(mesh)), 2)


# --- other processes -----------------------------------------------------------------------


def start_worker(workdir, process=0, processes=1, port=0, steps=0, devices=4):
    arguments = dict(workdir=str(workdir), process=process, processes=processes, port=port,
                     steps=steps, devices=devices)
    return subprocess.Popen([sys.executable, "-m", "tests.checkpoints.checkpoint_worker",
                             json.dumps(arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_two_workers(workdir, steps):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [start_worker(workdir, i, 2, port, steps) for i in range(2)]
    outputs = [w.communicate(timeout=120) for w in workers]
    assert all(w.returncode == 0 for w in workers), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs], outputs[0][1]


def test_one_process_saves_two_resume_and_back(tmp_path):
    save_worker_steps(tmp_path, 1)
    results, errors = run_two_workers(tmp_path, steps=2)
    assert results == [{"start": 1, "steps": [2, 3]}] * 2
    assert "orbax" not in errors
    with Checkpointer(tmp_path, CheckpointConfig()) as ckpt:  # 8 devices, one process
        worker.check(ckpt.restore_latest(worker.abstract_state(worker.make_mesh())), 3)
    # Only the second process reads what it wrote: it alone meets the damage, both fall back.
    for file in (tmp_path / "checkpoints/3/state/ocdbt.process_1/d").iterdir():
        os.truncate(file, 0)
    results, errors = run_two_workers(tmp_path, steps=1)
    assert results == [{"start": 2, "steps": [2, 3]}] * 2
    assert "checkpoints/3 is unreadable (another process could not read it)" in errors


def test_a_run_prints_one_line_for_a_damaged_step_and_none_else(workdir):
    # In a process of its own: under pytest the log has other handlers.
    for file in (workdir / "checkpoints/2/state/ocdbt.process_0/d").iterdir():
        os.truncate(file, 0)
    out, errors = start_worker(workdir, steps=2, devices=8).communicate(timeout=120)
    assert json.loads(out) == {"start": 1, "steps": [2, 3]}
    (line,) = errors.splitlines()
    assert "checkpoints/2 is unreadable (ValueError: OUT_OF_RANGE" in line


def test_killed_at_any_moment_the_next_run_finds_a_state_and_its_iterators(tmp_path):
    """Each life resumes, checks the pair bit for bit, and saves without pause until SIGKILL."""
    moments = random.Random(0)
    mesh, starts, half_written = worker.make_mesh(), [], 0
    for _ in range(5):
        process = start_worker(tmp_path, steps=10**6, devices=1)
        known = set(manager.all_steps(tmp_path))
        deadline = time.monotonic() + 60
        while not set(manager.all_steps(tmp_path)) - known:  # it saves steps of its own
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        half_written += len(list((tmp_path / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
        with Checkpointer(tmp_path, CheckpointConfig()) as ckpt:
            restored = ckpt.restore_latest(worker.abstract_state(mesh))
            worker.check(restored, restored.record.step)
            starts.append(restored.record.step)
    assert starts == sorted(set(starts))  # every life went on from the one before
    assert half_written >= 1  # some were killed in the middle of a save
