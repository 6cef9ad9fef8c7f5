"""The train step of an optimizer whose state is on disk: several programs, a layer's moments at a time.

    gradients    state and batch to gradients and metrics: what every train step begins with
    a layer      parameters, gradients and one layer's moments to new ones; the moments of the next
                 layers are read meanwhile, and those of the layers before written (parallel/disk.py)
    the rest     counts, the loss scale, metrics

Arrays that are stacked in no layers (embeddings, the last norm) are a piece together. Memory holds the
parameters, the gradients, and the moments of at most AHEAD + BEHIND + 1 pieces.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite import tree
from t5x_lite.parallel import disk
from t5x_lite.training.layerwise import FINITE, Layerwise, Shared, held_of, with_info
from t5x_lite.training.objectives import Sums
from t5x_lite.training.optimizers import OWN, Flat
from t5x_lite.training.state import State


class StreamedStep:
    """(state, batch) -> (state, {metric: (sum, count)}), as steps.make_train_step's; it consumes the state.

    What of the state is on disk is written over. Call it in the program's context.
    """

    def __init__(self, gradient_step: Callable, layerwise: Layerwise, abstract_state: State):
        self._gradient_step, self._layerwise = gradient_step, layerwise
        self._held = held_of(abstract_state["opt_state"])
        self._pieces = [(layers, paths, {name: {p: x[p] for p in paths if p in x}
                                         for name, x in self._held.items()})
                        for layers, paths in layerwise.pieces()]
        self._visits = disk.Visits([
            ((number, layer), disk.kept(held), layer if layers else None)
            for number, (layers, _, held) in enumerate(self._pieces)
            for layer in range(max(layers, 1))])
        self.gradients = jax.jit(self._begin)
        # In one program with the update XLA would copy a stack for every layer that is put into it.
        self._cut, self._put = jax.jit(_cut), jax.jit(_put, donate_argnums=0)
        self._update = jax.jit(layerwise.update_some, donate_argnums=(1, 2))
        self._end = jax.jit(self._after)

    def compile(self, abstract_state: State, abstract_batch: Mapping) -> "StreamedStep":
        """Compiles the gradients, which take the longest; the others are compiled when first met."""
        compiled = copy.copy(self)   # batches of other sizes may follow
        compiled.gradients = self.gradients.lower(abstract_state, abstract_batch).compile()
        return compiled

    def __call__(self, state: State, batch: Mapping) -> tuple[State, Sums]:
        grads, sums, shared = self.gradients(state, batch)
        params, good = tree.flatten(state["params"]), []
        for number, (layers, paths, held) in enumerate(self._pieces):
            some = {path: params[path] for path in paths}
            some_grads = {path: grads.pop(path) for path in paths}
            for layer in range(max(layers, 1)):
                moments = _like(held, self._visits.take((number, layer)))
                g, p = self._cut((some_grads, some), layer) if layers else (some_grads, some)
                new, moments, finite = self._update(g, p, moments, shared)
                some = self._put(some, new, layer) if layers else new
                self._visits.put((number, layer), jax.tree.leaves(moments))
                good.append(finite)
            params |= some
        step, rest, sums = self._end(shared, sums, good)
        return {**state, "step": step, "params": tree.unflatten(params),
                "opt_state": {**state["opt_state"], **rest}}, sums

    def _begin(self, state: State, batch: Mapping) -> tuple[Flat, Sums, Shared]:
        grads, sums = self._gradient_step(state, batch)
        shared = self._layerwise.shared(grads, state["opt_state"], state["step"])
        return self._layerwise.optimizer.trainable(grads), sums, shared

    def _after(self, shared: Shared, sums: Sums, good: list[jax.Array]) -> tuple[jax.Array, dict, Sums]:
        rest, info = self._layerwise.after(
            shared, {name: x for name, x in self._held.items() if name not in OWN})
        info[FINITE] = jnp.concatenate(good).all()
        return shared.step + 1, rest, with_info(sums, info)


def _cut(stacks: Any, layer: jax.Array) -> Any:
    """[layers, …] -> [1, …] of each stack."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, layer, 1, 0), stacks)


def _put(stacks: Flat, parts: Flat, layer: jax.Array) -> Flat:
    """The stacks with a layer replaced."""
    return jax.tree.map(lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, layer, 0),
                        stacks, parts)


def _like(held: Mapping[str, Mapping[str, Any]], arrays: list[jax.Array]) -> dict:
    """`held` with these arrays for what it has on disk."""
    return jax.tree.unflatten(jax.tree.structure(held, is_leaf=disk.is_on_disk), arrays)
