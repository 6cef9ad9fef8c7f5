"""Figures of runs for notebooks."""

import time
from types import SimpleNamespace

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


def test_titles_units_and_what_the_shade_is(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "a" / f"seed_{seed}", seed, [3.0 + seed, 2.0])
        write_run(tmp_path / "b" / f"seed_{seed}", seed, [3.0 + seed, 2.5])
    picture = figure.curves([tmp_path], title="Two arms")
    [axes] = picture.axes
    assert picture.get_suptitle() == "Two arms\nline: mean of the seeds, shade: their range"
    assert axes.get_ylabel() == "held-out loss (nats a token)" and axes.get_xlabel() == "step"
    # the legend stands beside the curves, in the order in which they end
    legend = axes.get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["b (2 seeds)", "a (2 seeds)"]
    assert legend.get_bbox_to_anchor().x0 > axes.bbox.x1


@pytest.mark.parametrize(("metric", "words"), [
    ("eval/closed_book_qa/metric/em", "exact match of closed_book_qa (%)"),
    ("eval/*/metric/f1", "F1 (%)"), ("train/loss", "training loss (nats a token)"),
    ("eval/squad/accuracy", "held-out accuracy of squad (share of tokens)"),
    ("eval/t/metric/spans_exact", "spans exact of t (%)"), ("train/grad_norm", "training grad norm")])
def test_a_metric_in_words(metric, words):
    assert figure.in_words(metric) == words


def test_many_shaded_arms_have_panels(tmp_path):
    for arm in "abcdefg":
        for seed in (0, 1):
            write_run(tmp_path / arm / f"seed_{seed}", seed, [3.0 + seed, 2.0])
    panels = [axes for axes in figure.curves([tmp_path]).axes if axes.axison]
    assert [axes.get_title() for axes in panels] == list("abcdefg")
    for number, axes in enumerate(panels):
        assert len(axes.lines) == 7 and len(axes.collections) == 1   # one in colour, six in grey
        assert axes.lines[-1].get_color() == f"C{number}" and axes.lines[0].get_color() == "0.75"
        assert axes.get_ylim() == panels[0].get_ylim()


def test_a_first_point_far_above_does_not_flatten_the_rest(tmp_path):
    write_run(tmp_path / "far", 0, [9.0, 2.2, 2.0])
    write_run(tmp_path / "near", 0, [2.5, 2.2, 2.0])
    [far], [near] = (figure.curves([tmp_path / name]).axes for name in ("far", "near"))
    assert far.get_ylim() == pytest.approx((1.98, 2.28)) and near.get_ylim()[1] > 2.5
    assert far.lines[0].get_ydata()[0] == 9.0   # it is there, above the frame


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
    picture = figure._Picture(tmp_path / "none", "train/loss", "step", {})._repr_mimebundle_()
    assert list(picture) == ["text/plain"] and "waiting" in picture["text/plain"]
    write_run(tmp_path / "a", 0, [3.0])
    later = figure._Picture(tmp_path / "a", "train/loss", "step", {"logx": True})
    assert "image/png" in later._repr_mimebundle_()


def test_a_ladder_is_watched_while_its_runs_come(tmp_path, monkeypatch):
    """In a notebook the picture of a folder is drawn anew, last of all when the block has ended."""
    from IPython import display
    drawn, updates = [], []
    monkeypatch.setitem(figure.sys.modules, "ipykernel", figure)
    monkeypatch.setattr(display, "display", lambda picture, display_id: SimpleNamespace(
        update=lambda picture: updates.append(picture._repr_mimebundle_().keys())))
    monkeypatch.setattr(figure, "curves", lambda *args, **look: drawn.append((args, look)) or (
        SimpleNamespace(savefig=lambda *_, **__: None)))
    with figure.watching(tmp_path, axis="FLOPs", seconds=0.01, logx=True):
        while len(updates) < 2:
            time.sleep(0.01)
    assert updates[-1] == {"image/png", "text/plain"}
    assert set(map(repr, drawn)) == {repr((([tmp_path], "train/loss", "FLOPs"), {"logx": True}))}
    with pytest.raises(UserError, match="axis='flop': must be one of step"), \
            figure.watching(tmp_path, axis="flop"):
        pass


def test_outside_a_notebook_nothing_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(figure.sys.modules, "ipykernel", raising=False)
    with figure.watching(tmp_path):
        pass
    assert capsys.readouterr().out == ""


def test_a_logarithmic_axis_of_less_than_a_decade_has_plain_numbers(tmp_path):
    write_run(tmp_path / "a", 0, [3.1, 2.4, 1.8])
    [axes] = figure.curves([tmp_path], logx=True, logy=True).axes
    axes.figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) > 3 and all(float(text) for text in labels), labels
    assert axes.get_xlabel() == "step" and axes.get_yscale() == "log"


def test_more_arms_than_colours_have_other_lines(tmp_path):
    for number in range(12):
        write_run(tmp_path / f"arm{number:02}", 0, [3.0, 2.0 + number])
    [axes] = figure.curves([tmp_path]).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12
