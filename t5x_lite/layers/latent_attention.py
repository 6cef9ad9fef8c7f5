"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C).

Keys and values of all heads are made of one short vector a token, the latent; a few further key
features, which all heads share, carry the position. Only these two are kept in the cache: while
decoding, the projections that make keys and values of the latent are moved over to the queries and
to the results, so that it is attended to as it is, with one key head for all query heads.

Shape letters: B batch, L query length, S key length, D model, N heads, H features of a query without
position, P those with, R latent rank, V features of a value.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError, at_least
from t5x_lite.layers import attention_implementations
from t5x_lite.layers.attention import attend, write_cache
from t5x_lite.layers.config import AttentionConfig, InitConfig, NormConfig, PositionConfig
from t5x_lite.layers.linear import Dense, RowKey, dropout, kernel_std
from t5x_lite.layers.masks import Masking, Terms
from t5x_lite.layers.norm import Norm
from t5x_lite.layers.position import POSITIONS, PositionBias
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag


def validate(config: AttentionConfig, where: str) -> None:
    """Raises UserError for what cannot be, naming the field."""
    latent = config.latent
    at_least(f"{where}.latent.query_rank", latent.query_rank, 0, "0 projects queries at once.")
    if latent.rotary_dim % 2 or not latent.rotary_dim < config.head_dim:
        raise UserError(f"{where}.latent.rotary_dim={latent.rotary_dim}: must be even and below "
                        f"head_dim={config.head_dim}, which counts it.")
    if config.num_kv_heads not in (0, config.num_heads):
        raise UserError(f"{where}.num_kv_heads={config.num_kv_heads}: latent attention makes keys "
                        "for every head. Leave it at 0.")
    if config.qk_norm:
        raise UserError(f"{where}.qk_norm: latent attention has norms of its own. Leave it out.")


def cache_dims(config: AttentionConfig) -> dict[str, tuple[int, int, str | None]]:
    """{entry: (heads, features of each, logical axis of heads)} of a token."""
    return {"latent": (1, config.latent.rank + config.latent.rotary_dim, None)}


