"""SIGKILL of runs whose workdir and data are in a bucket: at random moments, within a save, of two
processes. Against a storage server on this machine (tests/bucket_server.py)."""

import json
import random
import subprocess
import sys

import pytest

from t5x_lite import buckets, experiment, files
from t5x_lite.checkpoints import manager
from tests import bucket_server, test_experiment, tiny_config
from tests.faults import mini
from tests.faults.test_kills import cache, kill_soon, last_bits  # noqa: F401

pytestmark = pytest.mark.slow

FLAGS = ("train.num_steps=60", "train.log_every=7", "checkpoint.every=1", "eval.every=10",
         "checkpoint.keep_last=3")

PATIENCE = 1200   # seconds, for a busy machine


@pytest.fixture(scope="module")
def server():
    with bucket_server.used() as url:
        yield url


@pytest.fixture(scope="module")
def text(server, tmp_path_factory):
    """The same text on the disk and in the bucket."""
    name = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    with open(name, "rb") as content:
        buckets.write("gs://bucket/data/words.txt", content.read())
    return name


def test_kills_at_random_moments_of_saves(text, tmp_path):
    status, lines = mini.end(mini.begin(text, tmp_path / "whole", *FLAGS), PATIENCE)
    assert status == 0, lines
    moments, half_written = random.Random(3), 0
    workdir = "gs://bucket/a b=c/killed"
    for _ in range(6):
        process = mini.begin("gs://bucket/data/words.txt", workdir, *FLAGS)
        mini.wait_for(process, r"step \d|error|used ")
        kill_soon([process], moments, 1.0)
        held = [name for name in files.names(f"{workdir}/checkpoints") if name.isdigit()]
        half_written += len(held) > len(manager.all_steps(workdir))
    status, lines = mini.end(mini.begin("gs://bucket/data/words.txt", workdir, *FLAGS), PATIENCE)
    assert status == 0, lines
    _check_same(workdir, tmp_path / "whole")
    print(f"kills of one process in a bucket: 6 tried, 6 survived, {half_written} within a save")


def _check_same(workdir, whole):
    assert last_bits(files.path(workdir), 60) == last_bits(whole, 60)
    assert mini.without_timings(files.path(workdir)) == mini.without_timings(whole)
    assert manager.all_steps(workdir) == manager.all_steps(whole)


def _main(name, *arguments):
    result = subprocess.run([sys.executable, "-m", f"t5x_lite.{name}", *arguments], cwd=mini.ROOT,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_that_share_no_disk(text, tmp_path, monkeypatch):
    for status, lines in mini.two(text, tmp_path / "whole", *FLAGS, seconds=PATIENCE):
        assert status == 0, lines
    moments, workdir = random.Random(4), "gs://bucket/two"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for _ in range(3):
        processes = mini.begin_two("gs://bucket/data/words.txt", workdir, *FLAGS)
        mini.wait_for(processes[0], r"step \d|error|used ")
        kill_soon(processes, moments, 1.0)
    for status, lines in mini.two("gs://bucket/data/words.txt", workdir, *FLAGS, seconds=PATIENCE):
        assert status == 0, lines
    _check_same(workdir, tmp_path / "whole")

    out = _main("eval", f"--workdir={workdir}", "--step=all", "--override=mesh.data=-1")
    assert out.count("eval validation_files at step") == 3
    assert len(files.path(f"{workdir}/eval.jsonl").read_text().splitlines()) == 3
    _main("infer", f"--workdir={workdir}", "--input=gs://bucket/data/words.txt",
          "--output=gs://bucket/out.jsonl", "--decode.max_length=2", "--override=mesh.data=-1")
    written = files.path("gs://bucket/out.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in written] == [*range(1, 201)]
    _main("report", "gs://bucket/two", "--output=gs://bucket/report.html")
    assert "<html" in files.path("gs://bucket/report.html").read_text()


def test_an_experiment_in_a_bucket_runs_its_stages_and_draws(text, tmp_path):
    (tmp_path / "compare.py").write_text(test_experiment.CONFIG)
    path, workdir = f"{tmp_path}/compare.py:gs://bucket/data/words.txt", "gs://bucket/an exp=1"
    first = experiment.run(path, workdir, only="seed_0")
    shown = experiment.run(path, workdir)
    assert [line.split("|")[1:3] for line in shown.splitlines()[2:4]] == [
        [" staged/pretrain ", " 2 "], [" staged/finetune ", " 2 "]] and first != shown
    assert len(files.path(f"{workdir}/curves.png").read_bytes()) > 5000
    assert len(json.loads(files.path(f"{workdir}/results.json").read_text())) == 4
    before = bucket_server.listed("an exp=1/")
    assert experiment.run(path, workdir) == shown and bucket_server.listed("an exp=1/") == before


def test_a_second_start_in_the_same_workdir_waits_and_is_refused(text):
    first = mini.begin("gs://bucket/data/words.txt", "gs://bucket/taken", "train.num_steps=100000")
    mini.wait_for(first, r"step \d")
    status, lines = mini.end(mini.begin("gs://bucket/data/words.txt", "gs://bucket/taken",
                                        "checkpoint.wait_for_workdir=2"), PATIENCE)
    assert status == 2 and any(f"is in use: process {first.pid} on host" in line for line in lines)
    first.kill()
    first.communicate()
    # One that was killed on this very host is not waited for.
    status, lines = mini.end(mini.begin("gs://bucket/data/words.txt", "gs://bucket/taken",
                                        "train.num_steps=2"), PATIENCE)
    assert status in (0, 2) and not any("in use" in line for line in lines), lines
