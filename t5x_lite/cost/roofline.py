"""The fastest that a step can be: a bound from published peaks, never a prediction.

Some things take time, and a perfect program would overlap them completely:

    compute        least FLOPs / (chips x peak FLOP/s of a matmul in the compute dtype)
    HBM            (arguments read + results written + temporaries written and read) / bandwidth
    interconnect   bytes that must arrive at a chip / bandwidth of the links they can take
    host link      bytes of offloaded state, the busier direction / bandwidth to the host's memory
    disk           bytes of state on disk, read and written / bandwidth of the disk

so that step time >= their maximum. The least FLOPs are those that no implementation can skip,
with the idle ticks of a pipeline. MFU counts masked attention too, so that its bound, model
FLOPs / (chips x peak) / the maximum, may lie a little above 1. What is left out
(recomputation, latency, imperfect overlap, kernels below peak) only makes a step slower. A figure
that nobody published (hardware.py says None) is left out of the maximum and named in `unknown`:
the bound is then weaker, not wrong.

Interconnect. A ring all-gather of B bytes over n members gives each of them B (n-1)/n from
outside, a reduce-scatter likewise, an all-reduce both. Groups of several chips on a torus use
the links of the dimensions they extend over, two of a ring and one at the end of a line; groups
that lie on one chip (v2, v3 and v7x make two devices of a chip) use none. Collectives over
different dimensions may overlap, so for every set of dimensions the bytes of the collectives
inside it, over the links of the set, is a bound.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_lite.cost.hardware import Chip
from t5x_lite.cost.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Lower bounds in seconds for one step; None where the hardware table has no figure."""

    compute_seconds: float | None
    hbm_seconds: float | None
    fast_seconds: float | None  # ICI or NVLink
    dcn_seconds: float | None   # data-centre network: between slices or between GPU machines
    unknown: tuple[str, ...]    # what is left out for want of a published figure
    model_seconds: float | None = None   # model FLOPs, as MFU counts; None: compute_seconds
    host_seconds: float | None = 0.0     # the link between device and host, of offloaded state
    disk_seconds: float | None = 0.0     # reading and writing optimizer state on disk

    @property
    def parts(self) -> dict[str, float]:
        named = {"compute": self.compute_seconds, "HBM": self.hbm_seconds,
                 "interconnect": self.fast_seconds, "network": self.dcn_seconds}
        beyond = {"host link": self.host_seconds, "disk": self.disk_seconds}
        named |= {name: seconds for name, seconds in beyond.items() if seconds != 0}
        return {name: seconds for name, seconds in named.items() if seconds is not None}

    @property
    def bound_seconds(self) -> float | None:
        """No step is faster than this; None without a peak to compute with."""
        return None if self.compute_seconds is None else max(self.parts.values())

    @property
    def bound_mfu(self) -> float | None:
        """No MFU is higher than this."""
        bound, model = self.bound_seconds, self.model_seconds
        return None if not bound else (self.compute_seconds if model is None else model) / bound

    @property
    def limited_by(self) -> str | None:
        """The part that sets the bound."""
        return None if self.bound_seconds is None else max(self.parts, key=self.parts.get)


@dataclasses.dataclass(frozen=True)
class Beyond:
    """What a step moves beyond the device, and how fast; None: nobody says."""

    link_bytes: int = 0                          # a chip's, the busier direction
    link_bytes_per_second: float | None = None
    disk_bytes: int = 0                          # read and written, of all chips of a machine
    disk_bytes_per_second: float | None = None

    def seconds(self) -> tuple[float | None, float | None]:
        """(the host's link, the disk); None where something is moved at an unknown rate."""
        return (_over(self.link_bytes, self.link_bytes_per_second),
                _over(self.disk_bytes, self.disk_bytes_per_second))


def _over(moved: int, rate: float | None) -> float | None:
    if not moved:
        return 0.0
    return None if rate is None else moved / rate


NOTHING_BEYOND = Beyond()


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the devices of a mesh stand: arrays of the mesh's shape.

    slices, hosts, chips: ids. coords: [*mesh, k] places on the torus, or None off a torus.
    """

    axis_names: tuple[str, ...]
    slices: np.ndarray
    hosts: np.ndarray
    chips: np.ndarray
    coords: np.ndarray | None

    @property
    def devices_per_chip(self) -> int:
        return self.chips.size // len(np.unique(self.chips))

    @property
    def torus_shape(self) -> tuple[int, ...]:
        """Sizes of one slice's torus."""
        flat = self.coords.reshape(-1, self.coords.shape[-1])
        return tuple((flat.max(axis=0) - flat.min(axis=0) + 1).tolist())

    def group(self, axes: Sequence[str], array: np.ndarray) -> np.ndarray:
        """`array` (an attribute) at the devices of one slice that vary along `axes` only."""
        index = tuple(slice(None) if name in axes else 0 for name in self.axis_names)
        slices = self.slices[index]
        return array[index][slices == slices.flat[0]]


