"""The long short-term memory (Hochreiter & Schmidhuber 1997) as a token mixer.

Shape letters: B batch, L length, D model, W hidden features, G the four gates.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers.config import InitConfig, MixerConfig
from t5x_lite.layers.linear import Dense, RowKey, kernel_std, param
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.recurrences import row_of
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag

GATES = ("input", "forget", "cell", "output")   # torch.nn.LSTM's order
_HIDDEN = ("act_batch", "act_length", "act_mlp")


class LSTM(nnx.Module):
    """c_t = f c_(t-1) + i tanh(g), h_t = o tanh(c_t), gates sigmoid(W x_t + U h_(t-1) + b); y = W_out h.

    The products with x are made for all tokens at once; the rest goes token by token. Under tensor
    parallelism each device has its part of every gate, and h is gathered for the next token. Fresh
    forget gates are open: their bias is 1 (Jozefowicz et al. 2015).
    """

    def __init__(self, key: jax.Array, embed_dim: int, config: MixerConfig, causal: bool,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys, width = jax.random.split(key, 9), round(config.expand * embed_dim)
        for i, gate in enumerate(GATES):
            setattr(self, f"{gate}_gate", Dense(
                keys[i], embed_dim, width, ("embed", "mlp"), use_bias=True, dtype=dtype,
                std=kernel_std(init, embed_dim, width)))
            setattr(self, f"{gate}_recurrent", Dense(
                keys[4 + i], width, width, ("embed", "mlp"), dtype=dtype, std=kernel_std(init, width)))
        self.forget_gate.bias = param(keys[8], (width,), ("mlp",), mean=1.0)
        self.out = Dense(keys[8], width, embed_dim, ("mlp", "embed"), use_bias=config.use_bias,
                         dtype=dtype, std=kernel_std(init, width, embed_dim) * init.output_factor)
        self.dtype = dtype

    def __call__(self, x: jax.Array, kv: None, masking: Masking, bias: None, *,
                 cache: dict | None = None, key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (y_BLD, cache); arguments are Attention's.

        Args:
            cache: {"hidden", "cell"} float32 [B, W].
        """
        h, cache = self.hidden(x, masking, cache)
        return self.out(tag(h, "context"), ("act_batch", "act_norm_length", "act_embed")), cache

    def hidden(self, x: jax.Array, masking: Masking, cache: dict | None = None
               ) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (h_BLW, cache)."""
        row, by_row = row_of(masking, x.shape[0]), ("act_batch", "act_mlp")
        given = jnp.stack([getattr(self, f"{gate}_gate")(x, _HIDDEN) for gate in GATES], axis=2)
        kernel_WGW = jnp.stack([sharding.weight(
            getattr(self, f"{gate}_recurrent").kernel[...], ("embed", "mlp"), self.dtype)
            for gate in GATES], axis=1)
        if cache is None:
            zeros = sharding.shard(jnp.zeros((x.shape[0], kernel_WGW.shape[0]), jnp.float32), *by_row)
            state = (zeros, zeros)
        else:
            state = (cache["hidden"], cache["cell"])
        kept = jnp.ones_like(row.starts) if row.kept is None else row.kept

        def step(state, at):
            given_BGW, starts_B, kept_B = at
            old = tuple(jnp.where(starts_B[:, None], 0, x) for x in state)
            whole = sharding.shard(old[0].astype(self.dtype), "act_batch", None)
            gates = given_BGW + sharding.einsum("BW,WGX->BGX", whole, kernel_WGW,
                                                out=("act_batch", None, "act_mlp"))
            i, f, g, o = jnp.unstack(gates.astype(jnp.float32), axis=1)
            cell = jax.nn.sigmoid(f) * old[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
            state = tuple(jnp.where(kept_B[:, None], new, x)
                          for new, x in zip((hidden, cell), state, strict=True))
            return state, hidden.astype(self.dtype)

        along = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (given, row.starts, kept))
        state, h = jax.lax.scan(step, state, along)
        cache = None if cache is None else dict(zip(("hidden", "cell"), state, strict=True))
        return jnp.swapaxes(h, 0, 1), cache
