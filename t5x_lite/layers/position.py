"""Positions: biases on the attention logits, rotations of queries and keys, and vectors added
to the embeddings.

POSITIONS, at the end, says what each kind does; a row of it is all that a new kind needs.

Position indices are consecutive along a row; a leading dim of 1 says that all rows agree.

Shape letters: B batch (or 1), L query length, S key length, N heads, H head dim, D model,
R relative distances.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite.errors import UserError, at_least, between, one_of
from t5x_lite.layers.config import AttentionConfig, InitConfig, PositionConfig
from t5x_lite.layers.linear import Dense, param
from t5x_lite.layers.masks import Masking
from t5x_lite.parallel import products, sharding
from t5x_lite.parallel.remat import tag

# Pairs up to which a product with one row of buckets a pair is small beside attention itself.
_PAIRS_BY_PRODUCT = 1024 * 1024
ROTARY_SCALINGS = ("none", "linear", "ntk", "llama3", "yarn")


# --- biases ---------------------------------------------------------------------------------------

def relative_position_bucket(distance: jax.Array, *, bidirectional: bool, num_buckets: int,
                             max_distance: int) -> jax.Array:
    """T5's bucket of key position - query position (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the other half grow logarithmically up to
    max_distance; bidirectional ones spend half of all on keys after the query.
    """
    bucket = jnp.zeros_like(distance)
    behind = -distance
    if bidirectional:
        num_buckets //= 2
        bucket = jnp.where(behind < 0, num_buckets, 0)
        behind = jnp.abs(behind)
    else:
        behind = jnp.maximum(behind, 0)
    exact = num_buckets // 2
    ratio = jnp.log(behind.astype(jnp.float32) / exact + jnp.finfo(jnp.float32).eps)
    far = exact + (ratio / math.log(max_distance / exact) * (num_buckets - exact)).astype(jnp.int32)
    return bucket + jnp.where(behind < exact, behind, jnp.minimum(far, num_buckets - 1))


def alibi_slopes(num_heads: int) -> list[float]:
    """Press et al. 2022: the geometric sequence 2**(-8 i / n); other n interleave the next power."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    extra = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return slopes + extra


def skew(x: jax.Array, keys: int) -> jax.Array:
    """Columns by offset to columns by key: x_…LM -> …LS with out[l, s] = x[l, L - 1 - l + s].

    Where column c of x stands for the distance (last query) - (first key) - c, query l finds
    its distance to key s there. It is a reshape and two slices (Dai et al. 2019, appendix B).

    Args:
        x: M = L + keys columns; the last one is never read.
        keys: S.
    """
    *lead, length, columns = x.shape
    assert columns == length + keys, (x.shape, keys)
    x = x.reshape(*lead, length * columns)[..., length - 1:length * columns - 1]
    return x[..., :length * (columns - 1)].reshape(*lead, length, columns - 1)[..., :keys]


