"""Trackers receive the lines of metrics.jsonl and never stop a run; stand-ins for both packages."""

import json
import struct
import sys
import types

import pytest

from t5x_lite.config import RunConfig, from_mapping
from t5x_lite.errors import UserError
from t5x_lite.training import metrics
from t5x_lite.training.trackers import TrackConfig, Trackers


class Run:
    def __init__(self, given, fails=False):
        self.given, self.fails, self.lines, self.finished = given, fails, [], False

    def log(self, data, step=None):
        if self.fails:
            raise ConnectionError("no route")
        self.lines.append((step, data))

    def finish(self):
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch):
    """(its name, the runs that were begun, what its init does)."""
    module, runs = types.ModuleType(request.param), []
    module.init = lambda **given: runs.append(Run(given)) or runs[-1]
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, runs, module


def written(tmp_path, name, steps, config=TrackConfig):
    tracked = Trackers(config(to=(name,)), tmp_path, {"train": {"seed": 3}})
    with metrics.MetricsWriter(tmp_path, steps[0] - 1, tracked) as writer:
        for step in steps:
            writer.write({"step": step, "chip": "cpu"}, {"loss": 1 / step, "bad": float("nan")}, "train/")


def test_they_are_shown_the_lines_and_a_resumed_run_goes_on(tmp_path, package):
    name, runs, _ = package
    written(tmp_path, name, [1, 2])
    written(tmp_path, name, [3])
    lines = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [{"step": step, **data} for run in runs for step, data in run.lines] == lines
    assert [step for run in runs for step, _ in run.lines] == [1, 2, 3]
    assert not any("step" in data for run in runs for _, data in run.lines)   # trackio renames it
    assert all(run.finished for run in runs)
    first, second = (run.given for run in runs)
    assert first == second and first["resume"] == "allow" and first["project"] == "t5x_lite"
    assert first["config"] == {"train": {"seed": 3}} and tmp_path.name in first["name"]
    assert (tmp_path / "track.txt").read_text().strip() in (first.get("id") or first["name"])


def test_one_that_fails_is_left_out_and_said_once(tmp_path, package, capsys):
    name, _, module = package
    module.init = lambda **given: Run(given, fails=True)
    written(tmp_path, name, [1, 2])
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert capsys.readouterr().out == (
        f"warning: {name} fails (ConnectionError: no route); the run goes on without\n")


def test_what_cannot_begin_is_said_at_the_start(tmp_path, package, monkeypatch):
    name, _, module = package

    def init(**_):
        raise RuntimeError("no API key")

    module.init = init
    with pytest.raises(UserError, match=f"track.to={name}: RuntimeError: no API key. Log in"):
        written(tmp_path, name, [1])
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        written(tmp_path, name, [1])


def test_names():
    with pytest.raises(UserError, match="track.to.*one of wandb, trackio.*wandb"):
        TrackConfig(to=("wandbb",))
    run = from_mapping(RunConfig, {"track": {"to": "wandb,trackio"}})
    assert run.track.to == ("wandb", "trackio") and json.dumps(run.track.project)


# --- the packages themselves: pip install 't5x_lite[wandb]' 't5x_lite[trackio]' -----------------------------

def of_wandb(folder):
    """{run's id: [(step, loss)]} of the files that `wandb sync` would send: a log of LevelDB's kind, blocks
    of 32 KiB of (checksum, length, kind) and content."""
    from wandb.proto import wandb_internal_pb2
    found = {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content, place, whole = file.read_bytes(), 7, b""
        records = found.setdefault(file.stem.removeprefix("run-"), [])
        while place + 7 <= len(content):
            if -place % 32768 < 7:   # the rest of a block holds no header
                place += -place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", content[place:place + 7])
            whole += content[place + 7:place + 7 + length]
            place += 7 + length
            if kind in (1, 4):   # whole, or the last part
                record = wandb_internal_pb2.Record.FromString(whole)
                line = {item.key or item.nested_key[0]: json.loads(item.value_json)
                        for item in record.history.item}
                records += [(line["_step"], line["train/loss"])] if line else []
                whole = b""
    return found


def of_trackio(_):
    """The same of trackio's data base."""
    from trackio.sqlite_storage import SQLiteStorage
    return {run.rpartition("-")[2]: [(line["step"], line["train/loss"])
                                     for line in SQLiteStorage.get_logs("t5x_lite", run)]
            for run in SQLiteStorage.get_runs("t5x_lite")}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "of"), [("wandb", of_wandb), ("trackio", of_trackio)])
def test_offline_both_lives_of_a_run_are_kept_as_one(tmp_path, monkeypatch, name, of):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name, reason=f"pip install {name}; see its extra in setup.py")
    folder = tmp_path / "run x"
    written(folder, name, [1, 2])
    written(folder, name, [3])
    ours = (folder / "track.txt").read_text().strip()
    assert of(folder) == {ours: [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]}
