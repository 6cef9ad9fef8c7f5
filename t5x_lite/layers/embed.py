"""Token embeddings and the projection to logits.

Shape letters: B batch, L length, D model, P prompt length, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from t5x_lite.layers.config import InitConfig, NormConfig
from t5x_lite.layers.linear import Dense, kernel_std, param
from t5x_lite.layers.mlp import ACTIVATIONS
from t5x_lite.layers.norm import Norm
from t5x_lite.parallel import sharding


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


class TokenTypes(nnx.Module):
    """A learned vector a token type, added to the embeddings (BERT's segment A or B)."""

    def __init__(self, key: jax.Array, num_types: int, features: int, std: float,
                 dtype: jnp.dtype = jnp.float32):
        self.embedding = param(key, (num_types, features), ("position", "embed"), std=std)
        self.dtype = dtype

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 [B, L] -> x_BLD in the compute dtype."""
        return sharding.lookup(self.embedding[...].astype(self.dtype), ids,
                               ("act_batch", "act_length", "act_embed"))


class Prompt(nnx.Module):
    """Learned vectors_PD that stand before every row (prompt tuning, arXiv:2104.08691)."""

    def __init__(self, key: jax.Array, length: int, features: int, std: float,
                 dtype: jnp.dtype = jnp.float32):
        self.embedding = param(key, (length, features), ("position", "embed"), std=std)
        self.dtype = dtype

    def before(self, x: jax.Array) -> jax.Array:
        """x_BLD -> [B, P + L, D], in the compute dtype."""
        rows = sharding.weight(self.embedding[...], ("position", "embed"), self.dtype)
        rows = jax.lax.broadcast(rows, x.shape[:1],
                                 out_sharding=sharding.spec("act_batch", None, "act_embed"))
        x = sharding.shard(x, "act_batch", None, "act_embed")   # a split length cannot be joined
        return sharding.shard(jnp.concatenate([rows, x], axis=1),
                              "act_batch", "act_length", "act_embed")


class HeadTransform(nnx.Module):
    """norm(activation(x @ kernel + bias)): what BERT applies before the logits."""

    def __init__(self, key: jax.Array, features: int, activation: str, norm: NormConfig,
                 init: InitConfig, dtype: jnp.dtype = jnp.float32):
        self.dense = Dense(key, features, features, ("embed", None), use_bias=True, dtype=dtype,
                           std=kernel_std(init, features, features))
        self.norm = Norm(key, features, norm, dtype)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """x_BLD -> x_BLD."""
        x = self.dense(x, ("act_batch", "act_length", "act_embed"))
        return self.norm(ACTIVATIONS[self.activation](x))


class ScalarHead(nnx.Module):
    """A number a position, x_D . kernel_D: a reward model's score, or the value of a state.

    It starts at 0: a reward model then finds all answers equally good, and values are 0.
    """

    def __init__(self, key: jax.Array, features: int):
        self.kernel = param(key, (features, 1), ("embed", None), fan_in=features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x_BLD -> float32 [B, L]."""
        kernel = sharding.weight(self.kernel[...], ("embed", None), jnp.float32)
        return sharding.dense(x.astype(jnp.float32), kernel,
                              ("act_batch", "act_length", None))[..., 0]


class LogitsBias(nnx.Module):
    """A bias a vocabulary entry, where the kernel is the embedding table."""

    def __init__(self, key: jax.Array, vocab_size: int):
        self.bias = param(key, (vocab_size,), ("vocab",))
