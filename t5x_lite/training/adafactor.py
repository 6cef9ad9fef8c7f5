"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) per layer, as an optax transformation.

For a matrix with both dims of at least `min_dim_size_to_factor` the second moment is kept as
the means v_row and v_col of g^2 over columns and over rows, and estimated as their outer
product over the mean of v_row (their equation 4); other parameters keep all of v. The update

    u = g / sqrt(v),   u / max(1, RMS(u) / clipping_threshold),   times max(eps2, RMS(parameter))

uses decay 1 - t**-decay_rate. T5X's numbers are reproduced (a test holds 20 steps to its
output). Every mean above runs over the dims of one layer: a stack of layers or experts, held
as one array with leading dims, is updated as its members would be alone. (T5X factors
stacked parameters of any size; here a stack follows the same size rule as its members, so
that scanned and unrolled models train alike.)

All trees here are flat dicts {path: array}.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite.parallel.sharding import place_like


class AdafactorState(NamedTuple):
    """Moments by path; a path stands in v_row and v_col or in v, and in m with momentum."""

    count: jax.Array                # int32, updates made
    v_row: dict[str, jax.Array]     # float32, the parameter's shape without the column dim
    v_col: dict[str, jax.Array]     # float32, … without the row dim
    v: dict[str, jax.Array]         # float32, the parameter's shape
    m: dict[str, jax.Array]         # momentum of the finished update


def factored_dims(shape: tuple[int, ...], stacked: int, min_size: float) -> tuple[int, int] | None:
    """(row, col): the two largest dims of one layer, row the smaller; None if it stays whole.

    Args:
        stacked: how many leading dims enumerate layers or experts.
    """
    dims = sorted(range(stacked, len(shape)), key=lambda d: shape[d])
    if len(dims) < 2 or shape[dims[-2]] < min_size:
        return None
    return dims[-2], dims[-1]


def scale_by_adafactor(
        stacked: Mapping[str, int], *, factored: bool = True, min_dim_size_to_factor: int = 128,
        decay_rate: float = 0.8, step_offset: int = 0, clipping_threshold: float = 1.0,
        multiply_by_parameter_scale: bool = True, momentum: float = 0.0,
        momentum_dtype: str = "float32", epsilon1: float = 1e-30,
        epsilon2: float = 1e-3) -> optax.GradientTransformationExtraArgs:
    """Gradients (float32) to finished steps: what is to be subtracted from the parameters.

    Args:
        stacked: {path: leading dims that enumerate layers or experts}.
        step_offset: updates before the second moment's decay starts (T5X's fine-tuning from
            a restored optimizer state).
        clipping_threshold: largest RMS of one layer's update; 0 for no clipping.
        momentum: beta1 over finished steps, learning rate included (as T5X); 0 for none.
    The transformation's update takes `learning_rate`, {path: float32 scalar}, because the
    momentum averages steps and not directions.
    """

    smallest = min_dim_size_to_factor if factored else math.inf

    def dims_of(path: str, x: jax.Array) -> tuple[int, int] | None:
        return factored_dims(x.shape, stacked[path], smallest)

    def init(params: dict[str, jax.Array]) -> AdafactorState:
        v_row, v_col, v, m = {}, {}, {}, {}
        for path, p in params.items():
            p = p.astype(jnp.float32)
            zeros = jnp.zeros_like(p)  # takes over the parameter's sharding, as do its means
            if dims := dims_of(path, p):
                v_row[path], v_col[path] = zeros.mean(dims[1]), zeros.mean(dims[0])
            else:
                v[path] = zeros
            if momentum:
                m[path] = zeros.astype(momentum_dtype)
        return AdafactorState(jnp.zeros((), jnp.int32), v_row, v_col, v, m)

    def update(grads, state, params=None, *, learning_rate):
        decay = 1.0 - (state.count - step_offset + 1).astype(jnp.float32) ** -decay_rate
        v_row, v_col, v, m, steps = {}, {}, {}, {}, {}
        for path, g in grads.items():
            g2 = g * g + epsilon1
            if dims := dims_of(path, g):
                v_row[path], v_col[path], u = _factored(
                    g, g2, state.v_row[path], state.v_col[path], decay, dims)
            else:
                v[path] = _blend(decay, state.v[path], g2)
                u = g * v[path] ** -0.5
            layer_dims = tuple(range(stacked[path], g.ndim))
            u = _clipped(u, layer_dims, clipping_threshold)
            scale = learning_rate[path]
            if multiply_by_parameter_scale:
                scale = scale * jnp.maximum(_rms(params[path], layer_dims), epsilon2)
            steps[path] = scale * u
            if momentum:
                steps[path] = momentum * state.m[path] + (1.0 - momentum) * steps[path]
                m[path] = steps[path].astype(momentum_dtype)
        count = optax.safe_increment(state.count)
        return steps, AdafactorState(count, v_row, v_col, v, m)

    return optax.GradientTransformationExtraArgs(init, update)


def _blend(decay: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return decay * place_like(old, new) + (1.0 - decay) * new


def _factored(g: jax.Array, g2: jax.Array, v_row: jax.Array, v_col: jax.Array, decay: jax.Array,
              dims: tuple[int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(v_row, v_col, u): the means of g2 blended in, and g over the root of their outer product."""
    row, col = dims
    v_row = _blend(decay, v_row, g2.mean(col))
    v_col = _blend(decay, v_col, g2.mean(row))
    row_in_v_row = row - (col < row)
    mean = v_row.mean(row_in_v_row, keepdims=True)
    u = (g * jnp.expand_dims((v_row / mean) ** -0.5, col)
         * jnp.expand_dims(v_col ** -0.5, row))
    return v_row, v_col, u


def _clipped(u: jax.Array, dims: tuple[int, ...], threshold: float) -> jax.Array:
    """u with an RMS over these dims of at most the threshold; 0 for none."""
    return u / jnp.maximum(1.0, _rms(u, dims) / threshold) if threshold else u


def _rms(x: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """Root mean square over these dims, kept with size 1."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))
