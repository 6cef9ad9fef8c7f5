"""What makes attention logits beside queries and keys: who may attend to whom, and further terms.

Masks are small pure functions of positions and segment ids.

Shape letters: B batch (or 1 where all rows agree), L query length, S key length.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.parallel import sharding

# Large enough to vanish in the softmax, small enough to stay finite in bfloat16.
MASKED = -1e10


@dataclasses.dataclass(frozen=True)
class Masking:
    """What decides which keys a query sees.

    Positions are indices into the row (not restarted by packing), so that causality and
    relative distance follow from them alone; segments keep packed examples and padding
    apart. Padding is segment 0: a padded query sees only padding, which changes nothing that
    is read and keeps its softmax finite.
    """

    q_positions: jax.Array                 # int32 [B, L]
    k_positions: jax.Array                 # int32 [B, S]
    q_segments: jax.Array | None = None    # int32 [B, L]; None: one segment
    k_segments: jax.Array | None = None    # int32 [B, S]
    k_prefix: jax.Array | None = None      # bool [B, S]: keys seen by every query (prefix LM)
    causal: bool = False
    window: int = 0                        # keys at distance >= window are hidden; 0: none are
    # bool [B, L], while decoding: tokens that the state of a recurrent mixer takes up; None: all.
    kept: jax.Array | None = None

    def with_window(self, window: int) -> "Masking":
        """This masking with another attention window."""
        return dataclasses.replace(self, window=window)


jax.tree_util.register_dataclass(
    Masking, data_fields=["q_positions", "k_positions", "q_segments", "k_segments", "k_prefix", "kept"],
    meta_fields=["causal", "window"])


@dataclasses.dataclass(frozen=True)
class Terms:
    """What attention logits consist of beside q . k, see position.py.

    bias: float [1|B, N, L, S], or a function (q_positions, k_positions) -> that, which is never
        made whole where attention goes by chunks.
    relative: a dataclass whose field `query` [B, N, L, H] goes where the queries go, and which
        gives logits [B, N, L, S] when called with a Masking.
    """

    bias: jax.Array | Callable | None = None
    relative: Any = None
    softcap: float = 0.0      # c * tanh(q . k / c); 0: none


jax.tree_util.register_dataclass(Terms, data_fields=["bias", "relative"], meta_fields=["softcap"])


def allowed(masking: Masking) -> jax.Array | None:
    """bool [B, 1, L, S], True where query may see key; None where every query sees every key."""
    # A split length is gathered on the keys' side: queries stay where they are.
    def keys(x):
        return sharding.shard(x, "act_batch" if x.shape[0] > 1 else None, "act_keys")[:, None]

    q, k = masking.q_positions[:, :, None], keys(masking.k_positions)
    mask = None
    if masking.causal:
        mask = q >= k
        if masking.k_prefix is not None:
            mask = mask | keys(masking.k_prefix)
    if masking.window:
        near = (q - k < masking.window) if masking.causal else (jnp.abs(q - k) < masking.window)
        mask = near if mask is None else mask & near
    if masking.q_segments is not None:
        same = masking.q_segments[:, :, None] == keys(masking.k_segments)
        mask = same if mask is None else mask & same
    return None if mask is None else mask[:, None]


def read_segments(batch: Mapping[str, jax.Array], side: str) -> jax.Array:
    """int32 [B, L] of a side that is read as it stands: the packed example of each token, or 1, and 0
    on padding. Batches from elsewhere may come without: their id 0 is padding."""
    for name in (f"{side}_segment_ids", f"{side}_mask"):
        if name in batch:
            return batch[name]
    return (batch[f"{side}_input_tokens"] != 0).astype(jnp.int32)


def up_to_the_last(weights_BL: jax.Array) -> jax.Array:
    """bool [B, L]: the targets up to the last that is asked for, behind which padding begins."""
    asked_BL = as_keys(weights_BL > 0)   # whole rows, also where the length is split over devices
    return jnp.cumsum(asked_BL[:, ::-1], axis=1)[:, ::-1] > 0


def as_keys(x: jax.Array | None) -> jax.Array | None:
    """[B, S] as attention reads it: keys are whole even where queries' length is sharded."""
    return None if x is None else sharding.shard(x, "act_batch", "act_keys")


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
