"""The optimizer of a run: gradients to new parameters, with clipping, weight decay and groups.

How a gradient becomes a step is a row of methods.METHODS; everything around that is here and alike
for all of them. They see float32 gradients and parameters and act per layer: an array that stacks
layers or experts is updated as its members would be.

The optimizer state is a plain nested dict, so that a checkpoint does not depend on optax's
classes or on their order in a chain:

    {"count": int32, <moment>: {nested like the parameters it covers}, …}

with the moments mu, nu (Adam), mu (Lion), trace (SGD with momentum), v_row, v_col, v, m
(Adafactor), those of other rows by their names in optax (optax_state.py), and, where the precision
policy asks, "master" (float32 parameters) and "loss_scale". With train.ema_decay d "ema" is the
float32 moving average of the parameters, a_t = d a_(t-1) + (1 - d) p_t from a_0 = p_0 on, of p_t before
it is rounded to its own type; a skipped step leaves it as it was. It is treated as a moment, and so is
"pending": with optimizer.delay_after the float32 gradients, clipped, that the next update will use
(Optimizer.apply). Frozen parameters have no state. A moment may be sharded more finely than its parameter (ZeRO-1): the update then runs on the moment's
shards and only the new parameters are gathered; every output keeps the sharding of its input. It
may also be kept in the host's memory (sharding.offload_optimizer): then it visits the device layer
by layer.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_lite import errors, tree
from t5x_lite.errors import UserError, nearest, one_of
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel import offload
from t5x_lite.parallel.sharding import place_like
from t5x_lite.training import optax_state, precision, schedules
from t5x_lite.training.methods import METHODS, GroupConfig, OptimizerConfig, Trained, stacked_dims

# Names in a state that are no moments of the transformation.
OWN = ("master", "loss_scale")
EMA = "ema"   # the moment that no transformation reads
PENDING = "pending"   # gradients that the next step's update uses, with optimizer.delay_after
Flat = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """An optimizer state taken apart, or that of some parameters."""

    moments: dict[str, Flat]
    rest: dict[str, jax.Array]         # "count", and numbers of the transformation's own
    masters: Flat                      # {} without a master copy
    scale: dict[str, jax.Array] | None   # of the loss

    @classmethod
    def of(cls, opt_state: Mapping) -> "Parts":
        others = {name: x for name, x in opt_state.items() if name not in OWN}
        return cls(
            {name: tree.flatten(x) for name, x in others.items() if isinstance(x, Mapping)},
            {name: x for name, x in others.items() if not isinstance(x, Mapping)},
            tree.flatten(opt_state.get("master", {})), opt_state.get("loss_scale"))

    def place_of(self, path: str, param: jax.Array) -> jax.Array:
        """The array of the parameter's shape with the finest sharding in reach: the update runs
        where the moments live."""
        for held in (self.masters, *self.moments.values()):
            if path in held and held[path].shape == param.shape:
                return held[path]
        return param


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What make_optimizer returns: pure functions of its arguments, fixed at build time."""

    config: OptimizerConfig
    policy: precision.Policy
    loss_scaling: precision.LossScaleConfig
    seed: int
    table: Mapping[str, ParamInfo]
    group_of: Mapping[str, int]           # path -> index into config.groups, -1 for none
    weight_decay: Mapping[str, float]     # path -> rate, trainable paths only
    transformation: optax.GradientTransformationExtraArgs
    # path -> what its learning rate is multiplied by for the model's width; {}: 1 for all
    width_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ema_decay: float = 0.0   # of the average of the parameters; 0: there is none

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """Paths that are never updated: a step need not differentiate them."""
        return frozenset(self.table) - self.weight_decay.keys()

    def init(self, params: Mapping) -> dict:
        """The state before the first update; trace it under jit with out_shardings."""
        flat = self.trainable(params)
        master = {path: p.astype(jnp.float32) for path, p in flat.items()}
        moments, rest = optax_state.apart(self.transformation.init(master), flat)
        assert not {*moments, *rest} & {*OWN, EMA, PENDING}, (moments.keys(), rest.keys())
        state = {name: tree.unflatten(x) for name, x in moments.items()}
        state |= {"count": jnp.zeros((), jnp.int32), **rest}
        if self.ema_decay:
            state[EMA] = tree.unflatten(master)
        if self.config.delay_after is not None:
            state[PENDING] = tree.unflatten({p: jnp.zeros_like(x) for p, x in master.items()})
        if self.policy.master_copy:
            state["master"] = tree.unflatten(master)
        if self.policy.loss_scaling:
            state["loss_scale"] = precision.loss_scale_init(self.loss_scaling)
        return state

    def state_logical_axes(self) -> dict:
        """Logical axes of every leaf of the state, nested alike: a moment has its parameter's
        (less the dim that Adafactor averaged away), other numbers have none."""
        abstract = jax.eval_shape(self.init, tree.unflatten(
            {p: jax.ShapeDtypeStruct(i.shape, i.dtype) for p, i in self.table.items()}))
        moment_axes = METHODS[self.config.name].moment_axes

        def axes(path, leaf):
            moment, _, name = path.partition("/")
            whole = (None,) * leaf.ndim
            if name not in self.table:
                return whole
            info = self.table[name]
            logical = tuple(info.logical_axes)
            # Adafactor's means of a square matrix's rows and columns are told apart by name.
            alike = leaf.shape == tuple(info.shape)
            if alike and not moment.startswith("v_"):
                return logical
            if moment_axes is None:
                return whole
            return moment_axes(self.config, moment, stacked_dims(logical), info.shape, logical)

        return tree.map_with_path(axes, abstract)

    def check_offload(self, field: str) -> None:
        """Raises UserError where the state holds more than counts and what mirrors parameters: a
        number that is made of all gradients at once cannot be made layer by layer.

        field: what asks for it, "sharding.offload=params_host".
        """
        abstract = jax.eval_shape(self.init, tree.unflatten(
            {p: jax.ShapeDtypeStruct(i.shape, i.dtype) for p, i in self.table.items()}))
        rest = Parts.of(abstract).rest
        shared = [name for name, x in rest.items() if not jnp.issubdtype(x.dtype, jnp.integer)]
        if shared:
            raise UserError(f"optimizer.name={self.config.name!r} keeps {', '.join(shared)} of all "
                            f"parameters together, which an update layer by layer ({field}) cannot make: "
                            f"set {field.partition('=')[0]}="
                            f"{False if field.endswith('=True') else 'none'}.")

    def loss_scale(self, opt_state: Mapping) -> jax.Array | float:
        """What the loss must be multiplied by before it is differentiated; update divides."""
        return opt_state["loss_scale"]["scale"] if self.policy.loss_scaling else 1.0

    def update(self, grads: Mapping, opt_state: Mapping, params: Mapping, step: jax.Array
               ) -> tuple[dict, dict, dict[str, jax.Array]]:
        """One update.

        Args:
            grads: of loss_scale times the loss, nested like params; frozen ones may be absent.
            step: int32, steps before this one; the schedules and the rounding read the updates
                before it, which are as many but for the one that optimizer.delay_after leaves out.
        Returns:
            (params, opt_state, info), info holding float32 scalars: learning_rate (of the
            parameters in no group) and grad_norm before clipping; under loss scaling also
            loss_scale and skipped (1.0 where an overflow left all as it was). The norm of the
            update is not among them: on CPU it would triple Adafactor's time.
        """
        flat_params, state = self.trainable(params), Parts.of(opt_state)
        places = {path: state.place_of(path, p) for path, p in flat_params.items()}
        old = {path: state.masters[path] if path in state.masters else
               place_like(p.astype(jnp.float32), places[path]) for path, p in flat_params.items()}
        flat_grads = self.trainable(grads)
        g = {path: place_like(flat_grads[path], x).astype(jnp.float32)
             for path, x in places.items()}
        made = self.updates_before(step)
        info = {"learning_rate": schedules.schedule(self.config.schedule)(made)}
        finite = None
        if state.scale is not None:
            g, finite = precision.unscale(g, state.scale)
        # The barrier keeps XLA's CPU backend from fusing the norm with Adafactor's means over
        # the same squares, which took three times as long. Around the norm alone: a barrier that
        # the gradients pass through copies them (4 rows of T5-small: 4.4 s a step, not 2.6; at 8
        # rows no difference was seen).
        info["grad_norm"] = jax.lax.optimization_barrier(optax.tree.norm(g))
        if self.config.clip_norm:
            factor = self.config.clip_norm / jnp.maximum(info["grad_norm"], self.config.clip_norm)
            g = {path: x * factor for path, x in g.items()}
        new, moments, rest = self._apply_where_kept(g, old, state, step, finite)

        new_state = {name: tree.unflatten(x) for name, x in moments.items()} | rest
        if state.masters:
            new_state["master"] = tree.unflatten(new)
            new = offload.to_device(new)
        rounded = {path: self._round(path, x, flat_params[path], made) for path, x in new.items()}
        if state.scale is not None:
            rounded = {path: jnp.where(finite, x, flat_params[path])
                       for path, x in rounded.items()}
            new_state["loss_scale"] = precision.loss_scale_adjust(
                state.scale, finite, self.loss_scaling)
            info |= {"loss_scale": state.scale["scale"], "skipped": 1.0 - finite}
        new_params = tree.unflatten({**tree.flatten(params), **rounded})
        return new_params, new_state, info

    def _apply_where_kept(self, g: Flat, old: Flat, state: Parts, step, finite
                          ) -> tuple[Flat, dict[str, Flat], dict[str, jax.Array]]:
        """`apply`, layer by layer for the stacks whose moments are kept in the host's memory:
        one layer's moments at a time are on the device. What is not stacked comes as a whole.

        Args:
            old: float32 parameters; master copies may be in the host's memory like moments.
        """
        apply = functools.partial(self.apply, rest=state.rest, step=step, finite=finite)
        kept = [*old.values(), *(x for moment in state.moments.values() for x in moment.values())]
        if not any(offload.is_on_host(x) for x in kept):
            return apply(g, old, state.moments)
        new: Flat = {}
        new_moments: dict[str, Flat] = {name: {} for name in state.moments}
        for layers, paths in self._alike(g):
            some = functools.partial(_at, paths)
            values = (some(old), {name: some(m) for name, m in state.moments.items()})
            over = offload.each_layer if layers else offload.at_once
            done = over(lambda g, values: apply(g, *values)[:2], some(g), values)
            new |= done[0]
            for name, moment in done[1].items():
                new_moments[name] |= moment
        return new, new_moments, self.counted(state.moments, state.rest, step, finite)

    def counted(self, moments: Mapping[str, Flat], rest: Mapping, step, finite
                 ) -> dict[str, jax.Array]:
        """The state's numbers that belong to no layer, which go on once an update; of the rest of
        this one nothing is computed."""
        path = min(self.weight_decay, key=lambda p: self.table[p].size)
        blank = {path: jnp.zeros(self.table[path].shape)}
        return self.apply(blank, blank, {
            name: {path: jnp.zeros(moment[path].shape, moment[path].dtype)
                   for path in blank if path in moment} for name, moment in moments.items()},
            rest=rest, step=step, finite=finite)[2]

    def _alike(self, g: Flat) -> list[tuple[int, list[str]]]:
        """(layers, paths) of stacks of as many layers (or experts), and (0, all other paths)."""
        alike: dict = {}
        for path, x in g.items():
            axes = tuple(self.table[path].logical_axes)
            key = (axes[0], x.shape[0]) if stacked_dims(axes) else ("", 0)
            alike.setdefault(key, []).append(path)
        return [(layers, paths) for (_, layers), paths in alike.items()]

    def updates_before(self, step: jax.Array) -> jax.Array:
        """Updates made in so many steps."""
        after = self.config.delay_after
        return step if after is None else step - (step > after)

    def apply(self, g: Flat, old: Flat, moments: Mapping[str, Flat], *, rest, step, finite
               ) -> tuple[Flat, dict[str, Flat], dict[str, jax.Array]]:
        """Clipped float32 gradients and parameters to (new parameters, new moments by name, the
        state's other numbers), the old ones where `finite` is False.

        With optimizer.delay_after N (ZeRO-Offload, Ren et al. 2021, section 5.2) step t, counted
        from 0, uses g_t where t < N, nothing where t = N, and from then on the pending g_(t-1),
        which was taken at the parameters of before the last update; g_t is then pending.
        """
        after = self.config.delay_after
        if after is None:
            return self._apply_now(g, old, moments, rest=rest, step=step, finite=finite)
        pending = moments[PENDING]
        used = {path: jnp.where(step < after, x, pending[path]) for path, x in g.items()}
        new, new_moments, new_rest = self._apply_now(
            used, old, {name: x for name, x in moments.items() if name != PENDING}, rest=rest,
            step=self.updates_before(step), finite=step != after)
        return new, {**new_moments, PENDING: g}, new_rest

    def _apply_now(self, g: Flat, old: Flat, moments: Mapping[str, Flat], *, rest, step, finite
                   ) -> tuple[Flat, dict[str, Flat], dict[str, jax.Array]]:
        """`apply` with these gradients."""
        method, rates = METHODS[self.config.name], self._learning_rates(step)
        if method.decay == "gradient":
            g = {path: x + self.weight_decay[path] * old[path] if self.weight_decay[path] else x
                 for path, x in g.items()}
        # Which arrays there are depends on the paths: some of them come here alone.
        like = jax.eval_shape(self.transformation.init, old)
        steps, optax_new = self.transformation.update(
            g, optax_state.together(like, moments, rest, old), old, learning_rate=rates)
        new = {path: p - self._change(steps[path], p, rates[path], self.weight_decay[path])
               for path, p in old.items()}
        given, new_rest = optax_state.apart(optax_new, old)
        new_moments = {name: {path: place_like(x, moments[name][path]) for path, x in held.items()}
                       for name, held in given.items()}
        if EMA in moments:
            new_moments[EMA] = {path: self._averaged(x, new[path]) for path, x in moments[EMA].items()}
        new_rest = {"count": optax.safe_increment(rest["count"]), **new_rest}
        if finite is not None:
            new, new_moments, new_rest = jax.tree.map(
                lambda a, b: jnp.where(finite, a, b), (new, new_moments, new_rest),
                (old, moments, rest))
        return new, new_moments, new_rest

    def _averaged(self, average: jax.Array, param: jax.Array) -> jax.Array:
        """The moving average after a step that gave these parameters."""
        return average + (1 - self.ema_decay) * (place_like(param, average) - average)

    def _change(self, step: jax.Array, param: jax.Array, rate: jax.Array, decay: float
                ) -> jax.Array:
        """What is subtracted from the parameter."""
        method = METHODS[self.config.name]
        change = step if method.scales_by_rate else rate * step
        if not decay or method.decay != "change":
            return change
        return change + decay * rate ** self.config.weight_decay_lr_exponent * param

    def _learning_rates(self, step) -> dict[str, jax.Array]:
        """{trainable path: float32 scalar}, one computation a group."""
        groups = (GroupConfig(""), *self.config.groups)  # -1 + 1: no group
        rates = [schedules.schedule(group.schedule or self.config.schedule)(step)
                 * group.learning_rate_multiplier for group in groups]
        found = {path: rates[self.group_of[path] + 1] for path in self.weight_decay}
        return found | {path: factor * found[path] for path, factor in self.width_rates.items()}

    def _round(self, path, new, old_param, step) -> jax.Array:
        """The float32 value as the parameter's own type, on the parameter's own shards."""
        if self.policy.stochastic_rounding and old_param.dtype == jnp.bfloat16:
            # Threefry by name: the bits of other generators may depend on the sharding.
            key = jax.random.key(self.seed, impl="threefry2x32")
            key = jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(path.encode()))
            new = precision.stochastic_round(new, key)
        return place_like(new.astype(old_param.dtype), old_param)

    def trainable(self, nested: Mapping) -> Flat:
        """The part of a nested dict that is updated, flat."""
        flat = tree.flatten(nested)
        missing = [path for path in self.weight_decay if path not in flat]
        assert not missing, f"no value for {missing[:5]}"
        return {path: flat[path] for path in self.weight_decay}


