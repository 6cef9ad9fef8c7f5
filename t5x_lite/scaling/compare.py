"""How much compute a method saves over another, and whether the runs can tell.

Each arm has a law of its own over compute C (or tokens, …), fitted to log losses together:

    loss = E + A C^-alpha           floor: E shared by both arms, own, or none (E = 0)

The ratio of compute at a budget C is rho = C_A / C_B with equal losses at C_A = C sqrt(rho) and
C_B = C / sqrt(rho): above 1, the first arm needs more. Exchanging the arms gives 1 / rho.

What two paired runs share (seed, data order, the budget's place on the curve) is in their mean, not
in their difference. So the residuals of a pair are turned into (r_A + r_B) / sqrt 2 and
(r_A - r_B) / sqrt 2, each weighted by a spread of its own, and intervals count the degrees of
freedom that each has (Satterthwaite). Where differences of one budget's seeds agree better with one
another than with the line over budgets, the budgets are what is counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, stats

from t5x_lite.errors import UserError, between, one_of
from t5x_lite.scaling.arms import Pairs

FLOORS = ("shared", "own", "none")
POWER = 0.8             # chance with which the smallest difference would have been seen
_ROUNDS = 8
_LACK = 0.05            # level at which budgets, not seeds, are counted
_TINY = 1e-10


@dataclasses.dataclass
class Model:
    """Both arms' laws in u = log(x / middle): theta = (E_A, a_A, alpha_A, E_B, a_B, alpha_B)."""

    floor: str
    u: np.ndarray               # [2, P]
    log_loss: np.ndarray        # [2, P]

    @property
    def free(self) -> np.ndarray:
        """Which of theta are fitted [6]; a shared E is the first."""
        own, some = self.floor == "own", self.floor != "none"
        return np.array([some, True, True, own, True, True])

    def full(self, free: np.ndarray) -> np.ndarray:
        """What is fitted -> all six."""
        theta = np.zeros(6)
        theta[self.free] = free
        if self.floor == "shared":
            theta[3] = theta[0]
        return theta

    def residuals(self, free: np.ndarray) -> np.ndarray:
        """log loss - log prediction, turned: [2 (mean, difference), P]."""
        theta = self.full(free)
        return _turn(self.log_loss - np.stack([_log_loss(theta[3 * i:3 * i + 3], self.u[i])
                                               for i in (0, 1)]))

    def slope(self, free: np.ndarray) -> np.ndarray:
        """Derivatives of the residuals: [F, 2, P]."""
        theta = self.full(free)
        by_arm = np.zeros((6, *self.u.shape))
        for i in (0, 1):
            log_loss = _log_loss(theta[3 * i:3 * i + 3], self.u[i])
            share = np.exp(theta[3 * i + 1] - theta[3 * i + 2] * self.u[i] - log_loss)
            by_arm[3 * i:3 * i + 3, i] = np.exp(-log_loss), share, -self.u[i] * share
        if self.floor == "shared":
            by_arm[0] += by_arm[3]
        return np.stack([-_turn(rows) for rows in by_arm[self.free]])


def _log_loss(arm: np.ndarray, u: np.ndarray) -> np.ndarray:
    floor, level, power = arm
    return np.logaddexp(np.log(max(floor, 1e-300)), level - power * u)


def _turn(residual: np.ndarray) -> np.ndarray:
    return np.stack([residual[0] + residual[1], residual[0] - residual[1]]) / np.sqrt(2)


@dataclasses.dataclass
class Spread:
    """Of the mean or the difference of a pair: standard deviation and its degrees of freedom."""

    size: float
    freedom: float
    by_budget: bool = False     # counted over budgets, for seeds agree better than the line


