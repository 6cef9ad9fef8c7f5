"""Every collective of a compiled program, by kind, mesh axes and bytes, loops counted out.

The text of an XLA program (`compiled.as_text()`) is the one place where the compiler says what
it will send. Reading it has three traps, which this module is about:

* A loop body stands there once, however often it runs: we multiply by trip counts, taken from
  known_trip_count (CPU, GPU) or from the loop's condition (TPU).
* Asynchronous collectives are cut into start, steps and done, on TPU each a fusion that shows
  the whole collective again: we count the start.
* Between slices a TPU program has no collective but a send and a recv, tagged with what the
  pair stands for: we count the recv.

Compiled text is per device and XLA may print it in new ways; an instruction that is not
understood raises ValueError that shows it, rather than being left out of a sum.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from t5x_lite.cost import hlo_text
from t5x_lite.cost.hlo_text import Instruction, Program, Step


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program, as often as a step runs it."""

    kind: str                 # one of hlo_text.KINDS
    axes: tuple[str, ...]     # mesh axes along which its group lies, in mesh order
    bytes_per_device: int     # the full buffer on one device: gathered, reduced or exchanged
    count_per_step: int       # loop trip counts applied
    in_loop: bool
    group_size: int           # devices that exchange with one another
    network: str = "fast"     # "fast": ICI; "dcn": between slices; GPUs: see roofline.by_machine
    # An all-reduce of zeros with this device's shard written into them: a weight gather that
    # the compiler replaced (on 3-D tori, see DESIGN.md), which moves twice the bytes.
    replaces_gather: bool = False
    exact_count: bool = True  # False: inside a loop whose length depends on data, counted once

    @property
    def bytes_per_step(self) -> int:
        return self.bytes_per_device * self.count_per_step

    @property
    def received_bytes(self) -> float:
        """Bytes one device must receive per step: B (n-1)/n, twice that for an all-reduce."""
        if self.kind == "collective-permute":
            return float(self.bytes_per_step)
        share = (self.group_size - 1) / self.group_size
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * share * self.bytes_per_step


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All the collectives of one kind along the same axes."""

    kind: str
    axes: tuple[str, ...]
    network: str
    replaces_gather: bool
    calls_per_step: int
    bytes_per_step: int       # sum of the full buffers on one device
    received_bytes: float     # of them, what one device must receive


@dataclasses.dataclass(frozen=True)
class MeshLayout:
    """What ties device numbers in the program to mesh axes.

    slice_ids: the slice of each device in mesh order, for a mesh over several slices: the
    compiled program is then one slice's and numbers that slice's devices from 0.
    """

    shape: tuple[int, ...]
    axis_names: tuple[str, ...]
    slice_ids: tuple[int, ...] = ()

    @property
    def num_slices(self) -> int:
        return len(set(self.slice_ids)) or 1

    @functools.cached_property
    def _local(self) -> np.ndarray:
        """Mesh positions (flat) of the devices that the program numbers 0, 1, …"""
        if self.num_slices == 1:
            return np.arange(math.prod(self.shape))
        return np.flatnonzero(np.asarray(self.slice_ids) == self.slice_ids[0])

    def axes_of(self, groups: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """The axes along which the members of any of the groups differ."""
        varies = np.zeros(len(self.shape), bool)
        for group in groups:
            places = np.unravel_index(self._local[np.asarray(group)], self.shape)
            varies |= [len(set(place.tolist())) > 1 for place in places]
        return tuple(name for name, v in zip(self.axis_names, varies, strict=True) if v)

    @property
    def num_local_devices(self) -> int:
        return len(self._local)

    def slice_axes(self) -> tuple[str, ...]:
        """The axes along which the slice changes."""
        ids = np.asarray(self.slice_ids).reshape(self.shape)
        return tuple(
            name for i, name in enumerate(self.axis_names)
            if (ids != np.take(ids, [0], axis=i)).any())


def find_collectives(text: str, mesh: MeshLayout) -> list[Collective]:
    """Every collective of the program, in the order of its text.

    Args:
        text: compiled.as_text(). It may fail on some TPUs: guard that call.
        mesh: of the devices the program was compiled for.
    Raises:
        ValueError for an instruction whose form is not known.
    """
    program = Program(text)
    collectives = (_collective(step, program, mesh) for step in program.walk())
    return [one for one in collectives if one is not None]


def totals(collectives: Sequence[Collective]) -> list[CollectiveTotal]:
    """One line for each kind and axes, the most expensive first."""
    groups: dict[tuple, list[Collective]] = collections.defaultdict(list)
    for one in collectives:
        groups[one.kind, one.axes, one.network, one.replaces_gather].append(one)
    lines = [
        CollectiveTotal(*key, calls_per_step=sum(one.count_per_step for one in members),
                        bytes_per_step=sum(one.bytes_per_step for one in members),
                        received_bytes=sum(one.received_bytes for one in members))
        for key, members in groups.items()]
    return sorted(lines, key=lambda line: -line.received_bytes)


# --- Matrix products --------------------------------------------------------------------------

def matmul_flops(text: str) -> float:
    """FLOPs of a compiled program's matrix products on one device, loops counted out.

    Of a loop whose length depends on data one turn counts, of a conditional the dearest branch.
    Counted are dot instructions, in fusions too (XLA:CPU, XLA:GPU with Triton), and the calls of
    cuBLAS; a TPU's convolutions and custom kernels are not.
    """
    program, known = Program(text), {}

    def flops(name: str) -> float:
        if name not in known:
            body = program.computations.get(name, {})
            known[name] = sum(_instruction_flops(one, body, program, flops)
                              for one in body.values())
        return known[name]
    return flops(program.entry)


def _instruction_flops(one: Instruction, body: Mapping[str, Instruction], program: Program,
                       flops: Callable[[str], float]) -> float:
    if one.opcode == "dot" or '"__cublas$' in one.rest:   # of a tuple the first is the product
        shape = hlo_text.ARRAY.search(one.type).group(2).split(",")
        return 2.0 * math.prod(int(dim) for dim in shape if dim) * _contracted(one, body)
    if one.opcode == "while":
        turns = program.trip_count(one, body)
        return flops(one.attribute(r"body=%?([\w.\-]+)")) * (1 if turns is None else turns)
    if one.opcode == "conditional":
        return max(map(flops, hlo_text.branches(one)))
    return sum(map(flops, hlo_text.CALLED.findall(one.rest)))


def _contracted(one: Instruction, body: Mapping[str, Instruction]) -> int:
    """The length over which a product adds up: the left operand's contracting dims."""
    dims = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") \
        or (one.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or "").replace('"', "")
    shape = hlo_text.ARRAY.search(body[one.operands[0]].type).group(2).split(",")
    return math.prod(int(shape[i]) for i in _integers(dims))


