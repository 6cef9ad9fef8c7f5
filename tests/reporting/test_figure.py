"""Figures of runs for notebooks."""

import pytest

from t5x_lite.errors import UserError
from t5x_lite.reporting import figure
from tests.reporting.test_page import write_run


def test_a_colour_an_arm_and_a_line_a_seed(tmp_path):
    for arm in ("a", "b"):
        for seed in (0, 1):
            write_run(tmp_path / arm / f"seed_{seed}", seed, [3.0, 2.0])
    [axes] = figure.curves([tmp_path], "eval/all/loss", "tokens", logx=True).axes
    assert [line.get_color() for line in axes.lines] == ["C0", "C0", "C1", "C1"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    assert axes.get_xlabel() == "tokens" and axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata().tolist() == [640, 1280]


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
