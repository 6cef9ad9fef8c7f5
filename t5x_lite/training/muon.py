"""Muon (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982) per layer and over any mesh.

A matrix steps along its momentum M, made nearly orthogonal: with the singular value decomposition
M = U S V', five Newton-Schulz iterations

    X <- a X + (b X X' + c (X X')^2) X,   X_0 = M / |M|,   (a, b, c) = (3.4445, -4.7750, 2.0315)

bring every singular value near 1 without computing it. optax.contrib.muon has the same numbers (a
test holds 20 steps to it), but multiplies whole arrays: here a stack of layers or experts is as
many matrices, and where the mesh splits a matrix, its devices share out the matrices of the stack
instead, as far as they divide, each whole. The step comes back as the parameter is split.

All trees here are flat dicts {path: array}.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite.parallel import sharding
from t5x_lite.parallel.sharding import place_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class MuonState(NamedTuple):
    """Momentum by path."""

    count: jax.Array            # int32, updates made
    mu: dict[str, jax.Array]    # momentum_dtype, the parameter's shape


def scale_by_muon(stacked: Mapping[str, int], *, beta: float = 0.95, steps: int = 5,
                  nesterov: bool = True, consistent_rms: float = 0.0, eps: float = 1e-8,
                  momentum_dtype: str = "float32") -> optax.GradientTransformation:
    """Gradients (float32) of matrices to directions, to be multiplied by the learning rate.

    Args:
        stacked: {path: leading dims that enumerate layers or experts}; two more are the matrix.
        beta: of the momentum. steps: Newton-Schulz iterations.
        nesterov: look one step ahead along the momentum.
        consistent_rms: the RMS of every direction, whatever the shape; 0.2 is about AdamW's, so
            that its learning rates serve. 0: directions of spectral norm sqrt(max(1, out / in)).
    """
    def init(params):
        mu = {path: jnp.zeros_like(p, momentum_dtype) for path, p in _present(params).items()}
        return MuonState(jnp.zeros((), jnp.int32), {**params, **mu})

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        mu, directions = {}, {}
        for path, g in _present(grads).items():
            m = beta * state.mu[path] + (1 - beta) * g
            ahead = m / (1 - beta ** count)
            if nesterov:
                ahead = (beta * m / (1 - beta ** optax.safe_increment(count))
                         + (1 - beta) * g / (1 - beta ** count))
            whole = orthogonalised(_whole_matrices(ahead, stacked[path]), steps, eps)
            directions[path] = place_like(_scale(g.shape, consistent_rms) * whole, g)
            mu[path] = m.astype(momentum_dtype)
        return {**grads, **directions}, MuonState(count, {**state.mu, **mu})

    return optax.GradientTransformation(init, update)


def _present(flat: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What optax's masks have not taken out."""
    return {path: x for path, x in flat.items() if not isinstance(x, optax.MaskedNode)}


def orthogonalised(x: jax.Array, steps: int, eps: float = 1e-8) -> jax.Array:
    """Matrices [..., m, n] with their singular values brought near 1, each on its own."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    if tall:   # the smaller side's products are cheaper, and give the same
        x = jnp.swapaxes(x, -1, -2)
    x = x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True)) + eps)
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def _scale(shape: tuple[int, ...], consistent_rms: float) -> float:
    fan_in, fan_out = shape[-2:]
    if consistent_rms:
        return max(fan_in, fan_out) ** 0.5 * consistent_rms
    return max(1.0, fan_out / fan_in) ** 0.5


def _whole_matrices(x: jax.Array, stacked: int) -> jax.Array:
    """x whose last two dims are whole on every device: the mesh axes that split them split the
    stack's dims instead, where those divide."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        return x
    dims = sharding.split_of(x)
    lead, freed = dims[:stacked], [axis for dim in dims[stacked:] for axis in dim]
    for axis in freed:
        fits = [i for i, axes in enumerate(lead)
                if x.shape[i] % math.prod(mesh.shape[a] for a in (*axes, axis)) == 0]
        if fits:
            lead[fits[0]] = (*lead[fits[0]], axis)
    return jax.sharding.reshard(x, jax.sharding.PartitionSpec(
        *(axes or None for axes in lead), *(None,) * (x.ndim - stacked)))
