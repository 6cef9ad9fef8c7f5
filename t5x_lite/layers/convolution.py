"""Gated convolutions along a row as a token mixer.

Shape letters: B batch, L length, D model, W inner features, T taps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers.config import InitConfig, MixerConfig
from t5x_lite.layers.linear import Dense, RowKey, kernel_std, param
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.recurrences import convolve, last_inputs, per_device, row_of
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag


class DepthwiseConv(nnx.Module):
    """A convolution of each feature with taps of its own, plus a bias; what it keeps of a row in a cache
    are the last T - 1 inputs.

    Args of the constructor:
        axes: logical axis of the features in the parameter, and in the activations.
        units: what the features count, see linear.param.
        ahead: taps that read later tokens; 0: causal.
    """

    def __init__(self, key: jax.Array, taps: int, features: int, axes: tuple[str | None, str | None],
                 units: int, dtype: jnp.dtype, ahead: int = 0):
        self.kernel = param(key, (taps, features), (None, axes[0]), std=taps ** -0.5, fan_in=taps,
                            units=(taps, units))
        self.bias = param(key, (features,), (axes[0],), units=(units,))
        self.axes, self.ahead, self.dtype = axes, ahead, dtype

    def __call__(self, x: jax.Array, starts: jax.Array, behind: jax.Array | None = None,
                 kept: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """x_BLW -> (y_BLW, the inputs behind what comes next [B, T - 1, W], None without `behind`)."""
        stored, used = self.axes
        inner, ahead = ("act_batch", None, used), self.ahead

        def run(x, kernel, bias, starts, behind=None, kept=None):
            y = convolve(x, kernel, starts, behind, ahead) + bias
            return y if behind is None else [y, last_inputs(x, behind, kept)]

        arrays = {"x": x, "kernel": sharding.weight(self.kernel[...], (None, stored), self.dtype),
                  "bias": sharding.weight(self.bias[...], (stored,), self.dtype), "starts": starts,
                  "behind": behind, "kept": kept}
        axes = {"x": inner, "behind": inner, "kernel": (None, used), "bias": (used,),
                "starts": ("act_batch", None), "kept": ("act_batch", None)}
        if behind is None:
            return per_device(run, arrays, axes, inner), None
        return tuple(per_device(run, arrays, axes, [inner, inner]))


class Convolution(nnx.Module):
    """y = W_out conv(W_v x * sigmoid(W_g x)): a gated linear unit, then a depthwise convolution (Wu et al.
    2019, arXiv:1901.10430, figure 2, with free taps). Causal in decoders, centred in encoders."""

    def __init__(self, key: jax.Array, embed_dim: int, config: MixerConfig, causal: bool,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys, width = jax.random.split(key, 4), round(config.expand * embed_dim)
        self.value, self.gate = (Dense(
            k, embed_dim, width, ("embed", "mlp"), use_bias=config.use_bias, dtype=dtype,
            std=kernel_std(init, embed_dim, width)) for k in keys[:2])
        self.conv = DepthwiseConv(keys[2], config.taps, width, ("mlp", "act_mlp"), width, dtype,
                                  0 if causal else config.taps // 2)
        self.out = Dense(keys[3], width, embed_dim, ("mlp", "embed"), use_bias=config.use_bias,
                         dtype=dtype, std=kernel_std(init, width, embed_dim) * init.output_factor)

    def __call__(self, x: jax.Array, kv: None, masking: Masking, bias: None, *,
                 cache: dict | None = None, key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (y_BLD, cache); arguments are Attention's.

        Args:
            cache: {"inputs": [B, T - 1, W]}.
        """
        row, hidden = row_of(masking, x.shape[0]), ("act_batch", "act_length", "act_mlp")
        gated = self.value(x, hidden) * jax.nn.sigmoid(self.gate(x, hidden))
        behind = None if cache is None else cache["inputs"]
        y, behind = self.conv(gated, row.starts, behind, row.kept)
        cache = None if cache is None else {"inputs": behind}
        return self.out(tag(y, "context"), ("act_batch", "act_norm_length", "act_embed")), cache
