"""Comparisons: arms, seeds and stages run once, are gathered and drawn."""

import json

import pytest

from t5x_lite import experiment
from t5x_lite.errors import UserError
from t5x_lite.reporting import runs as reporting_runs
from tests import tiny_config
from tests.reporting.test_page import write_run

CONFIG = '''
import dataclasses
from t5x_lite import config as configs
from t5x_lite.experiment import Run
from t5x_lite.parallel.sharding import MeshConfig
from tests import tiny_config

SHOWN = ("validation_files/loss",)

def get_runs(text_file):
    base = dataclasses.replace(tiny_config.run(text_file), mesh=MeshConfig(data=8))
    base = configs.replace(base, "train.num_steps", 2)
    for seed in (0, 1):
        run = configs.replace(base, "train.seed", seed)
        yield Run("staged", seed, run, stage="pretrain")
        yield Run("staged", seed, run, stage="finetune", after="pretrain")
'''


def test_runs_once_resumes_and_reports(tmp_path):
    text = tiny_config.write_text(tmp_path / "words.txt")
    config = tmp_path / "compare.py"
    config.write_text(CONFIG)
    path, workdir = f"{config}:{text}", tmp_path / "out"
    experiment.run(path, workdir, only="seed_0")
    shown = experiment.run(path, workdir)
    assert shown.splitlines()[0] == "| arm | seeds | validation_files/loss |"
    assert [line.split("|")[1:3] for line in shown.splitlines()[2:4]] == [
        [" staged/pretrain ", " 2 "], [" staged/finetune ", " 2 "]]
    assert (workdir / "curves.png").stat().st_size > 5000
    results = json.loads((workdir / "results.json").read_text())
    first = results["staged/seed_0/pretrain"]["validation_files/loss"]
    # The second stage goes on from the parameters of the first, and learns.
    assert results["staged/seed_0/finetune"]["validation_files/loss"] < first
    before = {p: p.stat().st_mtime for p in workdir.rglob("metrics.jsonl")}
    assert experiment.run(path, workdir) == shown
    assert before == {p: p.stat().st_mtime for p in workdir.rglob("metrics.jsonl")}


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        experiment.load(str(tmp_path / "none.py"))
    (tmp_path / "plain.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="has no get_runs"):
        experiment.load(str(tmp_path / "plain.py"))
    (tmp_path / "compare.py").write_text(CONFIG)
    text = tiny_config.write_text(tmp_path / "words.txt")
    with pytest.raises(UserError, match="matches none of"):
        experiment.run(f"{tmp_path}/compare.py:{text}", tmp_path, only="seed_9")
    with pytest.raises(UserError, match="names no field"):
        experiment.run(f"{tmp_path}/compare.py:{text}", tmp_path, overrides=["train.steps=3"])


def test_a_plot_has_the_axes_that_are_asked_for(tmp_path, monkeypatch):
    runs = [experiment.Run(arm, 0, None) for arm in "ab"]
    for run in runs:
        write_run(tmp_path / run.folder, 0, [2.0, 1.0])
    drawn = []
    original = experiment.figure.drawn
    monkeypatch.setattr(experiment.figure, "drawn", lambda *args, **options: drawn.append(
        original(*args, **options)) or drawn[-1])
    experiment.draw(runs, tmp_path, "eval/all/loss", tmp_path / "curves.png", "FLOPs", "xy")
    [axes] = drawn[0].axes
    assert axes.get_xlabel() == "FLOPs"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.lines[0].get_xdata().tolist() == [1e9, 2e9]
    config = tmp_path / "c.py"
    config.write_text("def get_runs():\n    return ()\n")
    with pytest.raises(UserError, match="--over='flops': must be one of step, tokens, FLOPs"):
        experiment.run(str(config), tmp_path, over="flops")


@pytest.mark.parametrize("name", ["switch_vs_dense", "precision", "ladder"])
def test_what_a_shipped_experiment_shows_is_there_with_one_task(name, tmp_path):
    """A run of one task has no eval/all."""
    module, _ = experiment.load(f"configs/experiments/{name}.py")
    runs = [experiment.Run("float32" if name == "precision" else "dense", 0, None)]
    write_run(tmp_path / runs[0].folder, 0, [3.0, 2.0])
    file = tmp_path / runs[0].folder / "metrics.jsonl"
    file.write_text(file.read_text().replace("eval/all/", "eval/text/").replace(
        '"eval/text/loss": 2.0', '"eval/text/loss": 2.0, "eval/text/accuracy": 0.4'))
    cells = experiment.summary(runs, tmp_path, module.SHOWN).splitlines()[2]
    assert "–" not in cells and "| 2 (2 … 2)" in cells
    if hasattr(module, "conclude"):
        assert "nats a token" in module.conclude(runs, tmp_path) or "2.0000" in module.conclude(runs, tmp_path)
    experiment.draw(runs, tmp_path, f"eval/{module.SHOWN[0]}", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()


def test_all_tasks_together_come_first():
    values = {"a/loss": 1.0, "all/loss": 2.0, "b/z_loss": 3.0}
    assert reporting_runs.value(values, "*/loss") == 2.0
    assert reporting_runs.value({"a/loss": 1.0, "a/z_loss": 3.0}, "*/loss") == 1.0


def test_a_metric_that_no_run_has_is_said_and_not_drawn(tmp_path, capsys):
    run = experiment.Run("a", 0, None)
    write_run(tmp_path / run.folder, 0, [2.0])
    experiment.draw([run], tmp_path, "eval/all/los", tmp_path / "curves.png")
    assert "no run has PLOTTED='eval/all/los'; there are eval/all/loss" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(("names", "shown"), [
    (("squad/loss", "squad/accuracy", "squad/metric/em"), ("squad/loss", "squad/metric/em")),
    (("a/loss", "b/loss", "all/loss", "b/metric/f1"), ("all/loss", "b/metric/f1")),
    (("a/loss", "b/loss"), ("a/loss", "b/loss")), ((), ("all/loss",))])
def test_without_a_choice_the_table_shows_the_tasks_that_there_are(names, shown):
    assert experiment.default_metrics([dict.fromkeys(names, 1.0)]) == shown


def test_an_own_experiment_without_choices_has_a_table_and_a_plot(tmp_path, monkeypatch):
    """What runs wrote is shown, from evaluations before the first step on."""
    monkeypatch.setattr(experiment, "execute", lambda runs, workdir: [
        _evaluated(workdir / run.folder, run.seed) for run in runs])
    drawn = []
    original = experiment.figure.drawn
    monkeypatch.setattr(experiment.figure, "drawn", lambda *args, **options: drawn.append(
        original(*args, **options)) or drawn[-1])
    config = tmp_path / "own.py"
    config.write_text('"""My arms.\n\nMore."""\nfrom t5x_lite.experiment import Run\n'
                      "from tests import tiny\n"
                      "def get_runs():\n    return [Run('x', s, tiny.seq2seq()) for s in (0, 1)]\n")
    text = experiment.run(str(config), tmp_path / "out")
    assert text.splitlines()[0] == "| arm | seeds | mine/loss | mine/metric/em |"
    assert "| x | 2 | 1.5 (1 … 2) | 30 (30 … 30) |" in text
    [axes] = drawn[0].axes
    assert axes.lines[0].get_xdata().tolist() == [0, 5] and drawn[0].get_suptitle().startswith("My arms")
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000


def _evaluated(folder, seed):
    folder.mkdir(parents=True)
    lines = [{"step": step, "eval/mine/loss": 4.0 + seed - step * 0.6,
              "eval/mine/metric/em": 6.0 * step} for step in (0, 5)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "config.json").write_text("{}")