def _at(paths, flat: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a flat dict {path: value} whose paths are among `paths`."""
    return {path: flat[path] for path in paths if path in flat}


def make_optimizer(config: OptimizerConfig, table: Mapping[str, Any],
                   policy: precision.Policy = precision.POLICIES["float32"],
                   loss_scaling: precision.LossScaleConfig = precision.LossScaleConfig(),
                   seed: int = 0, width: float = 1.0, ema_decay: float = 0.0) -> Optimizer:
    """The optimizer of a model.

    Args:
        table: path -> ParamInfo of every parameter (models.parameter_table).
        policy: decides master copies, rounding and loss scaling.
        seed: of stochastic rounding.
        width: over that of the model whose learning rate was tuned, see models/parametrization.py.
        ema_decay: of a moving average of the parameters; 0: none is kept.
    Raises:
        UserError: an unknown name, a pattern that is no regex or matches nothing, a number
            out of range, or nothing left to train.
    """
    _check(config)
    if config.delay_after is not None and policy.loss_scaling:
        raise UserError(f"optimizer.delay_after={config.delay_after} keeps gradients for the next "
                        "step, whose loss scale may be another than theirs: use precision=bf16 or "
                        "float32, or set optimizer.delay_after=None.")
    group_of = _assign_groups(config, table)
    decay = {path: _decay_of(config, info, group_of[path]) for path, info in table.items()}
    weight_decay = {path: rate for path, rate in decay.items() if rate is not None}
    if not weight_decay:
        raise UserError("optimizer.groups freeze every parameter; leave at least one to train.")
    width_rates = _width_rates(config, {path: table[path] for path in weight_decay}, width)
    if METHODS[config.name].decay == "change":   # its rate is the base's: see _change
        weight_decay |= {path: weight_decay[path] / factor ** config.weight_decay_lr_exponent
                         for path, factor in width_rates.items()}
    axes = {path: tuple(table[path].logical_axes) for path in weight_decay}
    trained = Trained(axes, {path: stacked_dims(a) for path, a in axes.items()}, weight_decay)
    transformation = optax.with_extra_args_support(
        METHODS[config.name].transformation(config, trained))
    return Optimizer(config, policy, loss_scaling, seed, dict(table), group_of, weight_decay,
                     transformation, width_rates, ema_decay)


def _width_rates(config: OptimizerConfig, trained: Mapping[str, ParamInfo], width: float
                 ) -> dict[str, float]:
    """{path: factor of the learning rate}, where it is not 1."""
    powers = METHODS[config.name].widths(config)
    factors = {path: width ** powers[info.role] for path, info in trained.items()
               } if width != 1.0 else {}
    return {path: factor for path, factor in factors.items() if factor != 1.0}


def _decay_of(config: OptimizerConfig, info: ParamInfo, group: int) -> float | None:
    """A parameter's weight decay; None where it is frozen."""
    own = config.groups[group] if group >= 0 else GroupConfig("")
    if own.frozen:
        return None
    if own.weight_decay is not None:
        return own.weight_decay
    is_matrix = len(info.shape) - stacked_dims(tuple(info.logical_axes)) >= 2
    return config.weight_decay if is_matrix else 0.0


def until(config: OptimizerConfig, num_steps: int) -> OptimizerConfig:
    """The config with schedules, its own and its groups', that end at num_steps where they do not
    say when."""
    groups = tuple(group if group.schedule is None else dataclasses.replace(
        group, schedule=schedules.until(group.schedule, num_steps)) for group in config.groups)
    return dataclasses.replace(config, groups=groups,
                               schedule=schedules.until(config.schedule, num_steps))


def _check(config: OptimizerConfig) -> None:
    one_of("optimizer.name", config.name, METHODS)
    one_of("optimizer.momentum_dtype", config.momentum_dtype, ("float32", "bfloat16"))
    errors.check(config, "optimizer")
    schedules.schedule(config.schedule)
    for group in config.groups:
        if group.schedule is not None:
            schedules.schedule(group.schedule)


def _assign_groups(config: OptimizerConfig, table: Mapping[str, Any]) -> dict[str, int]:
    """path -> index of its group, -1 for none; every group must have members."""
    rules = []
    for index, group in enumerate(config.groups):
        where = f"optimizer.groups[{index}].pattern={group.pattern!r}"
        try:
            matches = [path for path in table if re.fullmatch(group.pattern, path)]
        except re.error as error:
            raise UserError(f"{where} is not a regular expression: {error}.") from error
        if not matches:
            raise UserError(f"{where} matches no parameter.{nearest(group.pattern, table)} It "
                            f"must match a whole path, such as {next(iter(table))!r}.")
        rules.append((group.pattern, index))
        taken = [path for path in matches if tree.first_match(rules, path)[0] == index]
        if not taken:
            raise UserError(f"{where} matches only parameters that earlier groups already took, "
                            f"such as {matches[0]!r}; put it first or drop it.")
    matches = {path: tree.first_match(rules, path) for path in table}
    return {path: match[0] if match else -1 for path, match in matches.items()}