@dataclasses.dataclass
class Comparison:
    """Two fitted arms. theta: what is fitted [F]; spreads: of pairs' means and differences."""

    pairs: Pairs
    model: Model
    theta: np.ndarray
    covariance: np.ndarray      # [F, F]
    shares: np.ndarray          # [2, F, F]: what means and differences bring to it
    spreads: tuple[Spread, Spread]
    middle: float               # log of the budget that u counts from
    level: float

    def interval(self, function: Callable[[np.ndarray], float]) -> tuple[float, float, float]:
        """(value, half width, standard error) of a smooth function of all six parameters."""
        value, error, freedom = self.error_of(function)
        return value, stats.t.ppf((1 + self.level) / 2, freedom) * error, error

    def error_of(self, function: Callable[[np.ndarray], float]) -> tuple[float, float, float]:
        """(value, standard error, degrees of freedom)."""
        slope = _slope(lambda theta: function(self.model.full(theta)), self.theta)
        parts = np.array([slope @ share @ slope for share in self.shares])
        total = float(parts.sum())
        used = sum(part**2 / s.freedom for part, s in zip(parts, self.spreads, strict=True))
        freedom = total**2 / used if used else np.inf
        return function(self.model.full(self.theta)), float(np.sqrt(total)), float(freedom)


def log_ratio(theta: np.ndarray, u: float) -> float:
    """log rho at the budget u: where the first arm at u + rho/2 meets the second at u - rho/2."""
    floor_a, level_a, power_a, floor_b, level_b, power_b = theta
    if floor_a == floor_b:
        return 2 * (level_a - level_b - (power_a - power_b) * u) / (power_a + power_b)
    first, second = theta[:3], theta[3:]

    def gap(rho):
        return _log_loss(first, u + rho / 2) - _log_loss(second, u - rho / 2)
    if gap(-40) * gap(40) > 0:      # one arm's floor lies above what the other reaches
        return np.inf if floor_a > floor_b else -np.inf
    return optimize.brentq(gap, -40, 40, xtol=1e-12)


def _slope(function: Callable[[np.ndarray], Any], at: np.ndarray) -> np.ndarray:
    """Central differences: [F, …]."""
    found = []
    for i, value in enumerate(at):
        step = np.zeros_like(at)
        step[i] = 1e-5 * max(abs(value), 0.1)
        found.append((np.asarray(function(at + step)) - np.asarray(function(at - step)))
                     / (2 * step[i]))
    return np.array(found)


def fit(pairs: Pairs, *, floor: str = "shared", noise: float = 0.0, level: float = 0.95
        ) -> Comparison:
    """Fits both arms to paired runs.

    Args:
        noise: spread of log loss between seeds, where it is known; 0: taken from the residuals.

    Raises:
        UserError: too few pairs for the laws, or losses that do not fall.
    """
    one_of("--floor", floor, FLOORS)
    between("--level", level, 0, 1, open_below=True, open_above=True)
    budgets = len(np.unique(pairs.budget))
    if budgets == 2 and floor != "none":
        floor = "none"
        pairs.warnings.append("two budgets: a straight line in logarithms is all that they give, "
                              "so the irreducible loss is taken as 0")
    if floor == "own" and budgets < 4:
        raise UserError(f"--floor=own needs four budgets, here are {budgets}: use --floor=shared.")
    middle = float(np.log(pairs.x).mean())
    model = Model(floor, np.log(pairs.x) - middle, np.log(pairs.loss))
    freedom = _freedom(model, pairs, noise)
    theta = _start(model)
    spreads = (Spread(1.0, freedom[0]), Spread(1.0, freedom[1]))
    for _ in range(_ROUNDS):
        before = spreads
        theta = _weighted(model, theta, spreads)
        spreads = _spreads(model, theta, pairs.budget, noise)
        if all(np.isclose(a.size, b.size, rtol=1e-4) for a, b in zip(spreads, before, strict=True)):
            break
    if min(model.full(theta)[[2, 5]]) <= 0:
        rising = " and ".join(n for n, power in zip(
            pairs.names, model.full(theta)[[2, 5]], strict=True) if power <= 0)
        raise UserError(f"the loss of {rising} does not fall with compute: leave out runs that "
                        f"diverged (--where), or look whether the columns are the right ones.")
    covariance, shares = _covariance(model, theta, spreads)
    return Comparison(pairs, model, theta, covariance, shares, spreads, middle, level)


def _taken(model: Model) -> tuple[int, int]:
    """Parameters that the means and the differences of pairs pay for."""
    return (2 if model.floor == "none" else 3), (3 if model.floor == "own" else 2)


