"""The bound: parts by hand on made-up chips and tori."""

import types

import numpy as np
import pytest

from t5x_lite.cost import hardware, roofline
from t5x_lite.cost.hlo import Collective

V5P, V5E, V4, V7X = (hardware.lookup(name) for name in ("v5p", "v5e", "v4", "v7x"))


def _torus(shape, cores=1, slices=1):
    """Devices of TPU slices in row-major order."""
    return np.asarray([
        types.SimpleNamespace(coords=list(place), slice_index=s if slices > 1 else None,
                              process_index=0, platform="tpu")
        for s in range(slices) for place in np.ndindex(*shape) for _ in range(cores)])


def _collective(kind, axes, megabytes, group_size, network="fast", count=1):
    return Collective(kind, axes, round(megabytes * 1e6), count, False, group_size, network)


def _fast(chip, devices, mesh_shape, names, *collectives):
    placement = roofline.place(devices.reshape(mesh_shape), names, chip)
    return roofline.roofline(chip, num_chips=hardware.count_chips(devices), model_flops=1.0,
                             dtype="bfloat16", collectives=collectives,
                             placement=placement).fast_seconds


def test_compute_and_hbm_by_hand():
    """4 v5p: 459 TFLOP each; 1 GB read, 0.5 GB written, 0.25 GB there and back."""
    bound = roofline.roofline(V5P, num_chips=4, model_flops=4 * 459e12, dtype="bfloat16",
                              argument_bytes=10**9, output_bytes=5 * 10**8,
                              temp_bytes=25 * 10**7)
    assert bound.compute_seconds == pytest.approx(1.0)
    assert bound.hbm_seconds == pytest.approx(2.0e9 / 2765e9)
    assert bound.bound_seconds == pytest.approx(1.0) and bound.limited_by == "compute"
    assert bound.bound_mfu == pytest.approx(1.0)
    slower = roofline.roofline(V5P, num_chips=4, model_flops=4 * 459e12, dtype="bfloat16",
                               argument_bytes=2 * 2765 * 10**9)
    assert (slower.limited_by, slower.bound_mfu) == ("HBM", pytest.approx(0.5))


def test_the_bound_counts_what_cannot_be_skipped_and_mfu_what_others_count():
    bound = roofline.roofline(V5P, num_chips=4, model_flops=4 * 459e12, dtype="bfloat16",
                              least_flops=3 * 459e12)
    assert bound.bound_seconds == pytest.approx(0.75)
    assert bound.bound_mfu == pytest.approx(4 / 3)


def test_a_ring_has_two_links_and_the_end_of_a_line_one():
    """1 GB gathered over 4 chips: 0.75 GB arrive, at 2 x 100 GB/s on v5p's ring of 4 and at
    1 x 50 GB/s on v5e, where only a dimension of 16 closes."""
    gather = _collective("all-gather", ("fsdp",), 1000, 4)
    assert _fast(V5P, _torus((4, 4, 4)), (16, 4), ("data", "fsdp"), gather) == pytest.approx(
        0.75 / 200)
    assert _fast(V5E, _torus((2, 4, 1)), (2, 4), ("data", "fsdp"), gather) == pytest.approx(
        0.75 / 50)


def test_a_group_over_several_dimensions_uses_the_links_of_all():
    """All 64 chips of a v5p cube: 63/64 GB over 6 links; an all-reduce twice that."""
    placement = (V5P, _torus((4, 4, 4)), (64,), ("fsdp",))
    gather = _fast(*placement, _collective("all-gather", ("fsdp",), 1000, 64))
    assert gather == pytest.approx(63 / 64 / 600)
    assert _fast(*placement, _collective("all-reduce", ("fsdp",), 1000, 64)) == pytest.approx(
        2 * gather)


def test_collectives_over_different_dimensions_may_overlap():
    """1 GB over x and 1 GB over y at 200 GB/s each: as long as one of them alone; together with
    1 GB over both, the three share the four links of x and y."""
    args = (V5P, _torus((4, 4, 1)), (4, 4), ("data", "fsdp"))
    over_x = _collective("all-gather", ("data",), 1000, 4)
    over_y = _collective("all-gather", ("fsdp",), 1000, 4)
    over_xy = _collective("all-gather", ("data", "fsdp"), 1000, 16)
    assert _fast(*args, over_x, over_y) == pytest.approx(0.75 / 200)
    assert _fast(*args, over_x, over_y, over_xy) == pytest.approx(
        (0.75 + 0.75 + 15 / 16) / 400)


