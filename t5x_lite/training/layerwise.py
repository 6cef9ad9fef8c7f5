"""An optimizer's update a layer at a time, for states of which the device never holds all.

`Optimizer.update` sees all arrays at once, and XLA fuses across them; here what is shared (the
gradients' norm, counts) comes first, then each piece alone, by the same arithmetic. A compiler may
fuse a multiplication and an addition in one and not in the other: without such instructions
(XLA_FLAGS=--xla_cpu_max_isa=SSE4_2) both give the same bits.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from t5x_lite import tree
from t5x_lite.parallel import offload
from t5x_lite.parallel.sharding import place_like
from t5x_lite.training import precision, schedules
from t5x_lite.training.optimizers import OWN, Flat, Optimizer, Parts

FINITE = "finite"   # the metric that says whether the updated state is; see steps.make_train_step


class Shared(NamedTuple):
    """What the updates of all parameters of a step share, see Layerwise.shared."""

    step: jax.Array
    rest: dict[str, jax.Array]           # of the state before it
    scale: dict[str, jax.Array] | None   # of the loss
    norm: jax.Array                      # of all gradients
    finite: jax.Array | None             # whether all gradients are; None where nobody asks


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """The pieces of an optimizer's update."""

    optimizer: Optimizer

    def shared(self, grads: Mapping, opt_state: Mapping, step: jax.Array) -> Shared:
        """What `update_some` of all parts of the parameters has in common.

        grads: as Optimizer.update's, wherever they are kept: the norm of stacks in the host's memory is
            added up a layer at a time.
        """
        flat, scale = self.optimizer.trainable(grads), opt_state.get("loss_scale")
        rest = Parts.of(opt_state).rest
        if any(offload.is_on_host(g) for g in flat.values()):
            squares = sum(offload.total(_squares, g, self.layers(p)) for p, g in flat.items())
            return Shared(step, rest, None, jnp.sqrt(squares), None)
        unscaled = {path: _unscaled(g, scale) for path, g in flat.items()}
        finite = None if scale is None else precision.all_finite(unscaled)
        norm = jax.lax.optimization_barrier(optax.tree.norm(unscaled))
        return Shared(step, rest, scale, norm, finite)

    def update_some(self, grads: Flat, params: Flat, held: Mapping[str, Flat], shared: Shared
                    ) -> tuple[Flat, dict[str, Flat], jax.Array]:
        """Optimizer.update of some parameters, whole arrays or a layer [1, …] of stacks.

        Args:
            held: the state's moments and master copies of these, {name: {path: array}}.
        Returns:
            (parameters, held, bool [1]: whether all of them are finite), each where its input is.
        """
        state = Parts({n: x for n, x in held.items() if n not in OWN}, shared.rest,
                       held.get("master", {}), shared.scale)
        places = {path: state.place_of(path, p) for path, p in params.items()}
        old = {path: state.masters[path] if path in state.masters else
               place_like(p.astype(jnp.float32), places[path]) for path, p in params.items()}
        g = {path: _unscaled(place_like(grads[path], x).astype(jnp.float32), shared.scale)
             for path, x in places.items()}
        if clip := self.optimizer.config.clip_norm:
            factor = clip / jnp.maximum(shared.norm, clip)
            g = {path: x * factor for path, x in g.items()}
        new, moments, _ = self.optimizer.apply(g, old, state.moments, rest=shared.rest,
                                               step=shared.step, finite=shared.finite)
        rounded = {path: place_like(x.astype(params[path].dtype), params[path])
                   for path, x in new.items()}
        if shared.finite is not None:
            rounded = {p: jnp.where(shared.finite, x, params[p]) for p, x in rounded.items()}
        made = rounded, moments | ({"master": new} if state.masters else {})
        # Behind the barrier nothing of the update is computed another way for being looked at.
        good = precision.all_finite(jax.lax.optimization_barrier(made))
        return *made, jnp.broadcast_to(good, (1,))

    def after(self, shared: Shared, moments: Mapping[str, Flat]
              ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """(the state's numbers that belong to no parameter, Optimizer.update's info) after an update."""
        made = self.optimizer.updates_before(shared.step)
        info = {"learning_rate": schedules.schedule(self.optimizer.config.schedule)(made),
                "grad_norm": shared.norm}
        rest = self.optimizer.counted(moments, shared.rest, shared.step, shared.finite)
        if shared.scale is not None:
            rest["loss_scale"] = precision.loss_scale_adjust(
                shared.scale, shared.finite, self.optimizer.loss_scaling)
            info |= {"loss_scale": shared.scale["scale"], "skipped": 1.0 - shared.finite}
        return rest, info

    def layers(self, path: str) -> int:
        """How many layers a parameter's array stacks; 0: it is one."""
        info = self.optimizer.table[path]
        return info.shape[0] if info.logical_axes[:1] == ("layers",) else 0

    def pieces(self) -> list[tuple[int, list[str]]]:
        """(layers, paths) of stacks of as many layers, and (0, paths) of all other arrays: what
        `update_some` takes at a time, a layer at a time of the former.

        An array alone would have other bits: XLA divides by a number once, where it has one user,
        and multiplies.
        """
        stacks: dict[int, list[str]] = {}
        for path in self.optimizer.weight_decay:
            if self.layers(path):
                stacks.setdefault(self.layers(path), []).append(path)
        alone = [path for path in self.optimizer.weight_decay if not self.layers(path)]
        return [*stacks.items(), *([(0, alone)] if alone else [])]

    def update(self, grads: Mapping, opt_state: Mapping, params: Mapping, step: jax.Array
               ) -> tuple[dict, dict, dict[str, jax.Array]]:
        """Optimizer.update for parameters in the host's memory, whose gradients are there too; info also
        has FINITE, of what the host keeps of the results."""
        flat_grads, flat_params = self.optimizer.trainable(grads), self.optimizer.trainable(params)
        shared, held = self.shared(grads, opt_state, step), held_of(opt_state)
        new, new_held, good = {}, {name: {} for name in held}, []
        for layers, paths in self.pieces():
            some = functools.partial(_at, paths)
            kept = (some(flat_params), {name: some(x) for name, x in held.items()},
                    jnp.ones(max(layers, 1), bool))
            over = offload.each_layer if layers else offload.at_once
            made, made_held, finite = over(
                lambda g, kept: self.update_some(g, *kept[:2], shared), some(flat_grads), kept)
            new, good = new | made, [*good, jnp.all(finite)]
            for name, x in made_held.items():
                new_held[name] |= x
        rest, info = self.after(shared, {n: x for n, x in held.items() if n not in OWN})
        info[FINITE] = jnp.stack(good).all()
        new_state = {name: tree.unflatten(x) for name, x in new_held.items()} | rest
        return tree.unflatten({**tree.flatten(params), **new}), new_state, info


def held_of(opt_state: Mapping) -> dict[str, dict[str, Any]]:
    """{name: {path: leaf}} of a state's moments and master copies."""
    return {name: tree.flatten(x) for name, x in opt_state.items()
            if isinstance(x, Mapping) and name != "loss_scale"}


def with_info(sums: Mapping, info: Mapping[str, jax.Array]) -> dict:
    """The metrics of a step with what its update says."""
    one = jnp.float32(1.0)
    return {**sums, **{name: (jnp.float32(x), one) for name, x in info.items()}}


def _unscaled(g: jax.Array, scale: Mapping[str, jax.Array] | None) -> jax.Array:
    g = g.astype(jnp.float32)
    return g if scale is None else g / scale["scale"]


def _squares(g: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(g.astype(jnp.float32)))


def _at(paths, flat: Mapping[str, Any]) -> dict[str, Any]:
    return {path: flat[path] for path in paths if path in flat}