def offsets(q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
    """int32 [M = L + S]: the distance query - key of each column that `skew` reads."""
    length, keys = q_positions.shape[1], k_positions.shape[1]
    return q_positions[0, -1] - k_positions[0, 0] - jnp.arange(length + keys)


@dataclasses.dataclass(frozen=True)
class PositionBias:
    """A bias on the logits as a function of positions: what attention calls, whole or by chunks."""

    table: jax.Array    # [1, R, N]: what `values` reads, such as T5's buckets or ALiBi's slopes
    values: Callable    # (self, distances int32 [B, …], logical axes of these) -> [B, N, …]
    config: PositionConfig
    bidirectional: bool

    def __call__(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """int32 [1|B, L], [1, S] -> bias_[1|B]NLS in the table's dtype."""
        if q_positions.shape[0] == 1:
            # One value an offset, spread over the diagonals.
            length, keys = q_positions.shape[1], k_positions.shape[1]
            values = self.values(self, -offsets(q_positions, k_positions)[None], (None, None))
            values = jnp.broadcast_to(values[:, :, None], (*values.shape[:2], length, length + keys))
            return sharding.shard(skew(values, keys), None, "act_heads", "act_length", None)
        distance = k_positions[:, None, :] - q_positions[:, :, None]
        return self.values(self, distance, ("act_batch", "act_length", None))

    def whole(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """The bias of all pairs as an array that the layers share, to be made once.

        What XLA can fuse into every layer's softmax it makes anew in each, twice: on CPU neither
        an optimization_barrier nor the reshape of `skew` keeps it from that, but a product
        does. So there T5's one-hot product goes over all pairs instead of over all distances.
        """
        (rows, length), keys = q_positions.shape, k_positions.shape[1]
        if rows == 1 and length * keys <= _PAIRS_BY_PRODUCT and products.platform() == "cpu":
            distance = k_positions[:, None, :] - q_positions[:, :, None]
            return self.values(self, distance, (None, "act_length", None))
        return jax.lax.optimization_barrier(self(q_positions, k_positions))


jax.tree_util.register_dataclass(PositionBias, data_fields=["table"],
                                 meta_fields=["values", "config", "bidirectional"])


def t5_values(bias: PositionBias, distance: jax.Array, axes: sharding.Axes) -> jax.Array:
    """The table's row of each distance's bucket."""
    table = bias.table[0]
    buckets = relative_position_bucket(
        distance, bidirectional=bias.bidirectional, num_buckets=bias.config.num_buckets,
        max_distance=bias.config.max_distance)
    # A product with one-hot rows: its transpose is a product too, where the gradient of a
    # gather would scatter rows one by one.
    one_hot = jax.nn.one_hot(buckets, bias.config.num_buckets, dtype=table.dtype)
    letters = "LS"[:distance.ndim - 1]
    return sharding.einsum(f"B{letters}R,RN->BN{letters}", one_hot, table,
                           out=(axes[0], "act_heads", *axes[1:]))


def alibi_values(bias: PositionBias, distance: jax.Array, axes: sharding.Axes) -> jax.Array:
    """-slope_N * |distance|."""
    slopes = bias.table[0, 0].reshape(-1, *(1,) * (distance.ndim - 1))
    values = -slopes * jnp.abs(distance)[:, None].astype(bias.table.dtype)
    return sharding.shard(values, axes[0], "act_heads", *axes[1:])


class RelativeBias(nnx.Module):
    """T5's learned bias: one scalar a head and bucket, added to the attention logits."""

    def __init__(self, key: jax.Array, num_heads: int, config: PositionConfig,
                 bidirectional: bool, dtype: jnp.dtype = jnp.float32):
        # T5X draws uniform with variance 1/fan_avg of (heads, buckets); the same variance here.
        std = math.sqrt(2.0 / (num_heads + config.num_buckets))
        self.embedding = param(key, (config.num_buckets, num_heads), ("buckets", "heads"), std=std)
        self.config = config
        self.bidirectional = bidirectional
        self.dtype = dtype

    def __call__(self) -> PositionBias:
        """The bias as a function of positions, in the compute dtype."""
        return PositionBias(self.embedding[...].astype(self.dtype)[None], t5_values, self.config,
                            self.bidirectional)


class AlibiBias(nnx.Module):
    """ALiBi: -slope_N * distance, no parameters, float32 whatever the compute dtype."""

    def __init__(self, key: jax.Array, num_heads: int, config: PositionConfig,
                 bidirectional: bool, dtype: jnp.dtype = jnp.float32):
        self.num_heads = num_heads
        self.config = config

    def __call__(self) -> PositionBias:
        """The bias as a function of positions, float32."""
        slopes = jnp.asarray(alibi_slopes(self.num_heads), jnp.float32)[None, None]
        return PositionBias(sharding.shard(slopes, None, None, "act_heads"), alibi_values,
                            self.config, False)


# --- rotations ------------------------------------------------------------------------------------

def frequencies(dim: int, config: PositionConfig) -> tuple[np.ndarray, float]:
    """(radians a position of each of the dim / 2 pairs, factor on the rotated features).

    f_i = base**(-2i/dim) (Su et al. 2021), and with scaling by a factor s:
        linear: f_i / s (Chen et al. 2023, position interpolation).
        ntk: base becomes base * s**(dim/(dim-2)), which divides the slowest f by s and leaves
            the fastest alone (bloc97 2023).
        llama3: f_i / s where a pair turns fewer than low_frequency times over the original
            length, f_i where more than high_frequency times, and between them a mixture that
            is linear in the number of turns (LLaMA 3.1).
        yarn: the same idea with beta_slow and beta_fast, linear in i; the features grow by
            0.1 ln(s) + 1, so that the softmax stays sharp (Peng et al. 2023).
    """
    scaling, base = config.rotary_scaling, config.rotary_base
    if scaling.kind == "ntk":
        base *= scaling.factor ** (dim / (dim - 2))
    plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if scaling.kind in ("none", "ntk"):
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2.0 * np.pi)
        kept = np.clip((turns - scaling.low_frequency)
                       / (scaling.high_frequency - scaling.low_frequency), 0.0, 1.0)
        return plain * kept + plain / scaling.factor * (1.0 - kept), 1.0

    def pair_with(turns):
        return dim * math.log(scaling.original_length / (turns * 2.0 * math.pi)) / (
            2.0 * math.log(base))
    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    kept = 1.0 - np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return (plain * kept + plain / scaling.factor * (1.0 - kept),
            scaling.feature_factor or 0.1 * math.log(scaling.factor) + 1.0)


def rotate(x: jax.Array, positions: jax.Array, config: PositionConfig) -> jax.Array:
    """RoPE (Su et al. 2021): pairs of features of x_BNLH turn by position * frequency.

    Args:
        positions: int32 [B, L].
    """
    head_dim = x.shape[-1]
    dim = int(head_dim * config.rotary_fraction) // 2 * 2
    frequency, factor = frequencies(dim, config)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency.astype(np.float32)
    sin, cos = factor * jnp.sin(angle), factor * jnp.cos(angle)
    turned, kept = x[..., :dim].astype(jnp.float32), x[..., dim:]
    if config.rotary_interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
        turned = pairs.reshape(*pairs.shape[:-2], dim)
    else:
        a, b = turned[..., :dim // 2], turned[..., dim // 2:]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), kept], axis=-1) if dim < head_dim \
        else turned.astype(x.dtype)


# --- vectors --------------------------------------------------------------------------------------

def sinusoids(positions: jax.Array, features: int) -> jax.Array:
    """Vaswani et al. 2017, section 3.5: int [...] -> float32 [..., D], sines, then cosines."""
    frequency = 10000.0 ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class LearnedPositions(nnx.Module):
    """A learned vector a position, added to the embeddings (GPT-2, BERT)."""

    def __init__(self, key: jax.Array, features: int, config: PositionConfig, init: InitConfig):
        self.embedding = param(key, (config.max_length + config.offset, features),
                               ("position", "embed"), std=init.position_std)
        self.config = config

    def __call__(self, positions: jax.Array) -> jax.Array:
        """int32 [B, L] -> float32 [B, L, D]. Raises UserError for L beyond max_length."""
        if positions.shape[1] > self.config.max_length:
            raise UserError(f"position.max_length={self.config.max_length} learned positions are "
                            f"fewer than the sequence length {positions.shape[1]}; shorten the "
                            f"data (data.inputs_length, data.targets_length) or raise it.")
        rows = "act_batch" if positions.shape[0] > 1 else None
        return sharding.lookup(self.embedding[...], positions + self.config.offset,
                               (rows, "act_length", "act_embed"))


class SinusoidalPositions(nnx.Module):
    """Fixed sinusoids, added to the embeddings (Vaswani et al. 2017)."""

    def __init__(self, key: jax.Array, features: int, config: PositionConfig, init: InitConfig):
        self.features = features
        self.config = config

    def __call__(self, positions: jax.Array) -> jax.Array:
        """int32 [B, L] -> float32 [B, L, D]."""
        return sinusoids(positions + self.config.offset, self.features)


# --- Transformer-XL -------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Relative:
    """Transformer-XL's position logits (Dai et al. 2019, section 3.3): query . key of a distance."""

    query: jax.Array   # [B, N, L, H], scaled, with the position bias v added
    keys: jax.Array    # [N, R = 2 S, H] for the distances S - 1, S - 2, …, -S

    def __call__(self, masking: Masking) -> jax.Array:
        """query_BNLH . key of the distance to each key: float32 [B, N, L, S]."""
        length, keys = self.query.shape[2], masking.k_positions.shape[1]
        highest = self.keys.shape[1] // 2 - 1      # the distance of the first of the R keys
        axes = ("act_batch", "act_heads", None, None)
        query = sharding.shard(self.query, *axes)
        q, k = masking.q_positions, masking.k_positions
        if q.shape[0] == 1:
            # The L + S distances from (last query - first key) on, then one reshape. Padded chunks
            # reach beyond the distances that exist.
            r = jnp.pad(self.keys, ((0, 0), (length, keys), (0, 0)))
            first = length + highest - (q[0, -1] - k[0, 0])
            r = jax.lax.dynamic_slice_in_dim(r, first, length + keys, axis=1)
            x = sharding.einsum("BNLH,NRH->BNLR", query, r, out=axes,
                                preferred_element_type=jnp.float32)
            x = skew(x, keys)
        else:
            x = sharding.einsum("BNLH,NRH->BNLR", query, self.keys, out=axes,
                                preferred_element_type=jnp.float32)
            index = highest - (q[:, None, :, None] - k[:, None, None, :])
            index = jnp.broadcast_to(index, (x.shape[0], x.shape[1], length, keys))
            x = jnp.take_along_axis(x, sharding.shard(index, *axes), axis=3)
        return sharding.shard(x, "act_batch", "act_heads", "act_length", None)


jax.tree_util.register_dataclass(Relative, data_fields=["query", "keys"], meta_fields=[])


def transformer_xl_parameters(keys: jax.Array, embed_dim: int, config: AttentionConfig,
                              std: float, dtype: jnp.dtype) -> dict[str, Any]:
    """{name: module or parameter} of an attention layer: W_k,R, u and v of the paper's
    equation for A^rel."""
    heads = config.num_heads
    features = heads * config.head_dim
    projection = Dense(keys[0], embed_dim, features, ("embed", "heads"), std=std, dtype=dtype,
                       units=(embed_dim, heads))
    biases = {name: param(keys[1], (features,), ("heads",), units=(heads,))
              for name in ("content_bias", "position_bias")}
    return {"relative_key": projection, **biases}


def transformer_xl_queries(layer: Any, query: jax.Array, num_keys: int, embed_dim: int
                           ) -> tuple[jax.Array, Relative]:
    """Queries_BNLH for the keys' contents, and the logits' term of positions.

    Args:
        layer: the Attention that has `transformer_xl_parameters`.
        query: its projection, [B, L, N * H], without scale.
        num_keys: S.
    """
    heads, head_dim = layer.config.num_heads, layer.config.head_dim
    content, position = (
        layer.split_heads(query + bias[...].astype(layer.dtype), heads, "act_heads") * layer.scale
        for bias in (layer.content_bias, layer.position_bias))
    distances = jnp.arange(num_keys - 1, -num_keys - 1, -1)
    table = sinusoids(distances, embed_dim).astype(layer.dtype)
    keys = layer.relative_key(table, (None, "act_heads"))
    keys = sharding.reshape(keys, (2 * num_keys, heads, head_dim), None, "act_heads", None)
    return tag(content, "query"), Relative(tag(position, "query"), keys.transpose(1, 0, 2))


# --- the kinds ------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class PositionKind:
    """What a kind of positions does, and to what; a part that is None it leaves alone."""

    # Fields of PositionConfig that the computed function depends on, besides the kind.
    settings: tuple[str, ...] = ()
    # To the embeddings: (key, features, config, init) -> module, whose positions int32 [1|B, L]
    # -> float32 [1|B, L, D] are added.
    vectors: Callable | None = None
    # To self-attention's logits: (key, num_heads, config, bidirectional, dtype) -> module, whose
    # () -> PositionBias is shared by the layers of a stack, or with per_layer is each layer's own.
    bias: Callable | None = None
    # To self-attention's queries and keys: (x_BNLH, positions int32 [1|B, L], config) -> x_BNLH.
    turn: Callable | None = None
    # To self-attention's queries, with parameters of each layer's own; see
    # transformer_xl_parameters and transformer_xl_queries for both functions' arguments.
    parameters: Callable | None = None
    queries: Callable | None = None


POSITIONS = {
    "none": PositionKind(),
    "t5_bias": PositionKind(("num_buckets", "max_distance", "per_layer"), bias=RelativeBias),
    "alibi": PositionKind(bias=AlibiBias),
    "rotary": PositionKind(("rotary_base", "rotary_fraction", "rotary_interleaved",
                            "rotary_scaling"), turn=rotate),
    "learned": PositionKind(("max_length", "offset"), vectors=LearnedPositions),
    "sinusoidal": PositionKind(("offset",), vectors=SinusoidalPositions),
    "transformer_xl": PositionKind(parameters=transformer_xl_parameters,
                                   queries=transformer_xl_queries),
}


def validate(config: PositionConfig, where: str) -> None:
    """Raises UserError for what cannot be, naming the field."""
    scaling = config.rotary_scaling
    one_of(f"{where}.kind", config.kind, POSITIONS)
    one_of(f"{where}.rotary_scaling.kind", scaling.kind, ROTARY_SCALINGS)
    between(f"{where}.rotary_fraction", config.rotary_fraction, 0.0, 1.0, open_below=True)
    at_least(f"{where}.rotary_scaling.feature_factor", scaling.feature_factor, 0)
    if scaling.kind != "none":
        at_least(f"{where}.rotary_scaling.factor", scaling.factor, 1.0,
                 "It is the new length over the original one.")


def validate_own(config: PositionConfig, of_stack: PositionConfig, where: str) -> None:
    """Raises UserError for positions that a layer cannot have in place of its stack's: those of
    either may only turn queries and keys."""
    fit = [name for name, kind in POSITIONS.items()
           if not (kind.vectors or kind.bias or kind.parameters)]
    for name, kind in ((f"{where}.kind", config.kind), ("the stack's position.kind", of_stack.kind)):
        if kind not in fit:
            raise UserError(f"{name}={kind!r}: a layer with positions of its own, and its stack, "
                            f"may have {' or '.join(fit)}.")


def make_bias(key: jax.Array, num_heads: int, config: PositionConfig, bidirectional: bool,
              dtype: jnp.dtype) -> nnx.Module | None:
    """The bias module of a stack or layer, None where positions enter elsewhere."""
    make = POSITIONS[config.kind].bias
    return None if make is None else make(key, num_heads, config, bidirectional, dtype)
