"""Positions against their papers' formulas, and the properties they exist for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.layers.config import InitConfig, PositionConfig, RotaryScalingConfig
from t5x_lite.layers.position import (
    LearnedPositions,
    PositionBias,
    alibi_slopes,
    alibi_values,
    frequencies,
    relative_position_bucket,
    rotate,
    sinusoids,
    t5_values,
    validate,
)

INDEX = jnp.arange(6)[None]


def test_t5_bias_is_looked_up_by_bucket():
    config = PositionConfig(num_buckets=8, max_distance=16)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, 3)), jnp.float32)
    bias = PositionBias(table, t5_values, config, bidirectional=True)
    found = bias(INDEX, INDEX)
    buckets = relative_position_bucket(jnp.arange(6)[None, :] - jnp.arange(6)[:, None],
                                       bidirectional=True, num_buckets=8, max_distance=16)
    np.testing.assert_allclose(found[0], np.asarray(table[0])[buckets].transpose(2, 0, 1))
    # Rows at their own positions, as in decoding, find the same numbers.
    rows = bias(jnp.array([[2], [5]]), INDEX)
    np.testing.assert_allclose(rows[:, :, 0], np.asarray(found)[0][:, [2, 5]].transpose(1, 0, 2))
    # So does a chunk of the queries over a chunk of the keys.
    np.testing.assert_allclose(bias(INDEX[:, 2:5], INDEX[:, 1:3]), found[:, :, 2:5, 1:3])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_bias_made_whole_is_the_one_by_distance(bidirectional):
    config = PositionConfig(num_buckets=8, max_distance=16)
    table = jax.random.normal(jax.random.key(0), (1, 8, 3))
    queries, keys = jnp.arange(5, 26)[None], jnp.arange(30)[None]

    def made(table, whole):
        bias = PositionBias(table, t5_values, config, bidirectional)
        return (bias.whole if whole else bias)(queries, keys)
    np.testing.assert_array_equal(made(table, True), made(table, False))
    weights = jax.random.normal(jax.random.key(1), (1, 3, 21, 30))
    grads = [jax.grad(lambda t, w=whole: jnp.sum(made(t, w) * weights))(table)
             for whole in (True, False)]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-5)


def test_alibi_slopes_and_bias_of_the_paper():
    assert alibi_slopes(8) == [2.0 ** -i for i in range(1, 9)]
    assert alibi_slopes(6) == [2.0 ** -2, 2.0 ** -4, 2.0 ** -6, 2.0 ** -8, 2.0 ** -1, 2.0 ** -3]
    slopes = jnp.asarray([alibi_slopes(2)], jnp.float32)[None]
    found = PositionBias(slopes, alibi_values, PositionConfig("alibi"), False)(INDEX[:, :3], INDEX[:, :3])
    # Slopes 1/16 and 1/256 times the distance (above the diagonal the mask hides everything).
    np.testing.assert_allclose(found[0, 0] * -16, [[0, 1, 2], [1, 0, 1], [2, 1, 0]])
    np.testing.assert_allclose(found[0, 1] * -256, [[0, 1, 2], [1, 0, 1], [2, 1, 0]])


# --- rotary ---------------------------------------------------------------------------------------

def draw(head_dim=8):
    return jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 6, head_dim)), jnp.float32)


def test_rotation_by_hand():
    """Position 1, two features: one radian; a quarter of eight features: only the first two."""
    x = jnp.ones((1, 1, 2, 2))
    found = rotate(x, jnp.arange(2)[None], PositionConfig("rotary"))[0, 0]
    c, s = np.cos(1), np.sin(1)
    np.testing.assert_allclose(found, [[1, 1], [c - s, c + s]], rtol=1e-6)
    found = rotate(draw(), INDEX, PositionConfig("rotary", rotary_fraction=0.25))
    np.testing.assert_array_equal(found[..., 2:], draw()[..., 2:])
    assert not np.allclose(found[..., :2], draw()[..., :2])


def test_pairings_are_permutations_of_one_another():
    half = rotate(draw(), INDEX, PositionConfig("rotary"))
    order = np.arange(8).reshape(2, 4).T.ravel()      # (0, 4), (1, 5), … side by side
    pairs = rotate(draw()[..., order], INDEX, PositionConfig("rotary", rotary_interleaved=True))
    np.testing.assert_allclose(pairs, half[..., order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "llama3", "yarn"])
def test_rotated_products_depend_on_distance_only(scaling):
    config = PositionConfig("rotary", rotary_scaling=RotaryScalingConfig(scaling, 4.0, 32))
    q, k = draw(), draw()[:, ::-1]
    near = jnp.einsum("bnlh,bnsh->bnls", rotate(q, INDEX, config), rotate(k, INDEX, config))
    far = jnp.einsum("bnlh,bnsh->bnls", rotate(q, INDEX + 9, config), rotate(k, INDEX + 9, config))
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-4)


def scaled(kind, dim=64, **kwargs):
    config = PositionConfig("rotary", rotary_base=10000.0,
                            rotary_scaling=RotaryScalingConfig(kind, **kwargs))
    plain, _ = frequencies(dim, PositionConfig("rotary"))
    found, factor = frequencies(dim, config)
    return found / plain, factor, plain


def test_linear_and_ntk_scaling():
    ratio, factor, _ = scaled("linear", factor=4.0)
    np.testing.assert_allclose(ratio, 0.25)
    assert factor == 1.0
    ratio, _, _ = scaled("ntk", factor=4.0)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(0.25)   # fastest kept, slowest divided
    assert np.all(np.diff(ratio) < 0)


def test_llama3_scaling_divides_slow_pairs_only():
    """Fewer than 1 turn over 8,192 tokens: an eighth; more than 4: kept; 2.5: halfway."""
    ratio, _, plain = scaled("llama3", factor=8.0, original_length=8192)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1.0)
    np.testing.assert_allclose(ratio[turns < 1], 1 / 8)
    between = (turns >= 1) & (turns <= 4)
    np.testing.assert_allclose(ratio[between], 1 / 8 + 7 / 8 * (turns[between] - 1) / 3)
    assert between.sum() >= 2


def test_yarn_scaling_and_temperature():
    """Peng et al. 2023, section 3.2 and equation 22, for LLaMA's 128 features over 2,048 tokens."""
    ratio, factor, _ = scaled("yarn", dim=128, factor=4.0, original_length=2048)
    assert factor == pytest.approx(0.1 * np.log(4.0) + 1.0)
    # Pairs that turn 32 times and once over 2,048 tokens: 16.1 and 40.2, rounded outwards.
    np.testing.assert_allclose(ratio[:17], 1.0)
    np.testing.assert_allclose(ratio[41:], 0.25)
    np.testing.assert_allclose(ratio[16:42], 1 - 0.75 * np.arange(26) / 25)
    x = rotate(draw(), INDEX, PositionConfig("rotary", rotary_scaling=RotaryScalingConfig(
        "yarn", 4.0, 2048)))
    np.testing.assert_allclose(np.linalg.norm(x, axis=-1),
                               factor * np.linalg.norm(draw(), axis=-1), rtol=1e-5)


