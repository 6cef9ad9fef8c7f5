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
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of the program, as often as a step runs it."""

    kind: str                 # one of KINDS
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
    program = _Program(text)
    found = (_collective(step, program, mesh) for step in program.walk())
    return [one for one in found if one is not None]


def totals(found: Sequence[Collective]) -> list[CollectiveTotal]:
    """One line for each kind and axes, the most expensive first."""
    groups: dict[tuple, list[Collective]] = collections.defaultdict(list)
    for one in found:
        groups[one.kind, one.axes, one.network, one.replaces_gather].append(one)
    lines = [
        CollectiveTotal(*key, calls_per_step=sum(one.count_per_step for one in members),
                        bytes_per_step=sum(one.bytes_per_step for one in members),
                        received_bytes=sum(one.received_bytes for one in members))
        for key, members in groups.items()]
    return sorted(lines, key=lambda line: -line.received_bytes)


# --- The text as instructions -----------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str         # such as "bf16[8,4]{1,0}" or "(f32[2]{0}, u32[])"
    opcode: str
    rest: str         # operands and attributes
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ", 1)[0])

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.rest)
        return match.group(1) if match else None


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_REFERRED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_GROUPS = r"replica_groups=(mesh\[.*?\{.*?\}|\{\}|\{\{.*?\}\}|\[[^ ]*?)(?:, |$)"
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class _Step:
    """An instruction as a step executes it."""

    instruction: _Instruction
    body: Mapping[str, _Instruction]  # the computation it stands in
    count: int
    in_loop: bool
    exact: bool


class _Program:
    """Computations by name, and a walk over what a step executes."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if line.startswith(" "):
                match = _INSTRUCTION.match(line)
                if match:
                    root, name, type_, opcode, rest = match.groups()
                    current[name] = _Instruction(name, type_, opcode, rest, bool(root))
            elif match := _COMPUTATION.match(line):
                current = self.computations[match.group(2)] = {}
                if match.group(1):
                    self.entry = match.group(2)
        if not self.entry:
            raise ValueError(f"no ENTRY computation in the program text: {text[:200]!r}")
        self._with_collectives = self._find_with_collectives() - self._find_continuations()

    def walk(self) -> Iterator[_Step]:
        """Everything a step executes that may be, or may hold, a collective."""
        yield from self._walk(self.entry, 1, False, True)

    def _walk(self, name: str, count: int, in_loop: bool, exact: bool) -> Iterator[_Step]:
        body = self.computations[name]
        for one in body.values():
            step = _Step(one, body, count, in_loop, exact)
            yield step
            yield from self._inside(step)

    def _inside(self, step: _Step) -> Iterator[_Step]:
        """What an instruction executes of other computations: a loop's body as often as it runs,
        one branch of a conditional, and what it calls."""
        one, count, exact = step.instruction, step.count, step.exact
        if one.opcode == "while":
            trips = self.trip_count(one, step.body)
            return self._walk(one.attribute(r"body=%?([\w.\-]+)"), count * (trips or 1), True,
                              exact and trips is not None)
        if one.opcode == "conditional":
            return iter(self._dearest(one, count, step.in_loop, exact))
        if one.opcode.endswith(("-done", "-update")):   # the start has it
            return iter(())
        called = [name for name in _CALLED.findall(one.rest) if name in self._with_collectives]
        return itertools.chain.from_iterable(
            self._walk(name, count, step.in_loop, exact) for name in called)

    def _find_with_collectives(self) -> set[str]:
        """Computations that hold a collective, directly or through what they call."""
        callers = collections.defaultdict(set)
        found = set()
        for name, body in self.computations.items():
            for one in body.values():
                if _base_kind(one.opcode) or one.opcode == "recv":
                    found.add(name)
                for called in [*_REFERRED.findall(one.rest), *_branches(one)]:
                    callers[called].add(name)
        queue = list(found)
        while queue:
            for caller in callers[queue.pop()] - found:
                found.add(caller)
                queue.append(caller)
        return found

    def _find_continuations(self) -> set[str]:
        """Fusions that only carry on or end a collective which another fusion starts."""
        starts, others = set(), []
        fused = {called for body in self.computations.values() for one in body.values()
                 if one.opcode == "fusion" for called in _CALLED.findall(one.rest)}
        for name in fused & self.computations.keys():
            body = self.computations[name].values()
            inside = {
                (one.opcode, one.attribute(r"channel_id=(\d+)"), tuple(_ARRAY.findall(one.type)))
                for one in body if one.opcode in KINDS}
            if any('"AsyncCollectiveStart"' in one.rest for one in body):
                starts |= inside
            elif inside:
                others.append((name, inside))
        return {name for name, inside in others if inside <= starts}

    def _dearest(self, one: _Instruction, count: int, in_loop: bool, exact: bool) -> list[_Step]:
        """What the branch with most collectives runs: only one branch of a conditional does."""
        runs = [list(self._walk(name, count, in_loop, exact)) for name in _branches(one)]
        return max(runs, key=lambda run: sum(
            step.count for step in run if _base_kind(step.instruction.opcode)))

    def trip_count(self, loop: _Instruction, body: Mapping[str, _Instruction]) -> int | None:
        """Times a while loop runs; None where the text does not tell (it depends on data)."""
        if known := _KNOWN_TRIPS.search(loop.rest):
            return int(known.group(1))
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        reach = dict(condition)
        for one in condition.values():
            for called in _CALLED.findall(one.rest):
                reach |= self.computations.get(called, {})
        compare = [one for one in reach.values() if one.opcode == "compare"]
        bounds = {int(match.group(1)) for one in reach.values()
                  if one.opcode == "constant" and one.type.startswith(("s", "u"))
                  and (match := re.match(r"(-?\d+)\)", one.rest))}
        if len(compare) != 1 or len(bounds) != 1:
            return None
        direction = compare[0].attribute(r"direction=([A-Z]+)")
        start = self._start_value(loop, body, reach)
        last = bounds.pop()
        trips = {"LT": last - start, "LE": last - start + 1, "GT": start - last,
                 "GE": start - last + 1, "NE": abs(last - start)}
        return max(trips[direction], 0) if direction in trips else None

    @staticmethod
    def _start_value(loop: _Instruction, body: Mapping, reach: Mapping) -> int:
        """The loop counter's first value: the constant in the loop's initial tuple, or 0."""
        counters = [int(one.attribute(r"index=(\d+)")) for one in reach.values()
                    if one.opcode == "get-tuple-element" and re.match(r"[su]\d+\[\]", one.type)]
        initial = body.get(loop.operands[0]) if loop.operands else None
        if len(counters) != 1 or initial is None or initial.opcode != "tuple":
            return 0
        value = body.get(initial.operands[counters[0]])
        while value is not None and value.opcode in ("copy", "bitcast", "convert"):
            value = body.get(value.operands[0])
        match = re.match(r"(-?\d+)\)", value.rest) if value is not None else None
        return int(match.group(1)) if match and value.opcode == "constant" else 0


