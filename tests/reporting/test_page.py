"""A page of runs: what it gathers, what it says of damaged folders, and that a browser draws it."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from t5x_lite.errors import UserError
from t5x_lite.reporting import page, runs as reporting_runs, tables

ROOT = pathlib.Path(__file__).resolve().parents[2]


def write_run(folder: pathlib.Path, seed: int, losses, width: int = 8, extra: str = "",
              **line) -> None:
    """A run's folder as a run writes it, with held-out losses at steps 10, 20, …"""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({
        "train": {"seed": seed, "num_steps": 30}, "model": {"embed_dim": width, "encoder": {
            "segments": [{"repeats": 2}]}}}))
    lines = [json.dumps({"step": 10 * i, "tokens_seen": 640 * i, "flops": 1e9 * i,
                         "chip_hours": 0.5 * i, **line, "train/loss": loss + 1}) + "\n"
             + json.dumps({"step": 10 * i, "tokens_seen": 640 * i, "flops": 1e9 * i,
                           "eval/all/loss": loss}) + "\n"
             for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(lines) + extra)


@pytest.fixture
def experiment(tmp_path):
    """Two arms of two seeds; one arm is wider."""
    for arm, width, first in (("narrow", 8, 3.0), ("wide", 16, 2.0)):
        for seed in (0, 1):
            write_run(tmp_path / "x" / arm / f"seed_{seed}", seed,
                      [first, first - 0.5, first - 1 + 0.25 * seed], width)
    return tmp_path / "x"


