"""Linear attention, plain and with decays, as token mixers whose state does not grow with the row.

Shape letters: B batch, L length, D model, N heads, K features of a key, V of a value (W = N * V).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers.config import InitConfig, MixerConfig, NormConfig
from t5x_lite.layers.linear import Dense, RowKey, kernel_std
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.norm import Norm
from t5x_lite.layers.recurrences import (
    FLAT,
    HEADS,
    both_ways,
    merge_heads,
    per_device,
    row_of,
    run_sums,
    split_heads,
)
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag

_GATE_TEMPERATURE = 16.0   # tau of Yang et al. 2024, section 4.2: decays near 1


class LinearAttention(nnx.Module):
    """y_t = sum_s phi(q_t).phi(k_s) v_s / sum_s phi(q_t).phi(k_s), phi = elu + 1 (Katharopoulos et al.
    2020, arXiv:2006.16236, equations 5 and 7): over s <= t in decoders, over all in encoders."""

    def __init__(self, key: jax.Array, embed_dim: int, config: MixerConfig, causal: bool,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys, width = jax.random.split(key, 4), round(config.expand * embed_dim)
        heads = width // config.head_dim

        def make(key, features):
            return Dense(key, embed_dim, features, ("embed", "heads"), units=(embed_dim, heads),
                         std=kernel_std(init, embed_dim, features), use_bias=config.use_bias, dtype=dtype)
        self.query, self.key = (make(k, heads * config.state_dim) for k in keys[:2])
        self.value = make(keys[2], width)
        self.out = Dense(keys[3], width, embed_dim, ("heads", "embed"), units=(heads, embed_dim),
                         use_bias=config.use_bias, dtype=dtype,
                         std=kernel_std(init, width, embed_dim) * init.output_factor)
        self.config, self.heads, self.causal, self.dtype = config, heads, causal, dtype

    def __call__(self, x: jax.Array, kv: None, masking: Masking, bias: None, *,
                 cache: dict | None = None, key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (y_BLD, cache); arguments are Attention's.

        Args:
            cache: {"state": float32 [B, N, K, V + 1]}, the last column of values being ones.
        """
        row = row_of(masking, x.shape[0])
        q, k = (jax.nn.elu(split_heads(f(x, FLAT), self.heads).astype(jnp.float32)) + 1
                for f in (self.query, self.key))
        v = split_heads(self.value(x, FLAT), self.heads).astype(jnp.float32)
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1.0)
        if self.causal:
            state = None if cache is None else cache["state"]
            y, state = run_sums(q, k, v, None, row, state, self.config.chunk)
            cache = None if cache is None else {"state": state}
        else:
            y = per_device(
                lambda q, k, v, starts: both_ways(q, k, v, starts, chunk=self.config.chunk),
                {"q": q, "k": k, "v": v, "starts": row.starts},
                {**dict.fromkeys("qkv", HEADS), "starts": ("act_batch", None)}, HEADS)
        # A row that has no token yet, in a prompt of others, has no weights either.
        total = jnp.where(y[..., -1:] == 0, 1.0, y[..., -1:])
        y = merge_heads((y[..., :-1] / total).astype(self.dtype))
        return self.out(tag(y, "context"), ("act_batch", "act_norm_length", "act_embed")), cache


class GatedLinearAttention(nnx.Module):
    """y_t = W_out (norm(q_t S_t) * silu(W_g x_t)), S_t = a_t S_(t-1) + k_t v_t^T, a head at a time.

    The decays a_t are one number a head: of the token, sigmoid(w x + b)^(1/16) (Yang et al. 2024,
    arXiv:2312.06635, with a scalar gate as in Mamba-2 and Sun et al. 2024, arXiv:2405.05254), or
    constants (RetNet, see `constant_decays`). Queries are divided by the root of K.

    Args of the constructor:
        decays: float32 [N] of the heads, None: of the tokens.
    """

    def __init__(self, key: jax.Array, embed_dim: int, config: MixerConfig, causal: bool,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32, *,
                 decays: Callable[[int], jax.Array] | None = None):
        keys, width = jax.random.split(key, 6), round(config.expand * embed_dim)
        heads = width // config.head_dim

        def make(key, features, use_bias=config.use_bias):
            return Dense(key, embed_dim, features, ("embed", "heads"), units=(embed_dim, heads),
                         std=kernel_std(init, embed_dim, features), use_bias=use_bias, dtype=dtype)
        self.query, self.key = (make(k, heads * config.state_dim) for k in keys[:2])
        self.value, self.gate = (make(k, width) for k in keys[2:4])
        if decays is None:
            self.decay = make(keys[4], heads, use_bias=True)
        self.norm = Norm(keys[4], config.head_dim, NormConfig(), dtype)
        self.out = Dense(keys[5], width, embed_dim, ("heads", "embed"), units=(heads, embed_dim),
                         use_bias=config.use_bias, dtype=dtype,
                         std=kernel_std(init, width, embed_dim) * init.output_factor)
        self.config, self.heads, self.decays, self.dtype = config, heads, decays, dtype

    def __call__(self, x: jax.Array, kv: None, masking: Masking, bias: None, *,
                 cache: dict | None = None, key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (y_BLD, cache); arguments are Attention's.

        Args:
            cache: {"state": float32 [B, N, K, V]}.
        """
        row = row_of(masking, x.shape[0])
        q, k, v = (split_heads(f(x, FLAT), self.heads) for f in (self.query, self.key, self.value))
        y, state = run_sums(q * self.config.state_dim ** -0.5, k, v, self._log_decay(x), row,
                            None if cache is None else cache["state"], self.config.chunk)
        y = merge_heads(self.norm(y)) * jax.nn.silu(self.gate(x, FLAT))
        cache = None if cache is None else {"state": state}
        return self.out(tag(y, "context"), ("act_batch", "act_norm_length", "act_embed")), cache

    def _log_decay(self, x: jax.Array) -> jax.Array:
        """float32 [B, N, L]."""
        if self.decays is None:
            gates = self.decay(x, FLAT).astype(jnp.float32)
            return jax.nn.log_sigmoid(gates).transpose(0, 2, 1) / _GATE_TEMPERATURE
        decays = jnp.log(self.decays(self.heads))[None, :, None]
        decays = jnp.broadcast_to(decays, (x.shape[0], self.heads, x.shape[1]))
        return sharding.shard(decays, *HEADS[:3])


def constant_decays(heads: int) -> jax.Array:
    """RetNet's 1 - 2^(-5 - n) of head n (Sun et al. 2023, equation 8)."""
    return 1 - 2.0 ** (-5.0 - jnp.arange(heads, dtype=jnp.float32))
