"""Figures of runs for notebooks."""

import pytest

from t5x_lite.errors import UserError
from t5x_lite.reporting import figure
from tests.reporting.test_page import write_run


def test_an_arm_is_the_mean_of_its_seeds_and_their_range(tmp_path):
    for arm in ("a", "b"):
        for seed in (0, 1):
            write_run(tmp_path / arm / f"seed_{seed}", seed, [3.0 + seed, 2.0])
    [axes] = figure.curves([tmp_path], "eval/*/loss", "tokens", logx=True).axes
    assert [line.get_color() for line in axes.lines] == ["C0", "C1"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a (2 seeds)", "b (2 seeds)"]
    assert axes.get_xlabel() == "tokens" and axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [640, 1280]
    assert axes.lines[0].get_ydata().tolist() == [3.5, 2.0]
    low, high = (edge(axes.collections[0].get_paths()[0].vertices[:, 1]) for edge in (min, max))
    assert (low, high) == (2.0, 4.0)


def test_seeds_that_share_no_place_are_lines_of_their_own(tmp_path):
    write_run(tmp_path / "a" / "seed_0", 0, [3.0])
    write_run(tmp_path / "a" / "seed_1", 1, [2.0], seconds=7)
    [axes] = figure.curves([tmp_path], "eval/all/loss", "hours").axes
    assert [line.get_ydata()[0] for line in axes.lines] == [3.0, 2.0] and not axes.collections


@pytest.mark.parametrize("arguments, message", [
    (dict(metric="eval/all/los"), "metric='eval/all/los'.*eval/all/loss"),
    (dict(axis="steps"), "axis='steps'.*step"),
])
def test_wrong_names_are_told(tmp_path, arguments, message):
    write_run(tmp_path / "a", 0, [3.0])
    with pytest.raises(UserError, match=message):
        figure.curves([tmp_path], **arguments)


def test_a_picture_of_nothing_yet_is_a_line_of_text(tmp_path):
    picture = figure._Picture(tmp_path / "none", "train/loss")._repr_mimebundle_()
    assert list(picture) == ["text/plain"] and "waiting" in picture["text/plain"]
    write_run(tmp_path / "a", 0, [3.0])
    assert "image/png" in figure._Picture(tmp_path / "a", "train/loss")._repr_mimebundle_()


def test_outside_a_notebook_nothing_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(figure.sys.modules, "ipykernel", raising=False)
    with figure.watching(tmp_path):
        pass
    assert capsys.readouterr().out == ""
