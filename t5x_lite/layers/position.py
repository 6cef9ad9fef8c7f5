"""Positions: relative biases on the attention logits, rotations of queries and keys, and
vectors added to the embeddings.

Shape letters: B batch (or 1), L query length, S key length, N heads, H head dim, D model.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import sharding
from t5x_lite.layers.linear import InitConfig, param


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How a stack knows the order of its tokens."""

    kind: str = "t5_bias"         # none | t5_bias | alibi | rotary | learned | sinusoidal
    num_buckets: int = 32         # t5_bias
    max_distance: int = 128       # t5_bias: farther tokens share the last bucket
    per_layer: bool = False       # t5_bias: one table a layer (UMT5) instead of one a stack
    max_length: int = 512         # learned: rows of the table
    rotary_base: float = 10000.0  # rotary: wavelengths 2 pi base**(2i/dim)
    rotary_fraction: float = 1.0  # rotary: share of the head dim that is rotated
    rotary_interleaved: bool = False  # rotary: pairs (2i, 2i+1) as in RoFormer, not (i, i+dim/2)


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

    def __call__(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """int32 [B, L], [B, S] -> bias_BNLS in the compute dtype."""
        buckets = relative_position_bucket(
            k_positions[:, None, :] - q_positions[:, :, None], bidirectional=self.bidirectional,
            num_buckets=self.config.num_buckets, max_distance=self.config.max_distance)
        table = self.embedding[...].astype(self.dtype)
        # A product with one-hot rows: 32 columns are nothing, and its transpose is a product
        # too, where the gradient of a gather would scatter L*S rows one by one.
        one_hot = jax.nn.one_hot(buckets, self.config.num_buckets, dtype=self.dtype)
        rows = "act_batch" if buckets.shape[0] > 1 else None
        return sharding.einsum("BLSR,RN->BNLS", one_hot, table,
                               out=(rows, "act_heads", "act_length", None))


def alibi_slopes(num_heads: int) -> list[float]:
    """Press et al. 2022: the geometric sequence 2**(-8 i / n); other n interleave the next power."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    extra = [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return slopes + extra


class AlibiBias(nnx.Module):
    """ALiBi: -slope_N * distance, no parameters."""

    def __init__(self, num_heads: int):
        self.num_heads = num_heads

    def __call__(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """int32 [B, L], [B, S] -> bias_BNLS float32."""
        distance = jnp.abs(k_positions[:, None, :] - q_positions[:, :, None]).astype(jnp.float32)
        slopes = sharding.shard(jnp.asarray(alibi_slopes(self.num_heads), jnp.float32), "act_heads")
        return -slopes[None, :, None, None] * distance[:, None]


def rotate(x: jax.Array, positions: jax.Array, config: PositionConfig) -> jax.Array:
    """RoPE (Su et al. 2021): pairs of features of x_BNLH turn by position * base**(-2i/dim).

    Args:
        positions: int32 [B, L].
    """
    head_dim = x.shape[-1]
    dim = int(head_dim * config.rotary_fraction) // 2 * 2
    frequency = config.rotary_base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
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


def sinusoids(positions: jax.Array, features: int) -> jax.Array:
    """Vaswani et al. 2017, section 3.5: int32 [B, L] -> float32 [B, L, D], sines then cosines."""
    frequency = 10000.0 ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class LearnedPositions(nnx.Module):
    """A learned vector a position, added to the embeddings (GPT-2, BERT)."""

    def __init__(self, key: jax.Array, features: int, config: PositionConfig, init: InitConfig):
        self.embedding = param(key, (config.max_length, features), ("position", "embed"),
                               std=init.position_std)

    def __call__(self, positions: jax.Array) -> jax.Array:
        """int32 [B, L] -> float32 [B, L, D]."""
        rows = "act_batch" if positions.shape[0] > 1 else None
        return sharding.lookup(self.embedding[...], positions, (rows, "act_length", "act_embed"))


def make_bias(key: jax.Array, num_heads: int, config: PositionConfig, bidirectional: bool,
              dtype: jnp.dtype) -> RelativeBias | AlibiBias | None:
    """The bias module of a stack or layer, None where positions enter elsewhere."""
    if config.kind == "t5_bias":
        return RelativeBias(key, num_heads, config, bidirectional, dtype)
    if config.kind == "alibi":
        return AlibiBias(num_heads)
    return None
