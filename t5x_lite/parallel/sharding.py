"""Where arrays live: the mesh, the rules from logical to mesh axes, and the helpers that use them.

Layers name *logical* axes only. Parameters: embed, mlp, heads, kv_heads, vocab, expert,
layers, norm, … Activations: act_batch, act_length, act_embed, … The two families have
different names because they shard differently: under FSDP a parameter's "embed" dim is
split over fsdp, an activation's is not. `Rules` maps each name to mesh axes and refuses
an unknown name, a mesh axis used twice and a size that does not divide, because a
misspelt name that silently meant "replicated" would cost memory and nothing would say so.

The mesh is Explicit: shardings are part of the array types, so a contraction whose result
is ambiguous is an error at trace time instead of a guess by the partitioner. All
contractions, weight uses and lookups therefore go through `einsum`, `dense`, `weight`,
`lookup`, `reshape` and `shard` below; without an active mesh they are the plain jnp calls.

Shape letters: B batch, L length, D model, F output features, V vocabulary.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t5x_lite.errors import Axis, UserError, known, refuse
from t5x_lite.parallel import products

Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the device count. One may be -1: the rest.

    Outermost first: neighbours in the last axis are neighbours on the interconnect, so the
    chattiest parallelism (tensor) stands last and the most patient (slices, over DCN) first.
    """

    slice: Axis = 1     # TPU slices joined by the data-centre network
    stage: Axis = 1     # pipeline stages
    data: Axis = -1     # replicas: parameters repeated, batch split
    fsdp: Axis = 1      # batch split, parameters and optimizer state split too (ZeRO-3)
    expert: Axis = 1    # experts of MoE layers split; elsewhere the batch is
    sequence: Axis = 1  # length split (context parallelism)
    tensor: Axis = 1    # heads, mlp and vocabulary split (Megatron)


MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))


