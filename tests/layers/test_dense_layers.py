"""Dense, norms, MLPs, dropout and the head's parts, by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.layers.config import InitConfig, MLPConfig, NormConfig
from t5x_lite.layers.embed import HeadTransform
from t5x_lite.layers.linear import Dense, RowKey, dropout, kernel_std, param
from t5x_lite.layers.mlp import ACTIVATIONS, MLP
from t5x_lite.layers.norm import Norm

KEY = jax.random.key(0)
X = jnp.array([[[1.0, -2.0, 3.0, 0.0]]])


def test_dense_multiplies_and_adds():
    layer = Dense(KEY, 4, 2, ("embed", "mlp"), std=1.0, use_bias=True)
    layer.bias = layer.bias.replace(jnp.array([10.0, 20.0]))
    kernel = np.asarray(layer.kernel[...])
    np.testing.assert_allclose(layer(X, ("act_batch", "act_length", "act_mlp"))[0, 0],
                               np.asarray(X)[0, 0] @ kernel + [10, 20], rtol=1e-6)


@pytest.mark.parametrize("config,expected", [
    (NormConfig("rms", epsilon=0.0), np.array([1, -2, 3, 0]) / math.sqrt(14 / 4)),
    (NormConfig("layer", epsilon=0.0), np.array([0.5, -2.5, 2.5, -0.5]) / math.sqrt(13 / 4)),
    (NormConfig("layer", epsilon=1.0, use_bias=True),
     np.array([0.5, -2.5, 2.5, -0.5]) / math.sqrt(13 / 4 + 1) + 7)], ids=str)
def test_norms_by_hand(config, expected):
    norm = Norm(KEY, 4, config)
    norm.scale = norm.scale.replace(jnp.full(4, 2.0))
    if config.use_bias:
        norm.bias = norm.bias.replace(jnp.full(4, 7.0))
        expected = expected * 2 - 7
    else:
        expected = expected * 2
    np.testing.assert_allclose(norm(X)[0, 0], expected, rtol=1e-5)


def test_norm_statistics_are_float32_in_bfloat16():
    """300 is exact in bfloat16, 300.5 is not: statistics of rounded sums would see it."""
    x = jnp.asarray([300.0, 302.0, 300.0, 302.0], jnp.bfloat16)
    norm = Norm(KEY, 4, NormConfig("layer", epsilon=0.0), jnp.bfloat16)
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), [-1, 1, -1, 1])


@pytest.mark.parametrize("name,expected", [
    ("relu", [0.0, 2.0]), ("squared_relu", [0.0, 4.0]), ("linear", [-1.0, 2.0]),
    ("gelu", [-0.15865525, 1.9544997]),          # x Phi(x)
    ("gelu_tanh", [-0.15880801, 1.9545977]), ("silu", [-0.26894142, 1.7615942])])
def test_activations_by_hand(name, expected):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.array([-1.0, 2.0])), expected, rtol=1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_mlp_equations(gated):
    config = MLPConfig(mlp_dim=3, activation="silu" if gated else "gelu", gated=gated,
                       use_bias=True)
    mlp = MLP(KEY, 4, config, InitConfig())
    weights = {name: np.asarray(getattr(mlp, name).kernel[...])
               for name in (("wi_0", "wi_1", "wo") if gated else ("wi", "wo"))}
    x, act = np.asarray(X)[0, 0], lambda h: np.asarray(ACTIVATIONS[config.activation](h))
    hidden = act(x @ weights["wi_0"]) * (x @ weights["wi_1"]) if gated else act(x @ weights["wi"])
    found, aux = mlp(X)
    np.testing.assert_allclose(found[0, 0], hidden @ weights["wo"], rtol=1e-5)
    assert aux == {} and mlp.wo.use_bias


def test_head_transform_is_dense_activation_norm():
    head = HeadTransform(KEY, 4, "gelu", NormConfig("layer", use_bias=True), InitConfig())
    hidden = ACTIVATIONS["gelu"](X @ head.dense.kernel[...])
    np.testing.assert_allclose(head(X), head.norm(hidden), rtol=1e-5)


# --- fresh parameters -----------------------------------------------------------------------------

def test_param_has_the_deviation_it_says_and_no_tails():
    drawn = np.asarray(param(KEY, (200, 200), ("embed", "mlp"), std=0.5)[...])
    assert drawn.std() == pytest.approx(0.5, rel=0.02) and abs(drawn.mean()) < 0.01
    assert np.abs(drawn).max() <= 2 * 0.5 / 0.8796   # truncated at two deviations before scaling
    described = param(KEY, (3,), ("norm",), mean=1.0)
    np.testing.assert_array_equal(described[...], 1.0)
    assert described.get_metadata()["init"] == "constant(1)"


def test_kernel_deviations():
    assert kernel_std(InitConfig(), 64) == 1 / 8
    assert kernel_std(InitConfig(kernel="fixed", kernel_std=0.02), 64) == 0.02
    assert kernel_std(InitConfig(kernel="fan_avg"), 24, 8) == 0.25
    assert kernel_std(InitConfig(kernel="fan_avg"), 32) == 0.25 * 2 ** -0.5


def test_dropout_keeps_the_mean_and_shares_draws():
    x = jnp.ones((2, 50, 400))
    key = RowKey.of(jax.random.key(1), 2)
    found = np.asarray(dropout(x, 0.25, key, "act_batch", "act_length", "act_embed",
                               broadcast_dims=(1,)))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.75)}
    assert np.all(found == found[:, :1]) and not np.all(found[0] == found[1])
    assert found.mean() == pytest.approx(1.0, abs=0.1)
    assert dropout(x, 0.25, None) is x and dropout(x, 0.0, key) is x
