"""Everything in a bucket: files, the lock, checkpoints, a run that is killed and goes on; what is
wrong is said before anything starts. Against a storage server on this machine (bucket_server.py)."""

import dataclasses
import gzip
import json
import os
import pathlib
import re
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from configs.experiments import ladder as ladder_config
from t5x_lite import (
    buckets,
    cli,
    config as configs,
    convert,
    eval as eval_main,
    files,
    infer,
    init_from,
    train,
    tree,
)
from t5x_lite.build import build
from t5x_lite.checkpoints import format, lock, manager
from t5x_lite.data import paths, readers, text_files, vocabulary
from t5x_lite.errors import TryAgain, UserError
from t5x_lite.evaluation import evaluator
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.running import profile
from t5x_lite.running.clock import Clock, Watchdog, WatchdogConfig
from t5x_lite.scaling import ladder_page, ladder_results as results, ladders
from t5x_lite.training import metrics
from tests import bucket_server, tiny_config
from tests.faults import mini
from tests.faults.test_resume import Killed, killed_after
from tests.scaling import test_ladders


@pytest.fixture(scope="module")
def server():
    with bucket_server.used() as url:
        yield url


@pytest.fixture
def bucket(server):
    """gs://bucket, emptied."""
    yield "gs://bucket"
    held = buckets.client().bucket("bucket")
    for key in bucket_server.listed():
        held.delete_blob(key)


@pytest.fixture
def forgetful():
    """What is remembered of servers is forgotten before and after."""
    bucket_server._forget()
    yield
    bucket_server._forget()


# --- what is wrong, before anything starts --------------------------------------------------------

@pytest.mark.parametrize(("name", "message"), [
    ("s3://b/run", "s3:// is not supported yet. Give a local path or gs://BUCKET/PATH"),
    ("gs:/b/run", "a URL has two slashes: gs://b/run"), ("gs://", "names no bucket"),
    ("gs:b/run", "a URL has two slashes: gs://b/run"),
    ("https://storage.googleapis.com/b", "https:// is not supported yet")])
def test_other_urls_are_refused_at_the_door(name, message):
    for use in (files.path, cli.workdir, files.is_file, init_from.check_workdir, paths.matches):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            use(name)
    with pytest.raises(UserError, match=message):
        convert.run("hf:nowhere", f"hf:{name}")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(buckets, "_is_installed", lambda package: package != "gcsfs")
    with pytest.raises(UserError, match=r"need the package gcsfs: pip install 't5x_lite\[gcs\]'"):
        cli.workdir("gs://b/run")


def test_a_missing_bucket_is_named(server):
    with pytest.raises(UserError, match="nowhere: there is no such bucket .*404.* buckets create"):
        cli.workdir("gs://nowhere/run")


@pytest.mark.parametrize("status", [401, 403])
def test_missing_rights_are_named_with_the_roles(server, monkeypatch, forgetful, status):
    with bucket_server.answering(status) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(UserError, match="no rights .*roles/storage.objectAdmin"):
            cli.workdir("gs://bucket/run")


def test_a_lost_connection_is_said_within_seconds(server, monkeypatch, forgetful):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{bucket_server.free_port()}")
    monkeypatch.setattr(buckets, "_SECONDS_TO_ANSWER", 1.0)
    with pytest.raises(TryAgain, match="gs://bucket: .* cannot be reached .*Is there a network"):
        cli.workdir("gs://bucket/run")


def test_what_is_out_of_reach_in_the_middle_of_a_run_asks_to_be_started_again(server, monkeypatch,
                                                                              capsys):
    def leave(status):
        raise SystemExit(status)
    monkeypatch.setattr(cli.os, "_exit", leave)
    buckets.client()
    for error, status in ((ConnectionResetError("by peer"), 75), (TryAgain("later"), 75),
                          (UserError("never"), 2)):
        def fail(error=error):
            raise error
        with pytest.raises(SystemExit) as ended:
            cli._guarded(fail)
        assert ended.value.code == status and "error: " in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        cli._guarded(lambda: open("/nowhere"))
    buckets.client.cache_clear()
    with pytest.raises(ConnectionResetError):   # no bucket's
        cli._guarded(lambda: (_ for _ in ()).throw(ConnectionResetError("by peer")))


