"""The cache of a decoder: what it keeps of a row's tokens while it writes the next ones.

    position    int32 [B], the tokens that each row has so far
    segments    int32 [B, S], of the encoder's tokens, where there is an encoder
    prefix      bool [B, L], the decoder's tokens that all others see, for a prefix LM
    layers/…    what each layer's mixer keeps (blocks.MIXERS): of attention keys and values as a rule,
                [layers, B, heads, length, features], of recurrences a state [layers, B, …] whose size
                no length changes; and cross-attention's keys and values
"""

import jax

from t5x_lite import tree
from t5x_lite.parallel import sharding


def slots(cache: dict) -> int:
    """Tokens for which its layers of attention have room; 0 where no layer attends."""
    found = {leaf.shape[3] for path, leaf in tree.flatten(cache["layers"]).items()
             if "/self_attention/" in path}
    assert len(found) <= 1, found
    return found.pop() if found else 0


def take_rows(cache: dict, rows: jax.Array) -> dict:
    """The cache with its batch rows reordered or repeated: int32 [B'] indices into B.

    Rows never move between inputs (see decoding/decode.py), so where the batch is sharded every
    copy is local; a global gather would collect the whole cache on each device. And what an
    input's rows share, which is all that comes of the encoder, stays once each row has it.
    """
    def take(path, leaf):
        axis = 1 if path.startswith("layers/") else 0
        shared = "/cross_attention/" in path or path in ("segments", "prefix")
        if shared and rows.shape[0] == leaf.shape[axis]:
            return leaf
        lead = (slice(None),) * axis
        spec = jax.typeof(leaf).sharding.spec
        names = spec[axis] if len(spec) > axis else None
        if not names:
            return leaf.at[(*lead, rows)].get(
                out_sharding=spec if sharding.mesh_sizes() else None)

        def local(x, r):
            return x[(*lead, r - jax.lax.axis_index(names) * x.shape[axis])]
        by_row = jax.sharding.PartitionSpec(names)
        return jax.shard_map(local, in_specs=(spec, by_row), out_specs=spec, check_vma=False)(
            leaf, jax.sharding.reshard(rows, by_row))
    return tree.map_with_path(take, cache)