# Logical axis -> mesh axes. () is replicated.
DEFAULT_RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "router": (),
    "layers": ("stage",),
    "norm": (),                # scales and biases: ("fsdp",) splits these too, for one more gather
    "buckets": (),
    "position": (),
    "lora": (),
    "latent": ("fsdp",),       # what latent attention makes queries, keys and values of
    # activations
    # Outside its stacks of layers a pipeline splits the batch over its stages too.
    "act_batch": ("slice", "stage", "data", "fsdp", "expert"),
    "act_length": ("sequence",),
    # Length between the tensor-parallel layers: norms, dropout, residuals. With "tensor" added
    # (sharding.sequence_parallel) they are split too, as Korthikanti et al. 2022 describe.
    "act_norm_length": ("sequence",),
    "act_keys": (),            # the length of attention's keys: gathered
    "act_embed": (),
    "act_mlp": ("tensor",),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_vocab": ("tensor",),
}
# Mesh axes over which a stored weight is gathered before use.
GATHERED_AXES = ("fsdp",)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis name -> mesh axes, checked against a mesh."""

    table: Mapping[str, tuple[str, ...]] = dataclasses.field(
        default_factory=lambda: dict(DEFAULT_RULES))

    def __post_init__(self):
        for name, axes in self.table.items():
            known("sharding.rules", "logical axis", name, DEFAULT_RULES)
            for axis in axes:
                known(f"sharding.rules.{name}", "mesh axis", axis, MESH_AXES)

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of one logical axis; None is a dim that is never sharded."""
        if name is None:
            return ()
        return self.table[known("sharding.rules", "logical axis", name, self.table)]

    def spec(self, axes: Axes, sizes: Mapping[str, int], drop: Sequence[str] = ()) -> PartitionSpec:
        """The PartitionSpec of an array with these logical axes.

        Args:
            axes: one logical name or None a dim.
            sizes: mesh axis -> size; axes of size 1 or absent are left out of the spec.
            drop: mesh axes to leave out (a weight at use is not split over fsdp).
        Raises:
            UserError: unknown name, or one mesh axis on two dims.
        """
        used: dict[str, str | None] = {}
        dims: list[None | str | tuple[str, ...]] = []
        for name in axes:
            mesh_axes = tuple(a for a in self.mesh_axes(name)
                              if sizes.get(a, 1) > 1 and a not in drop)
            for axis in mesh_axes:
                if axis in used:
                    raise UserError(
                        f"sharding.rules: mesh axis {axis!r} would split two dims of one array, "
                        f"{used[axis]!r} and {name!r} of {axes}; map one of them to ().")
                used[axis] = name
            dims.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0] if mesh_axes else None)
        return PartitionSpec(*dims)

    def without(self, axis: str) -> "Rules":
        """Rules that split no dim over this mesh axis, and every dim over the others as before."""
        return Rules({name: tuple(a for a in axes if a != axis)
                      for name, axes in self.table.items()})

    def replace(self, **table: tuple[str, ...]) -> "Rules":
        """Rules with other mesh axes for these logical names; the other names keep theirs."""
        return Rules({**self.table, **table})

    def check(self, path: str, axes: Axes, units: Sequence[int], sizes: Mapping[str, int]) -> None:
        """Raises UserError unless every dim divides by its mesh axes.

        Args:
            units: what each dim consists of: num_heads for a merged heads * head_dim dim,
                because half a head on each of two devices is not tensor parallelism.
        """
        self.spec(axes, sizes)
        for name, unit in zip(axes, units, strict=True):
            ways = math.prod(sizes.get(a, 1) for a in self.mesh_axes(name))
            if unit % ways:
                raise UserError(
                    f"{path}: {unit} {name} cannot be split {ways} ways over mesh axes "
                    f"{self.mesh_axes(name)}; choose mesh sizes whose product divides {unit}, or "
                    f"replicate it with --config.sharding.rules.{name}='()'"
                    + (" and the same for act_kv_heads." if name == "kv_heads" else "."))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The Explicit device mesh with every axis of MESH_AXES, sizes from `config`.

    Raises:
        UserError: a size below 1 (other than one -1), a product that is not the device count,
            or a number of slices that the devices do not have.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve_mesh(config, len(devices))
    shape = tuple(sizes.values())
    # GPUs count hosts as slices, and any mesh may span those.
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if slices > 1 and sizes["slice"] != slices and devices[0].platform == "tpu":
        raise UserError(f"mesh.slice={sizes['slice']}: the devices stand in {slices} slices, "
                        f"joined by the data-centre network; set mesh.slice={slices}.")
    if sizes["slice"] == slices > 1:
        array = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (sizes["slice"], *(1 for _ in shape[1:])), devices=devices)
    else:
        array = mesh_utils.create_device_mesh(
            shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def resolve_mesh(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """{mesh axis: size} with -1 filled in. Raises UserError as make_mesh does."""
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise refuse(f"mesh.{axis}", size, "a positive number, or -1 for the rest")
    shown = ", ".join(f"{a}={n}" for a, n in sizes.items() if n != 1) or "all 1"
    free = [a for a, n in sizes.items() if n == -1]
    fixed = math.prod(n for n in sizes.values() if n != -1)
    if len(free) > 1:
        raise UserError(f"mesh: only one axis may be -1, not {' and '.join(free)} ({shown}).")
    if free and num_devices % fixed == 0:
        return {**sizes, free[0]: num_devices // fixed}
    if not free and num_devices == fixed:
        return sizes
    multiple = "a multiple of " if free else ""
    raise UserError(f"mesh ({shown}) needs {multiple}{fixed} devices, but there {_are(num_devices)}; "
                    f"sizes must multiply to {num_devices} (its divisors: "
                    f"{_divisors(num_devices)}), and one may be -1.")


def _are(count: int) -> str:
    return f"is {count}" if count == 1 else f"are {count}"


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=Rules())


@contextlib.contextmanager
def activate(mesh: Mesh, rules: Rules):
    """Everything traced inside is sharded over `mesh` by `rules`."""
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)


@contextlib.contextmanager
def using(rules: Rules):
    """Other rules on the same mesh for what is traced inside."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


_mapped: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("mapped", default=())


@contextlib.contextmanager
def inside(axis: str):
    """For tracing a function under jax.vmap over a dim that lies on mesh axis `axis` (pipeline
    stages, slices): its arrays have no such dim, and no rule may name the axis.

    Differentiate the mapped function, do not map the differentiated one: see `manual`.
    """
    token = _mapped.set((*_mapped.get(), axis))
    try:
        with using(active_rules().without(axis)):
            yield
    finally:
        _mapped.reset(token)


def as_here(fn: Callable) -> Callable:
    """fn with the rules of this moment, whenever it is traced: JAX traces the backward pass of
    a custom_vjp after everything else, outside of what its call was inside of."""
    rules, mapped = _rules.get(), _mapped.get()

    def wrapped(*args):
        token = _mapped.set(mapped)
        try:
            with using(rules):
                return fn(*args)
        finally:
            _mapped.reset(token)
    return wrapped


def active_rules() -> Rules:
    """The rules that `activate` set."""
    return _rules.get()


def mesh_sizes() -> dict[str, int]:
    """{mesh axis: size} of the active mesh; {} without one, and on a device's own part of the
    arrays (inside a shard_map over all axes), where the helpers below are the plain calls."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind != AxisType.Manual}
    return dict(mesh.shape) if ours - {*_mapped.get()} else {}


def mapped() -> bool:
    """Whether whole arrays are traced for several stages or slices at once (see `inside`)."""
    return bool(_mapped.get() and mesh_sizes())


def spec(*axes: str | None) -> PartitionSpec | None:
    """The PartitionSpec of these logical axes on the active mesh, None without a mesh."""
    sizes = mesh_sizes()
    return _rules.get().spec(axes, sizes) if sizes else None


def named_sharding(mesh: Mesh, rules: Rules, axes: Axes) -> NamedSharding:
    """The NamedSharding of an array with these logical axes."""
    return NamedSharding(mesh, rules.spec(axes, dict(mesh.shape)))


def mesh_axes_of(dim: None | str | tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes of one dim of a PartitionSpec."""
    if dim is None:
        return ()
    return (dim,) if isinstance(dim, str) else tuple(dim)


def local_bytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    """Bytes that one device holds of an array, of what describes one, or of a tracer: its largest block."""
    mesh = jax.typeof(x).sharding.mesh
    ways = (math.prod(mesh.shape[axis] for axis in axes) for axes in split_of(x))
    return x.dtype.itemsize * math.prod(-(-size // n) for size, n in zip(x.shape, ways, strict=True))


def split_of(x: jax.Array | jax.ShapeDtypeStruct) -> list[tuple[str, ...]]:
    """The mesh axes that each dim of an array, or of its tracer, is split over."""
    partitions = jax.typeof(x).sharding.spec.partitions
    return [*map(mesh_axes_of, partitions), *[()] * (x.ndim - len(partitions))]


def spec_of(x: jax.Array) -> PartitionSpec | None:
    """The PartitionSpec of an array, or of its tracer; None without a mesh."""
    sharding = jax.typeof(x).sharding
    return None if sharding.mesh.empty else sharding.spec


def place_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """x on the shards of `like`, an array of its shape; x itself where they agree."""
    target = jax.typeof(like).sharding
    if target.mesh.empty or target == jax.typeof(x).sharding:
        return x
    return jax.sharding.reshard(x, target)


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """x with the sharding of these logical axes."""
    sharding = spec(*axes)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def weight(w: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
    """A parameter as a contraction uses it: cast, then gathered over fsdp.

    The cast comes first so that half the bytes travel; the gradient goes back the same way,
    reduce-scattered onto the stored sharding.
    """
    w = w.astype(dtype)
    sizes = mesh_sizes()
    if not sizes:
        return w
    return jax.sharding.reshard(w, _rules.get().spec(axes, sizes, drop=GATHERED_AXES))


@dataclasses.dataclass(frozen=True)
class WholeWeight:
    """A parameter that every device holds whole and whose gradient is born split (ZeRO-2).

    It stands where a parameter's array would; `[...]` gives the array. Differentiate with
    respect to `part`: as with a weight stored split, each layer's gradient is reduce-scattered
    where it arises, instead of being summed whole on every device.
    """

    whole: jax.Array
    part: jax.Array   # zeros of the same shape and dtype, sharded as the gradient is to be

    def __getitem__(self, index) -> jax.Array:
        assert index is Ellipsis, index
        return _whole(self.whole, self.part, jax.typeof(self.part).sharding.spec)


jax.tree_util.register_dataclass(WholeWeight, data_fields=["whole", "part"], meta_fields=[])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _whole(whole: jax.Array, part: jax.Array, spec: PartitionSpec) -> jax.Array:
    return whole


_whole.defvjp(lambda whole, part, spec: (whole, None),
              lambda spec, _, g: (None, jax.sharding.reshard(g, spec)))


def manual(fn: Callable, in_specs: tuple, out_specs: Any, check_vma: bool = True) -> Callable:
    """jax.shard_map over all mesh axes, also for what `inside` maps over some of them.

    JAX 0.10 cannot map a shard_map over a dim that is split over an Explicit axis (its batching
    rules put that axis into the manual region). So the mapping is spelt out: the dim becomes
    one of the shard_map's own, of which each device has one entry. The rule that does so has
    no transpose, hence what `inside` asks for.

    Args:
        fn: of the devices' parts; all its arrays must be arguments.
        in_specs, out_specs: PartitionSpecs, one an argument or a tree of them; out_specs a
            tree like the result.
        check_vma: see jax.shard_map.
    """
    return _manual(fn, in_specs, out_specs, check_vma, _mapped.get())


def _manual(fn, in_specs, out_specs, check_vma, mapped):
    call = jax.shard_map(fn, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    if not mapped:
        return call
    is_spec = lambda node: isinstance(node, PartitionSpec)
    call = jax.custom_batching.custom_vmap(call)

    @call.def_vmap
    def rule(size, batched, *args):
        specs = jax.tree.map(lambda spec, arg: jax.tree.map(lambda _: spec, arg), in_specs, args,
                             is_leaf=is_spec)
        specs = jax.tree.map(lambda b, spec: PartitionSpec(mapped[-1], *spec) if b else spec,
                             tuple(batched), specs)

        def one(*parts):
            parts = jax.tree.map(lambda b, x: x[0] if b else x, tuple(batched), parts)
            return jax.tree.map(lambda y: y[None], fn(*parts))

        outs = jax.tree.map(lambda spec: PartitionSpec(mapped[-1], *spec), out_specs,
                            is_leaf=is_spec)
        result = _manual(one, specs, outs, check_vma, mapped[:-1])(*args)
        return result, jax.tree.map(lambda _: True, result)
    return call


def einsum(equation: str, *operands: jax.Array, out: Axes, **kwargs) -> jax.Array:
    """jnp.einsum whose result has the logical axes `out`."""
    return jnp.einsum(equation, *operands, out_sharding=spec(*out), **kwargs)


def product(x: jax.Array, w: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    if products.applies(x, w):
        return products.product(x, w, spec)
    return jnp.einsum("...D,DF->...F", x, w, out_sharding=spec)


def dense(x: jax.Array, w: jax.Array, out: Axes,
          product: Callable[[jax.Array, jax.Array, PartitionSpec | None], jax.Array] = product
          ) -> jax.Array:
    """x_…D @ w_DF with logical axes `out` on the result.

    Leading dims are flattened to one: XLA's CPU backend runs the 2-D product 1.3 times as
    fast as the batched one, and the others do not mind. A length dim that is sharded cannot
    be merged with the batch, so that case keeps them apart.

    Where x's length is split more finely than the result's (act_norm_length under sequence
    parallelism) it is gathered first; where less, partial sums are reduce-scattered onto it.

    Args:
        product: what multiplies, (x_…D with one leading dim or more, w_DF, spec of the result).
    """
    lead = x.shape[:-1]
    if mesh_sizes():
        given, wanted = jax.typeof(x).sharding.spec, PartitionSpec(*spec(*out) or ())
        x = jax.sharding.reshard(x, PartitionSpec(
            *(b if set(mesh_axes_of(b)) <= set(mesh_axes_of(a)) else a
              for a, b in zip(given[:-1], wanted[:-1], strict=True)), given[-1]))
        if any((*given[1:-1], *wanted[1:-1])):
            return product(x, w, wanted)
    if len(lead) == 1:
        return product(x, w, spec(*out))
    y = product(x.reshape(math.prod(lead), x.shape[-1]), w, spec(out[0], out[-1]))
    return reshape(y, (*lead, w.shape[-1]), *out)


def sum_of_copies(x: jax.Array) -> jax.Array:
    """[n, …] split over an axis of copies -> [...], their sum, laid out as each copy was.

    What the devices of one copy hold alike they share out before they add, and gather
    afterwards, so that each sends a different part along the axis of copies.
    """
    named: tuple = tuple(jax.typeof(x).sharding.spec)
    copies, *kept = named + (None,) * (x.ndim - len(named))
    used = {axis for dim in (copies, *kept) for axis in mesh_axes_of(dim)}
    parts = list(kept)
    for axis in (a for a, size in mesh_sizes().items() if size > 1 and a not in used):
        ways = [mesh_sizes()[axis] * math.prod(mesh_sizes()[a] for a in mesh_axes_of(d))
                for d in parts]
        fits = [i for i, way in enumerate(ways) if x.shape[1 + i] % way == 0]
        if fits:
            dim = max(fits, key=lambda i: x.shape[1 + i] // ways[i])
            parts[dim] = (*mesh_axes_of(parts[dim]), axis)
    x = jax.sharding.reshard(x, PartitionSpec(copies, *parts))
    return jax.sharding.reshard(jnp.sum(x, axis=0), PartitionSpec(*kept))


def reshape(x: jax.Array, shape: Sequence[int], *axes: str | None) -> jax.Array:
    """x reshaped, with these logical axes on the result."""
    return jax.lax.reshape(x, tuple(shape), out_sharding=spec(*axes))


def lookup(table: jax.Array, ids: jax.Array, out: Axes) -> jax.Array:
    """Rows of table_VD at ids_…, with logical axes `out`; the gradient is a scatter-add."""
    sharding = spec(*out)
    if sharding is None:
        return table[ids]
    table = jax.sharding.reshard(table, PartitionSpec())
    return table.at[ids].get(out_sharding=sharding)
