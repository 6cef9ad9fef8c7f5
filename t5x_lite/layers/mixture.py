"""One device's part of a mixture of experts: what `MoE` (moe.py) runs inside jax.shard_map.

    batch axes  routing groups are split over them, the expert axis included
    expert      experts are split; two all-to-alls move the tokens
    fsdp        weights are gathered on use, gradients reduce-scattered
    tensor      hidden features are split; one sum over partial outputs

Which tokens are dropped depends on their routing group only, and random draws on a token's
place in the global batch, so one device and eight compute the same. Without a mesh it is the
same code with no axis to talk over.

Shape letters: B batch, L length, D model, F hidden, E experts (of all devices, or of this one
after the exchange), G groups, T tokens of a group, N = G * T tokens, K choices, C capacity, M
buffer rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jax.sharding import PartitionSpec

from t5x_lite.layers import dispatch, grouped, routing
from t5x_lite.layers.config import MoEConfig
from t5x_lite.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Placement:
    """Mesh axes of size above 1 by their role here; all empty without a mesh."""

    group: tuple[str, ...] = ()    # routing groups are split over these
    expert: tuple[str, ...] = ()   # experts are
    tensor: tuple[str, ...] = ()   # hidden features are

    @property
    def varying(self) -> tuple[str, ...]:
        """All axes over which devices compute different things."""
        return self.group + self.tensor

    def first_feature(self, local: int) -> jax.Array | int:
        """Index of this device's first hidden feature, of which it has `local`."""
        return jax.lax.axis_index(self.tensor) * local if self.tensor else 0


def placement() -> Placement:
    """The placement that the active mesh and rules give."""
    sizes, rules = sharding.mesh_sizes(), sharding.active_rules()
    expert = tuple(a for a in rules.mesh_axes("expert") if sizes.get(a, 1) > 1)
    gathered = tuple(a for name in ("embed", "mlp") for a in rules.mesh_axes(name)
                     if a in sharding.GATHERED_AXES)
    wanted = rules.mesh_axes("act_batch") + expert + gathered
    group = tuple(dict.fromkeys(a for a in wanted if sizes.get(a, 1) > 1))
    tensor = tuple(a for a in rules.mesh_axes("mlp")
                   if sizes.get(a, 1) > 1 and a not in sharding.GATHERED_AXES)
    return Placement(group, expert, tensor)


def weight_spec(axes: sharding.Axes) -> PartitionSpec:
    """The stored sharding of a weight, less what this layer neither splits nor gathers."""
    place, stored = placement(), sharding.spec(*axes) or ()
    known = {*place.expert, *place.tensor, *sharding.GATHERED_AXES}
    dims = [tuple(a for a in sharding.mesh_axes_of(dim) if a in known) for dim in stored]
    return PartitionSpec(*(dim or None for dim in dims))


def _gather(w: jax.Array, spec: PartitionSpec, place: Placement) -> jax.Array:
    """A device's part of a weight with its fsdp splits gathered, its expert split never."""
    for i, dim in enumerate(spec):
        axes = tuple(a for a in sharding.mesh_axes_of(dim)
                     if a in sharding.GATHERED_AXES and a not in place.expert)
        if axes:
            w = jax.lax.all_gather(w, axes, axis=i, tiled=True)
    return dispatch.vary(w, place.varying)