@pytest.mark.parametrize("character", "*?[]#")
def test_names_that_buckets_libraries_read_otherwise_are_refused(bucket, character):
    with pytest.raises(UserError, match="may not hold"):
        files.path(f"{bucket}/a{character}b")


def test_rights_to_read_alone_are_said_when_a_run_starts(bucket, monkeypatch):
    from google.api_core.exceptions import Forbidden

    def refuse(*_):
        raise Forbidden("robot lacks storage.objects.create")
    monkeypatch.setattr(buckets, "replace", refuse)
    with pytest.raises(UserError, match="cannot write to .*/run: no rights .*objects.create"):
        manager.Checkpointer(f"{bucket}/run", manager.CheckpointConfig())


# --- files ----------------------------------------------------------------------------------------

def test_files_are_written_read_listed_and_renamed(bucket):
    folder = files.path(f"{bucket}/a b=c/run")
    assert files.names(folder) == [] and not folder.exists()
    files.write_whole(folder / "x.txt", "ä")
    files.append(folder / "x.txt", "b\n")
    files.append(folder / "new.jsonl", "1\n")
    files.write_bytes(folder / "checkpoints/metrics.jsonl", b"")
    files.write_bytes(folder / "arm/seed_0/metrics.jsonl", b"")
    assert (folder / "x.txt").read_text() == "äb\n" and (folder / "new.jsonl").is_file()
    assert files.names(folder) == ["arm", "checkpoints", "new.jsonl", "x.txt"]
    assert files.find(folder, "metrics.jsonl") == [folder / "arm/seed_0/metrics.jsonl"]
    files.rename(folder / "arm", folder / "leg", "seed_0/metrics.jsonl")
    assert bucket_server.listed() == ["a b=c/run/" + name for name in (
        "checkpoints/metrics.jsonl", "leg/seed_0/metrics.jsonl", "new.jsonl", "x.txt")]
    assert files.absolute(folder) == f"{bucket}/a b=c/run" == str(folder)


def test_a_trace_goes_to_the_bucket(bucket):
    with profile.Profile("1:1", f"{bucket}/run") as traced:
        for step in (1, 2):
            traced.before(step, jnp.ones(3) * step)
    (key,) = bucket_server.listed("run/profile/")
    assert re.fullmatch(r"run/profile/plugins/profile/steps_1_1/.+_0\.xplane\.pb", key)