def _branches(one: _Instruction) -> list[str]:
    """The computations that a conditional chooses from."""
    if match := _BRANCHES.search(one.rest):
        return [name.strip().lstrip("%") for name in match.group(1).split(",")]
    return _TRUE_FALSE.findall(one.rest)


def _base_kind(opcode: str) -> str | None:
    """The collective that an opcode performs; None for others and for the ends (-done)."""
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None


# --- Matrix products --------------------------------------------------------------------------

def matmul_flops(text: str) -> float:
    """FLOPs of a compiled program's matrix products on one device, loops counted out.

    Of a loop whose length depends on data one turn counts, of a conditional the dearest branch.
    Counted are dot instructions, in fusions too (XLA:CPU, XLA:GPU with Triton), and the calls of
    cuBLAS; a TPU's convolutions and custom kernels are not.
    """
    program, known = _Program(text), {}

    def flops(name: str) -> float:
        if name not in known:
            body = program.computations.get(name, {})
            known[name] = sum(_instruction_flops(one, body, program, flops)
                              for one in body.values())
        return known[name]
    return flops(program.entry)


def _instruction_flops(one: _Instruction, body: Mapping[str, _Instruction], program: _Program,
                       flops: Callable[[str], float]) -> float:
    if one.opcode == "dot" or '"__cublas$' in one.rest:
        return 2.0 * _elements(split_tuple(one.type)[0] if one.type.startswith("(") else one.type) \
            * _contracted(one, body)
    if one.opcode == "while":
        turns = program.trip_count(one, body)
        return flops(one.attribute(r"body=%?([\w.\-]+)")) * (1 if turns is None else turns)
    if one.opcode == "conditional":
        return max(map(flops, _branches(one)))
    return sum(map(flops, _CALLED.findall(one.rest)))


