"""Multi-head attention (Vaswani et al. 2017), with grouped keys and a cache.

Shape letters: B batch, L query length, S key length, D model, N query heads, K key/value
heads (N = K * G), H head dim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import sharding
from t5x_lite.layers.linear import Dense, InitConfig, RowKey, dropout, kernel_std
from t5x_lite.layers.masks import Masking, allowed
from t5x_lite.layers.norm import Norm, NormConfig
from t5x_lite.layers.position import PositionConfig, rotate

# Large enough to vanish in the softmax, small enough to stay finite in bfloat16.
MASKED = -1e10


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
    dropout_rate: float = 0.0      # on the probabilities

    @property
    def kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.num_kv_heads or self.num_heads


def attend(q: jax.Array, k: jax.Array, v: jax.Array, masking: Masking, bias: jax.Array | None,
           config: AttentionConfig, key: RowKey | None = None) -> jax.Array:
    """softmax(q k^T + bias, masked) v with the logits and the softmax in float32.

    Args:
        q: [B, N, L, H], already scaled. k, v: [B, K, S, H].
        bias: [1|B, N, L, S] or None.
        key: dropout key of the probabilities, None outside training.
    Returns:
        [B, N, L, H].
    """
    batch, num_heads, length, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    groups = num_heads // kv_heads
    sizes = sharding.mesh_sizes()
    rules = sharding.active_rules()
    # Context parallelism: queries stay split over the length, keys and values are gathered.
    k, v = (sharding.shard(x, "act_batch", "act_kv_heads", "act_keys", None) for x in (k, v))
    if groups > 1 and sizes and rules.mesh_axes("act_kv_heads") != rules.mesh_axes("act_heads"):
        # Few kv heads replicated, many query heads split: give every query head its own.
        k, v = (sharding.shard(jnp.repeat(x, groups, axis=1),
                               "act_batch", "act_heads", "act_keys", None) for x in (k, v))
        groups, kv_heads = 1, num_heads
    split = ("act_batch", "act_kv_heads" if groups > 1 else "act_heads")
    if groups > 1:
        q = sharding.reshape(q, (batch, kv_heads, groups, length, head_dim),
                             *split, None, "act_length", None)
        logits = sharding.einsum("BKGLH,BKSH->BKGLS", q, k, out=(*split, None, "act_length", None),
                                 preferred_element_type=jnp.float32)
        logits = sharding.reshape(logits, (batch, num_heads, length, keys),
                                  "act_batch", "act_heads", "act_length", None)
    else:
        logits = sharding.einsum("BNLH,BNSH->BNLS", q, k, out=(*split, "act_length", None),
                                 preferred_element_type=jnp.float32)
    if config.logit_softcap:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    mask = allowed(masking)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    probs = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    probs = dropout(probs, config.dropout_rate, key, "act_batch", "act_heads", None, None,
                    broadcast_dims=(2,))
    if groups == 1:
        return sharding.einsum("BNLS,BNSH->BNLH", probs, v, out=(*split, "act_length", None))
    probs = sharding.reshape(probs, (batch, kv_heads, groups, length, keys),
                             *split, None, "act_length", None)
    y = sharding.einsum("BKGLS,BKSH->BKGLH", probs, v, out=(*split, None, "act_length", None))
    return sharding.reshape(y, (batch, num_heads, length, head_dim),
                            "act_batch", "act_heads", "act_length", None)


def write_cache(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """cache_BKSH with new_BKLH at positions_B … positions_B + L - 1 of each row.

    Rows stand at different positions, so each slot of the cache picks its source: a gather
    and a select, which every sharding of batch and heads leaves local.
    """
    slots = jnp.arange(cache.shape[2])
    source = slots[None, :] - positions[:, None]                                   # [B, S]
    inside = (source >= 0) & (source < new.shape[2])
    if new.shape[2] > 1:
        index = jnp.clip(source, 0, new.shape[2] - 1)[:, None, :, None]
        new = jnp.take_along_axis(new, index, axis=2)
    return jnp.where(inside[:, None, :, None], new.astype(cache.dtype), cache)


class Attention(nnx.Module):
    """Self- or cross-attention."""

    def __init__(self, key: jax.Array, embed_dim: int, config: AttentionConfig,
                 position: PositionConfig, init: InitConfig, dtype: jnp.dtype = jnp.float32):
        keys = jax.random.split(key, 6)
        heads, kv_heads, head_dim = config.num_heads, config.kv_heads, config.head_dim
        std = kernel_std(init, embed_dim)
        query_std = std * head_dim ** -0.5 if init.scale_query else std
        std_out = kernel_std(init, heads * head_dim) * init.output_factor * init.value_factor
        make = functools.partial(Dense, use_bias=config.use_bias, dtype=dtype)
        self.query = make(keys[0], embed_dim, heads * head_dim, ("embed", "heads"), std=query_std,
                          units=(embed_dim, heads))
        self.key = make(keys[1], embed_dim, kv_heads * head_dim, ("embed", "kv_heads"), std=std,
                        units=(embed_dim, kv_heads))
        self.value = make(keys[2], embed_dim, kv_heads * head_dim, ("embed", "kv_heads"),
                          std=std * init.value_factor, units=(embed_dim, kv_heads))
        self.out = Dense(keys[3], heads * head_dim, embed_dim, ("heads", "embed"), std=std_out,
                         use_bias=config.use_out_bias, dtype=dtype, units=(heads, embed_dim))
        if config.qk_norm:
            self.query_norm = Norm(keys[4], head_dim, NormConfig(), dtype)
            self.key_norm = Norm(keys[5], head_dim, NormConfig(), dtype)
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
        return tuple(sharding.shard(a, "act_batch", "act_kv_heads", "act_keys", None)
                     for a in (k, v))

    def __call__(self, x: jax.Array, kv: tuple[jax.Array, jax.Array] | None, masking: Masking,
                 bias: jax.Array | None, *, cache: dict | None = None,
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
        q = self._split_heads(self.query(x, flat), config.num_heads, "act_heads")
        if config.qk_norm:
            q = self.query_norm(q)
        if kv is None:
            if self.position.kind == "rotary":
                q = rotate(q, masking.q_positions, self.position)
            k, v = self.project_kv(x, masking.q_positions)
            if cache is not None:
                start = masking.q_positions[:, 0]
                k = write_cache(cache["key"], k, start)
                v = write_cache(cache["value"], v, start)
                cache = {"key": k, "value": v}
        else:
            k, v = kv
        q = q * jnp.asarray(config.scale or config.head_dim ** -0.5, self.dtype)
        y = attend(q, k.astype(self.dtype), v.astype(self.dtype),
                   masking.with_window(config.window) if kv is None else masking, bias, config, key)
        y = y.transpose(0, 2, 1, 3)
        y = sharding.reshape(y, (*y.shape[:2], config.num_heads * config.head_dim), *flat)
        return self.out(y, ("act_batch", "act_norm_length", "act_embed")), cache
