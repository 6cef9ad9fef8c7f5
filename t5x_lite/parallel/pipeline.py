"""Running a stack of equal layers: one after another, or as a pipeline over mesh.stage.

`run_layers` is the one place that decides how stacked parameters become a sequence of layer
applications, so that memory policy and schedule are config values and the layers know
nothing of them.

Pipelining. Outside the stacks the `stage` axis splits the batch, so that embeddings and
logits are computed once. Inside, it splits the layers. The rows of the batch are regrouped
into micro-batches, one work item a micro-batch and round; at tick t, stage s works on item
t - s, then hands its result to stage s + 1:

    stage 0  m0 m1 m2 m3  .  .  .      GPipe (Huang et al. 2019): M micro-batches fill and
    stage 1   . m0 m1 m2 m3  .  .      drain S stages in M + S - 1 ticks, of which every
    stage 2   .  . m0 m1 m2 m3  .      stage idles S - 1.
    stage 3   .  .  . m0 m1 m2 m3

    circular (interleaved, Narayanan et al. 2021): a stage holds R groups of layers and every
    micro-batch goes round R times, S micro-batches at a time: the idle share falls from
    (S - 1) / (M + S - 1) to (S - 1) / (M R + S - 1).

    1f1b: GPipe's forward pass, and a backward pass that holds at most S micro-batches, see
    pipeline_schedules.one_f_one_b.

A tick is one vmap of the stage's layers over a leading stage dim, which lies on the mesh's
`stage` axis: tensor, fsdp and data parallelism inside a stage are what they are outside. Only
the hand-over is a hand-written collective. Micro-batches live on the stage whose rows they
are made of; a ring that turns one stage a tick feeds them to stage 0 in order, and another
one brings the results home, so no device ever holds the whole batch.

Shape letters: S stages, R rounds, K layers a stage and round, G groups of S micro-batches,
b rows of a micro-batch.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_lite.errors import UserError, at_least, one_of
from t5x_lite.parallel import offload, remat, sharding
from t5x_lite.parallel.pipeline_schedules import (
    SCHEDULES,
    PipelineConfig,
    Plan,
    fill_drain,
    one_f_one_b,
)


def validate(config: PipelineConfig, where: str, stages: int, repeats: Sequence[int],
             rows: int, ways: int) -> None:
    """Raises UserError for a stack that cannot be pipelined.

    Args:
        where: the stack, such as "model.decoder".
        repeats: of the stack's segments.
        rows: of a batch (of an accumulated one: of one part).
        ways: into how many the mesh splits a batch, stages included.
    """
    one_of(f"{where}.pipeline.schedule", config.schedule, SCHEDULES)
    at_least(f"{where}.pipeline.circular_repeats", config.circular_repeats, 1)
    if stages == 1:
        return
    plan = config.plan(stages)
    for i, n in enumerate(repeats):
        if n % (stages * plan.rounds):
            each = f" x {plan.rounds} (circular_repeats)" if plan.rounds > 1 else ""
            raise UserError(
                f"{where}.segments[{i}].repeats={n} cannot be divided among mesh.stage={stages}"
                f"{each} stages; choose a number of stages that divides {n}.")
    if plan.microbatches < stages or plan.microbatches % stages:
        raise UserError(f"{where}.pipeline.num_microbatches={plan.microbatches} must be a "
                        f"multiple of mesh.stage={stages}.")
    if rows % (ways * plan.groups):
        raise UserError(
            f"{where}.pipeline.num_microbatches={plan.microbatches}: {rows} rows cannot be split "
            f"into so many micro-batches over a mesh that splits each {ways // stages} ways; the "
            f"rows must be a multiple of {ways * plan.groups}.")


def run_layers(layer_fn: Callable, stacked: Any, x: jax.Array, xs: Any, inputs: Any, *,
               repeats: int, scan: bool, remat_policy: str, pipeline: PipelineConfig | None = None
               ) -> tuple[jax.Array, Any, dict[str, tuple[jax.Array, jax.Array]]]:
    """Applies `repeats` layers one after another.

    Args:
        layer_fn: (x, layer parameters, slice of xs, inputs) -> (x, outputs); it must reach
            every array through its arguments.
        stacked: the layers' parameters; every leaf has a leading dim of size `repeats`.
        x: the carried activations, leading dim rows.
        xs: per-layer inputs (layer indices, caches), leading dim `repeats` too.
        inputs: what all layers share; leaves that have a leading dim of x's rows belong to
            those rows and accompany them through a pipeline.
        scan: True compiles one layer and loops (short compiles, needed for large models);
            False unrolls, which XLA's CPU backend runs faster.
        remat_policy: see remat.py.
        pipeline: how to run where mesh.stage > 1; None runs the layers one after another
            there too, fetching each from its stage (decoding with a cache).
    Returns:
        The last x; the layers' outputs, stacked on a leading dim, or in a pipeline summed over
        a stage's layers, averaged over micro-batches and stacked over stages; and
        {metric: (sum, count)} of the pipeline: pipeline_bubble, the share of idle stage-ticks.
    """
    # Inside of what is computed again: parameters in the host's memory are fetched again too.
    fn = remat.remat(lambda x, layer, *rest: layer_fn(
        remat.tag(x, "layer_input"), offload.to_device(layer), *rest), remat_policy, in_scan=scan)
    stages = sharding.mesh_sizes().get("stage", 1)
    if stages == 1:
        x, outputs = _in_turn(fn, stacked, x, xs, inputs, repeats, scan)
        return x, outputs, {}
    if pipeline is None:
        x, outputs = _fetched(fn, stacked, x, xs, inputs, repeats)
        return x, outputs, {}
    return _pipelined(fn, stacked, x, xs, inputs, repeats, scan, pipeline, stages)


def _in_turn(fn, stacked, x, xs, inputs, repeats, scan):
    if scan:
        return jax.lax.scan(lambda carry, layer: fn(carry, *layer, inputs), x, (stacked, xs))
    # unstack's transpose is one stack; slicing layer by layer would add up padded gradients.
    layers = jax.tree.map(functools.partial(jnp.unstack, axis=0), (stacked, xs))
    outputs = []
    for i in range(repeats):
        layer, here = jax.tree.map(lambda leaf, i=i: leaf[i], layers,
                                   is_leaf=lambda node: isinstance(node, tuple)
                                   and bool(node) and isinstance(node[0], jax.Array))
        x, out = fn(x, layer, here, inputs)
        outputs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _fetched(fn, stacked, x, xs, inputs, repeats):
    """One layer after another, each copied to all stages when its turn comes."""
    def fetch(leaf, i):
        # A gather, not a slice: one row cannot stay split over the stages.
        spec = jax.typeof(leaf).sharding.spec
        return leaf.at[i[None]].get(out_sharding=PartitionSpec(None, *spec[1:]))[0]

    def step(carry, at):
        i, here = at
        return fn(carry, jax.tree.map(lambda leaf: fetch(leaf, i), stacked), here, inputs)
    return jax.lax.scan(step, x, (jnp.arange(repeats), xs))


def _pipelined(fn, stacked, x, xs, inputs, repeats, scan, config, stages):
    plan = config.plan(stages)
    layers_each = repeats // (stages * plan.rounds)
    side = _SideInputs(inputs, rows=x.shape[0])

    def of_round(leaf, round_):
        if plan.rounds == 1:
            return leaf[0]
        return jax.lax.dynamic_index_in_dim(leaf, round_, 0, keepdims=False)

    def stage_fn(weights, row, round_):
        (layers, xs), shared = weights
        x, travelling = row
        layers, xs = jax.tree.map(lambda leaf: of_round(leaf, round_), (layers, xs))
        x, outputs = _in_turn(fn, layers, x, xs, side.join(travelling, shared), layers_each, scan)
        return x, jax.tree.map(lambda o: jnp.sum(o, axis=0), outputs)

    weights = (jax.tree.map(functools.partial(_to_stages, plan=plan), (stacked, xs)),
               [_on_every_stage(leaf, stages) for leaf in side.shared])
    split = functools.partial(_split_rows, plan=plan)
    groups = (split(x), [split(leaf) for leaf in side.travelling])
    schedule = one_f_one_b if config.schedule == "1f1b" else fill_drain
    y, outputs, idle = schedule(stage_fn, plan, weights, groups)
    outputs = jax.tree.map(lambda o: o / plan.microbatches, outputs)
    bubble = (jnp.sum(idle).astype(jnp.float32), jnp.float32(stages * plan.ticks))
    return _join_rows(y, x), outputs, {"pipeline_bubble": bubble}


class _SideInputs:
    """A tree of what layers read beside x, taken apart into what travels with a micro-batch's
    rows (masks, biases, the encoder's output) and what every stage shares.

    Random keys are shared, as their uint32 data: a mapped or scanned array must be numbers.

    Attributes:
        travelling: the leaves [B, …] with one entry per row.
        shared: the other leaves.
    """

    def __init__(self, tree: Any, rows: int):
        leaves, self._structure = jax.tree.flatten(tree)
        self._keys = [jax.random.key_impl(leaf) if _is_key(leaf) else None for leaf in leaves]
        self._travels = [not _is_key(leaf) and leaf.shape[:1] == (rows,) for leaf in leaves]
        data = [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in leaves]
        self.travelling = [leaf for leaf, t in zip(data, self._travels, strict=True) if t]
        self.shared = [leaf for leaf, t in zip(data, self._travels, strict=True) if not t]

    def join(self, travelling: list, shared: list) -> Any:
        """The tree with other leaves in the places of `travelling` and `shared`."""
        moving, fixed = iter(travelling), iter(shared)
        data = [next(moving if t else fixed) for t in self._travels]
        return jax.tree.unflatten(self._structure, [
            leaf if impl is None else jax.random.wrap_key_data(leaf, impl=impl)
            for leaf, impl in zip(data, self._keys, strict=True)])


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


# --- layouts ------------------------------------------------------------------------------------

def _row_axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that split a batch before `stage` does (slices), and after it."""
    axes = PartitionSpec(*sharding.spec("act_batch") or ())[0]
    axes = axes if isinstance(axes, tuple) else (axes,)
    if "stage" not in axes:
        raise UserError("sharding.rules.act_batch must contain 'stage' where mesh.stage > 1: "
                        "outside its layers a pipeline splits the batch over its stages.")
    at = axes.index("stage")
    return axes[:at], axes[at + 1:]


def _split_rows(x: jax.Array, plan: Plan) -> jax.Array:
    """[B, …] -> [S, G, b, …] with micro-batch g * S + s at [s, g], without communication.

    Stage s's rows are the s-th block of B, and its g-th micro-batch every G-th row of them:
    every device keeps the rows it has.
    """
    (outer, inner), rest = _row_axes(), jax.typeof(x).sharding.spec[1:]
    blocks = math.prod(sharding.mesh_sizes()[a] for a in outer)
    rows = x.shape[0] // plan.microbatches
    x = jax.sharding.reshard(x, PartitionSpec((*outer, "stage", *inner), *rest))
    x = jax.lax.reshape(
        x, (blocks, plan.stages, rows // blocks, plan.groups, *x.shape[1:]),
        out_sharding=PartitionSpec(outer, "stage", inner, None, *rest))
    x = jnp.moveaxis(x, (1, 3), (0, 1))
    return jax.lax.reshape(x, (plan.stages, plan.groups, rows, *x.shape[4:]),
                           out_sharding=PartitionSpec("stage", None, outer + inner, *rest))


def _join_rows(y: jax.Array, like: jax.Array) -> jax.Array:
    """y [S, G, b, …] -> [B, …], in the order that _split_rows took apart, sharded as `like`."""
    (outer, inner), rest = _row_axes(), jax.typeof(y).sharding.spec[3:]
    blocks = math.prod(sharding.mesh_sizes()[a] for a in outer)
    stages, groups, rows = y.shape[:3]
    y = jax.lax.reshape(y, (stages, groups, blocks, rows // blocks, *y.shape[3:]),
                        out_sharding=PartitionSpec("stage", None, outer, inner, *rest))
    y = jax.lax.reshape(jnp.moveaxis(y, (0, 1), (1, 3)), like.shape,
                        out_sharding=PartitionSpec((*outer, "stage", *inner), *rest))
    return jax.sharding.reshard(y, jax.typeof(like).sharding.spec)


def _on_every_stage(x: jax.Array, stages: int) -> jax.Array:
    """x as [S, …], a copy a stage: cotangents are then added up over stages once, at the end."""
    spec = PartitionSpec("stage", *jax.typeof(x).sharding.spec)
    return jax.lax.broadcast(x, (stages,), out_sharding=spec)


def _to_stages(x: jax.Array, plan: Plan) -> jax.Array:
    """Stacked layers [S R K, …] -> [S, R, K, …]: layer (r S + s) K + k at [s, r, k].

    With one round the layers stay where they are stored. With more, stage s needs every S-th
    group of K layers where it stores R groups in a row: the groups change places, one
    exchange of the parameters a step, so that checkpoints do not depend on the schedule.
    """
    stages, rounds = plan.stages, plan.rounds
    spec = jax.typeof(x).sharding.spec
    x = jax.sharding.reshard(x, PartitionSpec("stage", *spec[1:]))
    shape = (stages, rounds, x.shape[0] // (stages * rounds), *x.shape[1:])
    x = jax.lax.reshape(x, shape, out_sharding=PartitionSpec("stage", None, None, *spec[1:]))
    if rounds == 1:
        return x
    exchanges = _exchanges(stages, rounds)

    def move(x):
        stage = jax.lax.axis_index("stage")
        new = jnp.zeros_like(x)
        for sends in exchanges:
            source = jnp.asarray([sends[s][1] for s in range(stages)])[stage]
            part = jax.lax.dynamic_index_in_dim(x, source, 1)
            part = jax.lax.ppermute(part, "stage", [(s, sends[s][0]) for s in range(stages)])
            came_from = {to: s for s, (to, _, _) in sends.items()}
            target = jnp.asarray([sends[came_from[s]][2] for s in range(stages)])[stage]
            new = jax.lax.dynamic_update_index_in_dim(new, part, target, 1)
        return new

    spec = jax.typeof(x).sharding.spec
    return sharding.manual(move, (spec,), spec)(x)


@functools.lru_cache
def _exchanges(stages: int, rounds: int) -> list[dict[int, tuple[int, int, int]]]:
    """Groups of layers to their stages in as many permutations as a stage holds groups.

    Group c is stored on stage c // R at c % R and computed on stage c % S in round c // S.
    Every stage sends and receives R groups, so the moves fall apart into R permutations
    (Koenig 1916): R times a perfect matching of senders and receivers.

    Returns:
        R dicts {from stage: (to stage, stored at, round)}.
    """
    left: dict[int, list[tuple[int, int, int]]] = {s: [] for s in range(stages)}
    for c in range(stages * rounds):
        left[c // rounds].append((c % stages, c % rounds, c // stages))

    def match(sender, taken, seen):
        """Augments `taken` {to stage: (from stage, move)} by one more sender."""
        for move in left[sender]:
            if move[0] not in seen:
                seen.add(move[0])
                if move[0] not in taken or match(taken[move[0]][0], taken, seen):
                    taken[move[0]] = (sender, move)
                    return True
        return False

    permutations = []
    for _ in range(rounds):
        taken: dict[int, tuple[int, tuple[int, int, int]]] = {}
        for sender in range(stages):
            matched = match(sender, taken, set())
            assert matched, (stages, rounds, sender)
        permutations.append({sender: move for sender, move in taken.values()})
        for sender, move in taken.values():
            left[sender].remove(move)
    return permutations