# --- vectors --------------------------------------------------------------------------------------

def test_sinusoids_by_hand():
    found = sinusoids(jnp.array([[0, 3]]), 4)[0]
    np.testing.assert_allclose(found, [[0, 0, 1, 1],
                                       [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)]],
                               rtol=1e-5, atol=1e-7)


def test_learned_positions_start_at_the_offset_and_end():
    config = PositionConfig("learned", max_length=4, offset=2)
    module = LearnedPositions(jax.random.key(0), 3, config, InitConfig())
    assert module.embedding.shape == (6, 3)
    np.testing.assert_array_equal(module(jnp.arange(4)[None])[0], module.embedding[...][2:])
    with pytest.raises(UserError, match="max_length=4 learned positions .* sequence length 5"):
        module(jnp.arange(5)[None])


@pytest.mark.parametrize("change,message", [
    ({"kind": "rotery"}, "model.decoder.position.kind='rotery'.*did you mean 'rotary'"),
    ({"rotary_fraction": 1.5}, r"rotary_fraction=1.5: must be in \(0.0, 1.0\]"),
    ({"rotary_scaling": RotaryScalingConfig("yarm", 2.0)}, "kind='yarm'.*did you mean 'yarn'"),
    ({"rotary_scaling": RotaryScalingConfig("yarn", 0.5)}, "factor=0.5: must be at least 1")])
def test_impossible_positions_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(PositionConfig(), **change), "model.decoder.position")
