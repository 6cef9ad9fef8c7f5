"""Which steps are bad, by hand-drawn losses."""

import math

import pytest

from t5x_lite.config import TrainConfig
from t5x_lite.running.health import SPIKE_FEWEST, Health, Step, spike_bound


def step(number, loss=1.0, **fields):
    return Step(number, **{"loss": loss, "finite": True, "bound": math.inf, **fields})


def test_the_bound_is_the_median_and_robust_deviations_above_it():
    losses = [1.0, 2.0, 3.0] * 20   # median 2; deviations 1, 0, 1, so their median is 1
    assert spike_bound(losses, 6.0) == pytest.approx(2 + 6 * 1.4826)
    assert spike_bound([*losses, 1e9], 6.0) == pytest.approx(2 + 6 * 1.4826)   # a spike moves nothing
    assert spike_bound([2.0] * 60, 6.0) == pytest.approx(2 + 6 * 0.02)   # no spread: 1 % of the loss
    assert spike_bound(losses, 0.0) == math.inf == spike_bound(losses[:SPIKE_FEWEST - 1], 6.0)


@pytest.mark.parametrize(("fields", "words"), [
    ({"loss": math.nan}, "the loss of step 5 is nan"),
    ({"finite": False}, "the update of step 5 is not finite"),
    ({"grad_norm": math.inf}, "the update of step 5 is not finite"),
    ({"loss": 9.0, "bound": 8.5}, "the loss of step 5, 9, is above the 8.5"),
    ({"skipped": True, "loss_scale": 2.0}, "overflow float16 at a loss scale of 2"),
])
def test_faults_are_named(fields, words):
    assert words in step(5, **fields).fault(lowest_scale=2.0)


def test_an_overflow_of_float16_is_no_fault_while_the_scale_can_fall():
    overflow = step(5, skipped=True, loss_scale=4.0, grad_norm=math.inf)
    assert overflow.fault(lowest_scale=2.0) is None
    assert not overflow.speaks_against_the_state_before
    assert step(5, grad_norm=math.nan).speaks_against_the_state_before
    assert not step(5, finite=False).speaks_against_the_state_before


def test_a_bad_step_stops_at_once_and_skipped_ones_after_so_many_in_a_row():
    assert Health(TrainConfig(), 1.0).judge(step(1, math.nan)).stops
    health = Health(TrainConfig(bad_steps="skip", max_bad_steps=3), 1.0)
    bad = {"loss": math.nan, "skipped": True}
    assert [health.judge(step(n, **bad)).stops for n in (1, 2)] == [False, False]
    assert health.judge(step(3)) is None
    assert [health.judge(step(n, **bad)).stops for n in (4, 5, 6)] == [False, False, True]
    assert (health.bad, health.skipped, health.seen) == (5, 5, 6)


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("cut", [33, 40, 41])
def test_the_bound_does_not_depend_on_resumes_or_on_what_is_read_already(cut, late):
    """late: whether step n is dispatched before (1) or after (0) step n - 1 was read, as where a
    checkpoint stands between."""
    train = TrainConfig(spike_bound=3.0)
    losses = [2 + (n * 7 % 5) / 5 for n in range(60)]
    expected = [spike_bound(losses[:max(n - 1, 0)], 3.0) for n in range(60)]
    health, read = Health(train, 1.0), 0
    for n in range(60):
        while read < n - late:
            health.judge(step(read, losses[read]))
            read += 1
        if n == cut:
            while read < n:
                health.judge(step(read, losses[read]))
                read += 1
            health = Health(train, 1.0, health.memory())
        assert health.bound(n) == expected[n], n
