"""The main job: resumed equals uninterrupted, on any mesh and process count, killed or not."""

import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from t5x_lite import config as configs, eval as eval_main, train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import metrics
from tests import tiny_config
from tests.helpers import xla_flags

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def whole(text_file, tmp_path_factory):
    """(config, workdir) of an uninterrupted run on one device."""
    config = configs.replace(on_one_device(tiny_config.run(text_file)), "eval.at_start", True)
    workdir = tmp_path_factory.mktemp("whole")
    train.run(config, workdir)
    return config, workdir


def on_one_device(config):
    """The tests have 8 devices: split the batch over them all or keep a mesh of 8."""
    return dataclasses.replace(config, mesh=MeshConfig(data=8))


def params_of(workdir, step, config):
    program = build(config)
    params, _ = manager.restore_params(workdir, program.abstract_state["params"], step)
    return {p: np.asarray(x) for p, x in tree.flatten(params).items()}


def losses(workdir) -> dict[int, float]:
    return {line["step"]: line["train/loss"]
            for line in metrics.read_metrics(workdir / "metrics.jsonl") if "train/loss" in line}


def assert_same_bits(a: dict, b: dict):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].tobytes() == b[path].tobytes(), path


def test_writes_what_the_readme_promises(whole):
    config, workdir = whole
    assert json.loads((workdir / "config.json").read_text())["train"]["num_steps"] == 6
    table = (workdir / "parameters.txt").read_text()
    assert "decoder/segment_0/block_0/mlp/wo/kernel" in table and "total" in table
    assert manager.all_steps(workdir) == [4, 6]
    assert any((workdir / "tensorboard").iterdir())
    lines = metrics.read_metrics(workdir / "metrics.jsonl")
    assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]
    program = build(config)
    for line in lines:
        assert line["tokens_seen"] == line["step"] * 8 * 36
        assert line["flops"] == pytest.approx(line["step"] * 8 * program.flops_per_sequence)
        assert line["params_no_embed"] == program.num_non_embedding_params
    hours = [line["chip_hours"] for line in lines if "train/loss" in line]
    assert len(hours) == 6 and 0 < hours[0] < hours[-1]
    held_out = [line for line in lines if any(k.startswith("eval/") for k in line)]
    assert [line["step"] for line in held_out] == [0, 4, 6]   # eval.at_start
    assert held_out[0]["eval/validation_files/loss"] > held_out[-1]["eval/validation_files/loss"]


def test_resumed_is_uninterrupted_bit_for_bit(whole, tmp_path):
    config, workdir = whole
    half = configs.replace(config, "train.num_steps", 3)   # saved at 2 and at the last, 3
    train.run(half, tmp_path)
    train.run(config, tmp_path)
    assert_same_bits(params_of(tmp_path, 6, config), params_of(workdir, 6, config))
    assert losses(tmp_path) == losses(workdir)


@pytest.mark.slow
def test_resumes_on_another_mesh(whole, tmp_path):
    config, workdir = whole
    train.run(configs.replace(config, "train.num_steps", 3), tmp_path)
    train.run(dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path)
    for step, loss in losses(workdir).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-5)


def test_eval_reads_every_checkpoint(whole, capsys):
    config, workdir = whole
    loaded = configs.load(workdir / "config.json")
    assert loaded == config
    results = eval_main.run(loaded, workdir, eval_main.steps_to_evaluate(workdir, "all"))
    assert list(results) == [4, 6]
    logged = {line["step"]: line for line in metrics.read_metrics(workdir / "metrics.jsonl")
              if any(k.startswith("eval/") for k in line)}
    for step, tasks in results.items():
        for task, values in tasks.items():
            assert logged[step][f"eval/{task}/loss"] == pytest.approx(values["loss"], rel=1e-6)
    assert "bits/byte" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"must be all, last, best or one of \[4, 6\]"):
        eval_main.steps_to_evaluate(workdir, "5")


def test_samples_of_a_batch_that_lies_on_eight_devices(whole):
    config, _ = whole
    program = build(config)
    with program.activate():
        found = Evaluator(program).samples(program.init_state()["params"], 2)
    assert len(found) == 2 and all(inputs and target for inputs, _, target in found)


