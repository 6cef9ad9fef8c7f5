"""Optimizers: gradients to new parameters, with clipping, weight decay and regex groups.

AdamW, Adam, Lion and SGD are optax's own transformations, Adafactor is ours (adafactor.py).
All of them see float32 gradients and parameters and act per layer: an array that stacks
layers or experts is updated as its members would be.

The optimizer state is a plain nested dict, so that a checkpoint does not depend on optax's
classes or on their order in a chain:

    {"count": int32, <moment>: {nested like the parameters it covers}, …}

with the moments mu, nu (Adam), mu (Lion), trace (SGD with momentum), v_row, v_col, v, m
(Adafactor), and, where the precision policy asks, "master" (float32 parameters) and
"loss_scale". Frozen parameters have no state. A moment may be sharded more finely than its
parameter (ZeRO-1): the update then runs on the moment's shards and only the new parameters
are gathered; every output keeps the sharding of its input. It may also be kept in the host's
memory (sharding.offload_optimizer): then it visits the device layer by layer.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t5x_lite import tree
from t5x_lite.errors import UserError, nearest
from t5x_lite.parallel import offload
from t5x_lite.training import adafactor, precision, schedules

# Leading logical axes that enumerate independent parameters.
STACK_AXES = ("layers", "expert")


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters whose whole path matches `pattern`; the first group that matches wins."""

    pattern: str
    learning_rate_multiplier: float = 1.0
    schedule: schedules.ScheduleConfig | None = None  # None: the optimizer's own
    weight_decay: float | None = None  # given: for every member, vectors too
    frozen: bool = False               # no update and no optimizer state