def _freedom(model: Model, pairs: Pairs, noise: float) -> tuple[float, float]:
    count = len(pairs.budget)
    if noise:
        return np.inf, np.inf
    taken = _taken(model)
    if count - taken[1] < 1:
        raise UserError(f"{count} pairs of runs say nothing of their own error: run another "
                        f"budget, or two seeds a budget, or say the spread of log loss between "
                        f"seeds by --noise.")
    return tuple(float(max(count - n, 1)) for n in taken)


def _start(model: Model) -> np.ndarray:
    """The best of a few floors, with lines through log(loss - floor)."""
    best, best_value = None, np.inf
    for share in (0.0, 0.4, 0.7, 0.9):
        floor = share * np.exp(model.log_loss.min()) * (model.floor != "none")
        theta = np.zeros(6)
        for i in (0, 1):
            slope, level = np.polyfit(model.u[i], np.log(np.exp(model.log_loss[i]) - floor), 1)
            theta[3 * i:3 * i + 3] = floor, level, max(-slope, 0.01)
        value = (model.residuals(theta[model.free])**2).sum()
        if value < best_value:
            best, best_value = theta[model.free], value
    return best


def _weighted(model: Model, theta: np.ndarray, spreads: tuple[Spread, Spread]) -> np.ndarray:
    weights = np.array([[1 / s.size] for s in spreads])
    low = np.where(np.isin(np.flatnonzero(model.free), (0, 3)), 0.0, -np.inf)
    scale = weights.max()
    found = optimize.least_squares(
        lambda point: (model.residuals(point) * weights / scale).ravel(), np.maximum(theta, low),
        lambda point: (model.slope(point) * weights / scale).reshape(len(point), -1).T,
        bounds=(low, np.inf), x_scale="jac", xtol=1e-12, ftol=1e-12, gtol=1e-12)
    return found.x


def _spreads(model: Model, theta: np.ndarray, budget: np.ndarray, noise: float
             ) -> tuple[Spread, Spread]:
    if noise:
        return Spread(noise, np.inf), Spread(noise, np.inf)
    residuals = model.residuals(theta)
    taken = _taken(model)
    difference = _spread(residuals[1], budget, taken[1])
    if len(budget) - taken[0] < 1:      # one seed at three budgets: the mean goes through all
        return difference, difference
    return _spread(residuals[0], budget, taken[0]), difference


def _spread(residual: np.ndarray, budget: np.ndarray, taken: int) -> Spread:
    """From all residuals, or from budgets' means where those scatter more than seeds explain."""
    count, groups = len(residual), np.unique(budget)
    pooled = Spread(max(float(np.sqrt((residual**2).sum() / (count - taken))), _TINY),
                    count - taken)
    within, between_ = count - len(groups), len(groups) - taken
    if within < 1 or between_ < 1:
        return pooled
    means = np.array([residual[budget == g].mean() for g in groups])
    sizes = np.array([(budget == g).sum() for g in groups])
    inner = ((residual - means[np.searchsorted(groups, budget)])**2).sum() / within
    outer = (sizes * means**2).sum() / between_
    if inner > 0 and stats.f.sf(outer / inner, between_, within) < _LACK:
        return Spread(float(np.sqrt(outer)), between_, by_budget=True)
    return pooled


def _covariance(model: Model, theta: np.ndarray, spreads: tuple[Spread, Spread]
                ) -> tuple[np.ndarray, np.ndarray]:
    """(covariance [F, F], the parts of it by means and differences [2, F, F]). A floor that rests
    at 0 is held there."""
    slope = model.slope(theta)
    held = np.isin(np.flatnonzero(model.free), (0, 3)) & (theta < 1e-6)
    slope[held] = 0
    parts = np.array([slope[:, i] @ slope[:, i].T / s.size**2 for i, s in enumerate(spreads)])
    inverse = np.linalg.pinv(parts.sum(axis=0), hermitian=True, rcond=1e-14)
    shares = np.array([inverse @ part @ inverse for part in parts])
    return inverse, shares