class LatentAttention(nnx.Module):
    """Self-attention over latents."""

    def __init__(self, key: jax.Array, embed_dim: int, config: AttentionConfig,
                 position: PositionConfig, init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys, latent = jax.random.split(key, 6), config.latent
        heads, into, axis = config.num_heads, embed_dim, "embed"
        norm = NormConfig(epsilon=latent.norm_epsilon)
        make = functools.partial(Dense, dtype=dtype)
        if latent.query_rank:
            self.query_latent = make(keys[0], embed_dim, latent.query_rank, ("embed", None),
                                     std=kernel_std(init, embed_dim, latent.query_rank),
                                     use_bias=config.use_bias)
            self.query_latent_norm = Norm(keys[0], latent.query_rank, norm, dtype)
            into, axis = latent.query_rank, "latent"

        def per_head(key, into, axis, features, factor=1.0):
            std = kernel_std(init, into, heads * features) * factor
            return make(key, into, heads * features, (axis, "heads"), std=std, units=(into, heads))

        scale = config.head_dim ** -0.5 if init.scale_query else 1.0
        self.query = per_head(keys[1], into, axis, config.head_dim, scale)
        self.latent = make(keys[2], embed_dim, latent.rank + latent.rotary_dim, ("embed", None),
                           std=kernel_std(init, embed_dim, latent.rank), use_bias=config.use_bias)
        self.latent_norm = Norm(keys[2], latent.rank, norm, dtype)
        self.key = per_head(keys[3], latent.rank, "latent", config.head_dim - latent.rotary_dim)
        self.value = per_head(keys[4], latent.rank, "latent", latent.value_dim, init.value_factor)
        width = heads * latent.value_dim
        self.out = make(keys[5], width, embed_dim, ("heads", "embed"), units=(heads, embed_dim),
                        std=kernel_std(init, width, embed_dim) * init.output_factor
                        * init.value_factor, use_bias=config.use_out_bias)
        self.config = config
        self.position = position
        self.dtype = dtype

    def _heads(self, x: jax.Array) -> jax.Array:
        """x_BL(NH) -> BNLH."""
        heads = self.config.num_heads
        x = sharding.reshape(x, (*x.shape[:2], heads, x.shape[2] // heads),
                             "act_batch", "act_length", "act_heads", None)
        return x.transpose(0, 2, 1, 3)

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        turn = POSITIONS[self.position.kind].turn
        return x if turn is None else turn(x, positions, self.position)

    def _queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x_BLD -> scaled queries, [B, N, L, H] without position and [B, N, L, P] with it."""
        config = self.config
        if config.latent.query_rank:
            x = self.query_latent_norm(self.query_latent(x, ("act_batch", "act_length", None)))
        q = self._heads(self.query(x, ("act_batch", "act_length", "act_heads")))
        q = tag(q * jnp.asarray(config.scale or config.head_dim ** -0.5, self.dtype), "query")
        plain = config.head_dim - config.latent.rotary_dim
        return q[..., :plain], self._turn(q[..., plain:], positions)

    def _latents(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x_BSD -> latents [B, S, R], and the keys' features with position [B, 1, S, P]."""
        both = self.latent(x, ("act_batch", "act_length", None))
        rank = self.config.latent.rank
        return (tag(self.latent_norm(both[..., :rank]), "latent"),
                self._turn(both[:, None, :, rank:], positions))

    def _keys(self, latents: jax.Array, with_position: jax.Array, key: RowKey | None
              ) -> tuple[jax.Array, jax.Array]:
        """Keys [B, N, S, H + P] and values [B, N, S, V]."""
        flat = ("act_batch", "act_length", "act_heads")
        k, v = self._heads(self.key(latents, flat)), self._heads(self.value(latents, flat))
        axes = ("act_batch", "act_heads", "act_length", None)
        shared = sharding.shard(jnp.broadcast_to(
            with_position, (*k.shape[:3], with_position.shape[3])), *axes)
        k = jnp.concatenate([k, shared], axis=-1)
        k, v = (sharding.shard(a, "act_batch", "act_heads", "act_keys", None) for a in (k, v))
        # Zeroing a value is dropping its probability for every query at once.
        v = dropout(v, self.config.dropout_rate, key, "act_batch", "act_heads", "act_keys", None,
                    broadcast_dims=(3,))
        return tag(k, "key"), tag(v, "value")

    def __call__(self, x: jax.Array, kv: None, masking: Masking,
                 bias: PositionBias | jax.Array | None, *, cache: dict | None = None,
                 key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """Attention of x_BLD over itself; arguments and results are attention.Attention's.

        Args:
            cache: {"latent": [B, 1, S, R + P]}.
        """
        config = self.config
        plain, turned = self._queries(x, masking.q_positions)
        latents, with_position = self._latents(x, masking.q_positions)
        masking = masking.with_window(config.window)
        if cache is None:
            k, v = self._keys(latents, with_position, key)
            y = self._attend(jnp.concatenate([plain, turned], axis=-1), k, v, masking, bias)
        else:
            entry = jnp.concatenate([latents[:, None], with_position], axis=-1)
            kept = write_cache(cache["latent"], entry, masking.q_positions[:, 0])
            cache = {"latent": kept}
            q = jnp.concatenate([self._by_head(plain, "key"), turned], axis=-1)
            y = self._attend(q, kept, kept[..., :config.latent.rank], masking, bias)
            y = self._by_head(y, "value")
        y = y.transpose(0, 2, 1, 3)
        y = sharding.reshape(y, (*y.shape[:2], config.num_heads * config.latent.value_dim),
                             "act_batch", "act_length", "act_heads")
        return self.out(tag(y, "context"), ("act_batch", "act_norm_length", "act_embed")), cache

    def _attend(self, q, k, v, masking: Masking, bias) -> jax.Array:
        """Scaled q_BNLH over [B, N or 1, S, …] -> [B, N, L, …] in the compute dtype."""
        config = self.config
        q = q.astype(k.dtype)   # a cache may be wider: products.read_as
        chosen = attention_implementations.choose(
            config.implementation, q, k, masking=masking, softcap=config.logit_softcap,
            bias=bias is not None, value_dim=v.shape[3])
        y = attend(chosen, q, k, v, Terms(bias, None, config.logit_softcap), masking, config.chunk)
        return y.astype(self.dtype)

    def _by_head(self, x: jax.Array, name: str) -> jax.Array:
        """Queries_BNLH against latents, [B, N, L, R]; or what was read of latents as values.

        name: of the projection from latents, which each head's part of x is taken through.
        """
        kernel = sharding.weight(getattr(self, name).kernel[...], ("latent", "heads"), self.dtype)
        rank, heads = kernel.shape[0], self.config.num_heads
        kernel = sharding.reshape(kernel, (rank, heads, kernel.shape[1] // heads),
                                  None, "act_heads", None)
        equation = "BNLH,RNH->BNLR" if name == "key" else "BNLR,RNV->BNLV"
        return sharding.einsum(equation, x, kernel, out=("act_batch", "act_heads", "act_length", None))
