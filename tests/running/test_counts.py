"""Counts that survive a change of the batch, and changes of a config in words."""

from t5x_lite.running import changes
from t5x_lite.running.counts import Counts


def test_what_a_row_costs_may_change_and_the_past_stays():
    counts = Counts.resumed([], 64, 0.1)
    for _ in range(24):
        counts.add(4)
    assert (counts.rows, counts.tokens, counts.flops) == (96, 6144, 96 * 0.1)
    counts = Counts.resumed(counts.spent, 64, 0.1)
    assert len(counts.spent) == 1
    counts = Counts.resumed(counts.spent, 32, 0.1)
    counts.add(8)
    assert (counts.rows, counts.tokens) == (104, 6144 + 8 * 32)


def test_a_resumed_run_gives_the_very_floats():
    whole, cut = Counts.resumed([], 3, 0.1), Counts.resumed([], 3, 0.1)
    for _ in range(7):
        whole.add(3)
        cut.add(3)
        cut = Counts.resumed(cut.spent, 3, 0.1)
    assert cut.flops == whole.flops


def test_changes_are_named_by_field_with_both_values():
    old = {"train": {"batch": 4, "rates": [1, 2]}, "gone": 1, "nan": float("nan")}
    new = {"train": {"batch": 8, "rates": [1, 3]}, "nan": float("nan"), "fresh": "a"}
    assert changes.describe(old, new) == [
        "train.batch: 4 -> 8", "train.rates[1]: 2 -> 3", "gone: 1 -> None", "fresh: None -> 'a'"]
    many = changes.describe({}, {str(n): "x" * 200 for n in range(20)})
    assert len(many) == 13 and many[-1] == "… and 8 more" and len(many[0]) < 100