def test_devices_of_one_chip_need_no_link_and_share_the_chips_links():
    """v7x, two devices a chip: over cores nothing is sent; 4 chips in a line, each with two
    groups, receive 2 x 0.75 GB at 100 GB/s a link … of which a ring of 4 has two."""
    devices = _torus((4, 1, 1), cores=2)
    names, shape = ("fsdp", "tensor"), (4, 2)
    assert _fast(V7X, devices, shape, names, _collective("all-reduce", ("tensor",), 9, 2)) == 0
    both = _fast(V7X, devices, shape, names, _collective("all-gather", ("fsdp",), 1000, 4))
    assert both == pytest.approx(2 * 0.75 / 200)
    # One group over chips and cores alike: a chip fetches the other three quarters once.
    flat = _fast(V7X, devices, (8,), ("fsdp",), _collective("all-gather", ("fsdp",), 1000, 8))
    assert flat == pytest.approx(0.75 / 200)


def test_an_all_to_all_is_bound_by_the_middle_of_the_ring():
    """8 chips in a ring: each half sends half of its 4 GB to the other over 2 links each way."""
    seconds = _fast(V4, _torus((8, 1, 1)), (8,), ("expert",),
                    _collective("all-to-all", ("expert",), 1000, 8))
    assert seconds == pytest.approx(4 * 0.5 / (2 * 50))


def test_between_slices_the_network_counts():
    """v5e: 3.125 GB/s a chip; 1 GB all-reduced over two slices is 1 GB in."""
    placement = roofline.place(_torus((2, 4, 1), slices=2).reshape(2, 8), ("slice", "data"), V5E)
    inside = _collective("all-gather", ("data",), 1000, 8)
    across = _collective("all-reduce", ("slice",), 1000, 2, network="dcn")
    bound = roofline.roofline(V5E, num_chips=16, model_flops=1.0, dtype="bfloat16",
                              collectives=(inside, across), placement=placement)
    assert bound.dcn_seconds == pytest.approx(1 / 3.125)
    assert bound.fast_seconds == pytest.approx(7 / 8 / 100)  # two dimensions, one link each
    assert bound.limited_by == "network"


def test_an_axis_over_two_slices_is_one_group_in_each():
    """fsdp=16 over two slices of 8 chips: the part inside a slice gathers over 8."""
    seconds = _fast(V5E, _torus((2, 4, 1), slices=2), (16,), ("fsdp",),
                    _collective("all-gather", ("fsdp",), 1000, 8))
    assert seconds == pytest.approx(7 / 8 / 100)


def test_gpus_use_nvlink_inside_a_machine_and_the_network_between():
    """16 H100 in two machines: 1 GB gathered over all is 7/8 GB over NVLink, and the 8 of a
    machine fetch the other half of it together at 50 GB/s each. A described GPU has coordinates,
    which are of no torus."""
    h100 = hardware.lookup("h100")
    devices = np.asarray([types.SimpleNamespace(id=i, coords=(i, 0, 0), process_index=i // 8)
                          for i in range(16)])
    placement = roofline.place(devices, ("fsdp",), h100)
    bound = roofline.roofline(h100, num_chips=16, model_flops=1.0, dtype="bfloat16",
                              collectives=[_collective("all-gather", ("fsdp",), 1000, 16)],
                              placement=placement)
    assert bound.fast_seconds == pytest.approx(7 / 8 / 450)
    assert bound.dcn_seconds == pytest.approx(0.5 / 8 / 50)


def test_what_is_not_published_is_left_out_and_named():
    cpu = hardware.lookup("cpu")
    devices = np.asarray([types.SimpleNamespace(id=i) for i in range(8)])
    placement = roofline.place(devices, ("data",), cpu)
    bound = roofline.roofline(cpu, num_chips=8, model_flops=1e12, dtype="float32",
                              argument_bytes=10**9, placement=placement,
                              collectives=[_collective("all-reduce", ("data",), 1, 8)])
    assert bound.bound_seconds is bound.bound_mfu is bound.limited_by is None
    assert bound.unknown == ("peak FLOP/s in float32", "HBM bandwidth", "interconnect bandwidth")
    two_v4 = roofline.place(_torus((4, 1, 1), slices=2).reshape(2, 4), ("slice", "data"), V4)
    bound = roofline.roofline(
        V4, num_chips=8, model_flops=1e15, dtype="bfloat16", placement=two_v4,
        collectives=[_collective("all-reduce", ("slice",), 1, 2, network="dcn")])
    assert bound.dcn_seconds is None and bound.limited_by == "compute"
    assert bound.unknown == ("data-centre network bandwidth",)
