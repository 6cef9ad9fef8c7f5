"""Multi-head attention (Vaswani et al. 2017), with grouped keys and a cache.

Shape letters: B batch, L query length, S key length, D model, N query heads, K key/value
heads (N = K * G), H head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError, nearest
from t5x_lite.layers import attention_implementations
from t5x_lite.layers.dot_product import Relative, Terms
from t5x_lite.layers.linear import Dense, InitConfig, RowKey, dropout, kernel_std, param
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.norm import Norm, NormConfig
from t5x_lite.layers.position import PositionBias, PositionConfig, rotate, sinusoids
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """One attention layer."""

    num_heads: int = 8
    head_dim: int = 64
    num_kv_heads: int = 0          # 0: num_heads; 1: multi-query (Shazeer 2019); else grouped
    scale: float = 0.0             # factor on the logits; 0: head_dim**-0.5 (T5: 1)
    use_bias: bool = False         # on query, key and value
    use_out_bias: bool = False
    qk_norm: bool = False          # RMSNorm over each head's query and key
    logit_softcap: float = 0.0     # c * tanh(logits / c); 0: none
    window: int = 0                # see Masking.window
    # Share of the keys that each key/value head loses, for all queries alike (as T5X drops).
    dropout_rate: float = 0.0
    implementation: str = "auto"   # one of kernels.IMPLEMENTATIONS; cached decoding is plain
    chunk: int = 1024              # chunked: queries, and keys, at a time

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.num_kv_heads or self.num_heads


def validate(config: AttentionConfig, where: str) -> None:
    """Raises UserError for what cannot be, naming the field."""
    if config.num_heads < 1 or config.head_dim < 1:
        raise UserError(f"{where}: num_heads={config.num_heads} and head_dim={config.head_dim} "
                        f"must be at least 1.")
    if config.num_heads % config.kv_heads:
        raise UserError(f"{where}: num_heads={config.num_heads} must be a multiple of "
                        f"num_kv_heads={config.kv_heads}.")
    if config.implementation not in attention_implementations.IMPLEMENTATIONS:
        raise UserError(f"{where}.implementation={config.implementation!r}: must be one of "
                        f"{', '.join(attention_implementations.IMPLEMENTATIONS)}."
                        f"{nearest(config.implementation, attention_implementations.IMPLEMENTATIONS)}")
    for field, least in (("window", 0), ("logit_softcap", 0.0), ("chunk", 1)):
        if getattr(config, field) < least:
            raise UserError(f"{where}.{field}={getattr(config, field)}: must be at least {least}.")


def write_cache(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """cache_BKSH with new_BKLH at positions_B … positions_B + L - 1 of each row; all must fit.

    Rows stand at different positions. Each writes its own L slots, in place where the caller
    has no other use for the cache: selecting among all slots read and wrote the whole of it
    twice for every token.
    """
    def write(cache, new, positions):
        return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))(
            cache, new, positions)

    new = new.astype(cache.dtype)
    if not sharding.mesh_sizes():
        return write(cache, new, positions)
    spec = jax.typeof(cache).sharding.spec
    by_row = jax.sharding.PartitionSpec(spec[0])
    return sharding.manual(write, (spec, spec, by_row), spec, check_vma=False)(
        cache, jax.sharding.reshard(new, spec), jax.sharding.reshard(positions, by_row))


class Attention(nnx.Module):
    """Self- or cross-attention."""

    def __init__(self, key: jax.Array, embed_dim: int, config: AttentionConfig,
                 position: PositionConfig, init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys = jax.random.split(key, 8)
        heads, kv_heads, head_dim = config.num_heads, config.kv_heads, config.head_dim
        std = kernel_std(init, embed_dim, heads * head_dim)
        kv_std = kernel_std(init, embed_dim, kv_heads * head_dim)
        query_std = std * head_dim ** -0.5 if init.scale_query else std
        std_out = (kernel_std(init, heads * head_dim, embed_dim) * init.output_factor
                   * init.value_factor)
        make = functools.partial(Dense, use_bias=config.use_bias, dtype=dtype)
        self.query = make(keys[0], embed_dim, heads * head_dim, ("embed", "heads"), std=query_std,
                          units=(embed_dim, heads))
        self.key = make(keys[1], embed_dim, kv_heads * head_dim, ("embed", "kv_heads"), std=kv_std,
                        units=(embed_dim, kv_heads))
        self.value = make(keys[2], embed_dim, kv_heads * head_dim, ("embed", "kv_heads"),
                          std=kv_std * init.value_factor, units=(embed_dim, kv_heads))
        self.out = Dense(keys[3], heads * head_dim, embed_dim, ("heads", "embed"), std=std_out,
                         use_bias=config.use_out_bias, dtype=dtype, units=(heads, embed_dim))
        if config.qk_norm:
            self.query_norm = Norm(keys[4], head_dim, NormConfig(), dtype)
            self.key_norm = Norm(keys[5], head_dim, NormConfig(), dtype)
        if position.kind == "transformer_xl":
            self.relative_key = Dense(keys[6], embed_dim, heads * head_dim, ("embed", "heads"),
                                      std=std, dtype=dtype, units=(embed_dim, heads))
            self.content_bias, self.position_bias = (
                param(keys[7], (heads * head_dim,), ("heads",), units=(heads,)) for _ in range(2))
        self.config = config
        self.position = position
        self.dtype = dtype

    def _split_heads(self, x: jax.Array, heads: int, axis: str) -> jax.Array:
        """x_BL(NH) -> BNLH."""
        x = sharding.reshape(x, (*x.shape[:2], heads, self.config.head_dim),
                             "act_batch", "act_length", axis, None)
        return x.transpose(0, 2, 1, 3)

    def project_kv(self, x: jax.Array, positions: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """x_BSD -> keys and values [B, K, S, H]; positions_BS turn the keys under RoPE."""
        flat = ("act_batch", "act_length", "act_kv_heads")
        k = self._split_heads(self.key(x, flat), self.config.kv_heads, "act_kv_heads")
        v = self._split_heads(self.value(x, flat), self.config.kv_heads, "act_kv_heads")
        if self.config.qk_norm:
            k = self.key_norm(k)
        if positions is not None and self.position.kind == "rotary":
            k = rotate(k, positions, self.position)
        # Under context parallelism every query needs all keys: gather their length here.
        k, v = (sharding.shard(a, "act_batch", "act_kv_heads", "act_keys", None) for a in (k, v))
        return tag(k, "key"), tag(v, "value")

    def _queries(self, x: jax.Array, masking: Masking, turn: bool
                 ) -> tuple[jax.Array, Relative | None]:
        """Scaled queries [B, N, L, H] of x_BLD, and Transformer-XL's for the position logits."""
        config = self.config
        flat = ("act_batch", "act_length", "act_heads")
        scale = jnp.asarray(config.scale or config.head_dim ** -0.5, self.dtype)
        flat_query = self.query(x, flat)
        if self.position.kind == "transformer_xl" and turn:
            content, position = (
                self._split_heads(flat_query + bias[...].astype(self.dtype), config.num_heads,
                                  "act_heads") * scale
                for bias in (self.content_bias, self.position_bias))
            keys = masking.k_positions.shape[1]
            table = sinusoids(jnp.arange(keys - 1, -keys - 1, -1), x.shape[-1]).astype(self.dtype)
            r = self.relative_key(table, (None, "act_heads"))
            r = sharding.reshape(r, (2 * keys, config.num_heads, config.head_dim),
                                 None, "act_heads", None).transpose(1, 0, 2)
            return tag(content, "query"), Relative(tag(position, "query"), r)
        q = self._split_heads(flat_query, config.num_heads, "act_heads")
        if config.qk_norm:
            q = self.query_norm(q)
        if self.position.kind == "rotary" and turn:
            q = rotate(q, masking.q_positions, self.position)
        return tag(q * scale, "query"), None

    def __call__(self, x: jax.Array, kv: tuple[jax.Array, jax.Array] | None, masking: Masking,
                 bias: PositionBias | jax.Array | None, *, cache: dict | None = None,
                 key: RowKey | None = None) -> tuple[jax.Array, dict | None]:
        """Attention of x_BLD over itself, or over given keys and values.

        Args:
            kv: keys and values of another sequence (cross-attention), None for self-attention.
            masking, bias: over [L, S]; with a cache, S is the cache's length.
            cache: {"key", "value"} [B, K, S, H]; self-attention writes x's keys and values at
                masking.q_positions and attends to the whole of it.
            key: dropout key, None outside training.
        Returns:
            y_BLD and the cache after the write.
        """
        config = self.config
        flat = ("act_batch", "act_length", "act_heads")
        q, relative = self._queries(x, masking, turn=kv is None)
        if kv is None:
            k, v = self.project_kv(x, masking.q_positions)
            if cache is not None:
                start = masking.q_positions[:, 0]
                k = write_cache(cache["key"], k, start)
                v = write_cache(cache["value"], v, start)
                cache = {"key": k, "value": v}
            masking = masking.with_window(config.window)
        else:
            k, v = kv
        # Zeroing a value is dropping its probability for every query at once.
        v = dropout(v.astype(self.dtype), config.dropout_rate, key, "act_batch", "act_kv_heads",
                    "act_keys", None, broadcast_dims=(3,))
        k, v = _for_queries(k.astype(self.dtype), v, config)
        chosen = attention_implementations.choose(config.implementation, q, k, masking=masking,
                                bias=bias is not None or relative is not None,
                                softcap=config.logit_softcap)
        y = attention_implementations.attend(chosen, q, k, v, Terms(bias, relative, config.logit_softcap), masking,
                           config.chunk)
        y = y.transpose(0, 2, 1, 3)
        y = sharding.reshape(y, (*y.shape[:2], config.num_heads * config.head_dim), *flat)
        y = tag(y, "context")
        return self.out(y, ("act_batch", "act_norm_length", "act_embed")), cache


def _for_queries(k: jax.Array, v: jax.Array, config: AttentionConfig):
    """Keys and values that lie where their queries lie.

    Where few heads of keys are replicated and many of queries are split, every query head gets
    its own.
    """
    groups = config.num_heads // config.kv_heads
    sizes, rules = sharding.mesh_sizes(), sharding.active_rules()

    def ways(name):
        return [a for a in rules.mesh_axes(name) if sizes.get(a, 1) > 1]

    if groups == 1 or ways("act_kv_heads") == ways("act_heads"):
        return k, v
    return tuple(sharding.shard(jnp.repeat(x, groups, axis=1),
                                "act_batch", "act_heads", "act_keys", None) for x in (k, v))
