"""The two pipeline loops: fill and drain (GPipe, circular), and one forward one backward.

Both see a stage as `stage_fn(weights, rows, round) -> (y, outputs)`, a function of one
stage's weights and of one micro-batch's rows (x, side), where the side inputs (masks, biases,
the encoder's output, row numbers) travel with the micro-batch from stage to stage. Arrays here
have a leading stage dim on the mesh's `stage` axis; a tick is one vmap over it.

Shape letters: S stages, R rounds, G groups of S micro-batches, b rows of a micro-batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_lite.parallel import sharding

StageFn = Callable[[Any, Any, jax.Array | int], tuple[jax.Array, Any]]
SCHEDULES = ("gpipe", "circular", "1f1b")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of a pipeline."""

    stages: int
    microbatches: int   # a multiple of stages
    rounds: int = 1     # how often a micro-batch passes all stages

    @property
    def groups(self) -> int:
        """Groups of as many micro-batches as there are stages, one made of each stage's rows."""
        return self.microbatches // self.stages

    @property
    def period(self) -> int:
        """Ticks from the start of one group at stage 0 to the start of the next."""
        return self.stages * self.rounds

    @property
    def ticks(self) -> int:
        """Ticks of a forward pass; a stage works in microbatches * rounds of them."""
        return self.microbatches * self.rounds + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of stage-ticks that are idle: (S - 1) / (M R + S - 1)."""
        return (self.stages - 1) / self.ticks


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How a stack runs where mesh.stage > 1."""

    schedule: str = "gpipe"      # one of SCHEDULES
    num_microbatches: int = 0    # a multiple of mesh.stage; 0: mesh.stage
    circular_repeats: int = 2    # circular: groups of layers that a stage holds

    def plan(self, stages: int) -> Plan:
        """The sizes on a mesh with so many stages."""
        return Plan(stages, self.num_microbatches or stages,
                    self.circular_repeats if self.schedule == "circular" else 1)


def stage_ids(stages: int) -> jax.Array:
    """int32 [S] on the stage axis."""
    return jax.sharding.reshard(jnp.arange(stages), PartitionSpec("stage"))


def on_stages(fn: Callable, in_axes: Any) -> Callable:
    """fn for every stage at once; in it the `stage` axis does not exist."""
    def mapped(*args):
        with sharding.inside("stage"):
            return jax.vmap(fn, in_axes)(*args)
    return mapped


def shift(tree: Any, by: int) -> Any:
    """Arrays [S, …] moved `by` stages up; what leaves one end enters at the other."""
    def move(x):
        stages, spec = x.shape[0], jax.typeof(x).sharding.spec
        pairs = [(i, (i + by) % stages) for i in range(stages)]
        return sharding.manual(lambda part: jax.lax.ppermute(part, "stage", pairs),
                               (spec,), spec)(x)
    return jax.tree.map(move, tree)


def load(ring: Any, groups: Any, t: jax.Array, first: int, plan: Plan) -> Any:
    """The ring [S, b, …], or group g of groups [S, G, b, …] at tick first + g * period.

    A ring that is then shifted by -1 every tick brings micro-batch after micro-batch to one
    stage: the one made of the rows of stage 0, then that of stage 1, …
    """
    now, g = _group(t, first, plan)
    return jax.tree.map(lambda old, new: jnp.where(
        now, jax.lax.dynamic_index_in_dim(new, g, 1, keepdims=False), old), ring, groups)


