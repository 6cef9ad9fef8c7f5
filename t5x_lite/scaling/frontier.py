"""Compute-optimal models without a law of the loss: Hoffmann's approaches 1 and 2.

    parabola   at each budget a parabola of the loss in log N; its lowest point
    akima      at each budget Akima's interpolation, resampled with the seeds' noise, which also
               says how sure each lowest point is (Porian et al. 2024)
    envelope   curves of training runs; at each of many budgets the run with the lowest loss

and then a power law through the optima, N* = k C^a.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from scipy import interpolate

from t5x_lite.errors import UserError, one_of
from t5x_lite.scaling import checks
from t5x_lite.scaling.tables import Table

APPROACHES = ("parabola", "akima", "envelope")
OF_CURVES = ("envelope",)   # those that want a row an evaluation and not a row a run
_GAP = np.log(1.15)        # budgets nearer than this are one
_DRAWS = 200
_GRID = 400


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best model of one budget. spread: of log N*, 0 where it is not known."""

    flops: float
    params: float
    tokens: float
    loss: float
    spread: float = 0.0
    runs: int = 0


@dataclasses.dataclass
class Frontier:
    """Optima over budgets and the power laws through them."""

    approach: str
    optima: list[Optimum]
    exponents: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    factors: dict[str, float]
    warnings: list[str]
    sources: Mapping[str, str]
    runs: int
    counted: Mapping[str, str]      # what N, D and C are, in words

    def as_json(self) -> dict:
        """One object for programs."""
        return {"law": self.approach, "exponents": self.exponents, "factors": self.factors,
                "intervals": {n: list(i) for n, i in self.intervals.items()},
                "parameters": {f"{n}_factor": v for n, v in self.factors.items()},
                "optima": [dataclasses.asdict(o) for o in self.optima], "runs": self.runs,
                "budgets": len(self.optima), "columns": dict(self.sources),
                "counted": self.counted, "objective": None, "warnings": self.warnings}

    def params_at(self, flops: float) -> float:
        """N* of a budget."""
        return self.factors["N_of_C"] * flops ** self.exponents["N_of_C"]

    def tokens_at(self, flops: float) -> float:
        """D* of a budget."""
        return self.factors["D_of_C"] * flops ** self.exponents["D_of_C"]


def budgets(table: Table) -> list[np.ndarray]:
    """The runs (indices) of each budget, rising: the column budget, else clusters of flops."""
    values = np.log(table.columns.get("budget", table.columns["flops"]))
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order]) > _GAP) + 1
    return np.split(order, ends)


def fit(approach: str, table: Table, *, points: int = 0, noise: float = 0.0, draws: int = 1000,
        level: float = 0.95, seed: int = 0) -> Frontier:
    """Optima of each budget, exponents, and intervals by resampling.

    Args:
        points: only so many runs about each lowest one, an odd number; 0: all.
        noise: spread of log loss between seeds, which akima resamples with.

    Raises:
        UserError: an even number of points, or fewer than two budgets with an optimum between their sizes.
    """
    one_of("--law", approach, APPROACHES)
    if points and (points < 3 or points % 2 == 0):
        raise UserError(f"--points={points}: must be odd and at least 3, the lowest run and as many on "
                        f"either side; such as 7.")
    table.require(("params", "flops", "loss"), approach)
    rng = np.random.default_rng(seed)
    if approach == "envelope":
        optima, warnings = envelope(table)
    else:
        optima, warnings = _optima(approach, table, points, noise, rng)
    if len(optima) < 2:
        raise UserError(
            f"{approach}: {len(optima)} of the budgets {'has' if len(optima) == 1 else 'have'} an "
            f"optimum between their sizes; an exponent needs two or more. {' '.join(warnings)} Run "
            f"four budgets or more, each with sizes on both sides of its best: python -m "
            f"t5x_lite.scaling ladder --design=isoflop.")
    warnings += checks.rising(table)
    if len(optima) == 2:
        warnings.append("two budgets: the exponent has no error of its own; run four or more")
    exponents, factors = power_laws(optima)
    intervals = _intervals(optima, draws, level, rng)
    return Frontier(approach, optima, exponents, intervals, factors, warnings, table.sources,
                    len(table), table.counted)


def _optima(approach: str, table: Table, points: int, noise: float, rng
            ) -> tuple[list[Optimum], list[str]]:
    optima, warnings = [], []
    groups = budgets(table)
    for group in groups:
        runs = table.rows(group)
        flops = float(np.exp(np.log(runs.columns.get("budget", runs.columns["flops"])).mean()))
        trouble = _shape(runs)
        if trouble and "leans" not in trouble:
            warnings.append(f"budget {flops:.3g} left out: {trouble}")
            continue
        if trouble:
            warnings.append(f"budget {flops:.3g}: {trouble}")
        if approach == "parabola":
            found = _parabola(runs, points, flops)
        else:
            found = _akima(runs, noise, flops, rng)
        if isinstance(found, str):
            warnings.append(f"budget {flops:.3g} left out: {found}")
            continue
        optima.append(found)
    return optima, warnings


