"""What a run has used: by the clock, and by measured power or else the table's."""

import pytest

from t5x_lite.cost.power import PowerReading
from t5x_lite.cost.usage import UsageMeter, describe


class Meter:
    """A power meter that reads these watts one after the other."""

    def __init__(self, *watts):
        self.left = list(watts)

    def read(self):
        watts = self.left.pop(0)
        return None if watts is None else PowerReading(watts, "nvml")


def usage(kind, *watts, **kwargs):
    """A meter read at 0, 3600, 7200, … seconds."""
    seconds = iter(range(0, 36000, 3600))
    return UsageMeter(kind, dtype="bfloat16", meter=Meter(*watts), clock=lambda: next(seconds),
                      **kwargs)


def test_measured_power_adds_up_over_machines_and_hours():
    meter = usage("NVIDIA H100 80GB HBM3", 1000.0, 3000.0, num_chips=16, num_processes=2)
    first = meter.read(16 * 989.4e12 * 3600 * 0.4)
    assert first["mfu"] == pytest.approx(0.4)
    assert (first["chip_hours"], first["watts"]) == (16, 2000)
    assert first["energy_kwh"] == pytest.approx(2 * 1.10)
    second = meter.read(0.0)
    assert second["mfu"] == 0 and second["power_source"] == "measured: nvml"
    assert second["energy_kwh"] == pytest.approx((2 + 6) * 1.10)
    assert second["co2e_kg"] == pytest.approx(8 * 1.10 * 0.429)
    assert second["dollars"] == pytest.approx(32 * 55.04 / 8)


def test_the_tables_power_where_nothing_is_measured():
    found = usage("TPU v3", None, num_chips=4).read(1e15)
    assert (found["watts"], found["power_source"]) == (4 * 283, "table: measured mean")
    assert found["energy_kwh"] == pytest.approx(4 * 0.283 * 1.10)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 3060"])
def test_a_device_that_the_table_lacks_has_what_was_measured_only(kind):
    meter = usage(kind, None, 65.0, num_chips=1)
    assert meter.read(1e12, 7200) == {"chip_hours": 1.0, "chip": kind, "tokens_per_second": 2.0}
    assert meter.read(1e12).keys() == {"chip_hours", "chip", "tokens_per_second", "watts", "power_source", "energy_kwh",
                                       "co2e_kg"}


def test_a_run_that_goes_on_adds_to_what_it_had_used():
    first = usage("TPU v3", None, num_chips=4).read(1e15)
    second = usage("TPU v3", None, num_chips=4, before=first).read(1e15)
    for sum_ in ("chip_hours", "energy_kwh", "co2e_kg", "dollars"):
        assert second[sum_] == pytest.approx(2 * first[sum_])


def test_the_line_says_where_the_power_comes_from():
    assert describe(usage("TPU v3", None, num_chips=4).read(0.0)).startswith(
        "4 chip-hours, 1.25 kWh with PUE 1.10 (power: table: measured mean), 0.534 kg CO2e, $")
    cpu = describe(usage("cpu", 65.0, num_chips=1).read(0.0))
    assert "(power: measured: nvml)" in cpu and cpu.startswith("1 hours on CPU devices, ")
    assert "energy unknown" in describe(usage("cpu", None, num_chips=1).read(0.0))
