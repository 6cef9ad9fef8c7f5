"""Counts that survive a change of the batch, and changes of a config in words."""

from t5x_lite.running import changes
from t5x_lite.running.counts import Counts, RowCost


def test_what_a_row_costs_may_change_and_the_past_stays():
    counts = Counts.resumed([], RowCost(64, 0.1))
    for _ in range(24):
        counts.add(4)
    assert (counts.rows, counts.tokens, counts.flops) == (96, 6144, 96 * 0.1)
    counts = Counts.resumed(counts.spent, RowCost(64, 0.1))
    assert len(counts.spent) == 1
    counts = Counts.resumed(counts.spent, RowCost(32, 0.1))
    counts.add(8)
    assert (counts.rows, counts.tokens) == (104, 6144 + 8 * 32)


def test_a_resumed_run_gives_the_very_floats():
    cost = RowCost(3, 0.1, 0.07, 0.03, 0.09)
    whole, cut = Counts.resumed([], cost), Counts.resumed([], cost)
    for _ in range(7):
        whole.add(3, 1.5, 2)
        cut.add(3, 1.5, 2)
        cut = Counts.resumed(cut.spent, cost, cut.token_counts)
    assert cut.stamp() == whole.stamp() == {
        "tokens_seen": 63, "flops": 21 * 0.1, "flops_causal_half": 21 * 0.07,
        "flops_no_head": 21 * 0.03, "flops_6nd": 21 * 0.09, "tokens_filled": 14,
        "tokens_loss": 10.5}


def test_what_an_older_checkpoint_did_not_count_is_left_out_and_not_guessed():
    cost = RowCost(64, 0.1, 0.07, 0.03, 0.09)
    counts = Counts.resumed([[4, 64, 0.1]], cost)   # the same rows: their other FLOPs are known
    counts.add(4, 10, 20)
    assert counts.stamp() == {"tokens_seen": 512, "flops": 8 * 0.1, "flops_causal_half": 8 * 0.07,
                              "flops_no_head": 8 * 0.03, "flops_6nd": 8 * 0.09}
    counts = Counts.resumed([[4, 32, 0.1]], cost)
    counts.add(4)
    assert counts.stamp() == {"tokens_seen": 384, "flops": 8 * 0.1}


def test_changes_are_named_by_field_with_both_values():
    old = {"train": {"batch": 4, "rates": [1, 2]}, "gone": 1, "nan": float("nan")}
    new = {"train": {"batch": 8, "rates": [1, 3]}, "nan": float("nan"), "fresh": "a"}
    assert changes.describe(old, new) == [
        "train.batch: 4 -> 8", "train.rates[1]: 2 -> 3", "gone: 1 -> None", "fresh: None -> 'a'"]
    many = changes.describe({}, {str(n): "x" * 200 for n in range(20)})
    assert len(many) == 13 and many[-1] == "… and 8 more" and len(many[0]) < 100