def uniform(seed_2: jax.Array, row: jax.Array, features: int, first: jax.Array | int = 0):
    """float32 in [0, 1), [rows, features]: a pure function of seed, row and feature indices,
    so that a token draws the same wherever it is computed (Salmon et al. 2011).

    Args:
        seed_2: uint32 [2].
        row: int32 [rows], global indices.
        first: global index of the first feature.
    """
    shape = (row.shape[0], features)
    column = jnp.arange(features, dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
    counters = [jnp.broadcast_to(c, shape).reshape(-1)
                for c in (row.astype(jnp.uint32)[:, None], column)]
    bits = threefry_2x32(seed_2, jnp.concatenate(counters))[:shape[0] * shape[1]]
    return (bits.reshape(shape) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


@dataclasses.dataclass(frozen=True)
class Run:
    """What is fixed about one traced call."""

    config: MoEConfig
    activation: Callable
    place: Placement
    specs: Mapping[str, PartitionSpec]  # of the arrays that `mixture` is given
    tokens: int                         # of a group
    room: int | None                    # of an expert for a group; None: dropless
    train: bool


def _route(x_ND: jax.Array, arrays: Mapping[str, jax.Array], mask_GT: jax.Array,
           place_N: jax.Array | None, run: Run):
    """(Routing or ExpertChoice, logits_GTE or None where nothing is learned), in float32.

    Args:
        place_N: int32, where each token stands in the global batch, in training.
    """
    config, router = run.config, routing.ROUTERS[run.config.router]
    groups, tokens = mask_GT.shape
    logits_GTE = None
    if router.learned:
        logits_GTE = _logits(x_ND, arrays, place_N, run).reshape(groups, tokens, -1)
    given = routing.RouterInput(
        config=config, capacity=run.room, mask_GT=mask_GT if config.mask_padding else None,
        logits_GTE=logits_GTE, train=run.train,
        tokens_GT=arrays["tokens"].reshape(groups, tokens) if router.by_token else None,
        draw=lambda: uniform(arrays["seeds"][1], place_N, 1).reshape(groups, tokens))
    return router.route(given), logits_GTE


def _logits(x_ND: jax.Array, arrays: Mapping[str, jax.Array], place_N: jax.Array | None,
            run: Run) -> jax.Array:
    """The router's float32 logits_NE."""
    x_ND = x_ND.astype(jnp.float32)
    if run.train and run.config.jitter:
        noise = uniform(arrays["seeds"][0], place_N, x_ND.shape[1])
        x_ND = routing.jitter(x_ND, noise, run.config.jitter)
    # HIGHEST: a TPU would otherwise multiply float32 as bfloat16.
    logits = jnp.einsum("ND,DE->NE", x_ND, arrays["router"], precision=jax.lax.Precision.HIGHEST)
    return logits + arrays.get("router_bias", 0.0)


class _Experts:
    """The MLPs of this device's experts: rows in, rows out, over both kinds of buffer."""

    def __init__(self, arrays: Mapping[str, jax.Array], run: Run):
        place = run.place
        self.config, self.place, self.activation = run.config.mlp, place, run.activation
        self.weights = {name: _gather(w, run.specs[name], place)
                        for name, w in arrays.items() if "." in name}
        if place.tensor and "wo.bias" in self.weights:
            # Partial outputs are summed over tensor: only one of them may hold the bias.
            owner = jax.lax.axis_index(place.tensor) == 0
            self.weights["wo.bias"] = jnp.where(owner, self.weights["wo.bias"], 0)
        self.shared = ()  # what every row's dropout needs: seed, first hidden feature here
        if run.train and self.config.dropout_rate:
            features = self.weights["wo.kernel"].shape[1]
            self.shared = (arrays["seeds"][2],
                           jnp.asarray(place.first_feature(features), jnp.int32))

    def _first(self, dense, x):
        names = ("wi_0", "wi_1") if self.config.gated else ("wi",)
        return tuple(dense(x, name) for name in names)

    def _second(self, dense, pre, choice, shared):
        h = self.activation(pre[0])
        if self.config.gated:
            h = h * pre[1]
        if shared:
            seed, feature = shared
            draws = uniform(seed, choice.reshape(-1), h.shape[-1], feature).reshape(h.shape)
            rate = self.config.dropout_rate
            h = jnp.where(draws >= rate, h / (1.0 - rate), 0).astype(h.dtype)
        return dense(h, "wo")

    def in_buffers(self, x_MD: jax.Array, choice_M: jax.Array, num_experts: int) -> jax.Array:
        """Rows in buffers of equal length, expert by expert -> rows likewise.

        Args:
            choice_M: which choice of the global batch each row is; what its dropout depends on.
        """
        axes, shape = self.place.expert, x_MD.shape
        x_ECD = x_MD.reshape(num_experts, -1, shape[1])
        choice_EC = choice_M.reshape(num_experts, -1)
        if axes:
            there = functools.partial(jax.lax.all_to_all, axis_name=axes, split_axis=0,
                                      concat_axis=1, tiled=True)
            x_ECD = there(x_ECD)
            choice_EC = there(choice_EC) if self.shared else choice_EC

        def dense(x_ECD, name):
            y = grouped.product(x_ECD, self.weights[f"{name}.kernel"])
            bias_EF = self.weights.get(f"{name}.bias")
            return y if bias_EF is None else y + bias_EF[:, None]

        y_ECD = self._second(dense, self._first(dense, x_ECD), choice_EC, self.shared)
        if axes:
            y_ECD = jax.lax.all_to_all(y_ECD, axes, split_axis=1, concat_axis=0, tiled=True)
        return y_ECD.reshape(shape)

    def packed(self, x_MD: jax.Array, choice_M: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Rows sorted by expert, sizes_E of each -> rows likewise."""
        if self.place.expert:
            plan, received_PE = dispatch.plan_exchange(sizes_E, self.place.expert, len(choice_M))
            slot, source, sizes_E = dispatch.received_layout(received_PE, plan.rows)
            x_MD = dispatch.spread(dispatch.exchange(x_MD, plan), slot, source)
            if self.shared:
                arrived = dispatch.send(choice_M[:, None], plan)
                choice_M = dispatch.spread(arrived, slot, source)[:, 0]
            else:
                choice_M = jnp.zeros_like(source)
        y_MD = grouped.grouped(self._first, self._second, self.weights, x_MD, choice_M,
                                self.shared, sizes_E)
        if self.place.expert:
            y_MD = dispatch.exchange_back(dispatch.collect(y_MD, slot, source), plan)
        return y_MD


def mixture(arrays: Mapping[str, jax.Array], run: Run) -> tuple[jax.Array, dict]:
    """One device's rows of the batch -> (y_BLD, {name: (sum, count)} over all devices)."""
    config, place = run.config, run.place
    x_BLD = arrays["x"]
    x_ND = x_BLD.reshape(-1, x_BLD.shape[-1])
    mask_GT = arrays["mask"].reshape(-1, run.tokens)
    place_N = None
    if run.train:
        length = x_BLD.shape[1]
        place_N = (arrays["rows"][:, None] * length + jnp.arange(length)).reshape(-1)
    choice, logits_GTE = _route(x_ND, arrays, mask_GT, place_N, run)
    experts = _Experts(arrays, run)
    rows_ND = dispatch.vary(x_ND, place.varying)
    if isinstance(choice, routing.ExpertChoice):
        source_M = dispatch.choice_source(choice, run.tokens)
        rows_MD = rows_ND.at[source_M].get(mode="fill", fill_value=0)
        choice_M = place_N[source_M] if experts.shared else source_M
        y_MD = experts.in_buffers(rows_MD, choice_M, config.num_experts)
        y_ND = dispatch.scatter_combine(y_MD, choice, source_M, x_ND.shape[0])
    else:
        if run.room is None:
            slot_NK, source_M, sizes_E = dispatch.sorted_layout(choice, config.num_experts)
            compute = functools.partial(experts.packed, sizes_E=sizes_E)
        else:
            slot_NK, source_M = dispatch.capacity_layout(choice, config.num_experts, run.room)
            compute = functools.partial(experts.in_buffers, num_experts=config.num_experts)
        choices, choice_M = slot_NK.shape[1], source_M
        if experts.shared:
            choice_M = place_N[source_M // choices] * choices + source_M % choices
        y_MD = compute(dispatch.spread(rows_ND, slot_NK, source_M), choice_M)
        gate_NK = dispatch.vary(choice.gate.reshape(-1, choices), place.varying)
        y_ND = dispatch.combine(y_MD, gate_NK, slot_NK, source_M)
    if place.tensor:
        y_ND = jax.lax.psum(y_ND, place.tensor)
    if config.overflow == "identity":
        skipped_N1 = ~choice.kept.any(axis=-1).reshape(-1, 1)
        best_N1 = jnp.max(routing.probabilities(logits_GTE), axis=-1).reshape(-1, 1)
        y_ND = y_ND + jnp.where(skipped_N1, best_N1.astype(x_ND.dtype) * x_ND, 0)
    counted_GT = _counted(arrays["mask"], run).reshape(-1, run.tokens)
    return y_ND.reshape(x_BLD.shape), _aux(choice, logits_GTE, counted_GT, run)


def _counted(mask_BL: jax.Array, run: Run) -> jax.Array:
    """bool [B, L]: the tokens that losses and metrics are about. The real ones, or where padding
    is routed as well all of them, but for rows that only fill evaluation's last batch."""
    if run.config.mask_padding:
        return mask_BL
    if run.train:
        return jnp.ones_like(mask_BL)
    return jnp.broadcast_to(jnp.any(mask_BL, axis=1, keepdims=True), mask_BL.shape)


def _aux(choice, logits_GTE, counted_GT, run: Run) -> dict:
    """Losses and metrics over all devices, as (sum, count).

    In evaluation all of them are sums that batches add up to, whatever the size of a batch:
    models/blocks.mixture_metrics makes of them what training shows.
    """
    config = run.config
    p_GTE = None if logits_GTE is None else routing.probabilities(logits_GTE)
    total = {} if logits_GTE is None else _router_losses(choice, logits_GTE, counted_GT, config)
    if not run.train:   # groups that only fill evaluation's last batch count in no mean
        used = jnp.sum(jnp.any(counted_GT, axis=1), dtype=jnp.float32)
        total = {name: (value, used) for name, (value, _) in total.items()}
    total |= routing.router_metrics(choice, p_GTE, counted_GT)
    total = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), total)
    total, load_E = jax.tree.map(
        lambda a: jax.lax.psum(dispatch.vary(a, run.place.group), run.place.group)
        if run.place.group else a,
        (total, routing.expert_load(choice, config.num_experts, counted_GT)))
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    weighted = [(weight, *total[name]) for name, weight in
                (("load_balancing_loss", config.balance_weight), ("router_z_loss", config.z_weight))
                if name in total and weight]
    moe = {f"moe/{name}": pair for name, pair in sorted(total.items())}
    if not run.train:
        groups = total["router_z_loss"][1] if logits_GTE is not None else one
        return {"aux_loss": (sum((w * value for w, value, _ in weighted), zero), groups),
                **moe, routing.EXPERT_LOAD: (load_E, one)}
    aux_loss = sum((w * value / count for w, value, count in weighted), zero)
    moe |= {f"moe/{name}": pair for name, pair in routing.load_metrics(load_E).items()}
    return {"aux_loss": (aux_loss, one), **dict(sorted(moe.items()))}


def _router_losses(choice, logits_GTE, counted_GT, config: MoEConfig) -> dict[str, tuple]:
    """{name: (sum over groups, groups)} of a learned router."""
    over_all = config.loss_mean == "all"
    losses = {"router_z_loss": routing.router_z_loss(logits_GTE, counted_GT, over_all)}
    if isinstance(choice, routing.Routing):
        picked = choice.expert_index[..., :1 if config.balance_choices == "first" else None]
        losses["load_balancing_loss"] = routing.load_balancing_loss(
            routing.probabilities(logits_GTE), picked, counted_GT, over_all)
    return losses
