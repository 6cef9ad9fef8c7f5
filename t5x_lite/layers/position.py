"""Positions: biases on the attention logits, rotations of queries and keys, and vectors added
to the embeddings.

Position indices are consecutive along a row; a leading dim of 1 says that all rows agree.

Shape letters: B batch (or 1), L query length, S key length, N heads, H head dim, D model.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from t5x_lite.errors import UserError, nearest
from t5x_lite.layers.linear import InitConfig, param
from t5x_lite.parallel import sharding

KINDS = ("none", "t5_bias", "alibi", "rotary", "learned", "sinusoidal", "transformer_xl")
ROTARY_SCALINGS = ("none", "linear", "ntk", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RotaryScalingConfig:
    """Rotary frequencies for sequences longer than those of pre-training, see `frequencies`."""

    kind: str = "none"            # one of ROTARY_SCALINGS
    factor: float = 1.0           # new length / original_length
    original_length: int = 8192   # llama3, yarn: length of pre-training
    low_frequency: float = 1.0    # llama3: fewer turns over original_length are slowed in full …
    high_frequency: float = 4.0   # … and more turns not at all
    beta_slow: float = 1.0        # yarn: the same two numbers
    beta_fast: float = 32.0


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """How a stack knows the order of its tokens."""

    kind: str = "t5_bias"         # one of KINDS
    num_buckets: int = 32         # t5_bias
    max_distance: int = 128       # t5_bias: farther tokens share the last bucket
    per_layer: bool = False       # t5_bias: one table a layer (UMT5) instead of one a stack
    max_length: int = 512         # learned: the longest sequence
    offset: int = 0               # learned, sinusoidal: the index of the first token (BART: 2)
    rotary_base: float = 10000.0  # rotary: wavelengths 2 pi base**(2i/dim)
    rotary_fraction: float = 1.0  # rotary: share of the head dim that is rotated
    rotary_interleaved: bool = False  # rotary: pairs (2i, 2i+1) as in RoFormer, not (i, i+dim/2)
    rotary_scaling: RotaryScalingConfig = RotaryScalingConfig()


def validate(config: PositionConfig, where: str) -> None:
    """Raises UserError for what cannot be, naming the field."""
    scaling = config.rotary_scaling
    for field, value, allowed in (("kind", config.kind, KINDS),
                                  ("rotary_scaling.kind", scaling.kind, ROTARY_SCALINGS)):
        if value not in allowed:
            raise UserError(f"{where}.{field}={value!r}: must be one of {', '.join(allowed)}."
                            f"{nearest(value, allowed)}")
    if not 0.0 < config.rotary_fraction <= 1.0:
        raise UserError(f"{where}.rotary_fraction={config.rotary_fraction}: must be above 0 and "
                        f"at most 1.")
    if scaling.kind != "none" and scaling.factor < 1.0:
        raise UserError(f"{where}.rotary_scaling.factor={scaling.factor}: must be at least 1, the "
                        f"new length over the original one.")


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

    table: jax.Array                # [1, buckets, N] of T5, [1, 1, N] slopes of ALiBi
    config: PositionConfig
    bidirectional: bool

    def __call__(self, q_positions: jax.Array, k_positions: jax.Array) -> jax.Array:
        """int32 [1|B, L], [1, S] -> bias_[1|B]NLS in the table's dtype."""
        if q_positions.shape[0] == 1:
            # One value an offset, spread over the diagonals.
            length, keys = q_positions.shape[1], k_positions.shape[1]
            values = self._values(-offsets(q_positions, k_positions)[None], (None, None))
            values = jnp.broadcast_to(values[:, :, None], (*values.shape[:2], length, length + keys))
            return sharding.shard(skew(values, keys), None, "act_heads", "act_length", None)
        distance = k_positions[:, None, :] - q_positions[:, :, None]
        return self._values(distance, ("act_batch", "act_length", None))

    def _values(self, distance: jax.Array, axes: sharding.Axes) -> jax.Array:
        """Distances [B, …] with these logical axes -> [B, N, …]."""
        table = self.table[0]
        out = (axes[0], "act_heads", *axes[1:])
        if self.config.kind == "alibi":
            slopes = table[0].reshape(-1, *(1,) * (distance.ndim - 1))
            return sharding.shard(-slopes * jnp.abs(distance)[:, None].astype(table.dtype), *out)
        buckets = relative_position_bucket(
            distance, bidirectional=self.bidirectional, num_buckets=self.config.num_buckets,
            max_distance=self.config.max_distance)
        # A product with one-hot rows: its transpose is a product too, where the gradient of a
        # gather would scatter rows one by one.
        one_hot = jax.nn.one_hot(buckets, self.config.num_buckets, dtype=table.dtype)
        letters = "LS"[:distance.ndim - 1]
        return sharding.einsum(f"B{letters}R,RN->BN{letters}", one_hot, table, out=out)


jax.tree_util.register_dataclass(PositionBias, data_fields=["table"],
                                 meta_fields=["config", "bidirectional"])


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
        return PositionBias(self.embedding[...].astype(self.dtype)[None], self.config,
                            self.bidirectional)


class AlibiBias(nnx.Module):
    """ALiBi: -slope_N * distance, no parameters."""

    def __init__(self, num_heads: int, config: PositionConfig):
        self.num_heads = num_heads
        self.config = config

    def __call__(self) -> PositionBias:
        """The bias as a function of positions, float32."""
        slopes = jnp.asarray(alibi_slopes(self.num_heads), jnp.float32)[None, None]
        return PositionBias(sharding.shard(slopes, None, None, "act_heads"), self.config, False)


def make_bias(key: jax.Array, num_heads: int, config: PositionConfig, bidirectional: bool,
              dtype: jnp.dtype) -> RelativeBias | AlibiBias | None:
    """The bias module of a stack or layer, None where positions enter elsewhere."""
    if config.kind == "t5_bias":
        return RelativeBias(key, num_heads, config, bidirectional, dtype)
    if config.kind == "alibi":
        return AlibiBias(num_heads, config)
    return None


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
            0.1 * math.log(scaling.factor) + 1.0)


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
