"""SIGKILL at random moments, of one process and of two, in steps, saves, evaluations and starts."""

import dataclasses
import random
import signal
import time

import numpy as np
import pytest

from t5x_lite import config as configs, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.parallel.sharding import MeshConfig
from tests import tiny_config
from tests.faults import mini

pytestmark = pytest.mark.slow

# log_every divides neither the interval of saving nor that of evaluating.
FLAGS = ("train.num_steps=240", "train.log_every=7", "checkpoint.every=4", "eval.every=10",
         "checkpoint.keep_last=3")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Equal programs are compiled once."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def last_bits(workdir, step):
    config = dataclasses.replace(configs.load(workdir / "config.json"), mesh=MeshConfig(data=8))
    wanted = build(config).abstract_state["params"]
    params, _ = manager.restore_params(workdir, wanted, step)
    return {path: np.asarray(x).tobytes() for path, x in tree.flatten(params).items()}


def kill_soon(processes, moments, longest):
    """Kills one of the processes at a random moment, and the rest, which may be waiting for it."""
    time.sleep(moments.uniform(0.0, longest))
    moments.choice(processes).send_signal(signal.SIGKILL)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_forty_kills_and_the_same_bits_and_lines(text, tmp_path):
    status, lines = mini.end(mini.begin(text, tmp_path / "whole", *FLAGS))
    assert status == 0, lines
    moments, survived = random.Random(1), 0
    for number in range(40):
        process = mini.begin(text, tmp_path / "killed", *FLAGS)
        if number % 8 == 7:   # in its start
            kill_soon([process], moments, 6.0)
        else:
            mini.wait_for(process, r"step \d|error|used ")
            kill_soon([process], moments, 0.4)
        survived += 1
    status, lines = mini.end(mini.begin(text, tmp_path / "killed", *FLAGS))
    assert status == 0, lines
    assert last_bits(tmp_path / "killed", 240) == last_bits(tmp_path / "whole", 240)
    assert mini.without_timings(tmp_path / "killed") == mini.without_timings(tmp_path / "whole")
    print(f"kills of one process: {survived} tried, {survived} survived")


def test_kills_while_two_processes_save(text, tmp_path):
    flags = [*FLAGS, "train.num_steps=60", "checkpoint.every=1"]
    for status, lines in mini.two(text, tmp_path / "whole", *flags):
        assert status == 0, lines
    moments = random.Random(2)
    for _ in range(6):
        processes = mini.begin_two(text, tmp_path / "killed", *flags)
        mini.wait_for(processes[0], r"step \d|error|used ")
        kill_soon(processes, moments, 0.5)
    for status, lines in mini.two(text, tmp_path / "killed", *flags):
        assert status == 0, lines
    assert last_bits(tmp_path / "killed", 60) == last_bits(tmp_path / "whole", 60)
    assert mini.without_timings(tmp_path / "killed") == mini.without_timings(tmp_path / "whole")
    print("kills of two processes that save: 6 tried, 6 survived")
