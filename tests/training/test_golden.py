"""One training step of a tiny model, whose numbers are written down: a refactor changes none."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite.build import build
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny

# (loss a token, norm of the gradients, sum of |parameter| after the step) by optimizer.
GOLDEN = {"adafactor": (4.7938788, 1.0842965, 3544.2156), "adamw": (4.7938788, 1.0842965, 3547.0354)}
MESSAGE = """{name}: one step of the tiny T5 gives {found}, and {expected} is written down.

A refactor, a new option and a faster implementation change nothing here: then the code is to be
mended. Update GOLDEN in this file only where the numbers are meant to change (another initialisation,
formula, default or order of random keys), say so in CHANGELOG.md, since runs of before then resume with
other numbers, and raise the checkpoint format's version if states no longer fit."""


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_one_step_gives_the_numbers_that_are_written_down(name):
    run = dataclasses.replace(tiny.seq2seq(), optimizer=OptimizerConfig(
        name, ScheduleConfig("constant", 0.01)))
    program = build(run, jax.devices()[:1])
    with program.activate():
        state, sums = program.jit_train_step()(program.init_state(), tiny.batch())
    after = sum(float(np.abs(np.asarray(x, np.float64)).sum())
                for x in jax.tree.leaves(state["params"]))
    loss, weight = sums["loss"]
    found = (float(loss / weight), float(sums["grad_norm"][0]), after)
    expected = GOLDEN[name]
    assert found == pytest.approx(expected, rel=3e-6), MESSAGE.format(
        name=name, found=found, expected=expected)
