"""Attention layers with their caches: multi-head (Vaswani et al. 2017), with grouped keys, and latent.

ATTENTIONS, at the end, says what each kind is; a row of it is all that a new kind needs.

Shape letters: B batch, L query length, S key length, D model, N query heads, K key/value heads
(N = K * G), H head dim; of latent attention H features of a query without position, P those with,
R latent rank, V features of a value.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError, at_least, one_of
from t5x_lite.layers import attention_implementations, dot_product, norm, sparse_attention
from t5x_lite.layers.attention_implementations import FUSED_KERNELS, IMPLEMENTATIONS
from t5x_lite.layers.config import AttentionConfig, InitConfig, NormConfig, PositionConfig
from t5x_lite.layers.linear import Dense, RowKey, dropout, kernel_std
from t5x_lite.layers.masks import Masking, Terms, write_cache
from t5x_lite.layers.norm import Norm
from t5x_lite.layers.position import POSITIONS, PositionBias
from t5x_lite.parallel import sharding
from t5x_lite.parallel.remat import tag


def validate(config: AttentionConfig, where: str, *, crosses: bool = False) -> None:
    """Raises UserError for what cannot be, naming the field.

    Args:
        crosses: whether it reads another sequence.
    """
    kind = ATTENTIONS[one_of(f"{where}.kind", config.kind, ATTENTIONS)]
    if crosses and not kind.crosses:
        fit = [name for name, row in ATTENTIONS.items() if row.crosses]
        raise UserError(f"{where}.kind={config.kind!r} cannot read an encoder; use "
                        f"{' or '.join(fit)} there.")
    kind.validate(config, where)
    at_least(f"{where}.num_heads", config.num_heads, 1)
    at_least(f"{where}.head_dim", config.head_dim, 1)
    if config.num_heads % config.kv_heads:
        raise UserError(f"{where}: num_heads={config.num_heads} must be a multiple of "
                        f"num_kv_heads={config.kv_heads}.")
    one_of(f"{where}.implementation", config.implementation, IMPLEMENTATIONS)
    one_of(f"{where}.qk_norm_over", config.qk_norm_over, ("head", "all"))
    norm.validate(config.qk_norm_config, f"{where}.qk_norm_config")
    at_least(f"{where}.window", config.window, 0)
    at_least(f"{where}.logit_softcap", config.logit_softcap, 0)
    at_least(f"{where}.chunk", config.chunk, 1)


def _cache_of_heads(config: AttentionConfig) -> dict[str, tuple[int, int, str | None]]:
    """{entry: (heads, features of each, logical axis of heads)} of a token."""
    each = (config.kv_heads, config.head_dim, "act_kv_heads")
    return {"key": each, "value": each}


def attend(name: str, q: jax.Array, k: jax.Array, v: jax.Array, terms: Terms, masking: Masking,
           chunk: int) -> jax.Array:
    """Attention by the implementation of this name; see dot_product.plain."""
    if name == "plain":
        return dot_product.plain(q, k, v, terms, masking)
    if name == "chunked":
        run = functools.partial(dot_product.chunked, chunk=chunk)
        sizes = sharding.mesh_sizes()
        ways = sizes.get("sequence", 1)
        if ways == 1:
            return run(q, k, v, terms, masking)
        if masking.causal and masking.k_prefix is None and q.shape[2] == k.shape[2]:
            if q.shape[2] % (2 * ways) == 0:
                run = functools.partial(attention_implementations.balanced, run, ways)
            else:
                attention_implementations.log_once(
                    f"attention: {q.shape[2]} positions are no multiple of 2 x "
                    f"mesh.sequence={ways}, so its last devices work longest")
        return _per_device(run, q, k, v, terms, masking)
    kernel = FUSED_KERNELS[name]
    return _per_device(
        lambda q, k, v, terms, masking: kernel(q, k, v, masking, softcap=terms.softcap),
        q, k, v, terms, masking)


def _per_device(kernel: Callable, q, k, v, terms: Terms, masking: Masking) -> jax.Array:
    """The kernel on each device's own rows, heads and queries, over all of their keys."""
    if not sharding.mesh_sizes():
        return kernel(q, k, v, terms, masking)
    rows = "act_batch" if masking.q_positions.shape[0] > 1 else None
    masking = dataclasses.replace(
        masking, q_positions=sharding.shard(masking.q_positions, rows, "act_length"))
    args = (q, k, v, terms, masking)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
    return sharding.manual(kernel, specs, specs[0], check_vma=False)(*args)


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
            self.query_norm = _qk_norm(keys[4], heads, "heads", config, dtype)
            self.key_norm = _qk_norm(keys[5], kv_heads, "kv_heads", config, dtype)
        if parameters := POSITIONS[position.kind].parameters:
            for name, value in parameters(keys[6:], embed_dim, config, std, dtype).items():
                setattr(self, name, value)
        self.config = config
        self.position = position
        self.dtype = dtype

    @property
    def scale(self) -> jax.Array:
        """What queries are multiplied by, in the compute dtype."""
        return jnp.asarray(self.config.scale or self.config.head_dim ** -0.5, self.dtype)

    def split_heads(self, x: jax.Array, heads: int, axis: str) -> jax.Array:
        """x_BL(NH) -> BNLH."""
        x = sharding.reshape(x, (*x.shape[:2], heads, self.config.head_dim),
                             "act_batch", "act_length", axis, None)
        return x.transpose(0, 2, 1, 3)

    def _normed_heads(self, x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
        """x_BL(NH) -> BNLH, under the norm of queries or keys where there is one."""
        over = self.config.qk_norm_over if self.config.qk_norm else ""
        if over == "all":
            x = getattr(self, name)(x)
        x = self.split_heads(x, heads, axis)
        return getattr(self, name)(x) if over == "head" else x

    def project_kv(self, x: jax.Array, positions: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """x_BSD -> keys and values [B, K, S, H]; positions_BS of self-attention's, or None."""
        flat = ("act_batch", "act_length", "act_kv_heads")
        k = self._normed_heads(self.key(x, flat), "key_norm", self.config.kv_heads, "act_kv_heads")
        v = self.split_heads(self.value(x, flat), self.config.kv_heads, "act_kv_heads")
        turn = POSITIONS[self.position.kind].turn
        if positions is not None and turn is not None:
            k = turn(k, positions, self.position)
        # Under context parallelism every query needs all keys: gather their length here.
        k, v = (sharding.shard(a, "act_batch", "act_kv_heads", "act_keys", None) for a in (k, v))
        return tag(k, "key"), tag(v, "value")

    def _queries(self, x: jax.Array, masking: Masking, own_keys: bool) -> tuple[jax.Array, Any]:
        """Scaled queries [B, N, L, H] of x_BLD, and the positions' own term of the logits.

        Args:
            own_keys: whether this is self-attention, where positions matter.
        """
        config, kind = self.config, POSITIONS[self.position.kind]
        flat_query = self.query(x, ("act_batch", "act_length", "act_heads"))
        if own_keys and kind.queries is not None:
            return kind.queries(self, flat_query, masking.k_positions.shape[1], x.shape[-1])
        q = self._normed_heads(flat_query, "query_norm", config.num_heads, "act_heads")
        if own_keys and kind.turn is not None:
            q = kind.turn(q, masking.q_positions, self.position)
        return tag(q * self.scale, "query"), None

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
        q, relative = self._queries(x, masking, own_keys=kv is None)
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
        v = dropout(v, config.dropout_rate, key, "act_batch", "act_kv_heads", "act_keys", None,
                    broadcast_dims=(3,))
        k, v = _for_queries(k, v, config)
        q = q.astype(k.dtype)   # a cache may be wider: products.read_as
        terms = Terms(bias, relative, config.logit_softcap)
        y = self.attend(q, k, v, terms, masking).astype(self.dtype)
        y = y.transpose(0, 2, 1, 3)
        y = sharding.reshape(y, (*y.shape[:2], config.num_heads * config.head_dim), *flat)
        y = tag(y, "context")
        return self.out(y, ("act_batch", "act_norm_length", "act_embed")), cache


    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, terms: Terms, masking: Masking
               ) -> jax.Array:
        """softmax(q . k + terms, masked) v of scaled q_BNLH, [B, N, L, H]."""
        config = self.config
        chosen = attention_implementations.choose(
            config.implementation, q, k, masking=masking, softcap=config.logit_softcap,
            bias=terms.bias is not None or terms.relative is not None)
        return attend(chosen, q, k, v, terms, masking, config.chunk)


class SparseAttention(Attention):
    """Self-attention over a window, global tokens and random blocks: sparse_attention.py."""

    def attend(self, q: jax.Array, k: jax.Array, v: jax.Array, terms: Terms, masking: Masking
               ) -> jax.Array:
        """Attention's, over the keys that the pattern lets a query see."""
        assert terms.bias is None and terms.relative is None and not masking.causal

        def run(q, k, v, terms, masking):
            return sparse_attention.attend(q, k, v, masking.q_segments, self.config)
        # A device that holds a part of the length would not have its neighbours' keys.
        if sharding.mesh_sizes().get("sequence", 1) > 1:
            raise UserError(f"mesh.sequence splits rows, and kind={self.config.kind!r} needs them whole: "
                            "set mesh.sequence=1.")
        return _per_device(run, q, k, v, terms, masking)


def _qk_norm(key: jax.Array, heads: int, axis: str, config: AttentionConfig, dtype: jnp.dtype
             ) -> Norm:
    """The norm of queries or keys: over each head's features, or over those of all heads."""
    if config.qk_norm_over == "head":
        return Norm(key, config.head_dim, config.qk_norm_config, dtype)
    return Norm(key, heads * config.head_dim, config.qk_norm_config, dtype, axis, (heads,))


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


def validate_pattern(config: AttentionConfig, position: PositionConfig, where: str, *, causal: bool
                     ) -> None:
    """Raises UserError for what a kind with a pattern of its own cannot be given.

    Args:
        position, causal: of the stack.
    """
    if ATTENTIONS[config.kind].visible is None:
        return
    if causal:
        raise UserError(f"{where}.kind={config.kind!r} sees both ways, and is for encoders. Use kind=heads "
                        "with a window in a decoder.")
    row = POSITIONS[position.kind]
    if row.bias or row.parameters:
        fit = [name for name, kind in POSITIONS.items() if not (kind.bias or kind.parameters)]
        raise UserError(f"position.kind={position.kind!r} acts on the logits of pairs, which {where}.kind="
                        f"{config.kind!r} makes by blocks. Use one of {', '.join(fit)}.")


# --- latent ---------------------------------------------------------------------------------------

def _validate_latent(config: AttentionConfig, where: str) -> None:
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


def _latent_cache(config: AttentionConfig) -> dict[str, tuple[int, int, str | None]]:
    """{entry: (heads, features of each, logical axis of heads)} of a token."""
    return {"latent": (1, config.latent.rank + config.latent.rotary_dim, None)}


class LatentAttention(nnx.Module):
    """Self-attention over latents (DeepSeek-V2, arXiv:2405.04434, section 2.1 and appendix C).

    Keys and values of all heads are made of one short vector a token, the latent; a few further key
    features, which all heads share, carry the position. Only these two are kept in the cache: while
    decoding, the projections that make keys and values of the latent are moved over to the queries
    and to the results, so that it is attended to as it is, with one key head for all query heads.
    """

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
        """Attention of x_BLD over itself; arguments and results are Attention's.

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


# --- the kinds ------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class AttentionKind:
    """A row of the table."""

    # (key, embed_dim, config, position, init, dtype) -> module with Attention's __call__.
    module: Callable[..., nnx.Module]
    # What the cache keeps of a token: {entry: (heads, features of each, logical axis of heads)}.
    cache: Callable[[AttentionConfig], dict[str, tuple[int, int, str | None]]]
    validate: Callable[[AttentionConfig, str], None]   # of fields that it alone reads
    crosses: bool = True      # it can read another sequence (`project_kv`)
    turns_only: bool = False  # positions may only turn queries and keys
    section: str = ""         # of AttentionConfig, that it alone reads
    # Keys that a query sees, (config, length) -> their mean, of kinds with a pattern of their own: for
    # encoders, without positions that act on the logits.
    visible: Callable[[AttentionConfig, int], float] | None = None


ATTENTIONS = {
    "heads": AttentionKind(Attention, _cache_of_heads, lambda config, where: None),
    "latent": AttentionKind(LatentAttention, _latent_cache, _validate_latent, crosses=False,
                            turns_only=True, section="latent"),
    "longformer": AttentionKind(
        SparseAttention, _cache_of_heads, sparse_attention.validate_longformer, crosses=False,
        section="sparse", visible=sparse_attention.visible),
    "bigbird": AttentionKind(
        SparseAttention, _cache_of_heads, sparse_attention.validate_bigbird, crosses=False,
        section="sparse", visible=sparse_attention.visible),
}
