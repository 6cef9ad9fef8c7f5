"""One-step delayed updates (ZeRO-Offload): equal to numpy's, to shifted gradients, split, offloaded, resumed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import tree
from t5x_lite.build import build
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.checkpoints.manager import Checkpointer
from t5x_lite.config import replace, to_json
from t5x_lite.errors import UserError
from t5x_lite.models.params import ParamInfo
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.optimizers import PENDING, make_optimizer
from t5x_lite.training.schedules import ScheduleConfig
from tests import tiny
from tests.training.test_optimizer_state import run_of, updates

AFTER = 2


def delayed(config, after=AFTER):
    return dataclasses.replace(config, optimizer=dataclasses.replace(
        config.optimizer, delay_after=after))


def steps(program, state, seeds):
    """(the state, the metrics) after a step on the batch of each seed."""
    step, found = program.jit_train_step(), []
    with program.activate():
        for seed in seeds:
            state, sums = step(state, tiny.batch(seed=seed))
            found.append(sums)
    return state, found


def started(config):
    program = build(config, jax.devices()[:1])
    return program, tiny.place(tiny.params(config), program)


def numpy_adamw(p, gradient, num_steps, rate=0.01, decay=0.1, b1=0.9, b2=0.999, eps=1e-8, clip=1.0):
    """float64 parameters after each step: AdamW by hand, with the gradient of the step before from
    step AFTER + 1 on."""
    m, v, made, pending, found = np.zeros_like(p), np.zeros_like(p), 0, None, []
    for t in range(num_steps):
        fresh = gradient(p, t)
        fresh = fresh * clip / max(clip, np.linalg.norm(fresh))
        used, pending = (fresh, None) if t < AFTER else (pending, fresh)
        if used is not None:
            made += 1
            m, v = b1 * m + (1 - b1) * used, b2 * v + (1 - b2) * used**2
            direction = (m / (1 - b1**made)) / (np.sqrt(v / (1 - b2**made)) + eps)
            p = p - rate * (made - 1) * (direction + decay * p)
        found.append(p)
    return found


def test_updates_equal_a_simulation_in_numpy():
    """A bowl whose middle moves: gradients depend on the parameters that they are taken at, and the
    rate on how many updates were made."""
    rng = np.random.default_rng(0)
    start, bend, middles = (rng.normal(size=s) for s in ((3, 4), (3, 4), (6, 3, 4)))
    gradient = lambda p, t: bend**2 * p - middles[t]
    schedule = ScheduleConfig(factors="linear_warmup*constant", warmup_steps=100, base_learning_rate=1.0)
    info = ParamInfo("w/kernel", (3, 4), jnp.float32, ("embed", "mlp"), (3, 4), 3, "normal")
    optimizer = make_optimizer(OptimizerConfig(
        name="adamw", schedule=schedule, weight_decay=0.1, clip_norm=1.0, delay_after=AFTER), {"w/kernel": info})
    params = {"w": {"kernel": jnp.asarray(start, jnp.float32)}}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for t, expected in enumerate(numpy_adamw(start, gradient, 6)):
        grads = {"w": {"kernel": jnp.asarray(gradient(np.asarray(params["w"]["kernel"], np.float64), t),
                                             jnp.float32)}}
        params, state, info = update(grads, state, params, t)
        np.testing.assert_allclose(params["w"]["kernel"], expected, rtol=2e-6, atol=2e-6)
        assert int(state["count"]) == t + (t < AFTER)


@pytest.mark.parametrize("name", ["adafactor", pytest.param("muon", marks=pytest.mark.slow)])
def test_split_and_offloaded_equal_one_device(name):
    expected = updates(delayed(run_of(name), 1), jax.devices()[:1])
    found = updates(delayed(run_of(name, {"fsdp": 4, "tensor": 2}, offload_optimizer=True), 1), jax.devices())
    tiny.assert_close(found[0], expected[0])
    tiny.assert_close(found[1], expected[1])


def test_steps_resume_bit_for_bit_with_the_gradient_that_waits(tmp_path):
    """Saved after the first step that left a gradient waiting; the waiting one is the step's own."""
    program, state = started(delayed(run_of("adamw"), 1))
    state, _ = steps(program, state, [0, 1])
    waiting = tree.flatten(jax.tree.map(np.asarray, state["opt_state"][PENDING]))
    assert all(x.any() for path, x in waiting.items() if "kernel" in path)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(2, state, {}, to_json(program.config))
        whole, metrics = steps(program, state, [2, 3])
        resumed = checkpointer.restore_latest(program.abstract_state).state
        again, same = steps(program, resumed, [2, 3])
        plain = build(run_of("adamw"), jax.devices()[:1])
        with pytest.raises(UserError, match="holds a gradient that waits.*asks for none.*delay_after=1 "):
            checkpointer.restore_latest(plain.abstract_state)
    jax.tree.map(np.testing.assert_array_equal, (whole, metrics), (again, same))


@pytest.mark.slow
def test_a_step_that_is_skipped_leaves_the_waiting_gradient():
    program, state = started(replace(delayed(run_of("adamw"), 0), "train.bad_steps", "skip"))
    with program.activate():
        step = program.jit_train_step()
        state, _ = step(state, tiny.batch(seed=0), jnp.float32(np.inf))
        before = jax.tree.map(np.asarray, (state["params"], state["opt_state"]))
        state, sums = step(state, tiny.batch(seed=1), jnp.float32(-1.0))
    assert float(sums["skipped"][0]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, before, (state["params"], state["opt_state"]))


def test_loss_scaling_is_refused():
    config = replace(delayed(run_of("adamw")), "precision", "fp16")
    with pytest.raises(UserError, match=r"delay_after=2 .*precision=bf16"):
        build(config, jax.devices()[:1])
