"""The text of a compiled XLA program (`compiled.as_text()`) as instructions, and a walk over them.

A loop's body stands in the text once, however often it runs: trip counts are taken from
known_trip_count (CPU, GPU) or from the loop's condition (TPU).
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping

# The operations by which devices exchange arrays.
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
         "ragged-all-to-all", "collective-broadcast")


# --- Types ------------------------------------------------------------------------------------

ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,<=]*)\]")
_BITS = re.compile(r"[a-z]+(\d+)")


def type_bytes(type_: str) -> int:
    """Bytes of an HLO type: "bf16[2,8]{1,0}" -> 32; of a tuple the sum; tokens weigh nothing."""
    total = 0
    for dtype, dims in ARRAY.findall(type_):
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


# --- Instructions -----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Instruction:
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
CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_REFERRED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
_TRUE_FALSE = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction as a step executes it."""

    instruction: Instruction
    body: Mapping[str, Instruction]  # the computation it stands in
    count: int
    in_loop: bool
    exact: bool


class Program:
    """Computations by name, and a walk over what a step executes."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.startswith(" "):
                match = _INSTRUCTION.match(line)
                if match:
                    root, name, type_, opcode, rest = match.groups()
                    current[name] = Instruction(name, type_, opcode, rest, bool(root))
            elif match := _COMPUTATION.match(line):
                current = self.computations[match.group(2)] = {}
                if match.group(1):
                    self.entry = match.group(2)
        if not self.entry:
            raise ValueError(f"no ENTRY computation in the program text: {text[:200]!r}")
        self._with_collectives = self._find_with_collectives() - self._find_continuations()

    def walk(self) -> Iterator[Step]:
        """Everything a step executes that may be, or may hold, a collective."""
        yield from self._walk(self.entry, 1, False, True)

    def _walk(self, name: str, count: int, in_loop: bool, exact: bool) -> Iterator[Step]:
        body = self.computations[name]
        for one in body.values():
            step = Step(one, body, count, in_loop, exact)
            yield step
            yield from self._inside(step)

    def _inside(self, step: Step) -> Iterator[Step]:
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
        called = [name for name in CALLED.findall(one.rest) if name in self._with_collectives]
        return itertools.chain.from_iterable(
            self._walk(name, count, step.in_loop, exact) for name in called)

    def _find_with_collectives(self) -> set[str]:
        """Computations that hold a collective, directly or through what they call."""
        callers = collections.defaultdict(set)
        continuations = set()
        for name, body in self.computations.items():
            for one in body.values():
                if base_kind(one.opcode) or one.opcode == "recv":
                    continuations.add(name)
                for called in [*_REFERRED.findall(one.rest), *branches(one)]:
                    callers[called].add(name)
        queue = list(continuations)
        while queue:
            for caller in callers[queue.pop()] - continuations:
                continuations.add(caller)
                queue.append(caller)
        return continuations

    def _find_continuations(self) -> set[str]:
        """Fusions that only carry on or end a collective which another fusion starts."""
        starts, others = set(), []
        fused = {called for body in self.computations.values() for one in body.values()
                 if one.opcode == "fusion" for called in CALLED.findall(one.rest)}
        for name in fused & self.computations.keys():
            body = self.computations[name].values()
            inside = {
                (one.opcode, one.attribute(r"channel_id=(\d+)"), tuple(ARRAY.findall(one.type)))
                for one in body if one.opcode in KINDS}
            if any('"AsyncCollectiveStart"' in one.rest for one in body):
                starts |= inside
            elif inside:
                others.append((name, inside))
        return {name for name, inside in others if inside <= starts}

    def _dearest(self, one: Instruction, count: int, in_loop: bool, exact: bool) -> list[Step]:
        """What the branch with most collectives runs: only one branch of a conditional does."""
        runs = [list(self._walk(name, count, in_loop, exact)) for name in branches(one)]
        return max(runs, key=lambda run: sum(
            step.count for step in run if base_kind(step.instruction.opcode)))

    def trip_count(self, loop: Instruction, body: Mapping[str, Instruction]) -> int | None:
        """Times a while loop runs; None where the text does not tell (it depends on data)."""
        if known := _KNOWN_TRIPS.search(loop.rest):
            return int(known.group(1))
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
        reach = dict(condition)
        for one in condition.values():
            for called in CALLED.findall(one.rest):
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
    def _start_value(loop: Instruction, body: Mapping, reach: Mapping) -> int:
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


def branches(one: Instruction) -> list[str]:
    """The computations that a conditional chooses from."""
    if match := _BRANCHES.search(one.rest):
        return [name.strip().lstrip("%") for name in match.group(1).split(",")]
    return _TRUE_FALSE.findall(one.rest)


def base_kind(opcode: str) -> str | None:
    """The collective that an opcode performs; None for others and for the ends (-done)."""
    base = opcode.removesuffix("-start")
    return base if base in KINDS else None
