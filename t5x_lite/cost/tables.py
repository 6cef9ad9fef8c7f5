"""The figures of a plan as tables of plain text, a screen wide."""

import io
import math
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table

from t5x_lite.cost.energy import PublishedRun, RunCost
from t5x_lite.cost.hlo import CollectiveTotal
from t5x_lite.cost.roofline import Roofline
from t5x_lite.log import si

UNKNOWN = "unknown"


def to_text(*tables: RenderableType, width: int = 100) -> str:
    """The tables below one another, without colour: for logs, pipes, terminals and notebooks alike (in
    which rich would show them at once instead)."""
    out = io.StringIO()
    console = Console(file=out, width=width, no_color=True, highlight=False,
                      force_jupyter=False, force_terminal=False)
    for table in tables:
        console.print(table)
    return out.getvalue()


def quantity(value: float | None, unit: str = "") -> str:
    """Four figures with an SI prefix: 1.234e13 "FLOP" -> "12.34 TFLOP"; None -> "unknown"."""
    if value is None:
        return UNKNOWN
    return si(value, unit, digits=4)


def binary_bytes(value: float | None) -> str:
    """Bytes in binary units, as memory is counted: 2**31 -> "2.000 GiB"; None -> "unknown"."""
    if value is None:
        return UNKNOWN
    for size, unit, digits in ((2**30, "GiB", 3), (2**20, "MiB", 2), (2**10, "KiB", 1)):
        if value >= size:
            return f"{value / size:,.{digits}f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return UNKNOWN
    for size, unit in ((86400, "d"), (3600, "h"), (1, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def mass(tonnes: float | None) -> str:
    """Tonnes in the unit that suits them: 0.0109 -> "10.9 kg"; None -> "unknown"."""
    if tonnes is None:
        return UNKNOWN
    unit, size = next((pair for pair in (("t", 1.0), ("kg", 1e-3)) if tonnes >= pair[1]),
                      ("g", 1e-6))
    return f"{figures(tonnes / size)} {unit}"


def figures(value: float) -> str:
    """Three figures at least, never with an exponent: 1,234.6, 12.3, 0.0000331."""
    if value == 0 or value >= 1000:
        return f"{value:,.1f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def communication_table(lines: Sequence[CollectiveTotal]) -> Table:
    """Every kind of collective of a step, its axes, and what it moves; loops counted out."""
    table = Table("collective", "axes", "over", "calls/step", "buffers/step", "received/step",
                  title="Communication of one device in one step", title_justify="left")
    for line in lines:
        kind = f"{line.kind} (a replaced all-gather)" if line.replaces_gather else line.kind
        table.add_row(kind, " ".join(line.axes) or "-", line.network, f"{line.calls_per_step:,}",
                      binary_bytes(line.bytes_per_step), binary_bytes(line.received_bytes))
    if not lines:
        table.add_row("none", "", "", "", "", "")
    return table


def roofline_table(roofline: Roofline) -> Table:
    """The bound and what makes it."""
    table = Table("lower bound of", "seconds", title="Roofline: a bound, not a prediction",
                  title_justify="left", show_header=False)
    for name, seconds in roofline.parts.items():
        if seconds == 0:
            continue
        mark = "  <- sets the bound" if name == roofline.limited_by else ""
        table.add_row(name, duration(seconds) + mark)
    table.add_row("a step takes at least", duration(roofline.bound_seconds))
    mfu = roofline.bound_mfu
    table.add_row("model FLOPs utilisation at most", UNKNOWN if mfu is None else
                  f"{mfu:.1%}" + (" (it counts masked attention too)" if mfu > 1 else ""))
    if roofline.unknown:
        table.add_row("left out, nothing published", ", ".join(roofline.unknown))
    return table


def run_cost_table(cost: RunCost, *, assumed: str) -> Table:
    """Time, energy, carbon and money of the whole run. assumed: such as "at 40% MFU"."""
    table = Table("", "", title=f"The whole run {assumed}", title_justify="left",
                  show_header=False)
    table.add_row("time", duration(cost.days * 86400))
    table.add_row("chip-hours", figures(cost.chip_hours))
    known = cost.megawatt_hours is not None
    table.add_row("energy", f"{quantity(cost.megawatt_hours * 1e6, 'Wh')} (power: "
                            f"{cost.power_source})" if known else
                  f"{UNKNOWN} (no power figure); give --watts=… of a chip")
    table.add_row("CO2e", f"{mass(cost.tonnes_co2e_gross)} gross, {mass(cost.tonnes_co2e_net)} net"
                  if known else f"{UNKNOWN}, as the energy")
    price = cost.dollars
    table.add_row("price", f"{UNKNOWN}; give --dollars_per_chip_hour=…" if price is None
                  else f"${price:,.2f}" if price >= 1 else f"${figures(price)}")
    return table


def published_table(runs: Sequence[PublishedRun]) -> Table:
    """What estimate() derives from each run's FLOPs and FLOP/s, with the paper's own figures."""
    table = Table("run", "chips", "FLOPs", "TFLOP/s", "days", "MWh", "t CO2e gross", "t CO2e net",
                  "off by", title="Derived (published)", title_justify="left")
    for run in runs:
        estimate = run.estimate()
        pairs = [(getattr(estimate, name), getattr(run, name)) for name in (
            "days", "megawatt_hours", "tonnes_co2e_gross", "tonnes_co2e_net")]
        table.add_row(run.name, f"{run.chips:,} {run.chip}", f"{run.total_flops:.3g}",
                      f"{run.flops_per_second / 1e12:g}",
                      *(f"{mine:,.4g} ({theirs:,g})" for mine, theirs in pairs),
                      f"{max(abs(mine / theirs - 1) for mine, theirs in pairs):.1%}")
    return table
