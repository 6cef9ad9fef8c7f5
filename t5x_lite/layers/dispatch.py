"""Moving tokens to experts and back, and multiplying them by their own expert's weights.

Tokens are rows. A *layout* says where each choice of a token goes in a buffer of M rows that
is ordered by expert, as two index arrays: `slot_NK` (choice -> buffer row, M where dropped)
and `source_M` (buffer row -> choice n * K + k, N * K where empty). With both at hand, moving
rows either way and differentiating either move are gathers: a scatter of rows, which is what
autodiff would give, is many times slower.

    capacity_layout   E equal runs of G * C rows: every expert's buffer, full or not
    sorted_layout     E runs of whatever length, packed: no row is dropped and none is empty

Inside jax.shard_map arrays are the device's own part, and values carry the mesh axes they
vary over; `vary` marks a value as varying (its transpose sums the gradient over those axes).

Shape letters: N tokens, K choices, M buffer rows, D and F features, E experts, G groups, T
tokens of a group, C capacity, P peers (devices along the expert axis).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_lite.layers.routing import ExpertChoice, Routing

# Rows of one matrix product on CPU; a packed buffer uses those up to half its length. Each is
# compiled; runs just above an even share of a power of two are what balanced routers give.
BLOCK_ROWS = (64, 128, 192, 256, 320, 384, 512, 576, 640, 768, 1024)
# Of a GPU's equal blocks: a tile of tensor cores' work, up to what hides the reading of weights.
TILE_ROWS = (64, 128, 256, 512, 1024)
# Packed buffers are a multiple of this long (TPU tiles), with room for a last block that
# reaches beyond the last run.
ROW_MULTIPLE = 128


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x marked as varying over the manual mesh axes `axes` (no-op outside shard_map)."""
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _zeros(shape, dtype, *like) -> jax.Array:
    """Zeros that vary over the mesh axes that any of `like` varies over (a loop's carry must)."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in like))
    return vary(jnp.zeros(shape, dtype), tuple(sorted(axes)))


def _starts(sizes: jax.Array) -> jax.Array:
    return jnp.cumsum(sizes) - sizes


# ---------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------


def invert(slot_NK: jax.Array, rows: int) -> jax.Array:
    """source_M of slot_NK: which choice fills each of `rows` buffer rows, N * K where none."""
    choices = jnp.arange(slot_NK.size, dtype=jnp.int32)
    return jnp.full(rows, slot_NK.size, jnp.int32).at[slot_NK.reshape(-1)].set(
        choices, mode="drop", unique_indices=True)


def capacity_layout(routing: Routing, num_experts: int,
                    capacity: int) -> tuple[jax.Array, jax.Array]:
    """Row (e * G + g) * C + slot for a kept choice of group g; M = E * G * C."""
    groups, tokens, choices = routing.slot.shape
    rows = num_experts * groups * capacity
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    slot = (routing.expert_index * groups + group) * capacity + routing.slot
    slot_NK = jnp.where(routing.kept, slot, rows).reshape(groups * tokens, choices)
    return slot_NK, invert(slot_NK, rows)


def packed_rows(rows: int) -> int:
    """The length of a packed buffer for up to `rows` rows."""
    most = next((size for size in BLOCK_ROWS if size >= rows), BLOCK_ROWS[-1])
    return -(-(rows + most - 1) // ROW_MULTIPLE) * ROW_MULTIPLE


def sorted_layout(routing: Routing, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(slot_NK, source_M, sizes_E): the kept choices by expert, then group, then slot.

    `routing` must be without gaps, as it is where nothing is dropped by capacity: the slots
    of one expert in one group are 0, 1, 2, …
    """
    groups, tokens, choices = routing.slot.shape
    hits_GE = jnp.sum((routing.expert_index[..., None] == jnp.arange(num_experts))
                      & routing.kept[..., None], axis=(1, 2), dtype=jnp.int32)
    sizes_E = jnp.sum(hits_GE, axis=0)
    start_E = jnp.cumsum(sizes_E) - sizes_E
    start_GE = start_E + jnp.cumsum(hits_GE, axis=0) - hits_GE
    group = jnp.arange(groups)[:, None, None]
    rows = packed_rows(groups * tokens * choices)
    slot = start_GE[group, routing.expert_index] + routing.slot
    slot_NK = jnp.where(routing.kept, slot, rows).reshape(groups * tokens, choices)
    return slot_NK, invert(slot_NK, rows), sizes_E