@dataclasses.dataclass(frozen=True)
class AdafactorConfig:
    """See adafactor.scale_by_adafactor."""

    factored: bool = True
    min_dim_size_to_factor: int = 128
    decay_rate: float = 0.8
    step_offset: int = 0
    clipping_threshold: float = 1.0
    multiply_by_parameter_scale: bool = True
    epsilon1: float = 1e-30
    epsilon2: float = 1e-3


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One optimizer for all parameters, with exceptions by group."""

    name: str = "adafactor"
    schedule: schedules.ScheduleConfig = schedules.ScheduleConfig()
    clip_norm: float = 0.0     # largest global gradient norm; 0: no clipping
    weight_decay: float = 0.0  # of matrices; biases and norm scales have none unless a group says
    # AdamW, Lion and Adafactor subtract weight_decay * learning_rate**exponent * parameter;
    # 0 is T5X's Adafactor, 2 (with weight_decay 1) PaLM's. Adam and SGD add
    # weight_decay * parameter to the gradient instead.
    weight_decay_lr_exponent: float = 1.0
    beta1: float = 0.9         # Adam, AdamW, Lion
    beta2: float = 0.999       # … (GPT-3 and LLaMA take 0.95, Lion 0.99)
    eps: float = 1e-8          # Adam, AdamW
    momentum: float = 0.0      # SGD, Adafactor
    momentum_dtype: str = "float32"  # of first moments: float32 or bfloat16
    adafactor: AdafactorConfig = AdafactorConfig()
    groups: tuple[GroupConfig, ...] = ()


def _adam(c: OptimizerConfig, stacked: Mapping[str, int]):
    return optax.scale_by_adam(c.beta1, c.beta2, c.eps, mu_dtype=c.momentum_dtype)


def _lion(c: OptimizerConfig, stacked: Mapping[str, int]):
    return optax.scale_by_lion(c.beta1, c.beta2, mu_dtype=c.momentum_dtype)


def _sgd(c: OptimizerConfig, stacked: Mapping[str, int]):
    if c.momentum:
        return optax.trace(c.momentum, accumulator_dtype=c.momentum_dtype)
    return optax.identity()


def _adafactor(c: OptimizerConfig, stacked: Mapping[str, int]):
    return adafactor.scale_by_adafactor(
        stacked, momentum=c.momentum, momentum_dtype=c.momentum_dtype,
        **dataclasses.asdict(c.adafactor))


@dataclasses.dataclass(frozen=True)
class _Method:
    """How a name becomes an optax transformation, and what is left to do around it."""

    transformation: Callable[[OptimizerConfig, Mapping[str, int]], optax.GradientTransformation]
    decoupled_decay: bool = True     # False: weight decay is part of the gradient
    scales_by_rate: bool = False     # True: the transformation applies the learning rate


METHODS: dict[str, _Method] = {
    "adafactor": _Method(_adafactor, scales_by_rate=True),
    "adamw": _Method(_adam),
    "adam": _Method(_adam, decoupled_decay=False),
    "lion": _Method(_lion),
    "sgd": _Method(_sgd, decoupled_decay=False),
}


def stacked_dims(logical_axes: tuple[str | None, ...]) -> int:
    """How many leading dims enumerate layers or experts. A lone ("expert",) is a vector."""
    count = 0
    while count < len(logical_axes) and logical_axes[count] in STACK_AXES:
        count += 1
    return count - (0 < count == len(logical_axes) and logical_axes[-1] == "expert")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What make_optimizer returns: pure functions of its arguments, fixed at build time."""

    config: OptimizerConfig
    policy: precision.Policy
    loss_scaling: precision.LossScaleConfig
    seed: int
    table: Mapping[str, Any]              # path -> models.ParamInfo
    group_of: Mapping[str, int]           # path -> index into config.groups, -1 for none
    weight_decay: Mapping[str, float]     # path -> rate, trainable paths only
    transformation: optax.GradientTransformationExtraArgs

    @functools.cached_property
    def frozen(self) -> frozenset[str]:
        """Paths that are never updated: a step need not differentiate them."""
        return frozenset(self.table) - self.weight_decay.keys()

    def init(self, params: Mapping) -> dict:
        """The state before the first update; trace it under jit with out_shardings."""
        flat = self._trainable(params)
        master = {path: p.astype(jnp.float32) for path, p in flat.items()}
        state = _unpack(self.transformation.init(master))
        state["count"] = jnp.zeros((), jnp.int32)
        if self.policy.master_copy:
            state["master"] = tree.unflatten(master)
        if self.policy.loss_scaling:
            state["loss_scale"] = precision.loss_scale_init(self.loss_scaling)
        return state

    def state_logical_axes(self) -> dict:
        """Logical axes of every leaf of the state, nested alike: a moment has its parameter's
        (less the dim that Adafactor averaged away), counts and scales have ()."""
        abstract = jax.eval_shape(self.init, tree.unflatten(
            {p: jax.ShapeDtypeStruct(i.shape, i.dtype) for p, i in self.table.items()}))

        def axes(path, leaf):
            moment, _, name = path.partition("/")
            if name not in self.table:
                return ()
            info = self.table[name]
            logical = tuple(info.logical_axes)
            if leaf.shape == tuple(info.shape) and moment not in ("v_row", "v_col"):
                return logical
            row, col = adafactor.factored_dims(
                info.shape, stacked_dims(logical), self.config.adafactor.min_dim_size_to_factor)
            gone = {"v_row": col, "v_col": row}[moment]
            return logical[:gone] + logical[gone + 1:]

        return tree.map_with_path(axes, abstract)

    def loss_scale(self, opt_state: Mapping) -> jax.Array | float:
        """What the loss must be multiplied by before it is differentiated; update divides."""
        return opt_state["loss_scale"]["scale"] if self.policy.loss_scaling else 1.0

    def update(self, grads: Mapping, opt_state: Mapping, params: Mapping, step: jax.Array
               ) -> tuple[dict, dict, dict[str, jax.Array]]:
        """One update.

        Args:
            grads: of loss_scale times the loss, nested like params; frozen ones may be absent.
            step: int32, updates before this one; the schedules and the rounding read it.
        Returns:
            (params, opt_state, info), info holding float32 scalars: learning_rate (of the
            parameters in no group) and grad_norm before clipping; under loss scaling also
            loss_scale and skipped (1.0 where an overflow left all as it was). The norm of the
            update is not among them: on CPU it would triple Adafactor's time.
        """
        flat_params, state = self._trainable(params), dict(opt_state)
        scale_state, master = state.pop("loss_scale", None), state.pop("master", None)
        moments = {name: tree.flatten(x) for name, x in state.items() if name != "count"}
        masters = tree.flatten(master) if master is not None else {}
        # The finest sharding in reach: the update runs where the moments live.
        places = {path: next((m[path] for m in (masters, *moments.values())
                              if path in m and m[path].shape == p.shape), p)
                  for path, p in flat_params.items()}
        old = {path: masters[path] if path in masters else adafactor.place_like(
            p.astype(jnp.float32), places[path]) for path, p in flat_params.items()}
        flat_grads = self._trainable(grads)
        g = {path: adafactor.place_like(flat_grads[path], x).astype(jnp.float32)
             for path, x in places.items()}
        info = {"learning_rate": schedules.schedule(self.config.schedule)(step)}
        finite = None
        if scale_state is not None:
            g, finite = precision.unscale(g, scale_state)
        # The barrier keeps XLA's CPU backend from fusing the norm with Adafactor's means over
        # the same squares, which took three times as long. Around the norm alone: a barrier that
        # the gradients pass through copies them (4 rows of T5-small: 4.4 s a step, not 2.6; at 8
        # rows no difference was seen).
        info["grad_norm"] = jax.lax.optimization_barrier(optax.tree.norm(g))
        if self.config.clip_norm:
            factor = self.config.clip_norm / jnp.maximum(info["grad_norm"], self.config.clip_norm)
            g = {path: x * factor for path, x in g.items()}
        new, new_moments = self._apply_where_kept(g, old, moments, state["count"], step, finite)

        count = optax.safe_increment(state["count"])
        new_state = {name: tree.unflatten(x) for name, x in new_moments.items()}
        if master is not None:
            new_state["master"] = tree.unflatten(new)
            new = offload.to_device(new)
        rounded = {path: self._round(path, x, flat_params[path], step) for path, x in new.items()}
        if scale_state is not None:
            count = jnp.where(finite, count, state["count"])
            rounded = {path: jnp.where(finite, x, flat_params[path])
                       for path, x in rounded.items()}
            new_state["loss_scale"] = precision.loss_scale_adjust(
                scale_state, finite, self.loss_scaling)
            info |= {"loss_scale": scale_state["scale"], "skipped": 1.0 - finite}
        new_params = tree.unflatten({**tree.flatten(params), **rounded})
        return new_params, {**new_state, "count": count}, info

    @functools.cached_property
    def _state_class(self) -> type:
        shapes = {path: jax.ShapeDtypeStruct(self.table[path].shape, jnp.float32)
                  for path in self.weight_decay}
        return type(jax.eval_shape(self.transformation.init, shapes))

    def _apply_where_kept(self, g, old, moments, count, step, finite):
        """_apply, layer by layer for the stacks whose moments are kept in the host's memory:
        one layer's moments at a time are on the device. What is not stacked comes as a whole.

        Args:
            old: float32 parameters; master copies may be in the host's memory like moments.
        """
        kept = [*(x for m in moments.values() for x in m.values()), *old.values()]
        if not any(offload.is_on_host(x) for x in kept):
            return self._apply(g, old, moments, count, step, finite)
        new, new_moments = {}, {name: {} for name in moments}
        alike = {}   # stacks of as many layers (or experts), and what is not stacked (0)
        for path, x in g.items():
            axes = tuple(self.table[path].logical_axes)
            key = (axes[0], x.shape[0]) if stacked_dims(axes) else ("", 0)
            alike.setdefault(key, []).append(path)
        for (_, layers), paths in alike.items():
            some = lambda flat, paths=paths: {path: flat[path] for path in paths if path in flat}
            values = (some(old), {name: some(m) for name, m in moments.items()})
            run = lambda g, values: self._apply(g, *values, count, step, finite)
            done = offload.each_layer(run, some(g), values) if layers else \
                offload.at_once(run, some(g), values)
            new |= done[0]
            for name, moment in done[1].items():
                new_moments[name] |= moment
        return new, new_moments

    def _apply(self, g, old, moments, count, step, finite=None):
        """Clipped float32 gradients and parameters to (new parameters, new moments by name), the
        old ones where `finite` is False."""
        config, method = self.config, METHODS[self.config.name]
        rates = self._learning_rates(step)
        if not method.decoupled_decay:
            g = {path: x + self.weight_decay[path] * old[path] if self.weight_decay[path] else x
                 for path, x in g.items()}
        steps, packed = self.transformation.update(
            g, _pack(self._state_class, moments, count), old, learning_rate=rates)
        new = {}
        for path, p in old.items():
            rate, decay = rates[path], self.weight_decay[path]
            change = steps[path] if method.scales_by_rate else rate * steps[path]
            if decay and method.decoupled_decay:
                change = change + decay * rate ** config.weight_decay_lr_exponent * p
            new[path] = p - change
        new_moments = {
            name: {path: adafactor.place_like(x, moments[name][path])
                   for path, x in tree.flatten(moment).items()}
            for name, moment in _unpack(packed).items()}
        if finite is not None:
            new, new_moments = jax.tree.map(
                lambda a, b: jnp.where(finite, a, b), (new, new_moments), (old, moments))
        return new, new_moments

    def _learning_rates(self, step) -> dict[str, jax.Array]:
        """{trainable path: float32 scalar}, one computation a group."""
        groups = (GroupConfig(""), *self.config.groups)  # -1 + 1: no group
        rates = [schedules.schedule(group.schedule or self.config.schedule)(step)
                 * group.learning_rate_multiplier for group in groups]
        return {path: rates[self.group_of[path] + 1] for path in self.weight_decay}

    def _round(self, path, new, old_param, step) -> jax.Array:
        """The float32 value as the parameter's own type, on the parameter's own shards."""
        if self.policy.stochastic_rounding and old_param.dtype == jnp.bfloat16:
            # Threefry by name: the bits of other generators may depend on the sharding.
            key = jax.random.key(self.seed, impl="threefry2x32")
            key = jax.random.fold_in(jax.random.fold_in(key, step), zlib.crc32(path.encode()))
            new = precision.stochastic_round(new, key)
        return adafactor.place_like(new.astype(old_param.dtype), old_param)

    def _trainable(self, nested: Mapping) -> dict[str, jax.Array]:
        flat = tree.flatten(nested)
        missing = [path for path in self.weight_decay if path not in flat]
        assert not missing, f"no value for {missing[:5]}"
        return {path: flat[path] for path in self.weight_decay}


