"""The training state: {"step", "params", "opt_state"}, nested dicts of arrays.

Shardings come from the parameter table's logical axes and the rules, never from names or
ranks of arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from t5x_lite import sharding, tree
from t5x_lite.models import Model
from t5x_lite.optim import Optimizer
from t5x_lite.sharding import Rules

State = dict[str, Any]


def check_divisible(model: Model, mesh: Mesh, rules: Rules) -> None:
    """Raises UserError naming the first parameter that the mesh cannot split, in its units."""
    for info in model.table.values():
        rules.check(info.path, info.logical_axes, info.units, dict(mesh.shape))


def init(model: Model, optimizer: Optimizer, key: jax.Array) -> State:
    """A fresh state; call it under jit with out_shardings and outside the mesh context, where
    the compiler shards the random draws too instead of making whole parameters first."""
    params = model.init(key)
    return {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": optimizer.init(params)}


def logical_axes(model: Model, optimizer: Optimizer) -> State:
    """The logical axes of every leaf of the state."""
    return {"step": (),
            "params": tree.unflatten({p: i.logical_axes for p, i in model.table.items()}),
            "opt_state": optimizer.state_logical_axes()}


def abstract(model: Model, optimizer: Optimizer, mesh: Mesh, rules: Rules, zero: int = 3) -> State:
    """The state as ShapeDtypeStructs with their shardings.

    Args:
        zero: ZeRO's stage (config.ShardingConfig); below 3 the fsdp axis splits the optimizer
            state and not the parameters.
    """
    shapes = jax.eval_shape(lambda: init(model, optimizer, jax.random.key(0)))
    axes = tree.flatten(logical_axes(model, optimizer))

    def place(path, x):
        whole = zero < 3 and path.startswith("params/")
        spec = rules.spec(axes[path], dict(mesh.shape),
                          drop=sharding.GATHERED_AXES if whole else ())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    return tree.map_with_path(place, shapes)


def shardings(abstract_tree: Mapping) -> Any:
    """The shardings of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, abstract_tree)


def num_bytes_per_device(abstract_tree: Mapping) -> int:
    """Bytes that one device holds of a sharded tree."""
    total = 0
    for x in jax.tree.leaves(abstract_tree):
        local = x.sharding.shard_shape(x.shape)
        size = x.dtype.itemsize
        for n in local:
            size *= n
        total += size
    return total
