"""The hardware table: lookups, units that agree with one another, errors that help."""

import types

import pytest

from t5x_lite.cost import hardware
from t5x_lite.errors import UserError


@pytest.mark.parametrize("kind, name", [
    ("TPU v2", "v2"), ("TPU v3", "v3"), ("TPU v4", "v4"), ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"),
    ("Tesla V100-SXM2-16GB", "v100"), ("NVIDIA A100-SXM4-40GB", "a100-40g"),
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"),
    ("cpu", "cpu"), ("v5p", "v5p"), ("H100", "h100"),
])
def test_device_kinds_and_names_find_their_row(kind, name):
    assert hardware.lookup(kind).name == name


def test_an_unknown_accelerator_lists_the_known_ones():
    with pytest.raises(UserError, match="v5e.*NVIDIA H200.*did you mean 'TPU v6 lite'"):
        hardware.lookup("TPU v6 light")


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda chip: chip.name)
def test_figures_are_in_the_stated_units(chip):
    """A slip of 8 (bits) or 1000 (prefixes) puts a figure outside its plausible range."""
    if chip.name == "cpu":
        assert chip.matmul_flops_per_second("float32") is None and chip.watts is None
        return
    assert 1e13 < chip.matmul_flops_per_second("float16") < 1e16
    assert 7e9 < chip.hbm_bytes < 1e12
    assert 5e11 < chip.hbm_bytes_per_second < 1e13
    assert 1e11 < chip.interconnect.bytes_per_second_per_chip < 2e12
    # Bytes of memory per second and FLOPs balance at an intensity of 60 to 600 in every row.
    assert 60 < chip.matmul_flops_per_second("float16") / chip.hbm_bytes_per_second < 600
    for devices, usable in chip.usable_hbm_bytes.items():
        # What is sold as 80 GB of a GPU are nearly 80 GiB.
        most = 1.08 if chip.interconnect.kind == "nvlink" else 1.01
        assert 0.9 * chip.hbm_bytes < devices * usable <= most * chip.hbm_bytes
    assert (chip.dollars_per_hour is None) == (chip.price_source is None)
    assert (chip.watts is None) == (chip.power_scope is None)


@pytest.mark.parametrize("name, flops, per_byte", [
    ("v5e", 197e12, 4 * 50e9), ("v5p", 459e12, 6 * 100e9), ("v6e", 918e12, 4 * 100e9),
    ("v7x", 2307e12, 6 * 100e9), ("h100", 989.4e12, 450e9)])
def test_peak_and_one_way_bandwidth_of_a_chip(name, flops, per_byte):
    chip = hardware.lookup(name)
    assert chip.matmul_flops_per_second("bfloat16") == flops
    assert chip.interconnect.bytes_per_second_per_chip == per_byte


def test_a_matmul_runs_on_the_units_that_take_its_dtype():
    v5e, v100, h100 = (hardware.lookup(name) for name in ("v5e", "v100", "h100"))
    assert v5e.matmul_flops_per_second("float32") == v5e.peak_flops["bf16"]
    assert v100.matmul_flops_per_second("float32") == 15.7e12
    assert v100.matmul_flops_per_second("bfloat16") is None  # has no bf16 units
    assert h100.matmul_flops_per_second("float32") == h100.peak_flops["tf32"]
    assert h100.matmul_flops_per_second("float8_e4m3fn") == h100.peak_flops["fp8"]
    with pytest.raises(UserError, match="'bf16'.*bfloat16"):
        v5e.matmul_flops_per_second("bf16")


def test_two_devices_of_one_tpu_chip_count_once():
    def device(x, slice_index=None):
        return types.SimpleNamespace(coords=[x, 0, 0], slice_index=slice_index, platform="tpu")

    assert hardware.count_chips([device(0), device(0), device(1), device(1)]) == 2
    assert hardware.count_chips([device(0, 0), device(0, 1)]) == 2
    assert hardware.count_chips([types.SimpleNamespace(coords=[0, 0, 0], platform="gpu")] * 3) == 3