# ---------------------------------------------------------------------------------------
# Moving rows
# ---------------------------------------------------------------------------------------


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] by rows; an index beyond the end gives zeros."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x_ND: jax.Array, slot_NK: jax.Array, source_M: jax.Array) -> jax.Array:
    """The rows of x in buffer order -> [M, D]; empty buffer rows are 0."""
    return _rows(x_ND, source_M // slot_NK.shape[1])


def _spread_fwd(x_ND, slot_NK, source_M):
    return spread(x_ND, slot_NK, source_M), slot_NK


def _spread_bwd(slot_NK, g_MD):
    return jnp.sum(_rows(g_MD, slot_NK), axis=1), None, None


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def collect(y_MD: jax.Array, slot_N1: jax.Array, source_M: jax.Array) -> jax.Array:
    """The inverse of `spread` for one choice a row -> [N, D]; dropped rows are 0."""
    return _rows(y_MD, slot_N1[:, 0])


def _collect_fwd(y_MD, slot_N1, source_M):
    return collect(y_MD, slot_N1, source_M), source_M


def _collect_bwd(source_M, g_ND):
    return _rows(g_ND, source_M), None, None


collect.defvjp(_collect_fwd, _collect_bwd)


@jax.custom_vjp
def combine(y_MD: jax.Array, gate_NK: jax.Array, slot_NK: jax.Array,
            source_M: jax.Array) -> jax.Array:
    """sum_k gate_k * (the buffer row of choice k), added in float32, in y's dtype -> [N, D]."""
    y_NKD = _rows(y_MD, slot_NK).astype(jnp.float32)
    return jnp.sum(y_NKD * gate_NK[..., None], axis=1).astype(y_MD.dtype)


def _combine_fwd(y_MD, gate_NK, slot_NK, source_M):
    return combine(y_MD, gate_NK, slot_NK, source_M), (y_MD, gate_NK, slot_NK, source_M)


def _combine_bwd(saved, g_ND):
    y_MD, gate_NK, slot_NK, source_M = saved
    gate_M = _rows(gate_NK.reshape(-1), source_M)
    g_MD = _rows(g_ND, source_M // slot_NK.shape[1]).astype(jnp.float32)
    dgate_M = jnp.sum(y_MD.astype(jnp.float32) * g_MD, axis=-1)
    dgate_NK = dgate_M.at[slot_NK].get(mode="fill", fill_value=0)
    return (g_MD * gate_M[:, None]).astype(y_MD.dtype), dgate_NK, None, None


combine.defvjp(_combine_fwd, _combine_bwd)


def choice_source(choice: ExpertChoice, tokens: int) -> jax.Array:
    """Expert choice as a buffer of E * G * C rows: the token n of each row, G * T where none."""
    groups = choice.token_index.shape[0]
    start = jnp.arange(groups, dtype=jnp.int32)[:, None, None] * tokens
    source_GEC = jnp.where(choice.kept, choice.token_index + start, groups * tokens)
    return source_GEC.swapaxes(0, 1).reshape(-1)


def scatter_combine(y_MD: jax.Array, choice: ExpertChoice, source_M: jax.Array,
                    num_tokens: int) -> jax.Array:
    """y_n = sum over the buffer rows of token n of gate * row -> [N, D].

    How many experts chose a token is not bounded below E, so this one is a scatter-add.
    """
    gate_M = choice.gate.swapaxes(0, 1).reshape(-1)
    weighted = y_MD.astype(jnp.float32) * gate_M[:, None]
    y_ND = _zeros((num_tokens, y_MD.shape[1]), jnp.float32, weighted)
    return y_ND.at[source_M].add(weighted, mode="drop").astype(y_MD.dtype)


# ---------------------------------------------------------------------------------------
# Each row through its own expert
# ---------------------------------------------------------------------------------------

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
        x_MD: rows in a buffer of `packed_rows` length.
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
                y = y + _rows(weights[f"{name}.bias"], expert_M)
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
    block_rows = [rows for rows in BLOCK_ROWS if 2 * rows <= length]
    most, start_E = block_rows[-1], _starts(sizes_E)
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
                lambda i, c, rows=rows: put(c, rows, w, rest + i * rows, end, add=False), tuple(carry))
        written, total = jax.lax.fori_loop(
            0, full, lambda i, c: put(c, most, w, start_E[e] + i * most, end, add=True), carry)
        return written, total, jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b.astype(a.dtype), e, axis=0),
            summed, total)

    total = jax.tree.map(lambda a: _zeros(a.shape[1:], jnp.float32, a), summed)
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
    start_E, blocks_E = _starts(sizes_E), -(-sizes_E // rows)
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

    total = jax.tree.map(lambda a: _zeros(a.shape[1:], jnp.float32, a), summed)
    none = _zeros((), jnp.int32, sizes_E) - 1
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
    zeros = jax.tree.map(lambda a: _zeros(a.shape, a.dtype, x_MD, sizes_E, *weights.values()),
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
    dw, dx = jax.tree.map(lambda a: _zeros(a.shape, a.dtype, *like), (weights, x_MD))
    dx, dw = run(block, weights, sizes_E, dx, dw)
    return dw, dx


# ---------------------------------------------------------------------------------------
# All-to-all of runs of any length
# ---------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["sent_P", "received_P"], meta_fields=["axis", "rows"])
@dataclasses.dataclass(frozen=True)
class Exchange:
    """Who sends how many rows to whom along the mesh axis (or axes) `axis`.

    A device's packed buffer holds the rows for peer 0, then for peer 1, …; it receives
    peer p's rows at p * rows, in chunks long enough for all that a peer may have to send.
    """

    sent_P: jax.Array      # int32, rows of my packed buffer for each peer
    received_P: jax.Array  # int32, rows each peer has for me
    axis: tuple[str, ...]
    rows: int              # length of a packed buffer

    def all_to_all(self, x: jax.Array) -> jax.Array:
        """[P * n, …] -> [P * n, …]: chunk p goes to peer p and comes from peer p."""
        return jax.lax.all_to_all(x, self.axis, split_axis=0, concat_axis=0, tiled=True)


def plan_exchange(sizes_E: jax.Array, axis: tuple[str, ...],
                  rows: int) -> tuple[Exchange, jax.Array]:
    """The exchange that takes each row to its expert's device, and the sizes that arrive.

    Args:
        sizes_E: my rows for each of all experts; peer p holds experts [p * E/P, (p+1) * E/P).
        rows: length of my packed buffer.
    Returns:
        The plan, and received_PE int32 [P, E/P]: rows of each peer for each expert of mine.
    """
    peers = jax.lax.axis_size(axis)
    sent_PE = sizes_E.reshape(peers, -1)
    received_PE = jax.lax.all_to_all(sent_PE, axis, split_axis=0, concat_axis=0, tiled=True)
    return Exchange(jnp.sum(sent_PE, axis=1), jnp.sum(received_PE, axis=1), axis, rows), received_PE


def send(x_MD: jax.Array, plan: Exchange) -> jax.Array:
    """My packed rows to their experts' devices -> [P * rows, D], what I received.

    The chunks are as long as the worst case, all tokens of a peer for me, because nothing may
    be dropped; on TPU and GPU only the rows that exist travel (ragged_all_to_all), on CPU
    whole chunks do.
    """
    def padded(x_MD, plan):
        index_PR = _starts(plan.sent_P)[:, None] + jnp.arange(plan.rows)
        index_PR = jnp.where(jnp.arange(plan.rows) < plan.sent_P[:, None], index_PR, plan.rows)
        return plan.all_to_all(_rows(x_MD, index_PR.reshape(-1)))

    def ragged(x_MD, plan):
        peers = plan.sent_P.shape[0]
        received = _zeros((peers * plan.rows, *x_MD.shape[1:]), x_MD.dtype, x_MD, plan.sent_P)
        mine = jnp.full_like(plan.sent_P, jax.lax.axis_index(plan.axis) * plan.rows)
        return jax.lax.ragged_all_to_all(
            x_MD, received, _starts(plan.sent_P), plan.sent_P, mine, plan.received_P,
            axis_name=plan.axis)

    return jax.lax.platform_dependent(x_MD, plan, cpu=padded, default=ragged)


def send_back(y_RD: jax.Array, plan: Exchange) -> jax.Array:
    """The inverse (and the transpose) of `send`: [P * rows, D] -> my packed rows [M, D]."""
    def padded(y_RD, plan):
        returned = plan.all_to_all(y_RD)
        ends_P = jnp.cumsum(plan.sent_P)
        row = jnp.arange(plan.rows)
        peer = jnp.sum(row[:, None] >= ends_P, axis=1)
        start = _starts(plan.sent_P).at[peer].get(mode="fill", fill_value=0)
        index = jnp.where(row < ends_P[-1], peer * plan.rows + row - start, y_RD.shape[0])
        return _rows(returned, index)

    def ragged(y_RD, plan):
        peers = plan.sent_P.shape[0]
        back = _zeros((plan.rows, *y_RD.shape[1:]), y_RD.dtype, y_RD, plan.sent_P)
        # Where my chunk of peer p's buffer starts is only known to p.
        there = plan.all_to_all(_starts(plan.sent_P))
        return jax.lax.ragged_all_to_all(
            y_RD, back, jnp.arange(peers, dtype=jnp.int32) * plan.rows, plan.received_P, there,
            plan.sent_P, axis_name=plan.axis)

    return jax.lax.platform_dependent(y_RD, plan, cpu=padded, default=ragged)


exchange = jax.custom_vjp(send)
exchange.defvjp(lambda x, plan: (send(x, plan), plan), lambda plan, g: (send_back(g, plan), None))
exchange_back = jax.custom_vjp(send_back)
exchange_back.defvjp(lambda y, plan: (send_back(y, plan), plan),
                     lambda plan, g: (send(g, plan), None))


def received_layout(received_PE: jax.Array, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(slot_R1, source_M, sizes_E) that sort received chunks by expert, then by peer.

    Args:
        received_PE: rows of each peer for each of my experts.
        rows: length of a peer's chunk; R = P * rows.
    """
    peers, experts = received_PE.shape
    ends_PE = jnp.cumsum(received_PE, axis=1)
    sizes_E = jnp.sum(received_PE, axis=0)
    base_PE = _starts(sizes_E) + jnp.cumsum(received_PE, axis=0) - received_PE
    row = jnp.arange(rows)
    expert_PR = jnp.sum(row[:, None] >= ends_PE[:, None, :], axis=-1)
    shift_PE = base_PE - (ends_PE - received_PE)
    shift_PR = jnp.take_along_axis(shift_PE, jnp.minimum(expert_PR, experts - 1), axis=1)
    total = packed_rows(peers * rows)
    slot_PR = jnp.where(expert_PR < experts, row + shift_PR, total)
    slot_R1 = slot_PR.reshape(-1, 1)
    return slot_R1, invert(slot_R1, total), sizes_E
