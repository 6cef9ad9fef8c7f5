"""Moving tokens to experts and back; grouped.py multiplies them by their expert's weights.

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

import jax
import jax.numpy as jnp

# Rows of one matrix product on CPU; a packed buffer uses those up to half its length. Each is
# compiled; runs just above an even share of a power of two are what balanced routers give.
BLOCK_ROWS = (64, 128, 192, 256, 320, 384, 512, 576, 640, 768, 1024)
# Packed buffers are a multiple of this long (TPU tiles), with room for a last block that
# reaches beyond the last run.
ROW_MULTIPLE = 128


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["expert_index", "slot", "gate", "kept", "wanted"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Routing:
    """Tokens choose experts.

    Where `kept` is False (over capacity, padding, or a second expert declined by policy) the
    choice is not computed and its gate is 0.
    """

    expert_index: jax.Array  # int32 [G, T, K]
    slot: jax.Array          # int32 [G, T, K], position in the expert's buffer of this group
    gate: jax.Array          # float32 [G, T, K], weight of the expert's output
    kept: jax.Array          # bool [G, T, K]
    wanted: jax.Array        # bool [G, T, K]: asked for room (False: padding, or declined)


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["token_index", "gate", "kept"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Experts choose tokens: any number of experts, none included, may choose a token."""

    token_index: jax.Array  # int32 [G, E, C]
    gate: jax.Array         # float32 [G, E, C], 0 where not kept
    kept: jax.Array         # bool [G, E, C], False where the expert ran out of real tokens


def vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x marked as varying over the manual mesh axes `axes` (no-op outside shard_map)."""
    missing = tuple(a for a in axes if a not in jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros(shape, dtype, *like) -> jax.Array:
    """Zeros that vary over the mesh axes that any of `like` varies over (a loop's carry must)."""
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in like))
    return vary(jnp.zeros(shape, dtype), tuple(sorted(axes)))


def starts(sizes: jax.Array) -> jax.Array:
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


def take_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[index] by rows; an index beyond the end gives zeros."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def spread(x_ND: jax.Array, slot_NK: jax.Array, source_M: jax.Array) -> jax.Array:
    """The rows of x in buffer order -> [M, D]; empty buffer rows are 0."""
    return take_rows(x_ND, source_M // slot_NK.shape[1])


def _spread_fwd(x_ND, slot_NK, source_M):
    return spread(x_ND, slot_NK, source_M), slot_NK


def _spread_bwd(slot_NK, g_MD):
    return jnp.sum(take_rows(g_MD, slot_NK), axis=1), None, None


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def collect(y_MD: jax.Array, slot_N1: jax.Array, source_M: jax.Array) -> jax.Array:
    """Buffer rows [M, D] back in the order of tokens -> [N, D], where `spread` gave each token one
    row; dropped tokens are 0."""
    return take_rows(y_MD, slot_N1[:, 0])


def _collect_fwd(y_MD, slot_N1, source_M):
    return collect(y_MD, slot_N1, source_M), source_M


def _collect_bwd(source_M, g_ND):
    return take_rows(g_ND, source_M), None, None


collect.defvjp(_collect_fwd, _collect_bwd)


@jax.custom_vjp
def combine(y_MD: jax.Array, gate_NK: jax.Array, slot_NK: jax.Array,
            source_M: jax.Array) -> jax.Array:
    """sum_k gate_k * (the buffer row of choice k), added in float32, in y's dtype -> [N, D]."""
    y_NKD = take_rows(y_MD, slot_NK).astype(jnp.float32)
    return jnp.sum(y_NKD * gate_NK[..., None], axis=1).astype(y_MD.dtype)


def _combine_fwd(y_MD, gate_NK, slot_NK, source_M):
    return combine(y_MD, gate_NK, slot_NK, source_M), (y_MD, gate_NK, slot_NK, source_M)


def _combine_bwd(saved, g_ND):
    y_MD, gate_NK, slot_NK, source_M = saved
    gate_M = take_rows(gate_NK.reshape(-1), source_M)
    g_MD = take_rows(g_ND, source_M // slot_NK.shape[1]).astype(jnp.float32)
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
    y_ND = zeros((num_tokens, y_MD.shape[1]), jnp.float32, weighted)
    return y_ND.at[source_M].add(weighted, mode="drop").astype(y_MD.dtype)


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
        index_PR = starts(plan.sent_P)[:, None] + jnp.arange(plan.rows)
        index_PR = jnp.where(jnp.arange(plan.rows) < plan.sent_P[:, None], index_PR, plan.rows)
        return plan.all_to_all(take_rows(x_MD, index_PR.reshape(-1)))

    def ragged(x_MD, plan):
        peers = plan.sent_P.shape[0]
        received = zeros((peers * plan.rows, *x_MD.shape[1:]), x_MD.dtype, x_MD, plan.sent_P)
        mine = jnp.full_like(plan.sent_P, jax.lax.axis_index(plan.axis) * plan.rows)
        return jax.lax.ragged_all_to_all(
            x_MD, received, starts(plan.sent_P), plan.sent_P, mine, plan.received_P,
            axis_name=plan.axis)

    return jax.lax.platform_dependent(x_MD, plan, cpu=padded, default=ragged)


def send_back(y_RD: jax.Array, plan: Exchange) -> jax.Array:
    """Rows that `send` received, [P * rows, D], back to who sent them -> my packed rows [M, D].

    It is the transpose of `send` as well.
    """
    def padded(y_RD, plan):
        returned = plan.all_to_all(y_RD)
        ends_P = jnp.cumsum(plan.sent_P)
        row = jnp.arange(plan.rows)
        peer = jnp.sum(row[:, None] >= ends_P, axis=1)
        start = starts(plan.sent_P).at[peer].get(mode="fill", fill_value=0)
        index = jnp.where(row < ends_P[-1], peer * plan.rows + row - start, y_RD.shape[0])
        return take_rows(returned, index)

    def ragged(y_RD, plan):
        peers = plan.sent_P.shape[0]
        back = zeros((plan.rows, *y_RD.shape[1:]), y_RD.dtype, y_RD, plan.sent_P)
        # Where my chunk of peer p's buffer starts is only known to p.
        there = plan.all_to_all(starts(plan.sent_P))
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
    base_PE = starts(sizes_E) + jnp.cumsum(received_PE, axis=0) - received_PE
    row = jnp.arange(rows)
    expert_PR = jnp.sum(row[:, None] >= ends_PE[:, None, :], axis=-1)
    shift_PE = base_PE - (ends_PE - received_PE)
    shift_PR = jnp.take_along_axis(shift_PE, jnp.minimum(expert_PR, experts - 1), axis=1)
    total = packed_rows(peers * rows)
    slot_PR = jnp.where(expert_PR < experts, row + shift_PR, total)
    slot_R1 = slot_PR.reshape(-1, 1)
    return slot_R1, invert(slot_R1, total), sizes_E