def test_seeds_of_an_arm_are_one_row_with_their_range(experiment):
    found = reporting_runs.find([str(experiment)])
    assert [(run.arm, run.seed) for run in found] == [
        ("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1)]
    heads, rows = tables.final(found, reporting_runs.metrics_of(found))
    assert heads == ["arm", "seeds", "step", "all/loss"]
    assert rows == [["narrow", "2", "30", "2.125 (2 … 2.25)"],
                    ["wide", "2", "30", "1.125 (1 … 1.25)"]]


def test_only_what_differs_is_listed_as_different(experiment):
    assert tables.differing(reporting_runs.find([str(experiment)])) == (
        ["setting", "narrow", "wide"], [["model.embed_dim", "8", "16"]])


def test_any_folders_are_grouped_by_their_settings(tmp_path):
    for name, seed, width in (("a", 0, 8), ("b", 1, 8), ("c", 0, 16)):
        write_run(tmp_path / name, seed, [2.0], width)
    found = reporting_runs.find([str(tmp_path / name) for name in "abc"])
    assert {arm: len(members) for arm, members in reporting_runs.by_arm(found).items()} == {
        "a": 2, "c": 1}


def test_runs_that_are_named_side_by_side_stay_apart(tmp_path):
    """Of the same settings and seed; and a seed's folder is called by what is around it."""
    for name in ("first", "second"):
        write_run(tmp_path / name, 0, [2.0])
    for seed in (0, 1):
        write_run(tmp_path / "wide" / f"seed_{seed}", seed, [1.0], 16)
    found = reporting_runs.find([str(tmp_path / name) for name in ("first", "second", "wide")])
    assert [(run.arm, run.seed) for run in found] == [
        ("first", 0), ("second", 0), ("wide", 0), ("wide", 1)]


def test_arms_of_one_name_from_two_experiments_are_two(tmp_path):
    """… with the experiments' names before them; seeds of one setting from two folders are one arm."""
    write_run(tmp_path / "one" / "dense" / "seed_0", 0, [4.0])
    write_run(tmp_path / "two" / "dense" / "seed_0", 0, [2.0], width=16)
    write_run(tmp_path / "two" / "wide" / "seed_0", 0, [2.0], width=32)
    found = reporting_runs.find([tmp_path / "one", tmp_path / "two"])
    assert [run.arm for run in found] == ["one/dense", "two/dense", "wide"]
    write_run(tmp_path / "three" / "dense" / "seed_1", 1, [3.0])
    assert {run.arm for run in reporting_runs.find([tmp_path / "one", tmp_path / "three"])} == {"dense"}
    deep = tmp_path / "a" / "x", tmp_path / "b" / "x"
    for number, folder in enumerate(deep):
        write_run(folder / "dense", 0, [3.0], width=number)
    assert [run.arm for run in reporting_runs.find(deep)] == ["a/x/dense", "b/x/dense"]


def test_a_run_that_ended_in_nan_does_not_show_its_last_number(tmp_path):
    nan = float("nan")
    write_run(tmp_path / "x" / "good" / "seed_0", 0, [3.0, 2.0])
    write_run(tmp_path / "x" / "bad" / "seed_0", 0, [3.0, nan, nan])
    write_run(tmp_path / "x" / "half" / "seed_0", 0, [3.0, 2.0])
    write_run(tmp_path / "x" / "half" / "seed_1", 1, [3.0, nan])
    found = reporting_runs.find([tmp_path / "x"])
    _, rows = tables.final(found, ["eval/all/loss"])
    assert {row[0]: row[-1] for row in rows} == {
        "good": "2", "bad": "NaN since step 20", "half": "2; 1 of 2 NaN since step 20"}
    text = page.render(found, "t")
    assert "eval/all/loss is NaN or infinite from step 20 to the end" in text
    write_run(tmp_path / "only", 0, [nan, nan])
    with pytest.raises(UserError, match="is NaN or infinite since step 10: the run diverged"):
        page.render(reporting_runs.find([tmp_path / "only"]), "t")


def test_a_run_without_metrics_is_named_on_the_page(tmp_path):
    write_run(tmp_path / "x" / "one", 0, [3.0], extra=f'{{"step": 20, "eval/all/loss": {10 ** 400}}}\n')
    write_run(tmp_path / "x" / "crashed", 0, [])
    file = page.write([tmp_path / "x"], str(tmp_path / "out.html"))
    assert "crashed: no line of metrics; this run is on no curve" in file.read_text()


def test_losses_come_first_then_what_tasks_measure(tmp_path):
    write_run(tmp_path / "a", 0, [2.0], **{
        "eval/all/aux_loss": 1.0, "eval/t/loss": 1.0, "eval/t/z_loss": 1.0, "eval/t/metric/em": 1.0,
        "eval/t/accuracy": 1.0, "seconds/step": 3.0, "goodput": 0.75})
    found = reporting_runs.find([str(tmp_path / "a")])
    names = reporting_runs.metrics_of(found)
    assert names[:4] == ["eval/all/loss", "eval/t/loss", "eval/t/metric/em", "eval/t/accuracy"]
    assert names[-2:] == ["train/loss", "seconds/step"] and len(names) == 8
    heads, [row] = tables.cost(found)
    assert dict(zip(heads, row, strict=True)) | {"goodput": "75.0%", "step": "3 s"} == dict(
        zip(heads, row, strict=True))
    text = page.render(found, "t")
    assert '"eval/t/metric/em": "exact match of t (%)"' in text


def test_only_mixtures_have_an_expert_load(tmp_path):
    write_run(tmp_path / "dense", 0, [2.0], 16)
    write_run(tmp_path / "moe", 0, [2.0], **{"train/moe/load_entropy/encoder_1": 0.5})
    found = reporting_runs.find([str(tmp_path)])
    assert tables.expert_load(found) == (["run", "encoder layer 1"], [["moe, seed 0", "0.5"]])


def test_hours_are_carried_over_lines_that_do_not_say(tmp_path):
    write_run(tmp_path / "a", 0, [2.0, 1.0])
    [run] = reporting_runs.find([str(tmp_path / "a")])
    assert [line["hours"] for line in run.lines] == [0.5, 0.5, 1.0, 1.0]


def test_damaged_lines_and_configs_are_left_out_and_named(tmp_path):
    write_run(tmp_path / "a", 0, [2.0, float("nan")], extra='\0\0\n{"no": 1}\n{"step": 3')
    (tmp_path / "a" / "config.json").write_text("{")
    [run] = reporting_runs.find([str(tmp_path)])
    assert (len(run.lines), run.unreadable, run.last("eval/all/loss")) == (4, 3, 2.0)
    text = page.render([run], "t")
    assert "3 lines of metrics.jsonl" in text and "config.json could not be read" in text


def test_over_its_size_a_run_is_one_point(tmp_path):
    write_run(tmp_path / "a", 0, [3.0, 2.0], params_no_embed_head=1000)
    found = reporting_runs.find([str(tmp_path / "a")])
    points = tables.points(found, ["train/loss"])
    assert [(p["step"], p["parameters"], p["value"]) for p in points] == [
        (10, None, 4.0), (20, 1000, 3.0)]
    assert reporting_runs.curve(found[0], "train/loss", "parameters") == {1000: 3.0}
    assert "<option>parameters</option>" in page.render(found, "t")


def test_text_of_runs_cannot_end_the_script(experiment):
    (experiment / "wide" / "seed_0" / "samples.txt").write_text("</script><b>&")
    text = page.render(reporting_runs.find([str(experiment)]), "</script>")
    assert text.count("</script>") == 2 and "&lt;/script&gt;&lt;b&gt;&amp;" in text


def test_names_of_runs_cannot_leave_the_script_either(tmp_path):
    write_run(tmp_path / "a<!--<script>" / "seed_0", 0, [2.0])
    text = page.render(reporting_runs.find([str(tmp_path)]), "t")
    points = next(line for line in text.splitlines() if line.startswith("const points"))
    assert "\\u003c!--\\u003cscript>" in points and "<" not in points


@pytest.mark.parametrize("make, message", [
    (lambda d: page.write([], "o.html"), "which runs"),
    (lambda d: page.write([str(d / "none")], "o.html"), "is no folder"),
    (lambda d: page.write([str(d / "empty")], "o.html"), "holds no metrics.jsonl"),
    (lambda d: page.write([str(d / "blank")], "o.html"), "no line of metrics yet"),
    (lambda d: page.write([str(d / "good")], str(d / "good/metrics.jsonl/o.html")),
     "cannot be written"),
])
def test_wrong_input_is_refused_by_name(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "blank", 0, [])
    write_run(tmp_path / "good", 0, [1.0])
    with pytest.raises(UserError, match=message):
        make(tmp_path)


def test_a_browser_draws_it_without_network_or_complaint(experiment, tmp_path):
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (Debian's package chromium)")
    file = page.write([str(experiment)], str(tmp_path / "r.html"))
    shot = tmp_path / "r.png"
    result = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1200",
         "--virtual-time-budget=8000", "--enable-logging=stderr", "--dump-dom",
         f"--screenshot={shot}", file.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in result.stderr, result.stderr
    assert re.search(r"<(canvas|svg)[^>]*marks", result.stdout), "no curve was drawn"
    assert shot.stat().st_size > 20_000


@pytest.mark.slow
def test_the_command(experiment, tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "t5x_lite.report", str(experiment), f"--output={tmp_path}/o.html"],
        cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "written: " in result.stdout, result.stderr
    assert "narrow" in (tmp_path / "o.html").read_text()
