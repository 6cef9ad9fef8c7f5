"""Masks drawn by hand: 1 where the query (row) sees the key (column)."""

import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.layers.masks import Masking, allowed

INDEX = jnp.arange(5)[None]
PACKED = jnp.array([[1, 1, 2, 2, 0]])


def draw(**kwargs) -> list[str]:
    mask = allowed(Masking(INDEX, INDEX, **kwargs))
    assert mask.shape[1] == 1
    return ["".join("01"[int(x)] for x in row) for row in np.asarray(mask)[0, 0]]


@pytest.mark.parametrize("kwargs,expected", [
    ({"causal": True}, ["10000", "11000", "11100", "11110", "11111"]),
    ({"causal": True, "window": 2}, ["10000", "11000", "01100", "00110", "00011"]),
    ({"window": 2}, ["11000", "11100", "01110", "00111", "00011"]),
    # Two examples and padding, which sees itself.
    ({"q_segments": PACKED, "k_segments": PACKED}, ["11000", "11000", "00110", "00110", "00001"]),
    ({"causal": True, "q_segments": PACKED, "k_segments": PACKED},
     ["10000", "11000", "00100", "00110", "00001"]),
    ({"causal": True, "k_prefix": jnp.array([[True, True, True, False, False]])},
     ["11100", "11100", "11100", "11110", "11111"]),
], ids=lambda x: "-".join(x) if isinstance(x, dict) else "")
def test_drawn_masks(kwargs, expected):
    assert draw(**kwargs) == expected


def test_no_mask_where_everything_is_seen():
    assert allowed(Masking(INDEX, INDEX)) is None


def test_decoding_rows_stand_at_their_own_positions():
    mask = allowed(Masking(jnp.array([[1], [3]]), INDEX, causal=True))
    np.testing.assert_array_equal(mask[:, 0, 0], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
