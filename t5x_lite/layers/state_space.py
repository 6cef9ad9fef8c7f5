"""Mamba-2's state-space layer as a token mixer.

Shape letters: B batch, L length, D model, N heads, K features of the state, V of a value, T taps.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers.config import InitConfig, MixerConfig, NormConfig
from t5x_lite.layers.convolution import DepthwiseConv
from t5x_lite.layers.linear import Dense, RowKey, kernel_std, param
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.norm import Norm
from t5x_lite.layers.recurrences import FLAT, HEADS, merge_heads, row_of, run_sums, split_heads
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag


class StateSpace(nnx.Module):
    """Mamba-2's state-space dual (Dao & Gu 2024, arXiv:2405.21060, section 7), one group of B and C.

        u, B, C = silu(conv(W x)), dt = softplus(w x + b)
        S_t = exp(-exp(A) dt_t) S_(t-1) + B_t (dt_t u_t)^T, y_t = C_t S_t + skip u_t
        out = W_out norm(y * silu(W_g x))
    """

    def __init__(self, key: jax.Array, embed_dim: int, config: MixerConfig, causal: bool,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys, width = jax.random.split(key, 11), round(config.expand * embed_dim)
        heads, state = width // config.head_dim, config.state_dim

        def make(key, features, axis):
            return Dense(key, embed_dim, features, ("embed", axis), use_bias=config.use_bias, dtype=dtype,
                         units=(embed_dim, heads if axis else features),
                         std=kernel_std(init, embed_dim, features))
        self.value, self.gate = make(keys[0], width, "heads"), make(keys[1], width, "heads")
        self.key, self.query = make(keys[2], state, None), make(keys[3], state, None)
        self.step = make(keys[4], heads, "heads")
        self.value_conv = DepthwiseConv(keys[5], config.taps, width, ("heads", "act_heads"), heads, dtype)
        self.key_conv, self.query_conv = (
            DepthwiseConv(k, config.taps, state, (None, None), state, dtype) for k in keys[6:8])
        # Steps between 0.001 and 0.1, decays between exp(-1 dt) and exp(-16 dt), as published.
        step = jnp.exp(jax.random.uniform(keys[8], (heads,), minval=jnp.log(0.001), maxval=jnp.log(0.1)))
        decay = jnp.log(jax.random.uniform(keys[9], (heads,), minval=1.0, maxval=16.0))
        self.step_bias = param(keys[8], (heads,), ("heads",), value=step + jnp.log(-jnp.expm1(-step)))
        self.log_decay = param(keys[9], (heads,), ("heads",), value=decay)
        self.skip = param(keys[9], (heads,), ("heads",), mean=1.0)
        self.norm = Norm(keys[10], width, NormConfig(epsilon=1e-5), dtype, "heads", (heads,))
        self.out = Dense(keys[10], width, embed_dim, ("heads", "embed"), units=(heads, embed_dim),
                         use_bias=config.use_bias, dtype=dtype,
                         std=kernel_std(init, width, embed_dim) * init.output_factor)
        self.config, self.heads, self.dtype = config, heads, dtype

    def __call__(self, x: jax.Array, kv: None, masking: Masking, bias: None, *,
                 cache: dict | None = None, key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (y_BLD, cache); arguments are Attention's.

        Args:
            cache: {"state": float32 [B, N, K, V], and "value", "key", "query": inputs [B, T - 1, …]}.
        """
        row, new = row_of(masking, x.shape[0]), {}
        found = {}
        for name, flat in (("value", FLAT), ("key", (*FLAT[:2], None)), ("query", (*FLAT[:2], None))):
            found[name], new[name] = getattr(self, f"{name}_conv")(
                getattr(self, name)(x, flat), row.starts, None if cache is None else cache[name], row.kept)
        u, k, q = (jax.nn.silu(found[name]) for name in ("value", "key", "query"))
        step = self.step(x, FLAT).astype(jnp.float32) + self.step_bias[...]
        step = jax.nn.softplus(step).transpose(0, 2, 1)
        u = split_heads(u, self.heads).astype(jnp.float32)
        k, q = (self._for_heads(a) for a in (k, q))
        y, new["state"] = run_sums(q, k, u * step[..., None],
                                   -jnp.exp(self.log_decay[...])[:, None] * step, row,
                                   None if cache is None else cache["state"], self.config.chunk)
        y = merge_heads(y + self.skip[...][:, None, None] * u)
        y = self.norm(y * jax.nn.silu(self.gate(x, FLAT).astype(jnp.float32)))
        return (self.out(tag(y, "context"), ("act_batch", "act_norm_length", "act_embed")),
                None if cache is None else new)

    def _for_heads(self, x: jax.Array) -> jax.Array:
        """x_BLK of all heads -> [B, N, L, K]."""
        x = jnp.broadcast_to(x[:, None], (x.shape[0], self.heads, *x.shape[1:]))
        return sharding.shard(x, *HEADS)