def conclude(found: Comparison, over: str = "flops") -> dict[str, Any]:
    """All that `compare` prints, as one object for programs."""
    at_budgets = _by_budget(found, over)
    middle = _ratio_at(found, 0.0)
    trend = _trend(found)
    ends = at_budgets[0], at_budgets[-1]
    turned = (ends[0]["ratio"] > 1) != (ends[1]["ratio"] > 1)
    crossing = _crossing(found) if turned and all(row["told"] for row in ends) else None
    result = {
        "arms": list(found.pairs.names), "over": over, "floor": found.model.floor,
        "budgets": len(at_budgets), "pairs": len(found.pairs.budget), "level": found.level,
        "tuning": found.pairs.tuning, "fits": _fits(found),
        "ratio": {over: float(np.exp(found.middle)), **middle}, "by_budget": at_budgets,
        "trend": trend, "crossing": crossing, "smallest_difference": _smallest(found),
        "spread": {"of_a_pairs_difference": found.spreads[1].size * np.sqrt(2),
                   "freedom": found.spreads[1].freedom},
        "warnings": found.pairs.warnings + _warnings(found)}
    return {**result, "verdict": _verdict(result)}


def ratios(found: Comparison, x: np.ndarray) -> list[dict[str, Any]]:
    """The ratio with its interval at each budget of x."""
    return [_ratio_at(found, float(u)) for u in np.log(x) - found.middle]


def _ratio_at(found: Comparison, u: float) -> dict[str, Any]:
    value, half, _ = found.interval(lambda theta: log_ratio(theta, u))
    ends = [float(np.exp(np.clip(value + sign * half, -700, 700))) for sign in (-1, 1)]
    return {"ratio": float(np.exp(value)), "interval": ends, "told": bool(abs(value) > half)}


def _by_budget(found: Comparison, over: str) -> list[dict[str, Any]]:
    rows = []
    theta = found.model.full(found.theta)
    low, high = found.model.u.min(), found.model.u.max()
    for number in np.unique(found.pairs.budget):
        chosen = found.pairs.budget == number
        u = float(found.model.u[:, chosen].mean())
        reach = abs(log_ratio(theta, u)) / 2
        losses = np.exp(np.log(found.pairs.loss[:, chosen]).mean(axis=1))
        rows.append({over: float(np.exp(u + found.middle)), **_ratio_at(found, u),
                     "losses": losses.tolist(), "pairs": int(chosen.sum()),
                     "inside": bool(u - reach >= low - 1e-9 and u + reach <= high + 1e-9)})
    return rows


def _trend(found: Comparison) -> dict[str, Any]:
    """The factor by which the ratio changes over ten times the compute, and what that means."""
    def rise(theta):
        return (log_ratio(theta, 1.0) - log_ratio(theta, -1.0)) / 2 * np.log(10)
    value, half, _ = found.interval(rise)
    told = bool(abs(value) > half)
    at = log_ratio(found.model.full(found.theta), 0.0)
    said = "it cannot be told whether the ratio grows or shrinks"
    if told:
        said = "the difference grows with compute" if value * at > 0 else \
            "the difference shrinks with compute"
    return {"ratio_per_decade": float(np.exp(value)),
            "interval": [float(np.exp(np.clip(value + sign * half, -700, 700)))
                         for sign in (-1, 1)], "told": told, "said": said}


def _crossing(found: Comparison) -> dict[str, Any]:
    """Where neither arm needs more, and the budgets around it at which they cannot be told apart.
    For arms of which one is better at the first budget and the other at the last, as far as each
    budget's interval says."""
    low, high = found.model.u.min(), found.model.u.max()
    grid = np.linspace(low, high, 201)
    theta = found.model.full(found.theta)
    values = np.array([log_ratio(theta, u) for u in grid])
    change = np.flatnonzero(np.diff(np.sign(values)))
    place = optimize.brentq(lambda u: log_ratio(theta, u), grid[change[0]], grid[change[0] + 1])
    unclear = [u for u in grid if not _ratio_at(found, u)["told"]] or [place]
    ends = [None if edge in unclear else float(np.exp(u + found.middle)) for edge, u in
            ((grid[0], min(unclear)), (grid[-1], max(unclear)))]
    return {"at": float(np.exp(place + found.middle)), "interval": ends}


def _smallest(found: Comparison) -> dict[str, Any]:
    """The ratio that a design with these budgets and this spread sees in POWER of cases."""
    _, error, freedom = found.error_of(lambda theta: log_ratio(theta, 0.0))
    factor = stats.t.ppf((1 + found.level) / 2, freedom) + stats.t.ppf(POWER, freedom)
    return {"ratio": float(np.exp(min(factor * error, 700))), "power": POWER}


