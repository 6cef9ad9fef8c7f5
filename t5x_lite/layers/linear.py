"""Parameters and the dense layer.

Shape letters: B batch, L length, D input features, F output features.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers import fp8
from t5x_lite.layers.config import InitConfig
from t5x_lite.parallel import sharding

INIT_KERNELS = ("fan_in", "fan_avg", "fixed")


def param(key: jax.Array, shape: tuple[int, ...], axes: tuple[str | None, ...], *,
          std: float = 0.0, mean: float = 0.0, fan_in: int = 0,
          units: tuple[int, ...] | None = None, value: jax.Array | None = None) -> nnx.Param:
    """A float32 parameter drawn from a truncated normal (at two deviations), constant, or given.

    Args:
        axes: logical axis of each dim.
        std: standard deviation of the draw (after truncation); 0 gives the constant `mean`.
        fan_in: inputs summed into one output; 0 where that means nothing.
        units: what each dim counts, for divisibility: num_heads for heads * head_dim.
        value: what a layer has drawn by itself, in place of std and mean.
    """
    assert len(shape) == len(axes), (shape, axes)
    described = f"truncated_normal({std:.4g})" if std else f"constant({mean:g})"
    if value is not None:
        described = "as its layer draws it"
    elif std:
        # 0.8796… is the deviation of a unit normal truncated at +-2: rescale to have `std`.
        draw = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
        value = draw * (std / 0.87962566103423978) + mean
    else:
        value = jnp.full(shape, mean, jnp.float32)
    return nnx.Param(value, logical_axes=axes, fan_in=fan_in, init=described,
                     units=units or shape)


def project(x: jax.Array, w: jax.Array, out: sharding.Axes) -> jax.Array:
    """x_…D @ w_DF with logical axes `out`, in the number format of the precision policy."""
    if fp8.applies(x):
        return sharding.dense(x, w, out, fp8.product)
    return sharding.dense(x, w, out)


class Dense(nnx.Module):
    """y = x @ kernel (+ bias): kernel_DF with logical axes (axis_in, axis_out).

    Args:
        axes: logical axes of the kernel.
        std: deviation of the kernel's draw.
        units: see `param`.
    """

    def __init__(self, key: jax.Array, d_in: int, d_out: int, axes: tuple[str, str | None], *,
                 std: float, use_bias: bool = False, dtype: jnp.dtype = jnp.float32,
                 units: tuple[int, int] | None = None):
        self.kernel = param(key, (d_in, d_out), axes, std=std, fan_in=d_in, units=units)
        if use_bias:
            # A bias is tiny: only its tensor-parallel split matters, fsdp's if the rules say so.
            self.bias_axis = "norm" if axes[1] == "embed" else axes[1]
            self.bias = param(key, (d_out,), (self.bias_axis,), units=units and units[1:])
        self.axes = axes
        self.use_bias = use_bias
        self.dtype = dtype

    def __call__(self, x: jax.Array, out: sharding.Axes) -> jax.Array:
        """x_…D -> y_…F with logical axes `out`, in the compute dtype."""
        y = project(x, sharding.weight(self.kernel[...], self.axes, self.dtype), out)
        if self.use_bias:
            y = y + sharding.weight(self.bias[...], (self.bias_axis,), self.dtype)
        return y


def kernel_std(init: InitConfig, fan_in: int, fan_out: int | None = None) -> float:
    """The deviation of an ordinary kernel; without fan_out, of a square one."""
    if init.kernel == "fixed":
        return init.kernel_std
    if init.kernel == "fan_avg":
        return math.sqrt(2.0 / (fan_in + (fan_out or fan_in)))
    assert init.kernel == "fan_in", init.kernel
    return 1.0 / math.sqrt(fan_in)


@dataclasses.dataclass(frozen=True)
class RowKey:
    """A random key for every row of a batch.

    What a row draws follows from the key and from the row's index in the global batch, and
    from nothing else: accumulated, pipelined and sharded runs drop the same units.
    """

    key: jax.Array    # one key, shape ()
    rows: jax.Array   # int32 [B], where each row stands in the global batch

    @classmethod
    def of(cls, key: jax.Array, batch: int) -> "RowKey":
        """The keys of a whole global batch of so many rows."""
        return cls(key, sharding.shard(jnp.arange(batch), "act_batch"))

    def fold_in(self, number: jax.Array | int) -> "RowKey":
        """Other keys for the same rows, a different set for each number."""
        return RowKey(jax.random.fold_in(self.key, number), self.rows)

    def uniform(self, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
        """float32 in [0, 1) of this shape, leading dim B, drawn where `axes` places it. The
        numbers do not depend on the sharding (threefry is partitionable)."""
        keys = jax.vmap(jax.random.fold_in, (None, 0))(self.key, self.rows)
        return jax.vmap(lambda k: jax.random.uniform(
            k, shape[1:], out_sharding=sharding.spec(*axes[1:])))(keys)


jax.tree_util.register_dataclass(RowKey, data_fields=["key", "rows"], meta_fields=[])


def dropout(x: jax.Array, rate: float, key: RowKey | None, *axes: str | None,
            broadcast_dims: tuple[int, ...] = ()) -> jax.Array:
    """Zeroes units with probability `rate`, scaling the rest by 1/(1-rate); no-op without a key.

    Args:
        axes: logical axes of x, rows first, so that the mask is drawn where x lives.
        broadcast_dims: dims that share one draw (T5 drops whole positions' features alike).
    """
    if key is None or rate == 0.0:
        return x
    shape = tuple(1 if i in broadcast_dims else n for i, n in enumerate(x.shape))
    axes = tuple(None if i in broadcast_dims else a for i, a in enumerate(axes))
    keep = key.uniform(shape, *axes) < 1.0 - rate
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
