"""Products with weights in 8-bit floats (precision=fp8).

As Micikevicius et al. 2022 (arXiv:2209.05433) propose: both operands of the forward product are
e4m3, the gradient that comes back is e5m2, sums are wider, and every tensor is scaled by its own
largest value so that it fills the format's range. Everything else keeps the policy's compute
type: attention scores, experts' and logits' products, norms.

A CPU computes the same numbers, slower than in float32: to try it, not to save time.

Shape letters: D input features, F output features.
"""

import contextlib
import contextvars
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("fp8", default=False)


@contextlib.contextmanager
def matmuls(on: bool):
    """Whether products with weights traced inside are of 8-bit floats."""
    token = _active.set(on)
    try:
        yield
    finally:
        _active.reset(token)


def quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """(8-bit values, float32 scale) with x about equal to their product; zeros stay zeros."""
    largest = float(jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(x)).astype(jnp.float32) / largest
    scale = jnp.where(scale > 0, scale, 1.0)
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


def applies(x: jax.Array) -> bool:
    """Whether products of x with weights are of 8-bit floats: `matmuls` says so and x is narrow."""
    return _active.get() and x.dtype != jnp.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, w: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    """x_…D @ w_DF in x's dtype, sharded by `spec` where there is a mesh (else None)."""
    return _forward(x, w, spec)[0]


def _forward(x, w, spec):
    (x8, x_scale), (w8, w_scale) = quantize(x, FORWARD), quantize(w, FORWARD)
    y = _scaled("...D,DF->...F", x8, w8, x_scale * w_scale, x.dtype, spec)
    return y, (x8, x_scale, w8, w_scale)


def _backward(spec, kept, g):
    x8, x_scale, w8, w_scale = kept
    g8, g_scale = quantize(g, BACKWARD)
    lead = "ABC"[:x8.ndim - 1]
    like = (lambda a: None) if spec is None else lambda a: jax.typeof(a).sharding.spec
    dx = _scaled(f"{lead}F,DF->{lead}D", g8, w8, g_scale * w_scale, g.dtype, like(x8))
    dw = _scaled(f"{lead}D,{lead}F->DF", x8, g8, x_scale * g_scale, g.dtype, like(w8))
    return dx, dw


product.defvjp(_forward, _backward)


def _scaled(equation, a, b, scale, dtype, spec) -> jax.Array:
    y = jnp.einsum(equation, a, b, preferred_element_type=dtype, out_sharding=spec)
    return (y * scale).astype(dtype)