def place(devices: np.ndarray, axis_names: Sequence[str], chip: Chip) -> Placement:
    """The placement of jax devices in mesh shape (mesh.devices), attached or only described.

    TPU devices know their slice and their place on the torus. GPU machines are taken to hold
    chip.chips_per_host devices of consecutive ids.
    """
    def each(read):
        return np.asarray([read(device) for device in devices.flat])

    slices = each(lambda d: getattr(d, "slice_index", None) or 0)
    # A described GPU has coordinates too, but stands at a switch and on no torus.
    if chip.interconnect is not None and chip.interconnect.kind == "ici":
        coords = each(lambda d: d.coords)
        keys = [(s, *place) for s, place in zip(slices.tolist(), coords.tolist(), strict=True)]
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        chips = np.asarray([numbers[key] for key in keys])
        hosts = each(lambda d: d.process_index)
        coords = coords.reshape(*devices.shape, -1)
    else:
        chips, coords = np.arange(devices.size), None
        hosts = each(lambda d: d.id) // (chip.chips_per_host or devices.size)
    shaped = (array.reshape(devices.shape) for array in (slices, hosts, chips))
    return Placement(tuple(axis_names), *shaped, coords)


def by_machine(collectives: Sequence[Collective], placement: Placement) -> list[Collective]:
    """Collectives of GPUs with the network they need: "nvlink" inside a machine, "infiniband"
    where the members of a group stand in several."""
    def network(one: Collective) -> str:
        hosts = np.unique(placement.group(one.axes, placement.hosts))
        return "infiniband" if len(hosts) > 1 else "nvlink"
    return [dataclasses.replace(one, network=network(one)) for one in collectives]


def roofline(chip: Chip, *, num_chips: int, model_flops: float, dtype: str,
             least_flops: float | None = None, argument_bytes: int = 0,
             output_bytes: int = 0, temp_bytes: int = 0, collectives: Sequence[Collective] = (),
             placement: Placement | None = None, beyond: Beyond = NOTHING_BEYOND) -> Roofline:
    """The bound for one step.

    Args:
        model_flops: of the global batch, forward and backward, as MFU counts
            (flops.step_flops).
        dtype: of the operands of matrix multiplications, such as "bfloat16".
        least_flops: those that no implementation can skip; None: model_flops.
        argument_bytes, output_bytes, temp_bytes: of one device, from memory_analysis().
            Arguments are read and results written at least once; a temporary at least both.
        collectives: hlo.find_collectives of the compiled step.
        placement: needed where there are collectives.
        beyond: what is offloaded.
    """
    peak = chip.matmul_flops_per_second(dtype)
    devices_per_chip = placement.devices_per_chip if placement is not None else 1
    model = compute = hbm = None
    if peak is not None:
        model = model_flops / num_chips / peak
        compute = model if least_flops is None else least_flops / num_chips / peak
    if chip.hbm_bytes_per_second is not None:
        moved = argument_bytes + output_bytes + 2 * temp_bytes
        hbm = moved * devices_per_chip / chip.hbm_bytes_per_second
    fast, dcn = _communication(chip, collectives, placement)
    host, stored = beyond.seconds()
    missing = {f"peak FLOP/s in {dtype}": peak is None,
               "HBM bandwidth": hbm is None and argument_bytes > 0,
               "interconnect bandwidth": fast is None,
               "data-centre network bandwidth": dcn is None,
               "the host's link (--host_bandwidth)": host is None,
               "the disk (--disk_bandwidth)": stored is None}
    unknown = tuple(name for name, is_missing in missing.items() if is_missing)
    return Roofline(compute, hbm, fast, dcn, unknown, model, host, stored)