def test_two_that_append_lose_nothing(bucket):
    def add(name):
        for i in range(5):
            files.append(f"{bucket}/eval.jsonl", f"{name}{i}\n")
    threads = [threading.Thread(target=add, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = files.path(f"{bucket}/eval.jsonl").read_text().split()
    assert sorted(content) == sorted(f"{name}{i}" for name in "ab" for i in range(5))


def test_a_folder_that_is_moved_is_whole_at_every_moment(bucket, monkeypatch):
    old, new = files.path(f"{bucket}/1200"), files.path(f"{bucket}/1200.suspect")
    for name in ("a", "commit_success.txt", "z/b"):
        files.write_whole(old / name, name)
    moments = []
    kind = type(buckets.client().bucket("bucket"))

    def watched(call):
        def seen(*args, **kwargs):
            call(*args, **kwargs)
            moments.append(tuple((f / "commit_success.txt").exists() for f in (old, new)))
        return seen
    for name in ("copy_blob", "delete_blob"):
        monkeypatch.setattr(kind, name, watched(getattr(kind, name)))
    buckets.move_folder(old, new, "commit_success.txt")
    assert moments == [(True, False), (True, False), (True, True),
                       (False, True), (False, True), (False, True)]


def test_files_that_grow_appear_now_and_then_and_at_the_end(bucket, monkeypatch, tmp_path):
    files.write_whole(f"{bucket}/run/log", "old\n")
    monkeypatch.setattr(files, "SECONDS_BETWEEN_COPIES", 0.05)
    complaints = []
    growing = files.Growing(f"{bucket}/run", complaints.append)
    with open(growing.bring("log"), "a") as file:
        file.write("new\n")
        file.flush()
        deadline = time.monotonic() + 120
        while files.path(f"{bucket}/run/log").read_text() != "old\nnew\n":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (growing.folder / "board").mkdir()
        (growing.folder / "board/events").write_bytes(b"x")
    growing.close()
    growing.close()
    assert bucket_server.listed() == ["run/board/events", "run/log"]
    assert not growing.folder.exists() and not complaints
    lost = files.Growing(f"{bucket}/run", complaints.append)
    (lost.folder / "log").write_text("kept")
    monkeypatch.setattr(buckets, "upload", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    lost.close()
    assert (lost.folder / "log").read_text() == "kept" and "no network" in str(complaints[-1])


def test_data_are_read_by_name_and_pattern(bucket):
    for name, text in (("a 1=2.txt", "one\ntwo\n"), ("v[2]/b.txt", "three\n"), ("empty.txt", "")):
        buckets.write(f"{bucket}/data/{name}", text.encode())
    found = text_files.find_files(f"{bucket}/data/*1*.txt,{bucket}/data/v[2]/b.txt", "field")
    assert found == [f"{bucket}/data/a 1=2.txt", f"{bucket}/data/v[2]/b.txt"]
    assert [*text_files.read_documents(found, "line")] == ["one", "two", "three"]
    with pytest.raises(UserError, match="empty.txt is empty"):
        text_files.find_files(f"{bucket}/data/empty.txt", "field")
    with pytest.raises(UserError, match=r"\(in gs://bucket/data\); did you mean 'empty.txt'"):
        text_files.find_files(f"{bucket}/data/emty.txt", "field")
    buckets.write(f"{bucket}/c.jsonl.gz", gzip.compress(b'{"text": "four"}\n'))
    assert [*readers.json_lines(f"{bucket}/c.jsonl.gz")] == [(1, {"text": "four"})]
    before = files.state_of(found[0])
    buckets.write(found[0], b"one\ntwo\n")
    assert files.state_of(found[0])[:2] == before[:2] and files.state_of(found[0]) != before


def test_a_local_copy_is_made_anew_when_the_object_changes(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path))
    buckets.write(f"{bucket}/m/config.json", b"{}")
    buckets.write(f"{bucket}/m/model.safetensors", b"1")
    first = files.local_copy(f"{bucket}/m")
    assert first == files.local_copy(f"{bucket}/m")
    buckets.write(f"{bucket}/m/model.safetensors", b"2")
    second = files.local_copy(f"{bucket}/m")
    assert (first / "model.safetensors").read_bytes() == b"1"
    assert (second / "model.safetensors").read_bytes() == b"2"
    assert files.local_copy(f"{bucket}/m/config.json").read_text() == "{}"
    with pytest.raises(UserError, match="no file and no folder"):
        files.local_copy(f"{bucket}/n")
    monkeypatch.setenv("T5X_LITE_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match="must be a local folder"):
        files.cache_root()


@pytest.mark.parametrize(("use", "message"), [
    (lambda name: manager.read_record(name), "no checkpoint at gs://bucket/none"),
    (lambda name: cli.saved_config(files.path(name)), "none/config.json does not exist"),
    (lambda name: eval_main.steps_to_evaluate(files.path(name), "last"), "holds no checkpoint"),
    (lambda name: infer.open_input(name), "--input=gs://bucket/none does not exist"),
    (lambda name: readers.whole(name), "gs://bucket/none cannot be read"),
    (lambda name: reporting_runs.find([name]), "gs://bucket/none is no folder"),
    (lambda name: init_from.open_source(name), "no checkpoint at gs://bucket/none"),
    (lambda name: init_from.open_source(f"hf:{name}"), "no file and no folder of that name"),
    (lambda name: convert.run(f"peft:{name}", f"{name}2"), "no file and no folder of that name"),
    (lambda name: vocabulary.check_there(f"{name}.model"), "data.vocabulary='.*': no such file"),
    (lambda name: files.local(name, "--output"), "--output=.*must be a local folder")])
def test_a_name_without_an_object_is_said(bucket, use, message):
    with pytest.raises(UserError, match=message):
        use(f"{bucket}/none")


# --- the lock -------------------------------------------------------------------------------------

def held_by(bucket):
    return json.loads(files.path(f"{bucket}/run/run.lock").read_text() or "{}")


def test_one_writer_a_workdir(bucket):
    first = lock.hold(f"{bucket}/run", 0.0, print)
    assert first.before == {} and held_by(bucket)["pid"] == os.getpid()
    said = []
    with pytest.raises(UserError, match=f"in use: process {os.getpid()} on host"):
        lock.hold(f"{bucket}/run", 0.1, said.append)
    assert len(said) == 1
    threading.Timer(0.3, first.release).start()
    second = lock.hold(f"{bucket}/run", 30.0, said.append)   # waits for its end
    assert second.before == {}
    second.release()
    second.release()
    assert held_by(bucket) == {}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": 3, "alive": "y"}'])
def test_what_the_lock_holds_never_stops_a_start(bucket, content):
    buckets.write(f"{bucket}/run/run.lock", content.encode())
    held = lock.hold(f"{bucket}/run", 0.0, print)
    assert held_by(bucket)["pid"] == os.getpid()
    held.release()


def test_who_was_not_heard_of_is_replaced_and_learns_of_it(bucket, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 3600.0)
    asleep = lock.hold(f"{bucket}/run", 0.0, print)
    buckets.write(f"{bucket}/run/run.lock", json.dumps(
        {**held_by(bucket), "alive": time.time() - 2 * lock.STALE, "host": "elsewhere"}).encode())
    successor = lock.hold(f"{bucket}/run", 0.0, print)
    assert successor.before["host"] == "elsewhere" and successor.lost is None
    asleep._generation -= 1   # as it was before the test wrote for it
    asleep._sign()
    assert asleep.lost["lock"] == successor._mine
    asleep.release()   # leaves the successor's alone
    assert held_by(bucket)["lock"] == successor._mine
    successor.release()


def test_of_two_that_take_it_at_once_one_gets_it(bucket):
    held, refused = [], []

    def take():
        try:
            held.append(lock.hold(f"{bucket}/run", 0.0, print))
        except UserError as error:
            refused.append(error)
    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 3
    held[0].release()


# --- runs -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """(config, workdir) of a run that nothing disturbed, on the local disk."""
    config = dataclasses.replace(mini.run(text), mesh=MeshConfig(data=8))
    for field, value in {"train.num_steps": 8, "train.log_every": 3, "checkpoint.every": 2,
                         "eval.every": 4, "eval.num_batches": 1}.items():
        config = configs.replace(config, field, value)
    workdir = tmp_path_factory.mktemp("whole")
    train.run(config, workdir)
    return config, workdir


def bits(config, workdir, step):
    params, _ = manager.restore_params(workdir, build(config).abstract_state["params"], step)
    return {path: np.asarray(x).tobytes() for path, x in tree.flatten(params).items()}


def lines_of(workdir):
    return [line for line in metrics.read_metrics(files.path(workdir) / "metrics.jsonl")]


def without_timings(workdir):
    return [{n: v for n, v in line.items()
             if n not in mini.TIMINGS and not n.startswith("seconds/")} for line in lines_of(workdir)]


def test_a_killed_run_goes_on_and_is_the_uninterrupted_local_one(whole, text, bucket, monkeypatch,
                                                                 caplog, tmp_path):
    config, local = whole
    buckets.upload(pathlib.Path(text), f"{bucket}/data/words.txt")
    workdir = f"{bucket}/a b=c/run"
    config = configs.replace(config, "data.train_files", f"{bucket}/data/words.txt")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 5)
        train.run(config, workdir)
    # What a kill within the save of step 6 leaves: all but the object that comes last.
    held = buckets.client().bucket("bucket")
    for key in bucket_server.listed("a b=c/run/checkpoints/4/"):
        if not key.endswith("/4/commit_success.txt"):
            held.copy_blob(held.blob(key), held, key.replace("/4/", "/6/"))
    assert manager.all_steps(workdir) == [2, 4]
    assert manager.all_steps(f"{workdir}/checkpoints/6") == []
    with caplog.at_level("INFO", "t5x_lite.checkpoints.manager"):
        train.run(config, workdir)
    assert f"{workdir}/checkpoints/6 is a half-written checkpoint" in caplog.text
    assert "resumed from step 4" in caplog.text
    assert bits(config, workdir, 8) == bits(config, local, 8)
    assert without_timings(workdir) == without_timings(local)
    assert manager.all_steps(workdir) == manager.all_steps(local)
    names = files.names(workdir)
    assert names == sorted({*os.listdir(local)}) and "tensorboard" in names

    # Evaluated, predicted, reported and started from: everything is in the bucket.
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    saved = cli.saved_config(files.path(workdir))
    for step in ("last", "6"):
        eval_main.write(files.path(workdir), eval_main.run(
            saved, files.path(workdir), eval_main.steps_to_evaluate(files.path(workdir), step)))
    evaluated = files.path(f"{workdir}/eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in evaluated] == [8, 6]
    buckets.write(f"{bucket}/in.txt", b"alpha beta\ngamma\ndelta\n")
    for name in (f"{bucket}/out/o.jsonl", str(tmp_path / "o.jsonl")):
        _infer(saved, workdir, f"{bucket}/in.txt", name)
    out = files.path(f"{bucket}/out/o.jsonl").read_text()
    assert out == (tmp_path / "o.jsonl").read_text() and out.count("\n") == 3
    # Half of the output, with a line that was cut: the rest is added.
    buckets.write(f"{bucket}/out/o.jsonl", out.encode()[:out.index("\n") + 9])
    assert _infer(saved, workdir, f"{bucket}/in.txt", f"{bucket}/out/o.jsonl") == 2
    assert files.path(f"{bucket}/out/o.jsonl").read_text() == out
    (found,) = reporting_runs.find([bucket])
    assert found.arm == "a b=c/run" and found.settings["train.num_steps"] == 8
    init_from.check_workdir(workdir)
    assert init_from.open_source(workdir).config == config.model


def test_the_best_step_and_the_average_are_in_the_bucket(text, bucket, tmp_path, monkeypatch):
    """A run that averages, keeps its best step and stops early, killed on the way, is the local one."""
    config = dataclasses.replace(mini.run(text), mesh=MeshConfig(data=8))
    for field, value in {"train.num_steps": 9, "train.ema_decay": 0.5, "train.log_every": 1, "checkpoint.every": 1,
                         "checkpoint.keep_last": 1, "checkpoint.best": "loss", "eval.every": 1, "eval.num_batches": 1,
                         "eval.stop_after": 2}.items():
        config = configs.replace(config, field, value)
    losses, now, original = {0: 9.0, 1: 5.0, 2: 4.0, 3: 6.0, 4: 4.5}, [0], train._evaluate

    def evaluate(session, held_out, meter, state, step):
        now[0] = step
        return original(session, held_out, meter, state, step)
    monkeypatch.setattr(train, "_evaluate", evaluate)
    monkeypatch.setattr(evaluator.Evaluator, "evaluate", lambda self, params: {
        "validation_files": {"loss": losses[now[0]]}})
    workdir, local = f"{bucket}/best", tmp_path / "local"
    train.run(config, local)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(patch, 3)
        train.run(config, workdir)
    train.run(config, workdir)
    assert manager.all_steps(workdir) == manager.all_steps(local) and manager.all_steps(local)[-1] == 4
    for name, step in (("best", 2), ("last", 4)):
        assert manager.read_record(workdir, name).step == step
        found = [init_from.open_source(f"{folder}/checkpoints/{step}") for folder in (workdir, local)]
        for path in found[1].shapes:
            np.testing.assert_array_equal(*(source.read(path, jnp.float32) for source in found), err_msg=path)
    assert init_from.open_source(f"{workdir}/checkpoints/best").shapes == found[0].shapes
    assert eval_main.steps_to_evaluate(files.path(workdir), "best") == ["best"]
    assert without_timings(workdir) == without_timings(local)


def _infer(config, workdir, source, output):
    lines, name = infer.open_input(source)
    items = infer.read_lines(lines, "text", on_error="refuse", needs_targets=False, name=name)
    decode = dataclasses.replace(config.eval.decode, max_length=3)
    return infer.infer(config, files.path(workdir), "last", decode, items, files.path(output),
                       mode="predict", source=infer.source_of(source, "text"))


def test_a_checkpoint_holds_the_counts_of_when_its_save_began():
    """A bucket is slow enough for the next step to be counted before the record is written."""
    progress = {"spent": [[8, 24]]}
    args = format.save_args(1, {"params": {"x": jnp.ones(2)}}, {}, "{}", progress)
    progress["spent"][0][0] += 8
    assert args["record"].record.progress == {"spent": [[8, 24]]}


def test_a_step_that_cannot_be_read_or_is_bad_is_set_aside(whole, bucket):
    config, local = whole
    workdir = f"{bucket}/run"
    files.upload_folder(local, files.path(workdir), "UNFINISHED")
    assert manager.all_steps(workdir) == manager.all_steps(local)
    newest = manager.all_steps(workdir)[-1]
    buckets.delete(f"{workdir}/checkpoints/{newest}/record/record.json")
    program = build(config)
    with manager.Checkpointer(workdir, config.checkpoint) as checkpointer:
        restored = checkpointer.restore_latest(program.abstract_state)
        assert restored.record.step == newest - 2
        assert checkpointer.suspect(newest - 2) == [newest - 2]
        assert checkpointer.latest() is None
    aside = {f"{newest}.unreadable", f"{newest - 2}.suspect"}
    assert aside <= {*files.names(f"{workdir}/checkpoints")}
    with manager.Checkpointer(workdir, config.checkpoint):   # both are kept
        pass
    assert aside <= {*files.names(f"{workdir}/checkpoints")}


@pytest.mark.parametrize("error", [ConnectionResetError("by peer"), OSError("Forbidden: o\nrobot"),
                                   ValueError("UNAVAILABLE: Error opening")])
def test_a_network_that_fails_sets_nothing_aside(whole, bucket, monkeypatch, error):
    config, local = whole
    files.upload_folder(local, files.path(f"{bucket}/run"), "UNFINISHED")
    held = bucket_server.listed()

    def fail(*_):
        raise error
    program = build(config)
    with manager.Checkpointer(f"{bucket}/run", config.checkpoint) as checkpointer:
        monkeypatch.setattr(format, "_parse_record", fail)
        with pytest.raises(UserError, match="8 cannot be read now: .*Nothing was changed") as raised:
            checkpointer.restore_latest(program.abstract_state)
    assert isinstance(raised.value, TryAgain) != ("Forbidden" in str(error))
    assert {*held, "run/run.lock"} == {*bucket_server.listed()}
    with pytest.raises(manager.Unreadable):   # on a disk it is damage
        manager.checkpoint_format.read_record(manager._absolute(local / "checkpoints/8"))


def test_another_start_in_the_same_workdir_is_refused(whole, bucket, monkeypatch):
    config, _ = whole
    config = configs.replace(config, "checkpoint.wait_for_workdir", 0.0)
    held = lock.hold(f"{bucket}/run", 0.0, print)
    with pytest.raises(UserError, match="is in use: process"):
        train.run(config, f"{bucket}/run")
    held.release()
    with manager.Checkpointer(f"{bucket}/run", config.checkpoint) as checkpointer:
        checkpointer._lock.lost = {"host": "elsewhere", "pid": 7, "start": 0.0}
        with pytest.raises(UserError, match="taken over by process 7 on host elsewhere"):
            checkpointer.save(1, {}, {}, "{}")
        checkpointer._lock.lost = None


def test_the_watchdogs_stacks_are_in_the_bucket(bucket, capsys):
    ended = threading.Event()
    clock = Clock()
    with Watchdog(WatchdogConfig(start=0.1), clock, files.path(f"{bucket}/run"),
                  leave=lambda status: ended.set(), where=lambda: "at step 3"):
        assert ended.wait(30)
    assert "at step 3" in files.path(f"{bucket}/run/watchdog-0.txt").read_text()


def test_conversions_end_in_a_bucket_and_begin_there(whole, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path / "cache"))
    config = tiny_config.run("")
    program = init_from.alone(config)
    with manager.Checkpointer(tmp_path / "w", config.checkpoint) as checkpointer:
        checkpointer.save(3, {"params": program.init_params()}, {}, configs.to_json(config))
    convert.run(str(tmp_path / "w"), f"hf:{bucket}/hf")
    convert.run(f"hf:{bucket}/hf", f"{bucket}/w")
    assert manager.all_steps(f"{bucket}/w") == [0]
    convert.run(f"{bucket}/w", f"hf:{tmp_path}/hf")
    held = (tmp_path / "hf/model.safetensors").read_bytes()
    assert buckets.read(f"{bucket}/hf/model.safetensors")[0] == held
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.run(f"{bucket}/w", f"hf:{bucket}/hf")
    buckets.write(f"{bucket}/hf/UNFINISHED", b"")   # a conversion that was killed is begun anew
    buckets.write(f"{bucket}/hf/left.txt", b"")
    convert.run(f"{bucket}/w", f"hf:{bucket}/hf")
    assert not {"left.txt", "UNFINISHED"} & {*files.names(f"{bucket}/hf")}


def test_a_ladders_folder_is_in_a_bucket(bucket, tmp_path):
    """Its plan, its prediction and fits are those of the same folder on the disk."""
    folder = files.path(f"{bucket}/a ladder=1")
    test_ladders.write_ladder(tmp_path / "l", noise=1e-3)
    files.upload_folder(tmp_path / "l", folder, "UNFINISHED")
    assert results.table_of(folder, {}).columns["loss"].tolist() == results.table_of(
        tmp_path / "l", {}).columns["loss"].tolist()
    ladder = ladders.Ladder(budgets=(4e9, 1e10), unit=4, sizes=2)
    for _ in range(2):
        ladders.write_plan(folder, test_ladders.BASE, ladder)
    planned = ladder_config.get_runs(f"{folder}/ladder.json")
    with pytest.raises(UserError, match="is of another ladder"):
        ladders.write_plan(folder, test_ladders.BASE, dataclasses.replace(ladder, sizes=3))
    assert results.read_prediction(folder) is None
    results.write_prediction(folder, {"params": 5e4, "flops": 4e11})
    with pytest.raises(UserError, match="was written before"):
        results.write_prediction(folder, {"params": 1.0, "flops": 1.0})
    assert results.read_prediction(folder)["params"] == 5e4
    assert len(ladder_config.get_runs(f"{folder}/ladder.json")) == len(planned) + 1
    ladder_page.write(str(folder), f"{folder}/ladder.html", laws=("parabola",))
    assert "<title>a ladder=1" in (folder / "ladder.html").read_text()
