"""Tables as others write them: what is read, what is refused, and what is said of either."""

import gzip
import json
import warnings

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.scaling import __main__ as command, arms, frontier, tables
from tests.reporting.test_page import write_run

ROWS = [(n, 6 * n * d, 1.7 + 400 / n ** .34 + 900 / d ** .3) for n in (1e6, 4e6, 16e6) for d in (2e7, 8e7, 32e7)]


@pytest.fixture
def written(tmp_path):
    def write(text, name="runs.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)
    return write


def csv_of(rows, head="params,flops,loss", end="\n"):
    return head + end + "".join(",".join(map(str, row)) + end for row in rows)


@pytest.mark.parametrize("text", [
    csv_of(ROWS), csv_of(ROWS, end="\r\n"), csv_of(ROWS, end="\r"), csv_of(ROWS).replace(",", ";"),
    csv_of(ROWS).replace(",", "\t"), "\ufeff" + csv_of(ROWS), csv_of(ROWS).replace("\n", ",\n"),
    csv_of([(*row, "x" * 200_000) for row in ROWS], "params,flops,loss,notes")])
def test_one_table_however_it_is_written(written, text):
    found = tables.read(written(text), {})
    assert len(found) == 9 and found.columns["loss"].tolist() == [row[2] for row in ROWS]


@pytest.mark.parametrize("cell, said", [
    ("9.52M", "'9.52M', which is no number (write 9523909"), ("26.24%", "'26.24%', which is no number"),
    ('"9,523,909"', "'9,523,909', which is no number"), ("", "is empty in line 3"), ("nan", "is nan in line 3"),
    ("0", "is 0 in line 3"), ("-3", "is -3 in line 3"), ("1e999", "is 1e999 in line 3")])
def test_a_cell_that_cannot_be_fitted_is_shown(written, cell, said):
    with pytest.raises(UserError) as error:
        tables.read(written(f"params,flops,loss\n1e6,1e16,3\n{cell},1e16,3\n"), {})
    assert said in str(error.value) and "1 of 2 rows cannot be fitted" in str(error.value)


@pytest.mark.parametrize("content, name, message", [
    (gzip.compress(csv_of(ROWS).encode())[:-12], "cut.csv.gz", "not a whole .gz"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\3" + b"\xff" * 40, "bad.csv.gz", "not a whole .gz"),
    ("params,flops,loss\n1,2,3,4\n", "a.csv", "line 2 has 4 cells, and the line of names has 3"),
    ("params,flops,loss,loss\n1,2,3,4\n", "a.csv", "It has flops, loss#1, loss#2, params")])
def test_tables_that_cannot_be_read(written, content, name, message):
    with pytest.raises(UserError) as error:
        tables.read(written(content, name), {"params": "params", "flops": "flops", "loss": "loss"})
    assert message in str(error.value)


def test_what_a_strangers_column_counts_is_not_known(written):
    found = tables.read(written(csv_of(ROWS)), {})
    assert found.counted["params"] == "as 'params' of the table counts"


# --- curves ---------------------------------------------------------------------------------

def curves(names):
    """Three sizes, two horizons each, a row an evaluation."""
    rows = []
    for number, (size, horizon) in enumerate((s, h) for s in (1e6, 2e6, 4e6) for h in (1, 8)):
        rows += [(names.format(number), size, 6 * size * d, 2 + 300 / size ** .4 + (900 + 500 / horizon) / d ** .3)
                 for d in np.geomspace(1e6, 1e7 * horizon, 5)]
    return csv_of(rows, "run,params,flops,loss")


@pytest.mark.parametrize("names", ["{}", "run_{}"])
def test_runs_of_a_curve_are_told_apart_by_the_column_run(written, names):
    found = tables.read(written(curves(names)), {}, curves=True)
    assert np.unique(found.columns["run"]).size == 6
    again = tables.read(written(curves(names)), {"params": "params", "flops": "flops", "loss": "loss"}, curves=True)
    assert again.columns["run"].tolist() == found.columns["run"].tolist()


def test_runs_that_would_be_mixed_are_said(written):
    text = curves("{}").replace("run,", "name,")
    with pytest.raises(UserError, match="two losses at one number of FLOPs"):
        frontier.envelope(tables.read(written(text), {}, curves=True))
    rows = [line.split(",") for line in text.splitlines()[1:]]
    for row in rows:
        if int(row[0]) % 2:
            row[2] = str(float(row[2]) * 1.01)
    _, said = frontier.envelope(tables.read(written(csv_of(rows, "name,params,flops,loss")), {}, curves=True))
    assert any("fall 1 times from row to row" in text for text in said)


# --- the command ----------------------------------------------------------------------------

def run(capsys, *flags):
    """(exit status, what was printed)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = command.main(["fit", *flags])
    out = capsys.readouterr()
    return status, out.out + out.err


@pytest.mark.parametrize("flags, message", [
    (["--drop_highest=2", "--columns=params=params,flops=flops"], "--drop_highest needs the column loss"),
    (["--law=parabola", "--fix=alpha=.3"], "--fix=alpha=.3: --law=parabola does not use it; it is for --law=one that"),
    (["--law=akima", "--points=5"], "--law=akima does not use it; it is for --law=parabola"),
    (["--law=parabola", "--at=params=3"], "write --at=flops=C"),
    (["--at=params=0,tokens=0"], "--at=params=0"), (["--at=params=-1,tokens=5"], "--at=params=-1")])
def test_flags_that_would_do_nothing_or_harm(written, capsys, flags, message):
    status, said = run(capsys, f"--table={written(csv_of(ROWS))}", *flags)
    assert status == 2 and message in said


def test_a_frontier_predicts_the_best_model_of_a_budget(written, capsys):
    rows = [(n, c, 1 + (n / (c / 6e2) ** .5) + ((c / 6e2) ** .5 / n)) for c in (6e14, 6e16, 6e18)
            for n in (c / 6e2) ** .5 * np.array([.25, .5, 1, 2, 4])]
    status, out = run(capsys, f"--table={written(csv_of(rows))}", "--law=parabola", "--at=flops=6e20", "--json")
    assert status == 0 and json.loads(out)["prediction"]["params"] == pytest.approx(1e9, rel=0.05)


def test_rows_that_stand_twice_are_said_and_seeds_are_not(written, capsys):
    flags = ["--starts=5", "--json"]
    _, twice = run(capsys, f"--table={written(csv_of(ROWS + ROWS))}", *flags)
    seeds = [(n, c, loss + 1e-3) for n, c, loss in ROWS]
    _, seeded = run(capsys, f"--table={written(csv_of(ROWS + seeds))}", *flags)
    assert "9 of 18 rows repeat another exactly" in twice and "repeat another" not in seeded


def test_json_has_null_where_there_is_no_number():
    assert command._of_json({"a": [float("nan"), 1.5], "b": float("inf"), "c": (2,)}) == {
        "a": [None, 1.5], "b": None, "c": [2]}


def test_arms_in_folders_of_one_name(tmp_path):
    for experiment in ("a", "b"):
        for width in (8, 16, 32):
            write_run(tmp_path / experiment / "dense" / f"w{width}" / "seed_0", 0, [3.0, 2.5 - width / 100], width)
    folders = [str(tmp_path / name / "dense") for name in ("a", "b")]
    found = arms.from_folders(folders, "eval/all/loss", over="flops", skip_bad=False)
    assert [runs.name for runs in found] == ["a/dense", "b/dense"]
    with pytest.raises(UserError, match="the same folder twice"):
        arms.from_folders([folders[0], folders[0] + "/"], "eval/all/loss", over="flops", skip_bad=False)
