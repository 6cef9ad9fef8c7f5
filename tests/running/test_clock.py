"""Seconds by phase, goodput, and what the watchdog finds stuck."""

import sys

import pytest

from t5x_lite.errors import UserError
from t5x_lite.running.clock import EXIT_STUCK, Clock, Watchdog, WatchdogConfig


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_every_second_belongs_to_one_phase():
    time = Time()
    clock = Clock(now=time)
    time.now = 10.0
    clock.enter("step")
    time.now = 40.0
    with clock.during("evaluation"):
        time.now = 45.0
    time.now = 55.0
    clock.add({"step": 20.0, "lost": 15.0, "of another version": 3.0})
    seconds = clock.seconds()
    assert (seconds["start"], seconds["step"], seconds["evaluation"]) == (10, 60, 5)
    assert sum(seconds.values()) == 90 and clock.goodput() == pytest.approx(60 / 90)
    assert clock.line() == "goodput 66.7%: 10 s start, 60 s step, 5 s evaluation, 15 s lost"
    assert clock.metrics()["seconds/lost"] == 15


@pytest.mark.parametrize(("phase", "after", "saving", "expected"), [
    ("step", 4.9, None, None), ("step", 5.1, None, ("step", 5.0)),
    ("compile", 5.1, None, None), ("compile", 10.1, None, ("compile", 10.0)),
    ("data", 100.0, None, None),                       # 0: no deadline
    ("step", 1.0, -20.0, ("save", 20.0)),              # a save in the background
])
def test_what_has_taken_too_long(tmp_path, phase, after, saving, expected):
    time = Time()
    clock = Clock(now=time)
    clock.enter(phase)
    config = WatchdogConfig(start=10.0, step=5.0, data=0.0, save=20.0)
    watchdog = Watchdog(config, clock, tmp_path, where=str, now=time,
                        saving_since=lambda: saving)
    time.now = after
    assert watchdog.stuck() == expected


def test_it_ends_the_process_and_leaves_the_stacks_in_the_workdir(tmp_path, capfd):
    left = []
    sys.__stderr__.flush()
    clock = Clock()
    clock.enter("data")
    with Watchdog(WatchdogConfig(data=0.05), clock, tmp_path, where=lambda: "at step 7",
                  process=3, leave=left.append) as watchdog:
        watchdog._thread.join(30)
    assert left == [EXIT_STUCK]
    text = (tmp_path / "watchdog-3.txt").read_text()
    assert "data has taken more than train.watchdog.data=0.05 seconds; at step 7" in text
    assert "thread MainThread:" in text and "test_it_ends_the_process" in text
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: watchdog: data") and f"status {EXIT_STUCK}" in last


def test_bounds():
    with pytest.raises(UserError, match=r"train.watchdog.step=-1.*: must be at least 0"):
        WatchdogConfig(step=-1.0)
