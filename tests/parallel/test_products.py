"""Products of bfloat16 matrices on a CPU against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.parallel import products, sharding


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def test_product_and_gradients_round_once():
    x, w, g = draw(0, 24, 40), draw(1, 40, 16), draw(2, 24, 16)
    y, pull = jax.vjp(lambda x, w: products.product(x, w, None), x, w)
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    for ours, exact in zip((y, *pull(g)), (x64 @ w64, g64 @ w64.T, x64.T @ g64), strict=True):
        assert ours.dtype == jnp.bfloat16
        # Half a unit in the last of bfloat16's 8 digits, and float32's own error.
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("shapes, dtype, applies", [
    (((4, 8), (8, 2)), jnp.bfloat16, True),
    (((4, 8), (8, 2)), jnp.float32, False),
    (((3, 4, 8), (8, 2)), jnp.bfloat16, False)])
def test_which_operands_it_takes(monkeypatch, shapes, dtype, applies):
    monkeypatch.setattr(products, "chip_multiplies_bfloat16", lambda: True)
    operands = [jnp.zeros(shape, dtype) for shape in shapes]
    assert products.applies(*operands) is applies
    monkeypatch.setattr(products, "platform", lambda: "tpu")
    assert not products.applies(*operands)


def test_dense_takes_it_with_any_leading_dims(monkeypatch):
    calls, product = [], products.product
    monkeypatch.setattr(products, "chip_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(products, "product", lambda *args: calls.append(1) or product(*args))
    y = sharding.dense(draw(0, 2, 3, 8), draw(1, 8, 4), ("act_batch", None, None))
    assert calls and y.shape == (2, 3, 4) and y.dtype == jnp.bfloat16


def test_what_a_cpu_reads_of_a_cache(monkeypatch):
    found = [products.read_as(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32)]
    assert found == [jnp.float32] * 3
    monkeypatch.setattr(products, "platform", lambda: "gpu")
    assert products.read_as(jnp.bfloat16) == jnp.bfloat16


def test_a_wide_product_is_not_rounded():
    x, w = draw(0, 24, 40), draw(1, 40, 16)
    y = products.wide(x, w, None)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64), rtol=1e-5,
                               atol=1e-5)
