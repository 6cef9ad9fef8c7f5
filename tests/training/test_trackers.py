"""Trackers receive the lines of metrics.jsonl and never stop a run; stand-ins for both packages."""

import json
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
    assert [data for run in runs for _, data in run.lines] == lines
    assert [step for run in runs for step, _ in run.lines] == [1, 2, 3]
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
