"""Figures as text."""

import pytest

from t5x_lite.cost import energy, hardware, tables
from t5x_lite.cost.hlo import CollectiveTotal
from t5x_lite.cost.roofline import Roofline


@pytest.mark.parametrize("value, text", [
    (0, "0 FLOP"), (999, "999 FLOP"), (12_340, "12.34 kFLOP"), (999_960, "1 MFLOP"),
    (3.14e23, "314 ZFLOP"), (1.5, "1.5 FLOP"), (None, "unknown")])
def test_quantities(value, text):
    assert tables.quantity(value, "FLOP") == text


@pytest.mark.parametrize("value, text", [
    (12, "12 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.00 MiB"), (2**31, "2.000 GiB"),
    (None, "unknown")])
def test_bytes(value, text):
    assert tables.binary_bytes(value) == text


@pytest.mark.parametrize("seconds, text", [
    (5e-6, "5 us"), (0.0125, "12.5 ms"), (90, "90 s"), (7200, "2 h"), (86400 * 20.08, "20.1 d"),
    (None, "unknown")])
def test_durations(seconds, text):
    assert tables.duration(seconds) == text


@pytest.mark.parametrize("value, text", [
    (0, "0.0"), (471_234.56, "471,234.6"), (999.4, "999"), (12.34, "12.3"),
    (3.3112e-5, "0.0000331")])
def test_figures_have_no_exponents(value, text):
    assert tables.figures(value) == text


@pytest.mark.parametrize("tonnes, text", [
    (552.1, "552 t"), (0.0109, "10.9 kg"), (1.09e-8, "0.0109 g"), (None, "unknown")])
def test_masses(tonnes, text):
    assert tables.mass(tonnes) == text


def test_a_small_run_has_readable_figures_and_says_whose_power_it_is():
    """The quickstart on 8 H100: 0.0331 chip-seconds at 700 W and PUE 1.1."""
    cost = energy.estimate(
        total_flops=2.36e13, chips=8, flops_per_second=1.98e14, watts=700,
        power_source=hardware.lookup("h100").power_source, dollars_per_chip_hour=6.88)
    text = tables.to_text(tables.run_cost_table(cost, assumed="at 40% MFU"))
    for shown in ("0.0000331", "0.02549 Wh (power: table: TDP)", "0.0109 g gross", "$0.000228"):
        assert shown in text, text


def test_a_screen_says_what_is_a_bound_and_what_is_unknown():
    text = tables.to_text(
        tables.communication_table([
            CollectiveTotal("all-reduce", ("fsdp",), "fast", True, 8, 2**29, 2.0**30)]),
        tables.roofline_table(Roofline(0.1, 0.05, 0.2, None, ("data-centre network bandwidth",))),
        tables.run_cost_table(
            energy.estimate(total_flops=1e21, chips=64, flops_per_second=1e14, watts=None),
            assumed="at 40% MFU"),
        width=100)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "a replaced all-gather" in text and "512.00 MiB" in text
    assert "a bound, not a prediction" in text
    assert "200 ms  <- sets the bound" in text and "50.0%" in text
    assert "data-centre network bandwidth" in text
    assert "unknown (no power figure); give --watts=" in text
    assert "give --dollars_per_chip_hour=" in text and "at 40% MFU" in text
    skipping = tables.to_text(tables.roofline_table(Roofline(0.1, 0.0, 0.0, 0.0, (), 0.104)))
    assert "104.0% (it counts masked attention too)" in skipping
    assert "\x1b" not in text  # no colour codes in logs and pipes


def test_a_notebook_gets_the_text_too(monkeypatch):
    """Where rich would display a table itself and leave the text empty."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    table = tables.Table("column", title="Memory")
    table.add_row("parameters")
    text = tables.to_text(table)
    assert "parameters" in text and "Memory" in text and "\033" not in text