# --- One instruction as a Collective ----------------------------------------------------------

_GROUPS = r"replica_groups=(mesh\[.*?\{.*?\}|\{\}|\{\{.*?\}\}|\[[^ ]*?)(?:, |$)"
# Whose start is (operands, results), in that order; of the others it is the result alone.
_STARTS_WITH_OPERANDS = ("all-gather", "reduce-scatter", "collective-permute")


def _collective(step: Step, program: Program, mesh: MeshLayout) -> Collective | None:
    one = step.instruction
    if one.opcode == "recv" and "_xla_megascale_transfer_type" in one.rest:
        return _between_slices(step, mesh)
    kind = hlo_text.base_kind(one.opcode)
    if kind is None:
        return None
    type_ = one.type
    if one.opcode.endswith("-start") and kind in _STARTS_WITH_OPERANDS:
        type_ = hlo_text.split_tuple(type_)[1]
    groups = _groups(one, kind, mesh)
    group_size = 2 if kind == "collective-permute" else max(len(group) for group in groups)
    size = hlo_text.type_bytes(type_) * (group_size if kind == "reduce-scatter" else 1)
    replaces_gather = False
    if kind == "all-reduce" and _is_all_reduce_scatter(one, step.body):
        kind = "reduce-scatter"
    elif kind == "all-reduce":
        replaces_gather = all(_writes_a_shard(name, step.body, program) for name in one.operands)
    return Collective(kind, mesh.axes_of(groups), size, step.count, step.in_loop, group_size,
                      replaces_gather=replaces_gather, exact_count=step.exact)


