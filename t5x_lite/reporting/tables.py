"""The tables of a page, as rows of strings."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from t5x_lite.log import si
from t5x_lite.reporting.runs import AXES, SIZES, Run, by_arm, is_number

Table = tuple[Sequence[str], Sequence[Sequence[str]]]   # column heads, rows
_NONE = "–"   # nothing to show
_MOST_METRICS = 12
# Sums that a run writes into its lines, and how each is shown.
_COSTS = (("tokens_seen", "tokens", "tokens"), ("flops", "FLOPs", "FLOP"),
          ("hours", "hours", "h"), ("chip_hours", "chip-hours", "h"),
          ("energy_kwh", "energy", "kWh"), ("co2e_kg", "CO2e", "kg"), ("usd", "cost", "USD"))


def final(runs: Sequence[Run], metrics: Sequence[str]) -> Table:
    """An arm a row: mean (lowest … highest over the seeds) of the last value of each metric."""
    held_out = [m for m in metrics if m.startswith("eval/")] or list(metrics)
    shown = held_out[:_MOST_METRICS]
    rows = []
    for arm, members in by_arm(runs).items():
        steps = {int(run.lines[-1]["step"]) for run in members}
        cells = [_last_values(members, metric) for metric in shown]
        rows.append([arm, str(len(members)), " … ".join(f"{s:,}" for s in sorted(steps)), *cells])
    return ["arm", "seeds", "step", *(m.removeprefix("eval/") for m in shown)], rows


def _last_values(runs: Sequence[Run], metric: str) -> str:
    """The range of an arm's last values; of runs that end in NaN it says so instead of their last number."""
    ends = {run.folder: run.not_finite_since(metric) for run in runs}
    bad = sorted(step for step in ends.values() if step is not None)
    if not bad:
        return _range([run.last(metric) for run in runs])
    said = f"NaN since step {bad[0]:,}" if len(runs) == 1 else f"{len(bad)} of {len(runs)} NaN since step {bad[0]:,}"
    rest = [run.last(metric) for run in runs if ends[run.folder] is None]
    return f"{_range(rest)}; {said}" if rest else said


def _range(values: Sequence[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return _NONE
    mean = f"{statistics.fmean(numbers):.4g}"
    return mean if len(numbers) == 1 else f"{mean} ({min(numbers):.4g} … {max(numbers):.4g})"


def differing(runs: Sequence[Run]) -> Table:
    """Settings in which the arms differ, a row a setting; seeds are left out."""
    arms = by_arm(runs)
    names = sorted({name for run in runs for name in run.settings} - {"train.seed"})
    rows = []
    for name in names:
        values = {arm: {repr(run.settings[name]) if name in run.settings else _NONE
                        for run in members}
                  for arm, members in arms.items()}
        if len(set().union(*values.values())) > 1:
            rows.append([name, *(" / ".join(sorted(v)) for v in values.values())])
    return ["setting", *arms], rows


def cost(runs: Sequence[Run]) -> Table:
    """What each run used, of what it says: tokens, FLOPs, hours, energy, carbon, money, and where its
    seconds went."""
    known = [(field, head, unit) for field, head, unit in _COSTS
             if any(run.last(field) is not None for run in runs)]
    parts = list(dict.fromkeys(name for run in runs for line in run.lines[-3:] for name in line
                               if name.startswith("seconds/")))
    rows = []
    for run in runs:
        cells = [_quantity(run.last(field), unit) for field, _, unit in known]
        share = run.last("goodput")
        cells += [_NONE if share is None else f"{share:.1%}"] if parts else []
        cells += [_quantity(run.last(name), "s") for name in parts]
        rows.append([run.name, *cells])
    heads = [head for _, head, _ in known] + ["goodput"] * bool(parts)
    return ["run", *heads, *(name.removeprefix("seconds/") for name in parts)], rows


def _quantity(value: float | None, unit: str) -> str:
    return _NONE if value is None else si(value, unit)


def settings(run: Run) -> Table:
    """Every setting of a run."""
    return ["setting", "value"], [[name, _shown(value)] for name, value in run.settings.items()]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def expert_load(runs: Sequence[Run]) -> Table:
    """The load entropy of every mixture's layer, 1 where experts share evenly; {} of dense models."""
    names = sorted({name for run in runs for line in run.lines for name in line
                    if name.startswith("train/moe/load_entropy/")})
    rows = [[run.name, *(_range([run.last(name)]) for name in names)] for run in runs
            if any(run.last(name) is not None for name in names)]
    heads = [name.rsplit("/", 1)[1].replace("_", " layer ") for name in names]
    return ["run", *heads], rows if names else []


def points(runs: Sequence[Run], metrics: Sequence[str]) -> list[Mapping[str, Any]]:
    """What the page's curves are drawn from: {"run", "arm", "metric", "value", x axes} a point."""
    result = []
    for run in runs:
        for name in metrics:
            lines = [line for line in run.lines if is_number(line.get(name))]
            for line in lines:
                place = {axis: line.get(field) for axis, (field, _) in AXES.items()}
                if line is not lines[-1]:   # over its size a run is one point
                    place |= dict.fromkeys(SIZES)
                result.append({"run": run.name, "arm": run.arm, "metric": name,
                               "value": line[name], **place})
    return result