def _fits(found: Comparison) -> dict[str, Any]:
    """{arm: E, A and alpha with intervals, A for compute in its own unit}."""
    fits = {}
    for i, name in enumerate(found.pairs.names):
        base = 3 * i
        power, half, _ = found.interval(lambda theta, p=base + 2: theta[p])
        floor, floor_half, _ = found.interval(lambda theta, p=base: theta[p])
        level = found.model.full(found.theta)[base + 1]
        fits[name] = {"E": float(floor), "E_interval": [max(floor - floor_half, 0.0),
                                                        floor + floor_half],
                      "A": float(np.exp(level + power * found.middle)), "alpha": float(power),
                      "alpha_interval": [power - half, power + half]}
    return fits


def _warnings(found: Comparison) -> list[str]:
    warnings = []
    theta = found.model.full(found.theta)
    if found.model.floor != "none" and min(theta[0], theta[3]) < 1e-6:
        warnings.append("the irreducible loss rests at 0: these budgets do not show one, and the "
                        "exponents are those of a straight line")
    if _bends(found):
        warnings.append("the difference of losses bends over budgets as no two laws do: its ends and "
                        "a crossing there are not to be believed; leave out the smallest budgets "
                        "(--where), where warm-up and start-up weigh most")
    if found.spreads[1].by_budget:
        warnings.append("differences scatter more between budgets than between seeds: budgets are "
                        "counted, not seeds; tune at each budget, or look for a budget that is off")
    if np.unique(found.pairs.budget).size < 4:
        warnings.append("fewer than four budgets: the trend rests on little")
    if found.model.floor == "shared" and np.unique(found.pairs.budget).size > 3:
        value, half, _ = _floors_differ(found)
        if abs(value) > half:
            warnings.append(f"with a floor each, the arms' irreducible losses differ by {value:.3g} "
                            f"± {half:.2g}: --floor=own tells that part of the difference")
    return warnings


def _bends(found: Comparison) -> bool:
    """Whether the differences' residuals follow a parabola over budgets, at one per cent."""
    residual, u = found.model.residuals(found.theta)[1], found.model.u.mean(axis=0)
    freedom = len(u) - 3
    if freedom < 2 or len(np.unique(found.pairs.budget)) < 4:
        return False
    design = np.stack([np.ones_like(u), u, u**2], axis=1)
    solved, squares, *_ = np.linalg.lstsq(design, residual, rcond=None)
    error = np.sqrt(squares[0] / freedom * np.linalg.inv(design.T @ design)[2, 2])
    return bool(stats.t.sf(abs(solved[2]) / max(error, 1e-300), freedom) < 0.005)


def _floors_differ(found: Comparison) -> tuple[float, float, float]:
    own = fit(found.pairs, floor="own", level=found.level)
    return own.interval(lambda theta: theta[3] - theta[0])


def _verdict(result: dict[str, Any]) -> str:
    first, second = result["arms"]
    over, ratio, crossing = result["over"], result["ratio"], result["crossing"]
    smallest = result["smallest_difference"]["ratio"]
    if crossing:
        early, late = (first, second) if result["trend"]["ratio_per_decade"] > 1 else \
            (second, first)
        return (f"They cross at {crossing['at']:.3g} {over}: {early} is better below, {late} "
                f"above.")
    if not ratio["told"]:
        return (f"No difference can be told: {first} needs {_times(ratio)} times the {over} of "
                f"{second} for the same loss; this design would have seen a factor of "
                f"{smallest:.3g} in {POWER:.0%} of cases.")
    better, worse = (second, first) if ratio["ratio"] > 1 else (first, second)
    if ratio["ratio"] < 1:
        ratio = {"ratio": 1 / ratio["ratio"], "interval": [1 / e for e in ratio["interval"][::-1]]}
    return (f"{better} is better: {worse} needs {_times(ratio)} times its {over} for the same loss; "
            f"{result['trend']['said']}.")


def _times(ratio: dict[str, Any]) -> str:
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.3g} [{low:.3g}, {high:.3g}]"
