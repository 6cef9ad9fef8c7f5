"""Attention over a window, global tokens and random blocks, in time and memory linear in the length.

Longformer (Beltagy et al. 2020, arXiv:2004.05150) lets a token see those nearer than `window` and the
row's first tokens, which are global: they see all and all see them. BigBird (Zaheer et al. 2020,
arXiv:2007.14062) works on blocks of tokens: a block sees itself, its two neighbours, some random blocks
that stay the same for all rows and heads, and the global tokens. Both for encoders.

Shape letters: B batch, L length, N heads, H head dim, M blocks, b tokens of a block, J key blocks that
a block sees, G global tokens, S keys of a block of queries: G + J b.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.errors import UserError, at_least
from t5x_lite.layers.config import AttentionConfig
from t5x_lite.layers.masks import MASKED

_NONE = -1   # no block, in a table of blocks


def validate_longformer(config: AttentionConfig, where: str) -> None:
    """Raises UserError for what cannot be, naming the field."""
    at_least(f"{where}.window", config.window, 1, "A token sees those nearer than that.")
    _validate(config, where)
    if config.sparse.random_blocks:
        raise UserError(f"{where}.sparse.random_blocks={config.sparse.random_blocks}: longformer has none. "
                        "Use 0, or kind=bigbird.")


def validate_bigbird(config: AttentionConfig, where: str) -> None:
    """Raises UserError for what cannot be, naming the field."""
    _validate(config, where)
    if config.window:
        raise UserError(f"{where}.window={config.window}: of bigbird the window is three blocks of "
                        f"sparse.block={config.sparse.block} tokens. Use 0.")


def _validate(config: AttentionConfig, where: str) -> None:
    at_least(f"{where}.sparse.global_tokens", config.sparse.global_tokens, 0)
    at_least(f"{where}.sparse.random_blocks", config.sparse.random_blocks, 0)
    if config.implementation != "auto":
        raise UserError(f"{where}.implementation={config.implementation!r}: kind={config.kind!r} goes by "
                        "blocks of its own. Use 'auto'.")
    if config.logit_softcap:
        raise UserError(f"{where}.logit_softcap={config.logit_softcap:g}: kind={config.kind!r} has none. "
                        "Use 0.")


def block_of(config: AttentionConfig) -> int:
    """b: a window reaches no farther than into the neighbouring blocks."""
    return config.window or config.sparse.block


@functools.cache
def block_table(blocks: int, random_blocks: int, seed: int) -> np.ndarray:
    """int [M, J]: the key blocks of each block of queries, its neighbours and itself first; -1: none."""
    index = np.arange(blocks)[:, None] + np.arange(-1, 2)
    near = np.where((index >= 0) & (index < blocks), index, _NONE)
    table = np.full((blocks, random_blocks), _NONE)
    rng = np.random.default_rng(seed)
    for block in range(blocks):
        others = np.setdiff1d(np.arange(blocks), near[block])
        drawn = rng.permutation(others)[:random_blocks]
        table[block, :drawn.size] = drawn
    return np.concatenate([near, table], axis=1)


def visible(config: AttentionConfig, length: int) -> float:
    """Keys that a query sees, on average over a row without padding; a global token sees all."""
    sparse, block = config.sparse, block_of(config)
    near = 2 * config.window - 1 if config.window else (3 + sparse.random_blocks) * block
    return min(length, near + 2 * sparse.global_tokens)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, config: AttentionConfig
           ) -> jax.Array:
    """Scaled q_BNLH, k_BNLH, v_BNLH -> float32 [B, N, L, H].

    segments: int32 [B, L], tokens that may see one another; None: all may.
    """
    (batch, _, length, _), block = q.shape, block_of(config)
    count = min(config.sparse.global_tokens, length)
    if segments is None:
        segments = jnp.zeros((batch, length), jnp.int32)
    pad = -length % block
    blocks = (length + pad) // block
    table = block_table(blocks, config.sparse.random_blocks, config.sparse.seed)
    split = functools.partial(_split, pad=pad, block=block)
    q_blocks, k_blocks, v_blocks = split(q), split(k), split(v)      # [B, N, M, b, H]
    ids = jnp.pad(segments, ((0, 0), (0, pad)), constant_values=-1).reshape(batch, blocks, block)

    def gathered(x, x_blocks, axis):   # keys of each block of queries: global ones, then its blocks'
        first = jax.lax.slice_in_dim(x, 0, count, axis=axis)
        first = jnp.broadcast_to(jnp.expand_dims(first, axis), (*x.shape[:axis], blocks, *first.shape[axis:]))
        near = jnp.take(x_blocks, np.maximum(table, 0), axis=axis)
        near = near.reshape(*near.shape[:axis + 1], -1, *near.shape[axis + 3:])
        return jnp.concatenate([first, near], axis=axis + 1)

    keys, values = gathered(k, k_blocks, 2), gathered(v, v_blocks, 2)   # [B, N, M, S, H]
    same = ids[:, :, :, None] == gathered(segments, ids, 1)[:, :, None, :]
    mask = same & _pairs(table, count, block, config.window)
    logits = jnp.einsum("BNMbH,BNMSH->BNMbS", q_blocks, keys, preferred_element_type=jnp.float32)
    probs = jax.nn.softmax(jnp.where(mask[:, None], logits, MASKED), axis=-1).astype(v.dtype)
    y = jnp.einsum("BNMbS,BNMSH->BNMbH", probs, values)
    y = y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]
    if not count:
        return y.astype(jnp.float32)
    logits = jnp.einsum("BNGH,BNLH->BNGL", q[:, :, :count], k, preferred_element_type=jnp.float32)
    same = segments[:, :count, None] == segments[:, None, :]
    probs = jax.nn.softmax(jnp.where(same[:, None], logits, MASKED), axis=-1).astype(v.dtype)
    whole = jnp.einsum("BNGL,BNLH->BNGH", probs, v)
    return jnp.concatenate([whole, y[:, :, count:]], axis=2).astype(jnp.float32)


def _split(x: jax.Array, *, pad: int, block: int) -> jax.Array:
    """x_BNLH -> [B, N, M, b, H]."""
    x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))
    return x.reshape(*x.shape[:2], -1, block, x.shape[-1])


def _pairs(table: np.ndarray, count: int, block: int, window: int) -> np.ndarray:
    """bool [M, b, S]: which of the gathered keys a query sees, segments apart; each key once."""
    blocks = table.shape[0]
    inside = np.arange(block)
    queries = np.arange(blocks)[:, None] * block + inside
    keys = (table[:, :, None] * block + inside).reshape(blocks, -1)
    there = np.repeat(table != _NONE, block, axis=1) & (keys >= count)   # global keys stand in front
    seen = np.broadcast_to(there[:, None], (blocks, block, keys.shape[1]))
    if window:
        seen = seen & (np.abs(queries[:, :, None] - keys[:, None]) < window)
    return np.concatenate([np.ones((blocks, block, count), bool), seen], axis=2)