def _contracted(one: _Instruction, body: Mapping[str, _Instruction]) -> int:
    """The length over which a product adds up: the left operand's contracting dims."""
    dims = one.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") \
        or (one.attribute(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or "").replace('"', "")
    shape = _ARRAY.search(body[one.operands[0]].type).group(2).split(",")
    return math.prod(int(shape[i]) for i in _integers(dims))


def _elements(type_: str) -> int:
    dims = _ARRAY.search(type_).group(2)
    return math.prod(int(dim) for dim in dims.split(",") if dim)


# --- One instruction as a Collective ----------------------------------------------------------

# Whose start is (operands, results), in that order; of the others it is the result alone.
_STARTS_WITH_OPERANDS = ("all-gather", "reduce-scatter", "collective-permute")


def _collective(step: _Step, program: _Program, mesh: MeshLayout) -> Collective | None:
    one = step.instruction
    if one.opcode == "recv" and "_xla_megascale_transfer_type" in one.rest:
        return _between_slices(step, mesh)
    kind = _base_kind(one.opcode)
    if kind is None:
        return None
    type_ = one.type
    if one.opcode.endswith("-start") and kind in _STARTS_WITH_OPERANDS:
        type_ = split_tuple(type_)[1]
    groups = _groups(one, kind, mesh)
    group_size = 2 if kind == "collective-permute" else max(len(group) for group in groups)
    size = type_bytes(type_) * (group_size if kind == "reduce-scatter" else 1)
    replaces_gather = False
    if kind == "all-reduce" and _is_all_reduce_scatter(one, step.body):
        kind = "reduce-scatter"
    elif kind == "all-reduce":
        replaces_gather = all(_writes_a_shard(name, step.body, program) for name in one.operands)
    return Collective(kind, mesh.axes_of(groups), size, step.count, step.in_loop, group_size,
                      replaces_gather=replaces_gather, exact_count=step.exact)


def _groups(one: _Instruction, kind: str, mesh: MeshLayout) -> list[list[int]]:
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


def _between_slices(step: _Step, mesh: MeshLayout) -> Collective:
    """A recv between slices: its attributes name the collective, its type is the result."""
    one = step.instruction
    kind = one.attribute(r'_xla_megascale_transfer_type="(\w+)"').replace("_", "-").lower()
    kind = "collective-permute" if kind == "one-to-one" else kind
    if kind not in KINDS:
        raise ValueError(f"unknown transfer between slices: {one.name} = … recv({one.rest}")
    size = type_bytes(split_tuple(one.type)[0])
    if kind == "reduce-scatter":
        size *= mesh.num_slices
    return Collective(kind, mesh.slice_axes(), size, step.count, step.in_loop, mesh.num_slices,
                      "dcn", exact_count=step.exact)


def _is_all_reduce_scatter(one: _Instruction, body: Mapping[str, _Instruction]) -> bool:
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


def _writes_a_shard(name: str, body: Mapping[str, _Instruction], program: _Program) -> bool:
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


# --- Types and groups -------------------------------------------------------------------------

_ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,<=]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")


def type_bytes(type_: str) -> int:
    """Bytes of an HLO type: "bf16[2,8]{1,0}" -> 32; of a tuple the sum; tokens weigh nothing."""
    total = 0
    for dtype, dims in _ARRAY.findall(type_):
        if dtype == "token":
            continue
        if dtype == "pred":
            bits = 8
        else:
            match = _BITS.match(dtype)  # f8e4m3fn: the first number is the width
            if match is None:
                raise ValueError(f"unknown element type {dtype!r} in {type_!r}")
            bits = int(match.group(1))
        size = math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        total += -(-size * bits // 8)
    return total


def split_tuple(type_: str) -> list[str]:
    """The elements of "(a, (b, c), d)"; layouts such as {1,0:T(8,128)} stay whole."""
    parts, depth, start = [], 0, 1
    for i, char in enumerate(type_):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 or (depth == 1 and char == ","):
            parts.append(type_[start:i].strip())
            start = i + 1
    return parts


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
