"""Normalisation over the feature dim."""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import one_of
from t5x_lite.layers.config import NormConfig
from t5x_lite.layers.linear import param
from t5x_lite.parallel import sharding

KINDS = ("rms", "layer")


def validate(config: NormConfig, where: str) -> None:
    """Raises UserError for what cannot be, naming the field."""
    one_of(f"{where}.kind", config.kind, KINDS)


class Norm(nnx.Module):
    """rms: x / sqrt(mean(x^2) + eps) * scale; layer: (x - mean) / sqrt(var + eps) * scale + bias.

    Statistics are float32 whatever the compute dtype.
    """

    def __init__(self, key: jax.Array, features: int, config: NormConfig,
                 dtype: jnp.dtype = jnp.float32, axis: str = "norm",
                 units: tuple[int, ...] | None = None):
        """units: see linear.param."""
        self.scale = param(key, (features,), (axis,), mean=1.0 - config.scale_offset, units=units)
        if config.use_bias:
            self.bias = param(key, (features,), (axis,), units=units)
        self.config = config
        self.axis = axis
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x_…D -> …D in the compute dtype."""
        config = self.config
        y = x.astype(jnp.float32)
        if config.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.epsilon)
        if config.scale_offset:
            scale = sharding.weight(self.scale[...], (self.axis,), jnp.float32)
            y = (y * (config.scale_offset + scale)).astype(self.dtype)
        else:
            y = y.astype(self.dtype) * sharding.weight(self.scale[...], (self.axis,), self.dtype)
        if config.use_bias:
            y = y + sharding.weight(self.bias[...], (self.axis,), self.dtype)
        return y
