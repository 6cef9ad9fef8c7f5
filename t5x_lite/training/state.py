"""The training state: {"step", "params", "opt_state"}, nested dicts of arrays; where a part of
the model is frozen by models/peft.py, "params" is what trains and "frozen" the rest.

Shardings come from the parameter table's logical axes and the rules, never from names or
ranks of arrays.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from t5x_lite import tree
from t5x_lite.models.params import ModelDefinition, ParamInfo
from t5x_lite.models.peft import Tuning
from t5x_lite.parallel import sharding
from t5x_lite.parallel.disk import OnDisk
from t5x_lite.parallel.offload import ON_DEVICE, Places
from t5x_lite.parallel.sharding import Rules
from t5x_lite.training.optimizers import Optimizer

State = dict[str, Any]
# Of state["frozen"]: a copy of the parameters that the run starts from, by which it is measured.
REFERENCE = "reference"
HOST = "pinned_host"   # JAX's name for the host's memory that a device reads by itself


def check_divisible(table: Mapping[str, ParamInfo], mesh: Mesh, rules: Rules) -> None:
    """Raises UserError naming the first parameter that the mesh cannot split, in its units."""
    for info in table.values():
        rules.check(info.path, info.logical_axes, info.units, dict(mesh.shape))


def start(params: Mapping, optimizer: Optimizer, tuning: Tuning,
          key: jax.Array, trained: Mapping | None = None, *, copies: bool = False) -> State:
    """The state of step 0 with these parameters of the whole model.

    Call it under jit with out_shardings and, where it draws, outside the mesh context: there
    the compiler shards the random draws too instead of making whole parameters first.

    Args:
        key: draws what models/peft.py adds.
        trained: the trainable part, where it is not to be fresh.
        copies: keep a frozen copy of these parameters, as REFERENCE.
    """
    trainable, frozen = tuning.split(tree.flatten(params), key)
    if copies:
        frozen |= {f"{REFERENCE}/{path}": x for path, x in tree.flatten(params).items()}
    trainable = tree.unflatten(trainable) if trained is None else trained
    state = {"step": jnp.zeros((), jnp.int32), "params": trainable,
             "opt_state": optimizer.init(trainable)}
    return {**state, "frozen": tree.unflatten(frozen)} if frozen else state


def init(model: ModelDefinition, optimizer: Optimizer, tuning: Tuning, key: jax.Array, *,
         copies: bool = False) -> State:
    """A fresh state, drawn from the key; see `start`."""
    return start(model.init(key), optimizer, tuning, jax.random.fold_in(key, 1), copies=copies)


def logical_axes(model: ModelDefinition, optimizer: Optimizer) -> State:
    """The logical axes of every leaf of the state."""
    axes = lambda infos: tree.unflatten({p: i.logical_axes for p, i in infos.items()})
    frozen = {p: i for p, i in model.table.items() if p not in optimizer.table}
    copied = {f"{REFERENCE}/{p}": i for p, i in model.table.items()}
    return {"step": (), "params": axes(optimizer.table), "frozen": axes(frozen | copied),
            "opt_state": optimizer.state_logical_axes()}


def abstract(model: ModelDefinition, optimizer: Optimizer, mesh: Mesh, rules: Rules,
             tuning: Tuning, zero: int = 3, places: Places = ON_DEVICE, folder: str = "",
             copies: bool = False) -> State:
    """The state as ShapeDtypeStructs with their shardings, and OnDisk for what is kept there.

    Args:
        zero: ZeRO's stage (config.ShardingConfig); below 3 the fsdp axis splits the optimizer
            state and not the parameters.
        places: where parameters, moments and master copies are kept.
        folder: for those on disk.
        copies: see `start`.
    """
    shapes = jax.eval_shape(lambda: init(model, optimizer, tuning, jax.random.key(0), copies=copies))
    axes = tree.flatten(logical_axes(model, optimizer))

    def place(path, x):
        # What belongs to no parameter stays: it is small, and has no axes.
        part = path.partition("/")[0]
        kept_in = place_of(part, axes[path], places)
        whole = zero < 3 and part != "opt_state"
        placed = _placed(x, axes[path], mesh, rules, whole, HOST if kept_in == "host" else None)
        return placed if kept_in != "disk" else OnDisk(
            path, tuple(x.shape), x.dtype, placed.sharding, folder)
    return tree.map_with_path(place, shapes)


def place_of(part: str, axes: tuple[str | None, ...], places: Places) -> str:
    """Where an array of a part of the state is kept."""
    if part == "opt_state":
        return places.opt_state if any(axes) else "device"
    return places.params if axes[:1] == ("layers",) else "device"


def abstract_params(model: ModelDefinition, mesh: Mesh, rules: Rules, zero: int = 3,
                    places: Places = ON_DEVICE) -> dict:
    """The whole model's parameters as ShapeDtypeStructs with their shardings, nested."""
    memory = {"host": HOST, "device": None}
    return tree.unflatten({p: _placed(i, i.logical_axes, mesh, rules, zero < 3,
                                      memory[place_of("params", i.logical_axes, places)])
                           for p, i in model.table.items()})


def _placed(x, axes, mesh: Mesh, rules: Rules, whole: bool, memory: str | None = None
            ) -> jax.ShapeDtypeStruct:
    spec = rules.spec(axes, dict(mesh.shape), drop=sharding.GATHERED_AXES if whole else ())
    return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec, memory_kind=memory))


def shardings(abstract_tree: Mapping) -> Any:
    """The shardings of a tree of arrays or ShapeDtypeStructs."""
    return jax.tree.map(lambda x: x.sharding, abstract_tree)


def kept(abstract_tree: Mapping, *, on_host: bool) -> list:
    """The leaves that the host's memory keeps, or those that the device's does."""
    return [x for x in jax.tree.leaves(abstract_tree)
            if (x.sharding.memory_kind == HOST) == on_host]


def num_bytes_per_device(abstract_tree: Mapping) -> int:
    """Bytes that one device holds of a sharded tree."""
    return sum(map(sharding.local_bytes, jax.tree.leaves(abstract_tree)))
