"""What recurrent token mixers are made of: borders of a row, convolutions, scans and decayed sums.

All go along a row of tokens and start anew at each packed example. The functions that take arrays alone
are local code: `per_device` runs them on each device's own rows and heads.

Shape letters: B batch, L length, W inner features, T taps, N heads, K features of a key, V of a value,
C chunks, c tokens of a chunk.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.errors import UserError
from t5x_lite.parallel import sharding

FLAT = ("act_batch", "act_length", "act_heads")
HEADS = ("act_batch", "act_heads", None, None)


@dataclasses.dataclass(frozen=True)
class Row:
    """Where recurrences along a row begin, and what they take up."""

    starts: jax.Array          # bool [B, L], True at the first token of each example
    kept: jax.Array | None     # bool [B, L], tokens that a state takes up; None: all


def row_of(masking, batch: int) -> Row:
    """The Row of the masks.Masking that self-attention has.

    Raises:
        UserError: a split length, or a prefix that reads both ways.
    """
    if sharding.mesh_sizes().get("sequence", 1) > 1:
        raise UserError("mesh.sequence splits rows, and a recurrent or spatial mixer needs them whole: "
                        "set mesh.sequence=1.")
    if masking.k_prefix is not None:
        raise UserError("a prefix whose tokens see one another needs attention in every layer; use "
                        "objective.name=lm, or mixer.kind=attention.")
    starts = masking.q_positions == 0
    if masking.q_segments is not None:
        segments = sharding.shard(masking.q_segments, "act_batch", None)
        before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        starts = starts | (segments != before)
    starts = jnp.broadcast_to(starts, (batch, starts.shape[1]))
    return Row(sharding.shard(starts, "act_batch", None), masking.kept)


def per_device(fn: Callable, arrays: Mapping[str, jax.Array | None], axes: Mapping[str, sharding.Axes],
               out: Any) -> Any:
    """fn(**arrays) on each device's own part of the arrays, which no device needs of another's.

    Args:
        arrays: those that are None are left to fn's defaults.
        axes: logical axes of each array.
        out: logical axes of what fn returns: a tuple of names, or a list of such.
    """
    given = {name: x for name, x in arrays.items() if x is not None}
    if not sharding.mesh_sizes():
        return fn(**given)
    specs = {name: sharding.spec(*axes[name]) for name in given}
    given = {name: jax.sharding.reshard(x, specs[name]) for name, x in given.items()}
    results = [sharding.spec(*names) for names in out] if isinstance(out, list) else sharding.spec(*out)
    return sharding.manual(lambda given: fn(**given), (specs,), results, check_vma=False)(given)


def examples(starts: jax.Array) -> jax.Array:
    """int32 [B, L]: the number of each token's example in the row, from 1; 0 continues a state."""
    return jnp.cumsum(starts, axis=1, dtype=jnp.int32)


def convolve(x: jax.Array, kernel: jax.Array, starts: jax.Array, behind: jax.Array | None = None,
             ahead: int = 0) -> jax.Array:
    """y_t = sum over taps i of kernel_i x_(t + ahead - T + 1 + i), within an example, each feature alone.

    Args:
        x: [B, L, W]. kernel: [T, W]. starts: [B, L].
        behind: [B, T - 1, W], the inputs before x, None: zeros.
        ahead: taps that read later tokens; 0: causal.
    """
    taps, length = kernel.shape[0], x.shape[1]
    back = taps - 1 - ahead
    ids = examples(starts)
    wide_ids = jnp.pad(jnp.pad(ids, ((0, 0), (back, 0))), ((0, 0), (0, ahead)), constant_values=-1)
    if behind is None:
        behind = jnp.zeros((x.shape[0], back, x.shape[2]), x.dtype)
    wide = jnp.concatenate([behind.astype(x.dtype), x, jnp.zeros_like(x[:, :ahead])], axis=1)
    y = jnp.zeros_like(x)
    for i in range(taps):
        same = wide_ids[:, i:i + length] == ids
        y = y + kernel[i] * jnp.where(same[..., None], wide[:, i:i + length], 0)
    return y


def last_inputs(x: jax.Array, behind: jax.Array, kept: jax.Array | None) -> jax.Array:
    """The T - 1 inputs behind what comes next: [B, T - 1, W] of x_BLW and those before it.

    kept: the tokens of x that count, at its beginning; None: all.
    """
    wide = jnp.concatenate([behind, x.astype(behind.dtype)], axis=1)
    size = behind.shape[1]
    if kept is None:
        return wide[:, wide.shape[1] - size:]
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(
        wide, jnp.sum(kept, axis=1))


def diagonal_scan(decay: jax.Array, x: jax.Array, state: jax.Array | None = None) -> jax.Array:
    """h_t = decay_t h_(t-1) + x_t, all steps at once by an associative scan (Blelloch 1990).

    Args:
        decay, x: float32 [B, L, W]; a decay of 0 starts anew.
        state: h before the first step [B, W], None: zeros.
    Returns:
        h_BLW.
    """
    if state is not None:
        x = x.at[:, 0].add(decay[:, 0] * state)

    def after(one, other):
        return one[0] * other[0], other[0] * one[1] + other[1]
    return jax.lax.associative_scan(after, (decay, x), axis=1)[1]


