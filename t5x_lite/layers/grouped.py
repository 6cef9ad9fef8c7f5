"""Rows in a buffer that is sorted by expert, each multiplied by its own expert's weights.

What a dropless mixture computes (`grouped`), by whatever is fast on the platform, and the product
of one expert or of equal buffers of all (`product`).

Shape letters: M buffer rows, D and F features, E experts, C rows of one expert.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_lite.layers import dispatch

# Of a GPU's equal blocks: a tile of tensor cores' work, up to what hides the reading of weights.
TILE_ROWS = (64, 128, 256, 512, 1024)


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x_…CD @ w_…DF, for one expert or a leading dim of them.

    Its gradients are what autodiff's are, but the one of w comes out as w lies: autodiff's is
    [F, D], and turning all of them costs a tenth of a CPU's step.
    """
    return x @ w


def _product_bwd(saved, g):
    x, w = saved
    return (jnp.einsum("...CF,...DF->...CD", g, w), jnp.einsum("...CD,...CF->...DF", x, g))


product.defvjp(lambda x, w: (product(x, w), (x, w)), _product_bwd)


# An expert is two functions of `dense`, which multiplies rows by the named weights of their
# own expert: first(dense, x) -> pre-activations, and second(dense, pre-activations, choice,
# shared) -> y. Only the pre-activations are kept for the backward pass.
First = Callable[[Callable, jax.Array], tuple[jax.Array, ...]]
Second = Callable[[Callable, tuple[jax.Array, ...], jax.Array, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped(first: First, second: Second, weights: dict[str, jax.Array], x_MD: jax.Array,
            choice_M: jax.Array, shared: Any, sizes_E: jax.Array) -> jax.Array:
    """Rows sorted by expert, each through its own expert -> [M, D].

    On TPU `dense` is jax.lax.ragged_dot. On CPU and GPU, where that would compute every expert
    for every row, the rows of an expert go through both functions block by block: the cost is
    linear in the rows. A CPU runs blocks of the sizes that fit each run (_blocked), so that
    intermediates stay in the cache; a GPU a number of equal blocks that is known when it is
    compiled (_tiled), as a loop whose length depends on data waits for the host at every turn.
    Rows beyond the last run are unspecified.

    Args:
        weights: "<name>.kernel" [E, in, out] and "<name>.bias" [E, out], of x's dtype.
        x_MD: rows in a buffer of dispatch.packed_rows length.
        choice_M, shared: integers for `second`: of each row, and common to all rows.
        sizes_E: int32, rows of each expert: the first sizes_E[0] rows belong to expert 0, …
    """
    return _grouped_fwd(first, second, weights, x_MD, choice_M, shared, sizes_E)[0]


def _grouped_fwd(first, second, weights, x_MD, choice_M, shared, sizes_E):
    args = (weights, x_MD, choice_M, shared, sizes_E)
    blocked = functools.partial(_blocked_forward, first, second)
    tiled = functools.partial(blocked, run=_tiled)
    y_MD, pre = jax.lax.platform_dependent(
        *args, cpu=blocked, cuda=tiled, rocm=tiled,
        default=functools.partial(_ragged_forward, first, second))
    return y_MD, (pre, *args)


def _grouped_bwd(first, second, saved, g_MD):
    blocked = functools.partial(_blocked_backward, first, second)
    tiled = functools.partial(blocked, run=_tiled)
    dw, dx = jax.lax.platform_dependent(
        g_MD, *saved, cpu=blocked, cuda=tiled, rocm=tiled,
        default=functools.partial(_ragged_backward, first, second))
    return dw, dx, None, None, None


grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _backward(first, second, dense_of, weights, x, pre, choice, shared, g):
    """(gradient of weights, of x), given `pre` and a `dense` for weights."""
    _, second_vjp = jax.vjp(lambda w, p: second(dense_of(w), p, choice, shared), weights, pre)
    dw_second, d_pre = second_vjp(g)
    _, first_vjp = jax.vjp(lambda w, x: first(dense_of(w), x), weights, x)
    dw_first, dx = first_vjp(d_pre)
    return jax.tree.map(jnp.add, dw_first, dw_second), dx


def _ragged_dense(sizes_E):
    """weights -> `dense` for TPU, all rows at once."""
    # Where stages or slices are mapped (sharding.manual), their axis is Explicit as JAX looks
    # at a region first, and ragged_dot does not infer its sharding there.
    whole = PartitionSpec(None, None) if jax.sharding.get_abstract_mesh().explicit_axes else None

    def dense_of(weights):
        def dense(x, name):
            y = jax.lax.ragged_dot(x, weights[f"{name}.kernel"], sizes_E, out_sharding=whole)
            if f"{name}.bias" in weights:
                expert_M = jnp.sum(jnp.arange(x.shape[0])[:, None] >= jnp.cumsum(sizes_E), axis=1)
                y = y + dispatch.take_rows(weights[f"{name}.bias"], expert_M)
            return y
        return dense
    return dense_of


def _ragged_forward(first, second, weights, x_MD, choice_M, shared, sizes_E):
    dense = _ragged_dense(sizes_E)(weights)
    pre = first(dense, x_MD)
    return second(dense, pre, choice_M, shared), pre


def _ragged_backward(first, second, g_MD, pre, weights, x_MD, choice_M, shared, sizes_E):
    return _backward(first, second, _ragged_dense(sizes_E), weights, x_MD, pre, choice_M, shared,
                     g_MD)


def _block_dense(weights):
    """`dense` for rows of one expert with these weights."""
    def dense(x, name):
        y = product(x, weights[f"{name}.kernel"])
        return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y
    return dense


def _blocked(block, weights, sizes_E, written, summed):
    """Runs `block` over the rows of every expert, block by block.

    A run has as many blocks of the largest size as it fills, and one of the nearest size for
    the rest: a product with few rows costs nearly what one with more does, and it reads the
    expert's weights once more. The last block may reach into the next run, whose own blocks
    come later and overwrite it.

    Args:
        block: (rows, one expert's weights, first row, end of the run) -> (rows to write at the
            first row, float32 terms to add up over the expert's blocks), two trees.
        written: [M, …] each: where rows go.
        summed: [E, …] each: where the sums of an expert that has any rows go.
    """
    length = jax.tree.leaves(written)[0].shape[0]
    block_rows = [rows for rows in dispatch.BLOCK_ROWS if 2 * rows <= length]
    most, start_E = block_rows[-1], dispatch.starts(sizes_E)
    busy_E = jnp.argsort(sizes_E == 0, stable=True)

    def put(carry, rows, w, at, end, *, add):
        written, total = carry
        done, terms = block(rows, w, at, end)
        written = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b, at, axis=0), written, done)
        return written, jax.tree.map(jnp.add, total, terms) if add else terms

    def run(i, carry):
        (*carry, summed), e = carry, busy_E[i]
        w, end = {name: w[e] for name, w in weights.items()}, start_E[e] + sizes_E[e]
        full = (sizes_E[e] - 1) // most
        rest = start_E[e] + full * most
        nearest = jnp.sum(end - rest > jnp.asarray(block_rows))
        # Loops of one turn or none: what the branches of a conditional update, XLA copies. The
        # block's place depends on the turn, or XLA would move the products out of the loop.
        for n, rows in enumerate(block_rows):
            carry = jax.lax.fori_loop(
                0, (nearest == n).astype(jnp.int32),
                lambda i, c, rows=rows: put(c, rows, w, rest + i * rows, end, add=False),
                tuple(carry))
        written, total = jax.lax.fori_loop(
            0, full, lambda i, c: put(c, most, w, start_E[e] + i * most, end, add=True), carry)
        return written, total, jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b.astype(a.dtype), e, axis=0),
            summed, total)

    total = jax.tree.map(lambda a: dispatch.zeros(a.shape[1:], jnp.float32, a), summed)
    written, _, summed = jax.lax.fori_loop(
        0, jnp.sum(sizes_E > 0), run, (written, total, summed))
    return written, summed


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a GPU's blocks: the largest size of which a block for every expert, which may have
    a row in it alone, is at most a quarter of the buffer; at most half the buffer in any case,
    which leaves room for the last block (packed_rows)."""
    fitting = [size for size in TILE_ROWS if 4 * experts * size <= rows]
    return fitting[-1] if fitting else TILE_ROWS[0]


def _tiled(block, weights, sizes_E, written, summed):
    """`block` over the rows of every expert as `_blocked` runs it, in as many equal blocks as the
    rows can need: one for each tile_rows rows of the buffer, and one for each expert."""
    length = jax.tree.leaves(written)[0].shape[0]
    num_experts = sizes_E.shape[0]
    rows = tile_rows(length, num_experts)
    start_E, blocks_E = dispatch.starts(sizes_E), -(-sizes_E // rows)
    last_E = jnp.cumsum(blocks_E)

    def tile(carry, i):
        written, summed, total, before = carry
        active = i < last_E[-1]
        e = jnp.where(active, jnp.sum(i >= last_E), num_experts - 1)
        at = jnp.where(active, start_E[e] + (i - last_E[e] + blocks_E[e]) * rows, 0)
        end = jnp.where(active, start_E[e] + sizes_E[e], 0)
        own = {name: jax.lax.dynamic_index_in_dim(w, e, keepdims=False)
               for name, w in weights.items()}
        done, terms = block(rows, own, at, end)
        mine = at + jnp.arange(rows) < end

        def put(whole, part):
            kept = jnp.where(mine[:, None], part, _cut(at, rows, whole)[0])
            return jax.lax.dynamic_update_slice_in_dim(whole, kept, at, axis=0)

        written = jax.tree.map(put, written, done)
        total = jax.tree.map(lambda a, b: jnp.where(e == before, a, 0) + b, total, terms)
        summed = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b.astype(a.dtype), e, axis=0),
            summed, total)
        return (written, summed, total, e), None

    total = jax.tree.map(lambda a: dispatch.zeros(a.shape[1:], jnp.float32, a), summed)
    none = dispatch.zeros((), jnp.int32, sizes_E) - 1
    carry, _ = jax.lax.scan(tile, (written, summed, total, none),
                            jnp.arange(length // rows + num_experts, dtype=jnp.int32))
    return carry[:2]


def _cut(start, rows, *arrays):
    return [jax.lax.dynamic_slice_in_dim(a, start, rows) for a in arrays]


def _blocked_forward(first, second, weights, x_MD, choice_M, shared, sizes_E, run=_blocked):
    def block(rows, w, start, end):
        x, choice = _cut(start, rows, x_MD, choice_M)
        pre = first(_block_dense(w), x)
        return (second(_block_dense(w), pre, choice, shared), pre), ()

    shapes = jax.eval_shape(lambda w, x: first(_block_dense(w), x),
                            {name: w[0] for name, w in weights.items()}, x_MD)
    like = (x_MD, sizes_E, *weights.values())
    zeros = jax.tree.map(lambda a: dispatch.zeros(a.shape, a.dtype, *like),
                         (x_MD, tuple(shapes)))
    return run(block, weights, sizes_E, zeros, ())[0]


def _blocked_backward(first, second, g_MD, pre, weights, x_MD, choice_M, shared, sizes_E,
                      run=_blocked):
    def block(rows, w, start, end):
        x, choice, g, *pre_rows = _cut(start, rows, x_MD, choice_M, g_MD, *pre)
        g = jnp.where(start + jnp.arange(rows)[:, None] < end, g, 0)
        dw, dx = _backward(first, second, _block_dense, w, x, tuple(pre_rows), choice, shared, g)
        return dx, jax.tree.map(lambda a: a.astype(jnp.float32), dw)

    like = (x_MD, g_MD, sizes_E, *weights.values())
    dw, dx = jax.tree.map(lambda a: dispatch.zeros(a.shape, a.dtype, *like), (weights, x_MD))
    dx, dw = run(block, weights, sizes_E, dx, dw)
    return dw, dx
