"""The gradient noise scale: a quadratic whose answer is known, and micro-batches of a real step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import config as configs
from t5x_lite.build import build
from t5x_lite.errors import UserError
from t5x_lite.scaling import fits, tables
from t5x_lite.scaling.laws import LAWS
from t5x_lite.training import metrics, steps
from tests import tiny

DIM, NOISE = 40, 32.0   # of the quadratic |theta|^2 / 2; tr(Sigma) = NOISE |G|^2


def _row_gradients(rng, theta: np.ndarray, rows: int) -> np.ndarray:
    """[rows, DIM]: the gradient theta with noise of a covariance whose trace is NOISE |theta|^2."""
    spread = np.sqrt(NOISE * (theta @ theta) / DIM)
    return theta + spread * rng.standard_normal((rows, DIM))


def test_the_noise_of_a_quadratic_is_found():
    rng = np.random.default_rng(0)
    theta, rows, parts = np.ones(DIM), 24, 4
    total: dict = {}
    for _ in range(2000):
        grads = _row_gradients(rng, theta, rows).reshape(parts, rows // parts, DIM)
        grads = grads.sum(axis=1) / rows    # each a part of the whole's mean
        found = steps.noise_scale(jnp.sum(grads**2), jnp.sum(grads.sum(axis=0)**2), parts, rows)
        total = metrics.add(total, found)
    means = metrics.divide(total)
    assert means["noise_scale"] == pytest.approx(NOISE, rel=0.06)
    assert means["gradient_signal"] == pytest.approx(theta @ theta, rel=0.06)
    assert means["gradient_noise"] == pytest.approx(NOISE * (theta @ theta), rel=0.03)


def test_equal_parts_have_no_noise():
    found = steps.noise_scale(jnp.float32(4 * 2.0**2), jnp.float32(8.0**2), 4, 8)
    assert {name: float(a / b) for name, (a, b) in found.items()} == {
        "noise_scale": 0.0, "gradient_noise": 0.0, "gradient_signal": 64.0}


def test_a_step_measures_its_micro_batches_and_trains_as_before():
    """Against the gradient of every micro-batch alone, at its share of the loss."""
    run, batch = tiny.seq2seq(), tiny.batch()
    train = dataclasses.replace(run.train, accumulation=4)
    plain, measured = (build(dataclasses.replace(run, train=dataclasses.replace(
        train, noise_scale=noise)), jax.devices()[:1]) for noise in (False, True))
    params = tiny.params(run)
    alone = build(run, jax.devices()[:1]).differentiated
    with measured.activate():
        found = [jax.jit(lambda p, b, of=of: steps.gradients(of, p, b, None))(params, batch)
                 for of in (plain.differentiated, measured.differentiated)]
        gradient = jax.jit(lambda p, b: steps.gradients(alone, p, b, None)[0])
        weights = np.asarray(batch["decoder_loss_weights"])
        parts = []
        for part in range(4):   # rows part, part + 4, …
            of_part = weights * (np.arange(tiny.ROWS) % 4 == part)[:, None]
            grads = gradient(params, {**batch, "decoder_loss_weights": jnp.asarray(of_part)})
            parts.append(jax.tree.map(lambda g, w=of_part: np.asarray(g, float) * w.sum()
                                      / weights.sum(), grads))
    jax.tree.map(np.testing.assert_array_equal, found[1][0], found[0][0])
    assert "noise_scale" not in found[0][1]
    squares = [sum(np.sum(g**2) for g in jax.tree.leaves(part)) for part in
               (*parts, jax.tree.map(lambda *g: sum(g), *parts))]
    expected = steps.noise_scale(sum(squares[:4]), squares[4], 4, tiny.ROWS)
    for name, pair in expected.items():
        np.testing.assert_allclose(found[1][1][name], pair, rtol=1e-3, err_msg=name)


def test_one_micro_batch_is_refused():
    with pytest.raises(UserError, match=r"train\.accumulation to 2"):
        configs.TrainConfig(noise_scale=True)


def _steps_to(loss: float, batch: int, seed: int, rate: float = 0.02) -> int:
    """Steps of SGD on the quadratic, each at `rate` of the best learning rate for its batch."""
    rng = np.random.default_rng(seed)
    theta, taken = np.ones(DIM), 0
    while theta @ theta / 2 > loss:
        grad = theta + np.sqrt(NOISE * (theta @ theta) / DIM / batch) * rng.standard_normal(DIM)
        theta = theta - rate / (1 + NOISE / batch) * grad
        taken += 1
    return taken


def test_a_sweep_of_batches_finds_the_critical_one():
    batches = np.array([4, 8, 16, 32, 64, 128, 256])
    taken = np.array([_steps_to(1e-3, batch, seed) for seed, batch in enumerate(batches)])
    table = tables.from_columns({"batch": batches, "steps": taken})
    found = fits.fit(LAWS["steps_of_batch"], table, fits.Settings("log_squares"))
    assert found.exponents["B_crit"] == pytest.approx(NOISE, rel=0.1)
    low, high = fits.bootstrap(found, 200).intervals["B_crit"]
    assert low < found.exponents["B_crit"] < high
    steps_share = taken / found.parameters["S_min"] - 1
    examples_share = batches * taken / found.parameters["E_min"] - 1
    np.testing.assert_allclose(steps_share * examples_share, 1, rtol=0.35)