def decayed_sums(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, starts: jax.Array,
                 state: jax.Array | None = None, *, chunk: int) -> tuple[jax.Array, jax.Array]:
    """y_t = q_t S_t with S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T: linear attention with a decay.

    Within a chunk all pairs are made, between chunks the state S is handed on: time and memory are
    linear in the length (Sun et al. 2023, arXiv:2307.08621, equation 7; Dao & Gu 2024,
    arXiv:2405.21060, section 6). At an example's first token S begins from zero.

    Args:
        q, k: [B, N, L, K]. v: [B, N, L, V]. log_decay: [B, N, L], at most 0. starts: [B, L].
        state: S before the first token [B, N, K, V], None: zeros.
        chunk: tokens at a time; it changes no result.
    Returns:
        (y_BNLV, the last S), float32.
    """
    (batch, heads, length, _), chunk = q.shape, min(chunk, q.shape[2])
    if state is None:
        state = jnp.zeros((batch, heads, k.shape[3], v.shape[3]), jnp.float32)

    def cut(x, axis):   # -> chunks first; padding adds nothing to the state
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, -length % chunk)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1:])
        return jnp.moveaxis(x, axis, 0)

    causal = jnp.arange(chunk)[:, None] >= jnp.arange(chunk)

    def one_chunk(state, cut):
        q, k, v, log_decay, starts = cut
        total, ids = jnp.cumsum(log_decay, axis=2), examples(starts)
        last = ids[:, -1:]
        pairs = (causal & (ids[:, :, None] == ids[:, None, :]))[:, None]
        between = jnp.exp(jnp.where(pairs, total[..., :, None] - total[..., None, :], -jnp.inf))
        to_end = jnp.exp(total[..., -1:] - total) * (ids == last)[:, None]
        y = jnp.einsum("BNtK,BNsK->BNts", q, k) * between @ v
        y = y + jnp.exp(total)[..., None] * (ids == 0)[:, None, :, None] * (q @ state)
        kept = jnp.exp(total[..., -1]) * (last == 0)
        state = kept[..., None, None] * state + jnp.einsum("BNsK,BNs,BNsV->BNKV", k, to_end, v)
        return state, y

    arrays = [cut(x.astype(jnp.float32), 2) for x in (q, k, v, log_decay)] + [cut(starts, 1)]
    # The backward pass makes a chunk's pairs again: it keeps the states alone.
    state, y = jax.lax.scan(jax.checkpoint(one_chunk), state, tuple(arrays))
    y = jnp.moveaxis(y, 0, 2)
    return y.reshape(batch, heads, -1, v.shape[3])[:, :, :length], state


def both_ways(q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, *, chunk: int) -> jax.Array:
    """sum over all s of t's example of (q_t . k_s) v_s: float32 [B, N, L, V], in linear time."""
    none = jnp.zeros(q.shape[:3], jnp.float32)
    forward, _ = decayed_sums(q, k, v, none, starts, chunk=chunk)
    ends = jnp.concatenate([starts[:, 1:], jnp.ones_like(starts[:, :1])], axis=1)
    back, _ = decayed_sums(*(x[:, :, ::-1] for x in (q, k, v)), none, ends[:, ::-1], chunk=chunk)
    itself = jnp.sum(q.astype(jnp.float32) * k, axis=-1, keepdims=True) * v
    return forward + back[:, :, ::-1] - itself


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """x_BL(NH) -> BNLH."""
    x = sharding.reshape(x, (*x.shape[:2], heads, x.shape[2] // heads), *FLAT, None)
    return x.transpose(0, 2, 1, 3)


def merge_heads(x: jax.Array) -> jax.Array:
    """x_BNLH -> BL(NH)."""
    x = x.transpose(0, 2, 1, 3)
    return sharding.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3]), *FLAT)


def run_sums(q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, row: Row,
             state: jax.Array | None, chunk: int) -> tuple[jax.Array, jax.Array]:
    """decayed_sums on each device's rows and heads; tokens that are not kept leave the state alone.

    log_decay: float32 [B, N, L], None: 0.
    """
    if log_decay is None:
        log_decay = jnp.zeros_like(v[..., 0], jnp.float32)
    if row.kept is not None:
        kept = row.kept[:, None, :]
        k, log_decay = jnp.where(kept[..., None], k, 0), jnp.where(kept, log_decay, 0)

    def run(q, k, v, log_decay, starts, state=None):
        return list(decayed_sums(q, k, v, log_decay, starts, state, chunk=chunk))

    axes = {**dict.fromkeys("qkv", HEADS), "log_decay": HEADS[:3], "state": HEADS,
            "starts": ("act_batch", None)}
    arrays = {"q": q, "k": k, "v": v, "log_decay": log_decay, "starts": row.starts, "state": state}
    y, state = per_device(run, arrays, axes, [HEADS, HEADS])
    return y, state