def test_a_finished_run_started_again_changes_nothing(whole):
    config, workdir = whole
    before = (workdir / "metrics.jsonl").read_text()
    train.run(config, workdir)
    assert (workdir / "metrics.jsonl").read_text() == before


# --- other processes ------------------------------------------------------------------------

def command(text_file, workdir, *overrides, devices=1):
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": xla_flags(devices)}
    return ([sys.executable, "-m", "t5x_lite.train",
             f"--config={ROOT}/tests/tiny_config.py:{text_file}", f"--workdir={workdir}",
             *overrides], environment)


def start(text_file, workdir, *overrides, devices=1):
    args, environment = command(text_file, workdir, *overrides, devices=devices)
    return subprocess.Popen(args, env=environment, cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, status=0):
    out, err = process.communicate(timeout=600)
    assert process.returncode == status, (out, err)
    return out, err


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_restarted_ends_with_the_same_bits(text_file, tmp_path, monkeypatch, times):
    """SIGKILL at random moments between the first step of a life and its end."""
    steps = "--config.train.num_steps=60"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))   # of equal programs
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    reference = start(text_file, tmp_path / "whole", steps)
    out, err = finish(reference)
    # Nothing but our own lines: no third-party log spray.
    assert all(line.startswith(("started from scratch", "attention: "))
               for line in err.splitlines()), err
    rng = random.Random(0)
    kills = 0
    while kills < times:
        process = start(text_file, tmp_path / "killed", steps)
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(rng.uniform(0.0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        process.stderr.close()
        kills += 1
    finish(start(text_file, tmp_path / "killed", steps))
    config = dataclasses.replace(configs.load(tmp_path / "whole" / "config.json"),
                                 mesh=MeshConfig(data=8))
    assert_same_bits(params_of(tmp_path / "killed", 60, config),
                     params_of(tmp_path / "whole", 60, config))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_sigterm_saves_and_exits_cleanly(text_file, tmp_path):
    process = start(text_file, tmp_path, "--config.train.num_steps=100000",
                    "--config.checkpoint.every=100000", "--config.eval.every=100000")
    for line in process.stdout:
        if line.startswith("step 20/"):
            break
    process.send_signal(signal.SIGTERM)
    out, _ = finish(process)
    assert "stopped by SIGTERM after step" in out
    (step,) = manager.all_steps(tmp_path)
    assert step >= 20


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_train_as_one(whole, text_file, tmp_path):
    """2 processes x 4 devices over loopback: the batches and losses of one process."""
    _, workdir = whole
    coordinator = f"--coordinator_address=127.0.0.1:{free_port()}"
    processes = [start(text_file, tmp_path, coordinator, "--num_processes=2",
                       f"--process_id={i}", "--config.mesh.data=8", devices=4) for i in range(2)]
    for process in processes:
        finish(process)
    for step, loss in losses(workdir).items():
        assert losses(tmp_path)[step] == pytest.approx(loss, rel=1e-5)
    # … and one process goes on from what two saved.
    config = on_one_device(configs.load(tmp_path / "config.json"))
    assert manager.read_record(tmp_path, 6).step == 6
    train.run(configs.replace(config, "train.num_steps", 7), tmp_path)
    assert sorted(losses(tmp_path))[-1] == 7
    assert jax.process_count() == 1


@pytest.mark.slow
def test_the_quickstart_over_tensor_fsdp_stage_and_two_processes_is_the_one_of_a_device(tmp_path):
    """2 processes x 4 devices, tensor=2, fsdp=2, stage=2: 30 steps, and samples at the end."""
    def begin(name, devices, *more):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                       "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        return subprocess.Popen(
            [sys.executable, "-m", "t5x_lite.train", "--config=configs/quickstart.py",
             f"--workdir={tmp_path / name}", "--config.train.num_steps=30",
             "--config.train.log_every=1", "--config.eval.every=30", *more],
            env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    finish(begin("one", 1))
    mesh = [f"--config.mesh.{axis}" for axis in ("data=1", "tensor=2", "fsdp=2", "stage=2")]
    coordinator = f"--coordinator_address=127.0.0.1:{free_port()}"
    for process in [begin("two", 4, coordinator, "--num_processes=2", f"--process_id={i}", *mesh)
                    for i in range(2)]:
        finish(process)
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(expected) >= 29
    assert found == pytest.approx(expected, rel=1e-5)