def _communication(chip: Chip, collectives: Sequence[Collective], placement: Placement | None
                   ) -> tuple[float | None, float | None]:
    """(seconds on ICI or NVLink, seconds on the data-centre network); None without a figure."""
    if not collectives:
        return 0.0, 0.0
    assert placement is not None, "collectives need a placement"
    inside = [one for one in collectives if one.network != "dcn"]
    fast, dcn = None, 0.0
    if chip.interconnect is not None and placement.coords is not None:
        fast = _torus_seconds(chip, inside, placement)
    elif chip.interconnect is not None:
        fast, dcn = _switched_seconds(chip, inside, placement)
    between_slices = sum(one.received_bytes for one in collectives if one.network == "dcn")
    rate = chip.network_bytes_per_second
    if rate is None:
        return fast, None if between_slices else dcn
    return fast, dcn + between_slices * placement.devices_per_chip / rate


@dataclasses.dataclass
class _Torus:
    """What the collectives of a step ask of the links of one chip."""

    arriving: dict[frozenset[int], float]   # bytes at the chip, by the dimensions they may take
    links: dict[int, int]        # that the chip has along each dimension, at the worst
    crossing: dict[int, float]   # bytes of all-to-alls through the middle of each dimension

    def add(self, one: Collective, spans: Mapping[int, tuple[int, bool]], num_chips: int,
            groups_per_chip: float) -> None:
        """Adds a collective whose groups extend over `spans` (see _spans) and num_chips chips."""
        received = dataclasses.replace(one, group_size=num_chips).received_bytes * groups_per_chip
        dims = frozenset(spans)
        self.arriving[dims] = self.arriving.get(dims, 0.0) + received
        for dim, (_, is_ring) in spans.items():
            self.links[dim] = max(self.links.get(dim, 0), 2 if is_ring else 1)
        if one.kind not in ("all-to-all", "ragged-all-to-all"):
            return
        for dim, (members, is_ring) in spans.items():
            # Half of what one half of the line holds goes to the other half.
            exchanged = one.bytes_per_step * groups_per_chip * members / (8 if is_ring else 4)
            self.crossing[dim] = self.crossing.get(dim, 0.0) + exchanged

    def bytes_per_link(self) -> float:
        """The most that any link carries, over every set of dimensions and every middle."""
        bounds = list(self.crossing.values())
        for dims in {*self.arriving, frozenset(self.links)} - {frozenset()}:
            inside = sum(received for inner, received in self.arriving.items() if inner <= dims)
            bounds.append(inside / sum(self.links[dim] for dim in dims))
        return max(bounds, default=0.0)


def _torus_seconds(chip: Chip, collectives: Sequence[Collective], placement: Placement) -> float:
    """The largest of the bounds of the module docstring, over sets of torus dimensions."""
    torus = _Torus({}, {}, {})
    for one in collectives:
        chips = placement.group(one.axes, placement.chips)
        num_chips = len(np.unique(chips))
        if num_chips == 1:
            continue
        spans = _spans(chip, placement, placement.group(one.axes, placement.coords))
        torus.add(one, spans, num_chips, placement.devices_per_chip / (chips.size / num_chips))
    return torus.bytes_per_link() / chip.interconnect.bytes_per_second


def _spans(chip: Chip, placement: Placement, coords: np.ndarray) -> Mapping[int, tuple[int, bool]]:
    """{torus dimension: (chips of the group along it, whether they close a ring)}."""
    spans = {}
    for dim, size in enumerate(placement.torus_shape):
        members = len(np.unique(coords[..., dim]))
        if members > 1:
            closes = members == size and size % chip.interconnect.ring_multiple == 0
            spans[dim] = (members, closes)
    return spans


def _switched_seconds(chip: Chip, collectives: Sequence[Collective],
                      placement: Placement) -> tuple[float, float | None]:
    """(NVLink seconds, network seconds): the part inside a machine, and between machines."""
    fast = dcn = 0.0
    for one in collectives:
        hosts = placement.group(one.axes, placement.hosts)
        num_hosts = len(np.unique(hosts))
        per_host = math.ceil(hosts.size / num_hosts)
        inside = dataclasses.replace(one, group_size=per_host).received_bytes
        if one.kind == "all-reduce":
            inside /= 2  # a switch may add in flight (NVLink SHARP) and send the sum only
        fast += (inside if per_host > 1 else 0.0) / chip.interconnect.bytes_per_second_per_chip
        if num_hosts > 1 and dcn is not None:
            # Together the members on a machine fetch each byte of the other machines once.
            across = dataclasses.replace(one, group_size=num_hosts).received_bytes / per_host
            rate = chip.network_bytes_per_second
            dcn = None if rate is None else dcn + across / rate
    return fast, dcn