def _groups(one: Instruction, kind: str, mesh: MeshLayout) -> list[list[int]]:
    """The devices that exchange with one another; of a collective-permute its pairs."""
    if kind == "collective-permute":
        pairs = one.attribute(r"source_target_pairs=\{(.*?)\}\}") + "}"
        return [_integers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", pairs)]
    if "replica_groups=" not in one.rest:
        return parse_replica_groups("{}", mesh.num_local_devices)
    text = one.attribute(_GROUPS)
    if text is None:
        raise ValueError(f"replica groups in a form that is not known: {one.rest[:300]!r}")
    return parse_replica_groups(text, mesh.num_local_devices)


def _between_slices(step: Step, mesh: MeshLayout) -> Collective:
    """A recv between slices: its attributes name the collective, its type is the result."""
    one = step.instruction
    kind = one.attribute(r'_xla_megascale_transfer_type="(\w+)"').replace("_", "-").lower()
    kind = "collective-permute" if kind == "one-to-one" else kind
    if kind not in hlo_text.KINDS:
        raise ValueError(f"unknown transfer between slices: {one.name} = … recv({one.rest}")
    size = hlo_text.type_bytes(hlo_text.split_tuple(one.type)[0])
    if kind == "reduce-scatter":
        size *= mesh.num_slices
    return Collective(kind, mesh.slice_axes(), size, step.count, step.in_loop, mesh.num_slices,
                      "dcn", exact_count=step.exact)


def _is_all_reduce_scatter(one: Instruction, body: Mapping[str, Instruction]) -> bool:
    """TPU's fused reduce-scatter: an all-reduce, of one array or of several, whose own slices
    alone leave the computation."""
    def is_only_sliced(name):
        users = [user for user in body.values() if name in user.operands]
        return bool(users) and all(
            user.opcode == "dynamic-slice"
            or (user.opcode in ("bitcast", "copy", "reshape", "get-tuple-element")
                and is_only_sliced(user.name)) for user in users)

    root = next((user for user in body.values() if user.is_root), one)
    leaving = [body.get(name, one) for name in root.operands] if root.opcode == "tuple" else [root]
    return all(x.opcode == "dynamic-slice" for x in leaving) and is_only_sliced(one.name)


def _writes_a_shard(name: str, body: Mapping[str, Instruction], program: Program) -> bool:
    """Whether an operand is a dynamic-update-slice, maybe copied, maybe the root of a fusion."""
    one = body.get(name)
    while one is not None and one.opcode in ("bitcast", "convert", "copy", "copy-start",
                                             "copy-done"):
        one = body.get(one.operands[0])
    if one is not None and one.opcode == "fusion":
        called = program.computations.get(one.attribute(r"calls=%?([\w.\-]+)") or "", {})
        root = next((inner.name for inner in called.values() if inner.is_root), "")
        return _writes_a_shard(root, called, program)
    return one is not None and one.opcode == "dynamic-update-slice"


# --- Groups -----------------------------------------------------------------------------------

def parse_replica_groups(text: str, num_devices: int) -> list[list[int]]:
    """Device groups from any of the forms XLA prints.

    {{0,1},{2,3}}                       listed
    {}                                  one group of all
    [2,4]<=[4,2]T(1,0)                  iota: arange(8).reshape(4,2).transpose(1,0).reshape(2,4)
    mesh['a'=4,'b'=2] {'a'}             the devices along axes of a mesh, which may say, before
                                        its ] or after it, device_ids=([4,2]T(1,0)) or
                                        device_ids=(0,2,1,3), and may take part of an axis:
                                        {'a':(1)2}

    Raises ValueError for another form.
    """
    text = text.strip()
    if text == "{}":
        return [list(range(num_devices))]
    if text.startswith("{{"):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    if match := re.fullmatch(r"\[([\d,]+)\]<=(\[.*)", text):
        return _iota(match.group(2)).reshape(_integers(match.group(1))).tolist()
    if match := re.fullmatch(r"mesh\[((?:'[^']+'=\d+,? ?)+).*?\{(.*)\}", text):
        axes, chosen = match.groups()
        ids = re.search(r"device_ids=\((.*)\)\]? ?\{", text)
        return _mesh_groups(axes, ids and ids.group(1), chosen)
    raise ValueError(f"replica groups in a form that is not known: {text!r}")


def _integers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]


def _iota(text: str) -> np.ndarray:
    """Devices of "[4,2]T(1,0)": an iota of that shape, transposed, flat."""
    match = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"iota device list in a form that is not known: {text!r}")
    shape = _integers(match.group(1))
    devices = np.arange(math.prod(shape)).reshape(shape)
    if match.group(2):
        devices = devices.transpose(_integers(match.group(2)))
    return devices.ravel()


def _mesh_groups(axes: str, device_ids: str | None, chosen: str) -> list[list[int]]:
    """Groups of mesh['a'=4,'b'=2, device_ids=(…)] {'b','a':(1)2}."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    devices = np.arange(math.prod(sizes.values()))
    if device_ids:
        devices = (_iota(device_ids) if device_ids.startswith("[")
                   else np.asarray(_integers(device_ids)))
    # Split each axis of which part is taken into (before, part, after).
    shape, grouped = [], []
    parts = {name: (before, size) for name, before, size in
             re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}
    for name, size in sizes.items():
        if name not in parts:
            shape.append(size)
            continue
        before, part = parts[name]
        before, part = (int(before), int(part)) if part else (1, size)
        grouped.append(len(shape) + 1)
        shape += [before, part, size // (before * part)]
    kept = [i for i in range(len(shape)) if i not in grouped]
    devices = devices.reshape(shape).transpose(kept + grouped)
    return devices.reshape(-1, math.prod(shape[i] for i in grouped)).tolist()