def store(groups: Any, ring: Any, t: jax.Array, first: int, plan: Plan) -> Any:
    """groups [S, G, b, …] with the ring [S, b, …] written to group g at tick first + g * period.

    What `load` hands out at one stage comes back in the same order at another.
    """
    now, g = _group(t, first, plan)

    def write(old, new):
        kept = jax.lax.dynamic_index_in_dim(old, g, 1, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(old, jnp.where(now, new, kept), g, 1)
    return jax.tree.map(write, groups, ring)


def _group(t: jax.Array, first: int, plan: Plan) -> tuple[jax.Array, jax.Array]:
    since = t - first
    now = (since >= 0) & (since < plan.groups * plan.period) & (since % plan.period == 0)
    return now, jnp.clip(since // plan.period, 0, plan.groups - 1)


def _first_group(groups: Any) -> Any:
    """Zeros of the shape and sharding of one group: an empty ring."""
    return jax.tree.map(
        lambda x: jnp.zeros_like(jax.lax.index_in_dim(x, 0, 1, keepdims=False)), groups)


def _select(condition: jax.Array, a: Any, b: Any) -> Any:
    return jax.tree.map(functools.partial(jnp.where, condition), a, b)


def fill_drain(stage_fn: StageFn, plan: Plan, weights: Any, rows: tuple[jax.Array, Any]
               ) -> tuple[jax.Array, Any, jax.Array]:
    """The forward pass of every schedule; its transpose is the backward pass of GPipe.

    Args:
        weights: leaves [S, …].
        rows: (x, side), leaves [S, G, b, …]: micro-batch g * S + s stands at [s, g].
    Returns:
        y [S, G, b, …]; the stages' outputs summed over micro-batches and rounds, [S, …]; and
        how many ticks each stage was idle, int32 [S].
    """
    stages, last = plan.stages, plan.stages - 1

    def work(stage, t, weights, feed, arrived, drain):
        item = t - stage
        active = (item >= 0) & (item < plan.microbatches * plan.rounds)
        round_ = item // stages % plan.rounds if plan.rounds > 1 else 0
        row = _select((stage == 0) & (round_ == 0), feed, arrived)
        y, outputs = stage_fn(weights, row, round_)
        outputs = jax.tree.map(lambda o: jnp.where(active, o, jnp.zeros_like(o)), outputs)
        return (y, row[1]), jnp.where(stage == last, y, drain), outputs, active

    def tick(carry, t):
        arrived, feed, drain, done = carry
        feed = load(feed, rows, t, 0, plan)
        row, drain, outputs, active = on_stages(work, (0, None, 0, 0, 0, 0))(
            stage_ids(stages), t, weights, feed, arrived, drain)
        # The last of a group leaves the last stage while the first has come home to stage 0.
        done = store(done, drain, t, plan.period + stages - 2, plan)
        return (shift(row, 1), shift(feed, -1), shift(drain, -1), done), (outputs, active)

    empty = _first_group(rows)
    start = (empty, empty, empty[0], jnp.zeros_like(rows[0]))
    (*_, done), (outputs, active) = jax.lax.scan(tick, start, jnp.arange(plan.ticks))
    return (done, jax.tree.map(lambda o: jnp.sum(o, axis=0), outputs),
            jnp.sum(~active, axis=0, dtype=jnp.int32))


# --- one forward, one backward ----------------------------------------------------------------

def one_f_one_b(stage_fn: StageFn, plan: Plan, weights: Any, rows: tuple[jax.Array, Any]
                ) -> tuple[jax.Array, Any, jax.Array]:
    """fill_drain whose backward pass holds at most S micro-batches, however many there are.

    PipeDream's 1F1B (Narayanan et al. 2019, 2021) starts the backward pass of a micro-batch
    before the last one's forward pass, so the loss would have to stand inside the pipeline.
    Here the forward pass keeps nothing, the loss stands where it always does, and the backward
    pass runs the forward one again, in 1F1B's order: one forward and one backward a tick. So
    a stage is computed three times where GPipe with full rematerialisation computes it twice:
    5 against 4 units of a forward pass. Cotangents of the outputs are all known beforehand.

    In lock step the first stage would have to keep 2 S - 1 micro-batches and the last one 1;
    `_hold` lends the later stages' room to the earlier ones, so that every stage keeps S.
    """
    differentiable, others = zip(_partition(weights), _partition(rows), strict=True)

    def call(differentiable, others):
        return fill_drain(stage_fn, plan, _join(weights, differentiable[0], others[0]),
                          _join(rows, differentiable[1], others[1]))

    run = jax.custom_vjp(call)

    def backward(saved, cotangents):
        (weights_f, rows_f), (weights_o, rows_o) = saved
        grads, _ = backward_1f1b(stage_fn, plan, _join(weights, weights_f, weights_o),
                                 _join(rows, rows_f, rows_o), *cotangents[:2])
        return grads, None

    run.defvjp(lambda d, o: (call(d, o), (d, o)), sharding.as_here(backward))
    return run(differentiable, others)


def backward_1f1b(stage_fn: StageFn, plan: Plan, weights: Any, rows: tuple[jax.Array, Any],
                  y_bar: jax.Array, outputs_bar: Any) -> tuple[tuple[list, list], jax.Array]:
    """The backward pass of one_f_one_b, which runs the forward pass again in 1F1B's order.

    Stage s runs micro-batch m forward at tick m + s and backward at tick m + 2 (S - 1) - s.
    Ticks before the first backward run forward only, those after the last forward backward
    only, so the whole takes as long as a forward and a backward GPipe pass.

    Args:
        weights, rows: as fill_drain has them.
        y_bar: cotangents of y, [S, G, b, …].
        outputs_bar: cotangents of the summed outputs, leaves [S, …].
    Returns:
        cotangents of the differentiable leaves of weights and of rows; and the idle forward and
        backward half-ticks of each stage, int32 [S].
    """
    assert plan.rounds == 1, plan
    stages, last = plan.stages, plan.stages - 1
    weights_f, weights_o = _partition(weights)

    def forward(stage, feed, arrived, weights):
        row = _select(stage == 0, feed, arrived)
        return row, (stage_fn(weights, row, 0)[0], row[1])

    def cotangents(stage, t, y_bar, arrived, outputs_bar):
        item = t - 2 * last + stage
        active = (item >= 0) & (item < plan.microbatches)
        # arrived: cotangents of (y, side); at the last stage y's comes from outside.
        arrived = _select(stage == last, [y_bar, *map(jnp.zeros_like, arrived[1:])], arrived)
        both = _select(active, (arrived, outputs_bar),
                       jax.tree.map(jnp.zeros_like, (arrived, outputs_bar)))
        return *both, active

    def backward(row, y_bar, outputs_bar):
        row_f, row_o = _partition(row)
        run = on_stages(lambda w_f, r_f, w_o, r_o: stage_fn(
            _join(weights, w_f, w_o), _join(row, r_f, r_o), 0), 0)
        _, pull = jax.vjp(lambda w, r: run(w, r, weights_o, row_o), weights_f, row_f)
        return pull((y_bar, outputs_bar))

    def tick(now: _Tick, t: jax.Array, *, forwards: bool, backwards: bool) -> tuple[_Tick, None]:
        ids = stage_ids(stages)
        feed = load(now.feed, rows, t, 0, plan)
        row, onward, idle = now.arrived, now.arrived, now.idle
        if forwards:
            row, onward = on_stages(forward, 0)(ids, feed, now.arrived, weights)
            idle = idle + ((t < ids) | (t - ids >= plan.microbatches))
        held, ring = _hold(now.ring, row, t, stages)
        drain, total, arrived_bar = now.drain, now.total, now.arrived_bar
        if backwards:
            (y_bar_now, *side_bar), outputs_bar_now, active = on_stages(
                cotangents, (0, None, 0, 0, 0))(ids, t, now.feed_bar, now.arrived_bar, outputs_bar)
            added, (x_bar, *side_added) = backward(held, y_bar_now, outputs_bar_now)
            rows_bar = [x_bar, *map(jnp.add, side_bar, side_added)]
            drain = on_stages(lambda s, new, old: _select(s == 0, new, old), 0)(
                ids, rows_bar, drain)
            total, arrived_bar = jax.tree.map(jnp.add, total, added), shift(rows_bar, -1)
            idle = idle + ~active
        feed_bar = shift(load(now.feed_bar, y_bar, t, stages - 2, plan), -1)
        drain = shift(drain, -1)
        return _Tick(
            arrived=shift(onward, 1), feed=shift(feed, -1), ring=ring, arrived_bar=arrived_bar,
            feed_bar=feed_bar, drain=drain, done=store(now.done, drain, t, 3 * last, plan),
            total=total, idle=idle), None

    empty, rows_f = _first_group(rows), _partition(rows)[0]
    empty_bar = _first_group(rows_f)
    now = _Tick(
        arrived=empty, feed=empty, ring=jax.tree.map(lambda x: _empty_ring(x, stages), empty),
        arrived_bar=empty_bar, feed_bar=empty_bar[0], drain=empty_bar,
        done=list(map(jnp.zeros_like, rows_f)), total=list(map(jnp.zeros_like, weights_f)),
        idle=jnp.zeros_like(stage_ids(stages)))
    first, end = last, plan.microbatches + last
    for begin, stop, halves in ((0, first, (True, False)), (first, end, (True, True)),
                                (end, end + last, (False, True))):
        step = functools.partial(tick, forwards=halves[0], backwards=halves[1])
        now, _ = jax.lax.scan(step, now, jnp.arange(begin, stop))
    return (now.total, now.done), now.idle


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tick:
    """What one tick of 1F1B hands to the next. Leaves have a leading stage dim.

    A cotangent is named *_bar and belongs to the differentiable leaves alone.
    """

    arrived: Any            # the rows (x, side) that each stage runs forward now
    feed: Any               # a ring that brings the next micro-batch's rows to stage 0
    ring: Any               # the rows that wait for their backward pass: see _hold
    arrived_bar: list       # of (x, side): what the stage after has sent back
    feed_bar: jax.Array     # a ring that brings the next micro-batch's y_bar to the last stage
    drain: list             # a ring that takes cotangents of rows from stage 0 to their own stage
    done: list              # the cotangents of rows [S, G, b, …] that have come home
    total: list             # cotangents of the weights, summed over micro-batches
    idle: jax.Array         # half-ticks without work, int32 [S]


def _empty_ring(x: jax.Array, stages: int) -> jax.Array:
    """Zeros [S, S - 1, b, …] for x [S, b, …]."""
    spec = jax.typeof(x).sharding.spec
    return jnp.zeros((stages, stages - 1, *x.shape[1:]), x.dtype,
                     out_sharding=PartitionSpec("stage", None, *spec[1:]))


def _hold(ring: Any, row: Any, t: jax.Array, stages: int) -> tuple[Any, Any]:
    """Puts each stage's row of this tick away and hands out the row it now runs backward.

    Stage s needs a row again 2 (S - 1 - s) ticks later: S - 1 on average. Stage s of the first
    half sends its row to stage S - 1 - s, which returns it when stage s has room, as BPipe does
    (Kim et al. 2023). With the row of this tick every stage holds exactly S.

    Args:
        ring: leaves [S, S - 1, b, …]: at stage s first its own rows, then its guests.
        row: leaves [S, b, …].
    """
    last = stages - 1
    mirror = [(s, last - s) for s in range(stages)]

    def exchange(ring, row, t):
        stage = jax.lax.axis_index("stage")
        lag = 2 * (last - stage)                  # ticks until a row is needed
        away = jnp.maximum(last - 2 * stage, 0)   # of them, on the mirror stage
        guests = jnp.maximum(2 * stage - last, 0)
        own = lag - away                          # own + guests = S - 1
        at = lambda i: jax.lax.dynamic_index_in_dim(ring, i, 1, keepdims=False)
        put = jax.lax.dynamic_update_index_in_dim
        mine = (t - away) % jnp.maximum(own, 1)
        guest = jnp.where(guests > 0, own + t % jnp.maximum(guests, 1), mine)
        held = jnp.where(lag == 0, row, at((t - lag) % jnp.maximum(own, 1)))
        arrived = jax.lax.ppermute(jnp.where(away > 0, row, at(guest)), "stage", mirror)
        kept = jnp.where(own > 0, jnp.where(away > 0, arrived, row), at(mine))
        visitor = jnp.where(guests > 0, arrived, kept)   # without guests: the same write again
        return held, put(put(ring, kept, mine, 1), visitor, guest, 1)

    def one(ring, row):
        spec = jax.typeof(row).sharding.spec
        ring_spec = PartitionSpec("stage", None, *spec[1:])
        return sharding.manual(exchange, (ring_spec, spec, PartitionSpec()),
                               (spec, ring_spec))(ring, row, t)

    leaves, treedef = jax.tree.flatten(row)
    pairs = [one(a, b) for a, b in zip(jax.tree.leaves(ring), leaves, strict=True)]
    return treedef.unflatten(p[0] for p in pairs), treedef.unflatten(p[1] for p in pairs)


def _partition(tree: Any) -> tuple[list, list]:
    """The leaves that have gradients, and the others."""
    leaves = jax.tree.leaves(tree)
    floats = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]
    return ([x for x, f in zip(leaves, floats, strict=True) if f],
            [x for x, f in zip(leaves, floats, strict=True) if not f])


def _join(like: Any, differentiable: list, others: list) -> Any:
    """A tree like `like` of what _partition has taken apart."""
    leaves, treedef = jax.tree.flatten(like)
    parts = iter(differentiable), iter(others)
    return treedef.unflatten(
        next(parts[0] if jnp.issubdtype(x.dtype, jnp.inexact) else parts[1]) for x in leaves)
