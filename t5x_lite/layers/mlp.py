"""The position-wise feed-forward layer.

Shape letters: B batch, L length, D model, F hidden.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers.config import InitConfig, MLPConfig
from t5x_lite.layers.linear import Dense, RowKey, dropout, kernel_std
from t5x_lite.parallel.remat import tag

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),  # T5 1.1, GPT-2
    "silu": jax.nn.silu,
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
    "linear": lambda x: x,
}


class Adapter(nnx.Module):
    """x + up(gelu(down(x))), a bottleneck behind a sub-layer (Houlsby et al. 2019,
    arXiv:1902.00751). `up` starts at 0, so that a fresh adapter changes nothing."""

    def __init__(self, key: jax.Array, embed_dim: int, adapter_dim: int, init: InitConfig,
                 dtype: jnp.dtype = jnp.float32):
        self.down = Dense(key, embed_dim, adapter_dim, ("embed", None), use_bias=True, dtype=dtype,
                          std=kernel_std(init, embed_dim, adapter_dim))
        self.up = Dense(key, adapter_dim, embed_dim, (None, "embed"), std=0.0, use_bias=True,
                        dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x_BLD -> x_BLD."""
        h = ACTIVATIONS["gelu_tanh"](self.down(x, ("act_batch", "act_norm_length", None)))
        return x + self.up(h, ("act_batch", "act_norm_length", "act_embed"))


class MLP(nnx.Module):
    """The dense MLP. Returns (y, aux) as every MLP does; the dense one has no auxiliary values."""

    def __init__(self, key: jax.Array, embed_dim: int, config: MLPConfig, init: InitConfig,
                 dtype: jnp.dtype = jnp.float32):
        keys = jax.random.split(key, 3)
        std_in = kernel_std(init, embed_dim, config.mlp_dim) * init.value_factor
        std_out = (kernel_std(init, config.mlp_dim, embed_dim) * init.output_factor
                   * init.value_factor)
        wi = functools.partial(Dense, d_in=embed_dim, d_out=config.mlp_dim, axes=("embed", "mlp"),
                               std=std_in, use_bias=config.use_bias, dtype=dtype)
        if config.gated:
            self.wi_0, self.wi_1 = wi(keys[0]), wi(keys[1])
        else:
            self.wi = wi(keys[0])
        self.wo = Dense(keys[2], config.mlp_dim, embed_dim, ("mlp", "embed"), std=std_out,
                        use_bias=config.use_bias, dtype=dtype)
        self.config = config

    def __call__(self, x: jax.Array, key: RowKey | None = None,
                 **_) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x_BLD -> (y_BLD, {}). `key` is the dropout key, None outside training."""
        hidden = ("act_batch", "act_length", "act_mlp")
        activation = ACTIVATIONS[self.config.activation]
        if self.config.gated:
            h = activation(self.wi_0(x, hidden)) * self.wi_1(x, hidden)
        else:
            h = activation(self.wi(x, hidden))
        h = tag(h, "mlp_hidden")
        h = dropout(h, self.config.dropout_rate, key, *hidden, broadcast_dims=(1,))
        return self.wo(h, ("act_batch", "act_norm_length", "act_embed")), {}
