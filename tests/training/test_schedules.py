"""Schedules against T5X and by hand; batch ramps by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.training import batch_ramp, schedules
from t5x_lite.training.batch_ramp import BatchRampConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests.helpers import golden


def rates(config, steps):
    return np.asarray(jax.vmap(schedules.schedule(config))(jnp.asarray(steps)))


def test_equals_t5x():
    reference = json.loads(golden("learning_rate.json").read_text())
    assert len(reference["values"]) == 5
    for case, expected in reference["values"].items():
        config = ScheduleConfig(**json.loads(case))
        np.testing.assert_allclose(rates(config, reference["steps"]), expected, rtol=1e-5,
                                   err_msg=case)


@pytest.mark.parametrize("config, steps, expected", [
    (ScheduleConfig("constant * rsqrt_normalized_decay", 2.0, warmup_steps=4),
     [0, 4, 16, 64], [2.0, 2.0, 1.0, 0.5]),
    (ScheduleConfig("constant * decay_every", 1.0, decay_factor=0.5, steps_per_decay=10),
     [0, 9, 10, 25], [1.0, 1.0, 0.5, 0.25]),
    # GPT-3: warm-up, cosine to a tenth, and a tenth ever after
    (ScheduleConfig("constant * linear_warmup * cosine_to_floor", 1.0, warmup_steps=10,
                    total_steps=110, floor_fraction=0.1),
     [0, 5, 10, 60, 110, 1000], [1e-8, 0.5, 1.0, 0.55, 0.1, 0.1]),
    # Gopher: warm-up from a small rate
    (ScheduleConfig("constant * linear_warmup", 1.0, warmup_steps=10, warmup_init_fraction=0.2),
     [0, 5, 10, 20], [0.2, 0.6, 1.0, 1.0]),
    # BERT: linear to zero
    (ScheduleConfig("constant * linear_warmup * linear_to_floor", 1.0, warmup_steps=10,
                    total_steps=20, floor_fraction=0.0),
     [5, 10, 15, 20, 30], [0.5, 1.0, 0.5, 1e-8, 1e-8]),
    (ScheduleConfig("constant * linear_warmup * stable_then_decay", 1.0, warmup_steps=10,
                    total_steps=100, decay_steps=20, floor_fraction=0.0),
     [5, 10, 80, 90, 100], [0.5, 1.0, 1.0, 0.5, 1e-8]),
    (ScheduleConfig("constant * linear_warmup", 1.0, warmup_steps=10, step_offset=100),
     [0, 100, 105, 110], [1e-8, 1e-8, 0.5, 1.0]),
])
def test_by_hand(config, steps, expected):
    np.testing.assert_allclose(rates(config, steps), expected, rtol=1e-5, atol=2e-8)


def test_a_python_step_and_a_traced_one_agree():
    fn = schedules.schedule(ScheduleConfig())
    assert fn(1500).dtype == jnp.float32
    np.testing.assert_allclose(fn(1500), jax.jit(fn)(jnp.int32(1500)), rtol=1e-6)


@pytest.mark.parametrize("change, message", [
    ({"factors": "constant * linear_warmpu"}, "'linear_warmpu'. did you mean 'linear_warmup'"),
    ({"factors": ""}, "no factor is called ''"),
    ({"factors": "constant * linear_warmup", "warmup_steps": 0}, "warmup_steps=0: must be at least 1"),
    ({"factors": "cosine_to_floor", "total_steps": 1000}, "needs total_steps"),
    ({"factors": "stable_then_decay", "total_steps": 5000, "decay_steps": 4500}, "decay_steps"),
    ({"factors": "decay_every", "steps_per_decay": 0}, "steps_per_decay"),
    ({"factors": "cosine_decay", "steps_per_cycle": 0}, "steps_per_cycle"),
])
def test_errors(change, message):
    with pytest.raises(UserError, match=message):
        schedules.schedule(ScheduleConfig(**change))


def test_batch_ramp_by_hand():
    """PaLM in small: 3 steps of 2, 2 steps of 4, then 8."""
    ramp = BatchRampConfig(((2, 3), (4, 2)))
    sizes = [batch_ramp.batch_size_at(ramp, 8, step) for step in range(7)]
    assert sizes == [2, 2, 2, 4, 4, 8, 8]
    seen = [batch_ramp.sequences_before(ramp, 8, step) for step in range(8)]
    assert seen == [0, 2, 4, 6, 10, 14, 22, 30] == [sum(sizes[:n]) for n in range(8)]
    assert [batch_ramp.steps_for(ramp, 8, n) for n in (0, 1, 2, 6, 7, 14, 15, 22, 23)] == [
        0, 1, 1, 3, 4, 5, 6, 6, 7]
    assert batch_ramp.batch_unit(ramp, 8) == 2
    assert batch_ramp.batch_unit(BatchRampConfig(), 8) == 8
    assert batch_ramp.batch_size_at(BatchRampConfig(), 8, 0) == 8


def test_gopher_and_mt_nlg_ramps():
    """Gopher 280B: 3M to 6M tokens of 2048. MT-NLG: 32 to 1920 by 32 over 12B tokens."""
    gopher = BatchRampConfig(((1536, 100),))
    assert 2048 * batch_ramp.sequences_before(gopher, 3072, 101) == 2048 * (1536 * 100 + 3072)
    sequences = 12_000_000_000 // 2048
    ramp = batch_ramp.linear_ramp(32, 32, 1920, sequences)
    assert [size for size, _ in ramp.stages] == list(range(32, 1920, 32))
    end = sum(steps for _, steps in ramp.stages)
    assert batch_ramp.batch_size_at(ramp, 1920, end) == 1920
    assert abs(batch_ramp.sequences_before(ramp, 1920, end) - sequences) < 59 * 1920 / 2


def test_batch_ramp_errors():
    with pytest.raises(UserError, match="at least 1"):
        BatchRampConfig(((0, 5),))
    with pytest.raises(UserError, match="divide the difference 60"):
        batch_ramp.linear_ramp(4, 7, 64, 1000)


def test_a_schedule_that_does_not_say_when_ends_with_the_run():
    config = ScheduleConfig(factors="constant * linear_to_floor", base_learning_rate=1.0,
                            warmup_steps=0, floor_fraction=0.0)
    assert float(schedules.schedule(schedules.until(config, 10))(5)) == 0.5
    told = dataclasses.replace(config, total_steps=20)
    assert schedules.until(told, 10) == told


def test_a_run_of_more_steps_has_a_longer_schedule():
    from t5x_lite.training import optimizers
    schedule = ScheduleConfig(factors="constant * linear_to_floor", warmup_steps=0)
    config = optimizers.OptimizerConfig(schedule=schedule, groups=(optimizers.GroupConfig(
        pattern=".*", schedule=schedule),))
    ended = optimizers.until(config, 30)
    assert (ended.schedule.total_steps, ended.groups[0].schedule.total_steps) == (30, 30)


def test_a_run_that_ends_within_its_warm_up_has_a_schedule():
    config = ScheduleConfig(factors="constant * linear_warmup * linear_to_floor",
                            base_learning_rate=1.0, warmup_steps=40)
    assert float(schedules.schedule(schedules.until(config, 2))(20)) == 0.5


@pytest.mark.parametrize("factors, phases", [
    ("constant * linear_warmup", "warmup stable stable stable"),
    ("constant * linear_warmup * cosine_to_floor", "warmup decay decay decay"),
    ("constant * linear_warmup * stable_then_decay", "warmup stable stable decay"),
    ("constant", "stable stable stable stable"),
    ("constant * rsqrt_decay", "stable decay decay decay")])
def test_a_phase_is_what_the_rate_does(factors, phases):
    config = schedules.ScheduleConfig(factors, 1.0, warmup_steps=10, total_steps=100,
                                      decay_steps=20)
    assert [schedules.phase(config, step) for step in (9, 10, 79, 80)] == phases.split()
    rate, places = schedules.schedule(config), (5, 50, 90)
    change = {"warmup": 1, "stable": 0, "decay": -1}
    for step in places:
        found = np.sign(float(rate(step + 1)) - float(rate(step)))
        assert found == change[schedules.phase(config, step)], step
