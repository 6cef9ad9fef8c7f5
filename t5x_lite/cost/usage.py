"""What a run has used so far: chip-hours, energy, carbon, money and its MFU, as it trains.

The same figures as a plan's, with what was measured in the place of what was assumed: time by
the clock, power by the machine where it reports any (power.py), else by the hardware table;
"power_source" says which. Time in which no step ran (evaluation, saving) counts too.
"""

import time
from collections.abc import Callable, Mapping

from t5x_lite.cost import energy, hardware
from t5x_lite.cost.power import PowerMeter, PowerReading
from t5x_lite.errors import UserError

JOULES_PER_KWH = 3.6e6


class UsageMeter:
    """Adds up what a run uses; read it wherever metrics are written."""

    def __init__(self, device_kind: str, *, num_chips: int, dtype: str, num_processes: int = 1,
                 before: Mapping[str, float] | None = None, lost_seconds: float = 0.0,
                 meter: PowerMeter | None = None,
                 clock: Callable[[], float] = time.monotonic):
        """
        Args:
            device_kind: as jax.Device.device_kind says; one that the table lacks is no error.
            num_chips: of the whole run (hardware.count_chips).
            dtype: of matrix multiplications, such as "bfloat16".
            num_processes: machines; each is taken to draw what this one measures.
            before: the last figures of the run that goes on here, which are added to.
            lost_seconds: that it ran after those figures, for nothing.
        """
        before = before or {}
        self._name = device_kind
        try:
            self._chip = hardware.lookup(device_kind)
        except UserError:
            self._chip = hardware.lookup("cpu")   # a row without figures
        self._chips, self._processes, self._clock = num_chips, num_processes, clock
        self._peak = self._chip.matmul_flops_per_second(dtype)
        self._meter = PowerMeter() if meter is None else meter
        self._then = clock()
        self._seconds = before.get("chip_hours", 0.0) * energy.SECONDS_PER_HOUR / num_chips
        self._seconds += lost_seconds
        self._joules = before.get("energy_kwh", 0.0) * JOULES_PER_KWH / energy.PUE_GOOGLE_2020
        self._joules += (self._chip.watts or 0.0) * num_chips * lost_seconds

    def so_far(self) -> dict[str, float]:
        """The sums up to the last read: what `before` takes in the run's next life."""
        hours = self._chips * self._seconds / energy.SECONDS_PER_HOUR
        return {"chip_hours": hours,
                "energy_kwh": self._joules * energy.PUE_GOOGLE_2020 / JOULES_PER_KWH}

    def read(self, flops: float, tokens: int = 0) -> dict[str, float | str]:
        """The figures of one line of metrics.jsonl.

        Args:
            flops, tokens: model FLOPs and tokens of the whole run since the previous read.
        Returns:
            chip_hours and what chip that is ("cpu" where it is none), tokens_per_second (since the
            previous read), and, where they are known: mfu (since the previous read), watts (of the
            whole run) and power_source, energy_kwh (times the PUE of energy.PUE_GOOGLE_2020),
            co2e_kg (at the US mean) and dollars (at the list price).
        """
        now = self._clock()
        seconds, self._then = now - self._then, now
        self._seconds += seconds
        chip_hours = self._chips * self._seconds / energy.SECONDS_PER_HOUR
        figures: dict[str, float | str] = {"chip_hours": chip_hours, "chip": self._name}
        if seconds > 0:
            figures["tokens_per_second"] = tokens / seconds
        if self._peak is not None and seconds > 0:
            figures["mfu"] = flops / seconds / (self._chips * self._peak)
        watts, source = self._watts(self._meter.read())
        if watts is not None:
            self._joules += watts * seconds
            kwh = self._joules * energy.PUE_GOOGLE_2020 / JOULES_PER_KWH
            figures |= {"watts": watts, "power_source": source, "energy_kwh": kwh,
                      "co2e_kg": kwh * energy.KG_PER_KWH_US_2020}
        if self._chip.dollars_per_hour is not None:
            figures["dollars"] = chip_hours * self._chip.dollars_per_hour
        return figures

    def _watts(self, reading: PowerReading | None) -> tuple[float | None, str]:
        if reading is not None:
            return reading.watts * self._processes, f"measured: {reading.source}"
        if self._chip.watts is None:
            return None, ""
        return self._chip.watts * self._chips, self._chip.power_source


def describe(used: Mapping[str, float | str]) -> str:
    """The sums of UsageMeter.read in a line, with where the power comes from."""
    hours = "hours on CPU devices" if used["chip"] == "cpu" else "chip-hours"
    parts = [f"{used['chip_hours']:.3g} {hours}"]
    if "energy_kwh" in used:
        parts += [f"{used['energy_kwh']:.3g} kWh with PUE {energy.PUE_GOOGLE_2020:.2f} (power: "
                  f"{used['power_source']})", f"{used['co2e_kg']:.3g} kg CO2e"]
    else:
        parts.append("energy unknown (this machine reports no power and no table has it)")
    if "dollars" in used:
        parts.append(f"${used['dollars']:,.2f} at list price")
    return ", ".join(parts)
