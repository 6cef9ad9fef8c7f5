"""Token embeddings and the projection to logits.

Shape letters: B batch, L length, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite import sharding
from t5x_lite.layers.linear import param


class TokenEmbedding(nnx.Module):
    """A table_VD of token vectors."""

    def __init__(self, key: jax.Array, vocab_size: int, features: int, std: float,
                 dtype: jnp.dtype = jnp.float32):
        self.embedding = param(key, (vocab_size, features), ("vocab", "embed"), std=std)
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 [B, L] -> x_BLD in the compute dtype."""
        table = self.embedding[...].astype(self.dtype)
        return sharding.lookup(table, ids, ("act_batch", "act_length", "act_embed"))

    def as_kernel(self) -> jax.Array:
        """The table as a logits kernel_DV (tied embeddings), ready for use."""
        return sharding.weight(self.embedding[...], ("vocab", "embed"), self.dtype).T
