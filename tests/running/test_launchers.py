"""The runs of an experiment elsewhere: how many at once, in which order, what is said of failures."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from t5x_lite import experiment
from t5x_lite.errors import UserError
from t5x_lite.running import launchers
from tests.test_experiment import CONFIG


@pytest.fixture(autouse=True)
def module(monkeypatch):
    monkeypatch.setattr(launchers, "MODULE", "tests.running.launched")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def task(folder, name, what="ends", needs=""):
    return launchers.Task(name, (name, str(folder), what), (folder / f"{name}.done").exists, needs)


def run(folder, tasks, text="local:2"):
    return launchers.run_all(tasks, launchers.make(text, folder, {}), folder)


def events(folder) -> list[str]:
    return (folder / "events").read_text().splitlines()


def test_so_many_at_a_time_in_order_and_once(tmp_path):
    tasks = [task(tmp_path, "b", needs="a"), *(task(tmp_path, n) for n in "acd")]
    assert run(tmp_path, tasks) == {}
    seen, running = events(tmp_path), 0
    for event in seen:
        running += 1 if event.startswith("begins") else -1
        assert running <= 2
    assert len(seen) == 8 and seen.index("ends a") < seen.index("begins b")
    assert {p.name for p in (tmp_path / launchers.FOLDER).glob("*.txt")} == {
        "a.txt", "b.txt", "c.txt", "d.txt"}
    assert run(tmp_path, tasks) == {} and events(tmp_path) == seen


def test_failures_are_named_and_what_needs_them_waits(tmp_path, capsys):
    tasks = [task(tmp_path, "bad", "fails"), task(tmp_path, "after", needs="bad"),
             task(tmp_path, "later", needs="after"), task(tmp_path, "good")]
    failures = run(tmp_path, tasks)
    assert list(failures) == ["bad", "after", "later"]
    assert failures["bad"].startswith("exit status 3: ValueError: no such luck; see ")
    assert failures["after"] == "not started: it needs bad"
    assert (tmp_path / "good.done").exists() and "bad: FAILED" in capsys.readouterr().out


def test_a_signal_is_handed_on_once_and_its_save_awaited(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("T5X_LITE_STOPPED_STATUS", "77")

    def ask():
        while not (tmp_path / "events").exists() or len(events(tmp_path)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(SystemExit) as end:
        run(tmp_path, [task(tmp_path, "a", "hangs"), task(tmp_path, "b", "hangs"),
                       task(tmp_path, "c")])
    assert end.value.code == 77
    assert sorted(events(tmp_path))[2:] == ["saved a", "saved b"]
    assert "SIGTERM: all runs have stopped; the same command goes on" in capsys.readouterr().out


def test_each_has_its_share_of_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4,5,7")
    given = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, *, env, **_: given.append(
        env["CUDA_VISIBLE_DEVICES"]))
    pool = launchers.make("local:2", tmp_path, {})
    pool.start(task(tmp_path, "a"), 0)
    pool.start(task(tmp_path, "b"), 1)
    assert given == ["3,5", "4,7"]
    with pytest.raises(UserError, match="there are 4 GPUs"):
        launchers.make("local:5", tmp_path, {})


def test_shards_keep_the_stages_of_a_seed_together():
    runs = [experiment.Run(arm, seed, None, stage) for arm in "ab" for seed in (0, 1, 2)
            for stage in ("pretrain", "finetune")]
    parts = [experiment.shard_of(runs, f"{i}/4") for i in (1, 2, 3, 4)]
    assert sorted(r.folder for part in parts for r in part) == sorted(r.folder for r in runs)
    assert [len(part) for part in parts] == [4, 4, 2, 2]
    assert {r.stage for r in parts[3]} == {"pretrain", "finetune"}


@pytest.mark.parametrize("make, message", [
    (lambda p: launchers.make("slrum", p, {}), "one of local, slurm"),
    (lambda p: launchers.make("local:two", p, {}), "must be a number of runs"),
    (lambda p: launchers.make("local:0", p, {}), "at least 1"),
    (lambda p: launchers.make("local:2", p, {"timeout_min": 3}), "are for --launcher=slurm"),
    (lambda p: launchers.options_of(["timeout_min:3"]), "option=value"),
    (lambda p: experiment.shard_of([], "0/2"), "1/4 … 4/4"),
    (lambda p: experiment.shard_of([], "3"), "1/4 … 4/4")])
def test_bad_input(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def test_what_runs_in_a_bucket_print_is_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launchers.folder_of("gs://b/an exp=1/x") == tmp_path / "launched/b/an exp=1/x"
    assert launchers.folder_of("runs/x") == tmp_path / "runs/x/launched"


def test_options_are_json_or_words():
    assert launchers.options_of(["timeout_min=600", "slurm_partition=gpu"]) == {
        "timeout_min": 600, "slurm_partition": "gpu"}


def test_without_slurm_its_absence_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no sbatch here"):
        launchers.make("slurm", tmp_path, {})


@pytest.mark.slow
def test_an_experiment_two_runs_at_a_time(tmp_path):
    """The whole command; one of its runs fails."""
    from tests import tiny_config
    text = tiny_config.write_text(tmp_path / "words.txt")
    (tmp_path / "compare.py").write_text(CONFIG.replace(
        'yield Run("staged", seed, run, stage="finetune", after="pretrain")',
        'yield Run("bad", seed, configs.replace(run, "data.train_files", text_file + "x"))'
        ' if seed else Run("good", 2, run)'))
    command = [sys.executable, "-m", "t5x_lite.experiment", f"--workdir={tmp_path / 'out'}",
               f"--config={tmp_path / 'compare.py'}:{text}", "--launcher=local:2",
               "--only=bad|good", "--override=train.num_steps=1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "good/seed_2: finished" in result.stdout
    last = result.stdout[result.stdout.index("1 of 2 runs failed"):]
    assert "bad/seed_1: exit status 2: error: " in last and "words.txtx" in last
    assert "| good | 1 |" in (tmp_path / "out" / "results.md").read_text()