def _shape(runs: Table) -> str:
    """What is wrong with one budget's runs, or ''."""
    size, loss = runs.columns["params"], runs.columns["loss"]
    order = np.argsort(size)
    if len(np.unique(np.round(np.log(size), 3))) < 3:
        return f"{len(size)} run{'s' * (len(size) != 1)} of fewer than 3 sizes; add sizes"
    lowest = int(np.argmin(loss[order]))
    if lowest in (0, len(order) - 1):
        side = "smaller" if lowest == 0 else "larger"
        return (f"no interior minimum, the {'smallest' if lowest == 0 else 'largest'} size is the "
                f"best; add {side} sizes than {size[order][lowest]:.3g}")
    below, above = lowest, len(order) - 1 - lowest
    if max(below, above) >= 4 * min(below, above):
        side = "smaller" if below < above else "larger"
        return (f"the grid leans: {below} sizes below and {above} above its minimum; add {side} "
                f"ones")
    return ""


def _near(values: np.ndarray, loss: np.ndarray, points: int) -> np.ndarray:
    """Indices of so many runs about the lowest, half of them on either side; fewer where a side ends
    (making up for them on the other would shift the window off the lowest)."""
    order = np.argsort(values)
    if not points:
        return order
    place = int(np.argmin(loss[order]))
    return order[max(place - points // 2, 0):place + points // 2 + 1]


def _lowest(values: np.ndarray, loss: np.ndarray, points: int) -> tuple[float, float] | str:
    """(x, y) of a parabola's lowest point in log x; what is wrong, in words, where it has none."""
    x = np.log(values)
    near = _near(x, loss, points)
    middle = x[near].mean()
    curve, slope, level = np.polyfit(x[near] - middle, loss[near], 2)
    if curve <= 0:
        return "the parabola opens downwards, so that it has no minimum; add sizes or seeds"
    place = middle - slope / (2 * curve)
    if not x.min() - 0.5 <= place <= x.max() + 0.5:
        return f"the parabola's minimum {np.exp(place):.3g} lies outside its sizes; add sizes there"
    return float(np.exp(place)), float(level - slope**2 / (4 * curve))


def _parabola(runs: Table, points: int, flops: float) -> Optimum | str:
    found = _lowest(runs.columns["params"], runs.columns["loss"], points)
    if isinstance(found, str):
        return found
    tokens = flops / (6 * found[0])
    if _measured(runs, "tokens"):
        by_tokens = _lowest(runs.columns["tokens"], runs.columns["loss"], points)
        if isinstance(by_tokens, str):
            return by_tokens
        tokens = by_tokens[0]
    return Optimum(flops, found[0], tokens, found[1], runs=len(runs))


def _measured(runs: Table, name: str) -> bool:
    """Whether a column was given and not derived from others."""
    return name in runs.columns and "/ (6" not in runs.sources.get(name, "")


def _akima(runs: Table, noise: float, flops: float, rng) -> Optimum | str:
    size, place = np.unique(np.log(runs.columns["params"]), return_inverse=True)
    loss = np.bincount(place, runs.columns["loss"]) / np.bincount(place)
    grid = np.linspace(size[0], size[-1], _GRID)

    def lowest(values):
        curve = interpolate.Akima1DInterpolator(size, values)(grid)
        at = int(np.argmin(curve))
        return grid[at], curve[at]

    best, level = lowest(loss)
    spread = 0.0
    if noise:
        drawn = [lowest(loss * np.exp(noise * rng.standard_normal(len(loss))))[0]
                 for _ in range(_DRAWS)]
        spread = float(np.std(drawn))
    return Optimum(flops, float(np.exp(best)), _tokens_at(runs, best, flops), float(level),
                   max(spread, float(grid[1] - grid[0]) / 2) if noise else 0.0, len(runs))


def _tokens_at(runs: Table, log_size: float, flops: float) -> float:
    """D at a size of one budget: between its runs' own, where they say; else by C = 6 N D."""
    if not _measured(runs, "tokens"):
        return flops / (6 * float(np.exp(log_size)))
    size, first = np.unique(np.log(runs.columns["params"]), return_index=True)
    return float(np.exp(np.interp(log_size, size, np.log(runs.columns["tokens"][first]))))


def envelope(table: Table, per_decade: int = 20) -> tuple[list[Optimum], list[str]]:
    """The lowest of the curves at each of many budgets that all but one curve may miss.

    The table has a row a point of a curve; runs are told apart by their column run, else by params.
    """
    log_c, loss = np.log(table.columns["flops"]), table.columns["loss"]
    name = table.columns.get("run", table.columns["params"])
    curves, warnings = {}, []
    for run in np.unique(name):
        chosen = np.flatnonzero(name == run)
        warnings += _one_curve(table, chosen)
        chosen = chosen[np.argsort(log_c[chosen], kind="stable")]
        if len(chosen) > 1:
            curves[run] = chosen
    if len(curves) < 3:
        raise UserError(f"envelope: {len(curves)} curves of two points or more; it needs a row for "
                        f"every evaluation of at least 3 runs (run=COL tells them apart).")
    count = max(int(np.ptp(log_c) / np.log(10) * per_decade), 4)
    best: list[Optimum] = []
    sizes = np.array([table.columns["params"][c[0]] for c in curves.values()])
    for place in np.linspace(log_c.min(), log_c.max(), count):
        values = np.array([np.interp(place, log_c[c], loss[c], left=np.inf, right=np.inf)
                           for c in curves.values()])
        winner = int(np.argmin(values))
        inside = sizes.min() < sizes[winner] < sizes.max()
        if np.isfinite(values).sum() >= 2 and inside:
            flops, size = float(np.exp(place)), float(sizes[winner])
            curve = list(curves.values())[winner]
            tokens = float(np.exp(np.interp(place, log_c[curve], np.log(
                table.columns["tokens"][curve])))) if _measured(table, "tokens") else \
                flops / (6 * size)
            best.append(Optimum(flops, size, tokens, float(values[winner]), runs=len(curves)))
    if len({o.params for o in best}) < 3:
        warnings.append("the envelope touches fewer than 3 sizes between the smallest and the "
                        "largest: its exponent rests on very little; add sizes")
    return best, warnings


def _one_curve(table: Table, chosen: np.ndarray) -> list[str]:
    """A warning where the rows that count as one curve look like several runs'.

    Raises:
        UserError: two losses at one place of a curve.
    """
    flops, size = table.columns["flops"][chosen], table.columns["params"][chosen[0]]
    told = "the column run" if "run" in table.columns else "params: name the column of runs by --columns=run=COL,…"
    if len(np.unique(flops)) < len(flops):
        raise UserError(f"envelope: a curve of params={size:.4g} has two losses at one number of FLOPs, so it is "
                        f"more than one run; runs are told apart by {told}.")
    falls = int((np.diff(flops) < 0).sum())
    if not falls:
        return []
    return [f"the FLOPs of params={size:.4g} fall {falls} times from row to row: if these are several runs, their "
            f"curves are mixed; runs are told apart by {told}"]


def power_laws(optima: list[Optimum]) -> tuple[dict[str, float], dict[str, float]]:
    """Exponents and factors of N* = k C^a and D* = k C^b, weighted where spreads are known."""
    exponents, factors = {}, {}
    for name, get in _GETTERS.items():
        slope, level = line(optima, get)
        exponents[name], factors[name] = slope, float(np.exp(level))
    return exponents, factors


_GETTERS: dict[str, Callable[[Optimum], float]] = {
    "N_of_C": lambda o: o.params, "D_of_C": lambda o: o.tokens}


def line(optima: list[Optimum], get: Callable[[Optimum], float]) -> tuple[float, float]:
    """(slope, level) of log get over log C."""
    x = np.log([o.flops for o in optima])
    y = np.log([get(o) for o in optima])
    spread = np.array([o.spread for o in optima])
    weight = 1 / spread if spread.all() else np.ones(len(x))
    slope, level = np.polyfit(x, y, 1, w=weight)
    return float(slope), float(level)


def _intervals(optima: list[Optimum], draws: int, level: float, rng) -> dict[str, tuple]:
    """Percentiles of the exponents over resampled optima; {} of two optima, which have no error."""
    if len(optima) < 3:
        return {}
    drawn = [_draw(optima, rng) for _ in range(draws)]
    drawn = [chosen for chosen in drawn if len({o.flops for o in chosen}) > 1]
    found = {}
    for name, get in _GETTERS.items():
        slopes = [line(chosen, get)[0] for chosen in drawn]
        low, high = np.quantile(slopes, ((1 - level) / 2, (1 + level) / 2))
        found[name] = (float(low), float(high))
    return found


def _draw(optima: list[Optimum], rng) -> list[Optimum]:
    """The optima, each moved by its spread where all have one, else drawn with replacement."""
    if not all(o.spread for o in optima):
        return [optima[i] for i in rng.integers(len(optima), size=len(optima))]
    shifts = np.exp([o.spread * rng.standard_normal() for o in optima])
    return [dataclasses.replace(o, params=o.params * shift, tokens=o.tokens / shift)
            for o, shift in zip(optima, shifts, strict=True)]