def _unpack(state) -> dict:
    """An optax state (a NamedTuple of flat dicts and a count) as a nested dict, less the count
    and what is empty."""
    return {name: tree.unflatten(x) for name, x in state._asdict().items()
            if name != "count" and x}


def _pack(kind, moments, count):
    """The inverse: an optax state of this class from flat moments."""
    given = {name: moments.get(name, {}) for name in kind._fields if name != "count"}
    return kind(**given, count=count) if "count" in kind._fields else kind(**given)


def make_optimizer(config: OptimizerConfig, table: Mapping[str, Any],
                   policy: precision.Policy = precision.POLICIES["float32"],
                   loss_scaling: precision.LossScaleConfig = precision.LossScaleConfig(),
                   seed: int = 0) -> Optimizer:
    """The optimizer of a model.

    Args:
        table: path -> ParamInfo of every parameter (models.parameter_table).
        policy: decides master copies, rounding and loss scaling.
        seed: of stochastic rounding.
    Raises:
        UserError: an unknown name, a pattern that is no regex or matches nothing, a number
            out of range, or nothing left to train.
    """
    _check(config)
    group_of = _assign_groups(config, table)
    weight_decay, stacked = {}, {}
    for path, info in table.items():
        group = config.groups[group_of[path]] if group_of[path] >= 0 else GroupConfig("")
        if group.frozen:
            continue
        stacked[path] = stacked_dims(tuple(info.logical_axes))
        is_matrix = len(info.shape) - stacked[path] >= 2
        weight_decay[path] = (group.weight_decay if group.weight_decay is not None
                              else config.weight_decay if is_matrix else 0.0)
    if not weight_decay:
        raise UserError("optimizer.groups freeze every parameter; leave at least one to train.")
    transformation = optax.with_extra_args_support(
        METHODS[config.name].transformation(config, stacked))
    return Optimizer(config, policy, loss_scaling, seed, dict(table), group_of, weight_decay,
                     transformation)


def _check(config: OptimizerConfig) -> None:
    if config.name not in METHODS:
        raise UserError(f"optimizer.name={config.name!r} is unknown."
                        f"{nearest(config.name, METHODS)} Known: {', '.join(METHODS)}.")
    if config.momentum_dtype not in ("float32", "bfloat16"):
        raise UserError(f"optimizer.momentum_dtype={config.momentum_dtype!r}: "
                        f"must be float32 or bfloat16.")
    for name in ("beta1", "beta2", "momentum"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise UserError(f"optimizer.{name}={getattr(config, name)}: must be in [0, 1).")
    for name in ("clip_norm", "weight_decay"):
        if getattr(config, name) < 0.0:
            raise UserError(f"optimizer.{name}={getattr(config, name)}: must not be negative; "
                            f"0 turns it off.")
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
    found = {path: tree.first_match(rules, path) for path in table}
    return {path: match[0] if match else -1 for path, match in found.items()}
