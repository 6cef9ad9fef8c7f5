"""Days, energy, carbon and money against the published figures."""

import pytest

from t5x_lite.cost import energy


@pytest.mark.parametrize("run", energy.PATTERSON_2021, ids=lambda run: run.name)
def test_patterson_2021_table_4_follows_from_its_inputs(run):
    """Each figure within 1.2% of the paper's, which are rounded to two or three digits."""
    cost = run.estimate()
    for name in ("days", "megawatt_hours", "tonnes_co2e_gross", "tonnes_co2e_net"):
        assert getattr(cost, name) == pytest.approx(getattr(run, name), rel=0.012), name


def test_gpt3_takes_355_gpu_years_at_28_tflops():
    assert energy.chip_years(3.14e23, 28e12) == pytest.approx(355, rel=0.005)


def test_an_estimate_by_hand():
    """10 chips x 10 h at 1e12 FLOP/s, 100 W, PUE 1.2: 12 kWh x 0.5 kg/kWh = 6 kg; $2 x 100 h."""
    cost = energy.estimate(
        total_flops=10 * 36_000 * 1e12, chips=10, flops_per_second=1e12, watts=100, pue=1.2,
        kg_per_kwh=0.5, kg_per_kwh_net=0.25, dollars_per_chip_hour=2.0, power_source="measured")
    assert cost.days == pytest.approx(10 / 24)
    assert cost.chip_hours == pytest.approx(100)
    assert cost.megawatt_hours == pytest.approx(0.012)
    assert cost.tonnes_co2e_gross == pytest.approx(0.006)
    assert cost.tonnes_co2e_net == pytest.approx(0.003)
    assert cost.dollars == pytest.approx(200)
    assert cost.power_source == "measured"


def test_what_is_unknown_stays_unknown():
    cost = energy.estimate(total_flops=1e18, chips=4, flops_per_second=1e14, watts=None)
    assert cost.megawatt_hours is cost.tonnes_co2e_gross is cost.tonnes_co2e_net is None
    assert cost.dollars is None
    assert cost.days > 0
