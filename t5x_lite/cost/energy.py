"""From FLOPs to days, energy, carbon and money, after Patterson et al. 2021 (arXiv:2104.10350).

    seconds = FLOPs / (chips x achieved FLOP/s a chip)
    MWh     = chips x hours x mean watts a chip x PUE / 1e6
    tCO2e   = MWh x kg CO2e per kWh, gross (the grid's) or net (after matched clean energy)

PATTERSON_2021 holds the six columns of the paper's table 4; estimate() applied to the inputs
of each gives its published days, MWh and tCO2e to better than 2%.
"""

import dataclasses

HOURS_PER_DAY, SECONDS_PER_HOUR = 24, 3600
DAYS_PER_YEAR = 365.25

# Power usage effectiveness: what the data centre draws / what its machines draw.
PUE_GOOGLE_2020 = 1.10    # arXiv:2104.10350: mean of Google's data centres
# kg CO2e per kWh of electricity.
KG_PER_KWH_US_2020 = 0.429  # arXiv:2104.10350: US mean


@dataclasses.dataclass(frozen=True)
class RunCost:
    """What a run takes. None where an input (power, price) is unknown."""

    days: float
    chip_hours: float
    megawatt_hours: float | None
    tonnes_co2e_gross: float | None
    tonnes_co2e_net: float | None
    dollars: float | None
    power_source: str  # "measured", "table: …" or "given": where the watts come from


def training_days(total_flops: float, chips: int, flops_per_second: float) -> float:
    """Days that `chips` take for total_flops at flops_per_second achieved by each of them."""
    assert chips > 0 and flops_per_second > 0, (chips, flops_per_second)
    return total_flops / (chips * flops_per_second) / SECONDS_PER_HOUR / HOURS_PER_DAY


def chip_years(total_flops: float, flops_per_second: float) -> float:
    """Years of one chip; GPT-3's 3.14e23 at 28 TFLOP/s of a V100 are the 355 often quoted."""
    return training_days(total_flops, 1, flops_per_second) / DAYS_PER_YEAR


def estimate(*, total_flops: float, chips: int, flops_per_second: float,
             watts: float | None, power_source: str = "table", pue: float = PUE_GOOGLE_2020,
             kg_per_kwh: float = KG_PER_KWH_US_2020, kg_per_kwh_net: float | None = None,
             dollars_per_chip_hour: float | None = None) -> RunCost:
    """Days, energy, carbon and money of a whole run.

    Args:
        total_flops: model FLOPs of the run (t5x_lite.cost.flops), forward and backward.
        flops_per_second: achieved by one chip: MFU x its peak, or measured.
        watts: mean power of one chip with its share of the host where the figure includes it
            (Chip.power_scope says); None gives None for energy and carbon.
        kg_per_kwh_net: after matched clean energy; None means the same as gross.
    """
    days = training_days(total_flops, chips, flops_per_second)
    chip_hours = chips * days * HOURS_PER_DAY
    megawatt_hours = None if watts is None else chip_hours * watts * pue / 1e6
    net = kg_per_kwh if kg_per_kwh_net is None else kg_per_kwh_net
    return RunCost(
        days=days,
        chip_hours=chip_hours,
        megawatt_hours=megawatt_hours,
        # kg per kWh = tonnes per MWh
        tonnes_co2e_gross=None if megawatt_hours is None else megawatt_hours * kg_per_kwh,
        tonnes_co2e_net=None if megawatt_hours is None else megawatt_hours * net,
        dollars=None if dollars_per_chip_hour is None else chip_hours * dollars_per_chip_hour,
        power_source=power_source,
    )


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """One column of table 4 of arXiv:2104.10350: inputs, then the paper's own results."""

    name: str
    chip: str                 # a name in t5x_lite.cost.hardware
    chips: int
    watts: float              # measured mean of one accelerator with its share of the system
    pue: float
    flops_per_second: float   # measured, one chip
    total_flops: float
    kg_per_kwh_gross: float
    kg_per_kwh_net: float
    days: float
    megawatt_hours: float
    tonnes_co2e_gross: float
    tonnes_co2e_net: float

    def estimate(self) -> RunCost:
        """Days, MWh and tCO2e derived from the inputs alone."""
        return estimate(
            total_flops=self.total_flops, chips=self.chips,
            flops_per_second=self.flops_per_second, watts=self.watts, power_source="measured",
            pue=self.pue, kg_per_kwh=self.kg_per_kwh_gross, kg_per_kwh_net=self.kg_per_kwh_net)


PATTERSON_2021 = (
    PublishedRun("Evolved Transformer", "v2", 200, 208, 1.10, 24.8e12, 2.91e21, 0.431, 0.431,
                 6.8, 7.5, 3.2, 3.2),
    PublishedRun("T5", "v3", 512, 310, 1.12, 45.6e12, 4.05e22, 0.545, 0.545,
                 20, 85.7, 46.7, 46.7),
    PublishedRun("Meena", "v3", 1024, 289, 1.09, 42.3e12, 1.12e23, 0.415, 0.415,
                 30, 232, 96.4, 96.4),
    PublishedRun("GShard-600B", "v3", 1024, 288, 1.09, 48.0e12, 1.33e22, 0.201, 0.177,
                 3.1, 24.1, 4.8, 4.3),
    PublishedRun("Switch Transformer", "v3", 1024, 245, 1.10, 34.4e12, 8.22e22, 0.403, 0.330,
                 27, 179, 72.2, 59.1),
    PublishedRun("GPT-3", "v100", 10_000, 330, 1.10, 24.6e12, 3.14e23, 0.429, 0.429,
                 14.8, 1287, 552.1, 552.1),
)
