"""Values kept in the host's memory that visit the device a layer at a time.

Moving whole trees at once would need the device memory that offloading is to save, and more
for the copies (1316 MiB where no offloading took 1236, in one measurement; by layers 934).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5x_lite.parallel.sharding import spec_of

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@dataclasses.dataclass(frozen=True)
class Places:
    """A row of OFFLOADS: where the arrays of a state are between their visits to the device."""

    opt_state: Literal["device", "host", "disk"] = "device"   # moments, averages, master copies
    params: Literal["device", "host"] = "device"


ON_DEVICE = Places()
# sharding.offload. Arrays that visit come a layer of a stack at a time.
OFFLOADS: dict[str, Places] = {
    "none": ON_DEVICE,
    "optimizer_host": Places(opt_state="host"),                 # ZeRO-Offload, Ren et al. 2021
    # L2L, Pudipeddi et al. 2020: gradients arise there too; what is in no stack stays on the device.
    "params_host": Places(opt_state="host", params="host"),
    "optimizer_disk": Places(opt_state="disk"),                 # ZeRO-Infinity, Rajbhandari et al. 2021
}


def to_device(tree: Any) -> Any:
    """The tree with what the host keeps of it on the device."""
    return jax.tree.map(lambda x: _move(x, DEVICE), tree)


def to_host(x: jax.Array) -> jax.Array:
    """The array in the host's memory."""
    return _move(x, HOST)


def at_once(fn: Callable[[Any, Any], Any], inputs: Any, kept: Any) -> Any:
    """fn(inputs, kept) on the device; the result, a tree like kept, returns where kept was."""
    return _back(fn(to_device(inputs), to_device(kept)), kept)


def total(fn: Callable[[jax.Array], jax.Array], x: jax.Array, layers: int) -> jax.Array:
    """fn(x), a sum over x [layers, …] or […]; of a stack in the host's memory a layer at a time."""
    if not layers or not is_on_host(x):
        return fn(to_device(x))

    def add(i, so_far):
        return so_far + fn(to_device(jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=True)))
    return jax.lax.fori_loop(0, layers, add, jnp.float32(0.0))


def each_layer(fn: Callable[[Any, Any], Any], inputs: Any, kept: Any) -> Any:
    """at_once for leaves [layers, …] and an fn that acts on each layer alone, a layer at a time.

    fn sees leaves [stages, …], one layer of each pipeline stage (without a pipeline: one).
    """
    layers = jax.tree.leaves(kept)[0].shape[0]
    ways = _ways(jax.tree.leaves(kept)[0])
    inputs, whole = jax.tree.map(lambda x: _split(x, ways), (inputs, kept))

    def layer(i, whole):
        at = lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
        here = jax.tree.map(at, whole)
        new = _back(fn(to_device(jax.tree.map(at, inputs)), to_device(here)), here)
        return jax.tree.map(
            lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, i, 1), whole, new)

    whole = jax.lax.fori_loop(0, layers // ways, layer, whole)
    return jax.tree.map(_join, whole, kept)


def is_on_host(x: jax.Array) -> bool:
    """Whether an array, or its tracer, is kept in the host's memory."""
    return jax.typeof(x).memory_space == HOST


def _move(x: jax.Array, space: Any) -> jax.Array:
    return x if jax.typeof(x).memory_space == space else jax.device_put(x, space)


def _back(new: Any, like: Any) -> Any:
    return jax.tree.map(lambda x, y: _move(x, jax.typeof(y).memory_space), new, like)


def _ways(x: jax.Array) -> int:
    """Into how many the mesh splits the layers."""
    sharding = jax.typeof(x).sharding
    return 1 if sharding.mesh.empty else x.shape[0] // sharding.shard_shape(x.shape)[0]


def _split(x: jax.Array, ways: int) -> jax.Array:
    """[layers, …] -> [ways, layers / ways, …]."""
    spec = spec_of(x)
    return jax.lax.reshape(x, (ways, x.shape[0] // ways, *x.shape[1:]),
                           out_sharding=spec and PartitionSpec(spec[0], None, *spec[1:]))


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.reshape(x, like.shape, out_sharding=spec_of(like))
