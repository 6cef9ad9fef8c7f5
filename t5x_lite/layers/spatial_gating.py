"""gMLP's spatial gating unit (Liu et al. 2021, arXiv:2105.08050) as a token mixer.

Shape letters: B batch, L length, S slots of a cache, D model, W inner features.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError
from t5x_lite.layers.config import InitConfig, MixerConfig, NormConfig
from t5x_lite.layers.linear import Dense, RowKey, kernel_std, param
from t5x_lite.layers.masks import Masking, write_cache
from t5x_lite.layers.norm import Norm
from t5x_lite.layers.recurrences import examples, row_of
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag


class SpatialGating(nnx.Module):
    """y = W_out (u * (T norm(v) + b)) with u, v = gelu(W x): section 2.1 and equation 2.

    T is a Toeplitz matrix, T_ts = w_(t - s), as in the paper's appendix on shift invariance: packed
    examples then compute what they compute alone, and max_length numbers are enough. In decoders it is
    lower triangular. Fresh ones are near 0 with b = 1, so that a new layer gates nothing. What later
    tokens read does grow with the row: the cache holds norm(v) of every token.
    """

    def __init__(self, key: jax.Array, embed_dim: int, config: MixerConfig, causal: bool,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys, width = jax.random.split(key, 5), round(config.expand * embed_dim)
        self.gate, self.value = (Dense(
            k, embed_dim, width, ("embed", "mlp"), use_bias=config.use_bias, dtype=dtype,
            std=kernel_std(init, embed_dim, width)) for k in keys[:2])
        self.norm = Norm(keys[2], width, NormConfig(), dtype, "mlp")
        size = config.max_length
        self.offsets = param(keys[3], (size if causal else 2 * size - 1,), (None,), std=1e-3)
        self.places = param(keys[3], (size,), (None,), mean=1.0)
        self.out = Dense(keys[4], width, embed_dim, ("mlp", "embed"), use_bias=config.use_bias,
                         dtype=dtype, std=kernel_std(init, width, embed_dim) * init.output_factor)
        self.causal, self.dtype, self.max_length = causal, dtype, size

    def __call__(self, x: jax.Array, kv: None, masking: Masking, bias: None, *,
                 cache: dict | None = None, key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """x_BLD -> (y_BLD, cache); arguments are Attention's.

        Args:
            cache: {"values": [B, 1, S, W]}, norm(v) of every token.
        Raises:
            UserError: a row longer than max_length.
        """
        hidden = ("act_batch", "act_length", "act_mlp")
        row = row_of(masking, x.shape[0])
        u = jax.nn.gelu(self.gate(x, hidden), approximate=True)
        v = self.norm(jax.nn.gelu(self.value(x, hidden), approximate=True))
        if cache is not None:
            values = write_cache(cache["values"], v[:, None], masking.q_positions[:, 0])
            cache, v = {"values": values}, values[:, 0].astype(self.dtype)
        if v.shape[1] > self.max_length:
            raise UserError(f"mixer.max_length={self.max_length}: a row of {v.shape[1]} tokens is longer. "
                            f"Set it to {v.shape[1]} or more.")
        weights, places = self._weights(masking, row.starts, v.shape[1], cached=cache is not None)
        rows = "B" if weights.ndim == 3 else ""
        mixed = sharding.einsum(f"{rows}LS,BSW->BLW", weights, v, out=hidden)
        y = u * (mixed + places[..., None])
        return self.out(tag(y, "context"), ("act_batch", "act_norm_length", "act_embed")), cache

    def _weights(self, masking: Masking, starts: jax.Array, keys: int, *, cached: bool
                 ) -> tuple[jax.Array, jax.Array]:
        """T [B, L, S], or [L, S] where rows agree, and b [B, L], in the compute dtype."""
        index = jnp.arange(keys)
        if cached:
            at, places = masking.q_positions, masking.q_positions
        else:
            at = index[None]
            first = jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
            places = index - first
        distance = at[:, :, None] - index
        shift = 0 if self.causal else self.max_length - 1
        table = self.offsets[...].astype(self.dtype)
        weights = _take(table, jnp.clip(distance + shift, 0, table.shape[0] - 1))
        seen = distance >= 0 if self.causal else jnp.ones_like(distance, bool)
        if masking.q_segments is not None and not cached:
            ids = examples(starts)
            seen = seen & (ids[:, :, None] == ids[:, None, :])
            weights = jnp.broadcast_to(weights, seen.shape)
        weights = jnp.where(seen, weights, 0)
        if weights.shape[0] == 1:
            weights = weights[0]
        else:
            weights = sharding.shard(weights, "act_batch", None, None)
        return weights, _take(self.places[...].astype(self.dtype), places)


def _take(table: jax.Array, ids: jax.Array) -> jax.Array:
    """table[ids] where ids lie."""
    if not sharding.mesh_sizes():
        return table[ids]
    return table.at[ids].get(out_sharding=sharding.spec_of(ids))
