"""What stands further along a row: the tokens that further-token modules read and predict.

Shape letters: B batch, L length.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5x_lite.parallel import sharding


def ahead(x: jax.Array, steps: int) -> jax.Array:
    """x_BL moved to the left by so many places, zeros behind."""
    x = sharding.shard(x, "act_batch", None)
    moved = jnp.concatenate([x[:, steps:], jnp.zeros_like(x[:, :steps])], axis=1)
    return sharding.shard(moved, "act_batch", "act_length")


def targets(batch: Mapping[str, jax.Array], steps: int) -> tuple[jax.Array, jax.Array]:
    """(tokens, loss weights)_BL so many places further along the same example."""
    weights = ahead(batch["decoder_loss_weights"], steps)
    segments = batch.get("decoder_segment_ids")
    if segments is not None:
        weights = weights * (ahead(segments, steps) == segments)
    return ahead(batch["decoder_target_tokens"], steps), weights
