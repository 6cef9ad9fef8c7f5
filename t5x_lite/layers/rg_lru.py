"""The real-gated linear recurrent unit of Griffin (De et al. 2024, arXiv:2402.19427) as a token mixer.

Shape letters: B batch, L length, D model, W recurrent features, N blocks of the gates, I and J the
features of a block.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers.config import InitConfig, MixerConfig
from t5x_lite.layers.convolution import DepthwiseConv
from t5x_lite.layers.linear import Dense, RowKey, kernel_std, param
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.recurrences import diagonal_scan, per_device, row_of
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag

_SHARPNESS = 8.0            # c of equation 3
_DECAYS = (0.9, 0.999)      # of fresh units, at an open gate


class BlockDiagonal(nnx.Module):
    """y = x @ kernel + bias where each block of features sees itself alone: kernel_NIJ."""

    def __init__(self, key: jax.Array, features: int, blocks: int, init: InitConfig, dtype: jnp.dtype):
        size = features // blocks
        self.kernel = param(key, (blocks, size, size), ("heads", None, None), fan_in=size,
                            std=kernel_std(init, size), units=(blocks, size, size))
        self.bias = param(key, (features,), ("heads",), units=(blocks,))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """x_BLW -> y_BLW."""
        kernel = sharding.weight(self.kernel[...], ("heads", None, None), self.dtype)
        split = ("act_batch", "act_length", "act_heads", None)
        blocks = sharding.reshape(x, (*x.shape[:2], kernel.shape[0], kernel.shape[1]), *split)
        y = sharding.einsum("BLNI,NIJ->BLNJ", blocks, kernel, out=split)
        y = sharding.reshape(y, x.shape, "act_batch", "act_length", "act_heads")
        return y + sharding.weight(self.bias[...], ("heads",), self.dtype)


class RGLRU(nnx.Module):
    """y = W_out (gelu(W_g x) * lru(conv(W_x x))), Griffin's recurrent block (section 2.4) around

        r = sigmoid(W_a u + b_a), i = sigmoid(W_i u + b_i), log a = -8 r softplus(decay)
        h_t = a_t h_(t-1) + sqrt(1 - a_t^2) (i_t u_t)

    with block-diagonal W_a and W_i. An example's first token enters at its full size.
    """

    def __init__(self, key: jax.Array, embed_dim: int, config: MixerConfig, causal: bool,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys, width = jax.random.split(key, 7), round(config.expand * embed_dim)
        blocks = width // config.head_dim
        self.gate, self.input = (Dense(
            k, embed_dim, width, ("embed", "heads"), use_bias=config.use_bias, dtype=dtype,
            std=kernel_std(init, embed_dim, width), units=(embed_dim, blocks)) for k in keys[:2])
        self.conv = DepthwiseConv(keys[2], config.taps, width, ("heads", "act_heads"), blocks, dtype)
        self.input_gate, self.decay_gate = (
            BlockDiagonal(k, width, blocks, init, dtype) for k in keys[3:5])
        # a of an open gate lies evenly between the bounds; softplus^-1(x) = log(exp(x) - 1).
        opened = jax.random.uniform(keys[5], (width,), minval=_DECAYS[0], maxval=_DECAYS[1])
        self.decay = param(keys[5], (width,), ("heads",), units=(blocks,),
                           value=jnp.log(jnp.expm1(-jnp.log(opened) / _SHARPNESS)))
        self.out = Dense(keys[6], width, embed_dim, ("heads", "embed"), use_bias=config.use_bias,
                         dtype=dtype, std=kernel_std(init, width, embed_dim) * init.output_factor,
                         units=(blocks, embed_dim))

    def __call__(self, x: jax.Array, kv: None, masking: Masking, bias: None, *,
                 cache: dict | None = None, key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (y_BLD, cache); arguments are Attention's.

        Args:
            cache: {"inputs": [B, T - 1, W], "state": float32 [B, W]}.
        """
        row, inner = row_of(masking, x.shape[0]), ("act_batch", "act_length", "act_heads")
        u, behind = self.conv(self.input(x, inner), row.starts,
                              None if cache is None else cache["inputs"], row.kept)
        arrays = {"u": u, "input_gate": self.input_gate(u), "decay_gate": self.decay_gate(u),
                  "decay": self.decay[...], "starts": row.starts, "kept": row.kept,
                  "state": None if cache is None else cache["state"]}
        axes = {**dict.fromkeys(("u", "input_gate", "decay_gate"), inner), "decay": ("act_heads",),
                "starts": ("act_batch", None), "kept": ("act_batch", None),
                "state": ("act_batch", "act_heads")}
        h, state = per_device(_recur, arrays, axes, [inner, ("act_batch", "act_heads")])
        y = h.astype(u.dtype) * jax.nn.gelu(self.gate(x, inner), approximate=True)
        cache = None if cache is None else {"inputs": behind, "state": state}
        return self.out(tag(y, "context"), ("act_batch", "act_norm_length", "act_embed")), cache


def _recur(u, input_gate, decay_gate, decay, starts, kept=None, state=None):
    """-> [h_BLW, the last one_BW], float32."""
    u, input_gate, decay_gate = (x.astype(jnp.float32) for x in (u, input_gate, decay_gate))
    log_a = -_SHARPNESS * jax.nn.sigmoid(decay_gate) * jax.nn.softplus(decay)
    first = starts[..., None]
    scale = jnp.where(first, 1.0, jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), 1e-12)))
    a, x = jnp.where(first, 0.0, jnp.exp(log_a)), scale * jax.nn.sigmoid(input_gate) * u
    if kept is not None:
        a, x = jnp.where(kept[..., None], a, 1.0), jnp.where(kept[..., None], x, 0.0)
    h = diagonal_scan(a, x, state)
    return [h, h[:, -1]]
