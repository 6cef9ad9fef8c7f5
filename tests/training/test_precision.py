"""Policies, stochastic rounding over every bfloat16, and the loss scale's walk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from t5x_lite.errors import UserError
from t5x_lite.training import precision


def all_bf16():
    """float32 values of all 65,536 bfloat16 patterns."""
    patterns = np.arange(65536, dtype=np.uint32) << 16
    return patterns.view(np.float32)


def round_with_bits(x, low_bits, monkeypatch):
    """stochastic_round with given instead of random bits."""
    monkeypatch.setattr(jax.random, "bits", lambda *a, **k: jnp.asarray(low_bits, jnp.uint32))
    return precision.stochastic_round(jnp.asarray(x), jax.random.key(0))


def test_every_bf16_pattern_is_kept():
    x = all_bf16()
    for seed in range(3):
        y = np.asarray(precision.stochastic_round(jnp.asarray(x), jax.random.key(seed)))
        finite = np.isfinite(x)
        np.testing.assert_array_equal(
            y[finite].view(np.uint16), (x[finite].view(np.uint32) >> 16).astype(np.uint16))
        np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
        np.testing.assert_array_equal(y[np.isinf(x)].astype(np.float32), x[np.isinf(x)])


def test_nan_with_only_low_bits_stays_nan(monkeypatch):
    x = np.array([0x7F800001, 0xFF800001, 0x7F800000], np.uint32).view(np.float32)
    y = np.asarray(round_with_bits(x, 0, monkeypatch)).astype(np.float32)
    assert np.isnan(y[:2]).all() and np.isposinf(y[2])


def test_unbiased_between_every_pair_of_neighbours(monkeypatch):
    """Over all 2**16 random values the mean is the float32 itself, to float64 rounding."""
    patterns = np.arange(0, 65536, 331, dtype=np.uint32)  # 199 patterns over all exponents
    low = np.random.default_rng(0).integers(0, 65536, patterns.shape, dtype=np.uint32)
    x = ((patterns << 16) | low).view(np.float32)
    x = x[np.isfinite(x) & (np.abs(x) < 3.3e38)]
    noise = np.arange(65536, dtype=np.uint32)
    y = round_with_bits(np.broadcast_to(x[:, None], (len(x), 65536)), noise[None], monkeypatch)
    mean = np.asarray(y).astype(np.float64).mean(axis=1)
    np.testing.assert_allclose(mean, x.astype(np.float64), rtol=1e-12, atol=0)


def test_every_pattern_rounds_away_from_zero_for_as_many_random_values_as_its_low_bits_say(
        monkeypatch):
    """All 65,536 upper halves, random lower halves l: up from the random value 65,536 - l on, so
    for l of 65,536, which is unbiased; the sum's carry lets no later value round down again."""
    upper = np.arange(65536, dtype=np.uint32)
    low = np.random.default_rng(1).integers(1, 65536, upper.shape, dtype=np.uint32)
    x = ((upper << 16) | low).view(np.float32)
    numbers = np.isfinite(x)
    for noise, up in ((0, 0), (65535 - low, 0), (65536 - low, 1), (65535, 1)):
        y = np.asarray(round_with_bits(x, noise, monkeypatch)).view(np.uint16).astype(np.uint32)
        np.testing.assert_array_equal(y[numbers], (upper + up)[numbers])


def test_unbiased_with_random_keys():
    """One million normals: the mean error is within 4 standard errors; to-nearest's spread is
    there too, so that a constant zero could not pass."""
    x = jax.random.normal(jax.random.key(1), (1 << 20,))
    error = np.asarray(precision.stochastic_round(x, jax.random.key(2))).astype(np.float64)
    error -= np.asarray(x, np.float64)
    assert error.std() > 1e-4
    assert abs(error.mean()) < 4 * error.std() / 1024


def test_small_updates_add_up_only_when_rounded_stochastically():
    def run(rounding):
        def body(p, i):
            q = p.astype(jnp.float32) + 1e-4
            return rounding(q, jax.random.fold_in(jax.random.key(0), i)), None
        return jax.lax.scan(body, jnp.ones((4096,), jnp.bfloat16), jnp.arange(1000))[0]
    nearest = run(lambda q, key: q.astype(jnp.bfloat16))
    stochastic = run(precision.stochastic_round)
    assert (np.asarray(nearest) == 1.0).all()
    assert abs(np.asarray(stochastic).astype(np.float64).mean() - 1.1) < 2e-3


@pytest.mark.parametrize("spec", [("data", None), (None, "tensor"), (("data", "tensor"), None)])
def test_rounding_does_not_depend_on_the_sharding(spec):
    x = jax.random.normal(jax.random.key(3), (64, 48))
    expected = np.asarray(precision.stochastic_round(x, jax.random.key(4))).view(np.uint16)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, PartitionSpec(*spec))
        found = jax.jit(precision.stochastic_round)(sharded, jax.random.key(4))
    assert found.sharding.spec == PartitionSpec(*spec)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), expected)


def test_policies():
    for name, policy in precision.POLICIES.items():
        assert policy.name == name and precision.policy(name) is policy
    with pytest.raises(UserError, match="'bf17': must be one of .* did you mean 'bf16'"):
        precision.policy("bf17")


def test_loss_scale_walk():
    config = precision.LossScaleConfig(initial=8.0, growth_interval=2, minimum=1.0, maximum=16.0)
    state = precision.loss_scale_init(config)
    scales = []
    for finite in (True, True, True, True, False, True, False, False, False, False):
        state = precision.loss_scale_adjust(state, jnp.asarray(finite), config)
        scales.append(float(state["scale"]))
    # grows after two finite steps, capped at 16; an overflow halves and restarts the count
    assert scales == [8, 16, 16, 16, 8, 8, 4, 2, 1, 1]


def test_unscale():
    state = {"scale": jnp.float32(4.0), "finite_steps": jnp.int32(0)}
    grads, finite = precision.unscale({"a": jnp.array([8.0], jnp.float16)}, state)
    assert grads["a"].dtype == jnp.float32 and float(grads["a"][0]) == 2.0 and bool(finite)
    for bad in (jnp.nan, jnp.inf):
        assert not precision.unscale({"a": jnp.ones(3), "b": jnp.array([bad])}, state)[1]
