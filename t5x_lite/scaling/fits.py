"""`fit(law, table)`: parameters, objective, intervals, and what speaks against believing them.

Objectives, of the residual r = log y - log prediction at each run, or of y - prediction:

    huber        sum of Huber(r), delta 1e-3 (Hoffmann et al. 2022). The sum, not the mean: under an
                 optimiser's default tolerances the mean stops far from the optimum (Besiroglu 2024)
    log_squares  sum of (r / std)^2 / 2, std from the table's column std, else 1
    squares      sum of (y - prediction)^2 / 2
    likelihood   minus the log likelihood of normal r, whose spread is estimated too
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from t5x_lite.errors import UserError, nearest, one_of
from t5x_lite.scaling import checks, optimise
from t5x_lite.scaling.laws import Law, SumLaw
from t5x_lite.scaling.tables import Table

OBJECTIVES = ("huber", "log_squares", "squares", "likelihood")
METHODS = ("bfgs", "varpro")
_NEAR = 0.005       # share of the objective within which another minimum is as good
_APART = np.log(1.5)
_MOST_MINIMA = 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fit."""

    objective: str = "huber"
    method: str = "bfgs"        # or varpro: least squares over the exponents alone
    delta: float = 1e-3
    starts: int = 500           # at most so many of the law's grid, the best of them
    mean: bool = False          # average the objective instead of summing it
    tolerance: float = 1e-13
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
    start: Mapping[str, float] = dataclasses.field(default_factory=dict)   # this one alone

    def __post_init__(self):
        one_of("--objective", self.objective, OBJECTIVES)
        one_of("--method", self.method, METHODS)


@dataclasses.dataclass
class Fit:
    """A fitted law."""

    law: Law
    table: Table
    settings: Settings
    theta: np.ndarray           # [P], as fitted
    start: np.ndarray           # [P], where the best fit began
    objective: float
    warnings: list[str]
    intervals: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    near_minima: list[dict[str, float]] = dataclasses.field(default_factory=list)
    samples: np.ndarray | None = None      # [B, P] of a bootstrap

    @property
    def parameters(self) -> dict[str, float]:
        """Natural values by name."""
        return naturals(self.law, self.theta)

    @property
    def exponents(self) -> dict[str, float]:
        """What the law says of the compute-optimal model."""
        return self.law.exponents(self.parameters)

    def predict(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Predictions [R] for columns of inputs."""
        x = {n: np.atleast_1d(np.asarray(columns[n], float)) for n in self.law.inputs}
        return np.exp(self.law.evaluate(self.theta, x)[0])

    @property
    def residuals(self) -> np.ndarray:
        """log y - log prediction, [R]."""
        return np.log(self.table.columns[self.law.output]) - np.log(
            self.predict(self.table.columns))

    def as_json(self) -> dict[str, Any]:
        """One object for programs."""
        found = {
            "law": self.law.name, "formula": self.law.formula, "source": self.law.source,
            "parameters": self.parameters,
            "intervals": {n: list(i) for n, i in self.intervals.items()},
            "objective": self.objective, "objective_kind": self.settings.objective,
            "exponents": self.exponents, "runs": len(self.table),
            "rmse_log": float(np.sqrt(np.mean(self.residuals**2))),
            "columns": dict(self.table.sources), "counted": self.table.counted,
            "fixed": dict(self.settings.fixed),
            "near_minima": self.near_minima, "warnings": self.warnings}
        return found


def naturals(law: Law, theta: np.ndarray) -> dict[str, float]:
    """{name: natural value}."""
    return {p.name: p.natural(v) for p, v in zip(law.params, theta, strict=True)}


def fit(law: Law, table: Table, settings: Settings = Settings(), *,
        check: bool = True) -> Fit:
    """The best fit over a grid of starts.

    Raises:
        UserError: columns are missing, or the table's design cannot identify the law.
    """
    table.require((*law.inputs, law.output), law.name)
    _check_named(law, "fix", settings.fixed)
    _check_named(law, "start", settings.start)
    warnings = checks.design(law, table, len(law.params) - len(settings.fixed)) if check else []
    if settings.method == "varpro":
        theta, value, start, others = *_project(law, table, settings), []
    else:
        theta, value, start, others = _search(law, table, settings)
    found = Fit(law, table, settings, theta, start, float(value), warnings, near_minima=others)
    warnings += checks.fitted(found)
    if settings.mean:
        warnings += _short_of(found)
    if others:
        warnings.append(f"{len(others)} other minima lie within {_NEAR:.1%} of the best objective, "
                        f"with parameters up to 1.5x away and more (near_minima): the runs do not "
                        f"choose among them")
    return found


def _short_of(found: Fit) -> list[str]:
    """A warning where the summed objective still falls from the end of an averaged fit."""
    problem = Problem(found.law, found.table, dataclasses.replace(found.settings, mean=False))
    value = found.objective * len(found.table)
    lowest = _polish(problem, problem.inner(found.theta), value)[1]
    gain = 1 - lowest / value if value else 0.0
    return [f"the optimiser stopped short: the objective still falls by {gain:.1%} from here, "
            f"since averaging makes its slopes smaller than the tolerance; leave out --mean"
            ] if gain > 1e-3 else []


def _check_named(law: Law, flag: str, values: Mapping[str, float]) -> None:
    """Raises UserError where a value is of no parameter, or one that it cannot have."""
    params = {p.name: p for p in law.params}
    for name, value in values.items():
        if name not in params:
            raise UserError(f"--{flag}={name}: {law.name} has {', '.join(law.names)}."
                            f"{nearest(name, law.names)}")
        param = params[name]
        if not np.isfinite(value) or param.log and value <= 0 or \
                not param.low <= param.fitted(value) <= param.high:
            raise UserError(f"--{flag}={name}={value:g}: must lie from "
                            f"{param.natural(param.low):g} to {param.natural(param.high):g}.")


class Problem:
    """A law on a table, on a scale where its coefficients hardly hang together with exponents."""

    def __init__(self, law: Law, table: Table, settings: Settings):
        self.law, self.settings = law, settings
        x = {name: table.columns[name] for name in law.inputs}
        self.y = table.columns[law.output]
        self.x, self.back = x, np.eye(len(law.params))
        if isinstance(law, SumLaw) and not settings.fixed and not settings.mean:
            self.x, self.back = law.centred(x)
        self.forth = np.linalg.inv(self.back)
        std = table.columns.get("std")
        self.std = np.ones(len(self.y)) if std is None else std
        self.free = np.array([n not in settings.fixed for n in law.names])
        self.base = np.array([p.fitted(settings.fixed[p.name]) if p.name in settings.fixed else 0.0
                              for p in law.params])
        self.low = np.array([p.low for p in law.params])[self.free]
        self.high = np.array([p.high for p in law.params])[self.free]

    def full(self, theta: np.ndarray) -> np.ndarray:
        """Free parameters [..., F] -> all [..., P], still on the inner scale."""
        whole = np.broadcast_to(self.base, (*theta.shape[:-1], len(self.base))).copy()
        whole[..., self.free] = theta
        return whole

    def inner(self, theta: np.ndarray) -> np.ndarray:
        """Parameters of the law [..., P] -> free ones on the inner scale."""
        return (theta @ self.forth.T)[..., self.free]

    def outer(self, theta: np.ndarray) -> np.ndarray:
        """What `inner` is given, back."""
        return self.full(theta) @ self.back.T

    def residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(residuals [..., R], derivatives [..., F, R])."""
        log_f, slope = self.law.evaluate(self.full(theta), self.x)
        slope = slope[..., self.free, :]
        if self.settings.objective == "squares":
            f = np.exp(np.minimum(log_f, 300))
            return self.y - f, -slope * f[..., None, :]
        scale = self.std if self.settings.objective != "huber" else 1.0
        return (np.log(self.y) - log_f) / scale, -slope / scale

    def objective(self, counts: np.ndarray | None = None) -> optimise.Objective:
        """The objective and its slope. counts: [S, R], how often each problem has each run."""
        settings = self.settings

        def evaluate(theta, which):
            residual, slope = self.residuals(theta)
            weight = 1.0 if counts is None else counts[which]
            value, outer = _LOSSES[settings.objective](residual, weight, settings.delta)
            share = 1 / len(self.y) if settings.mean else 1.0
            value = np.where(np.isfinite(value), value, np.inf)
            return share * value, share * np.nan_to_num(np.einsum("...pr,...r->...p", slope, outer))
        return evaluate


def _huber(r, weight, delta):
    clipped = np.clip(r, -delta, delta)
    return (weight * clipped * (r - clipped / 2)).sum(-1), weight * clipped


def _squares(r, weight, _):
    return (weight * r**2 / 2).sum(-1), weight * r


def _likelihood(r, weight, _):
    count = np.sum(weight * np.ones_like(r), -1)
    mean = np.maximum((weight * r**2).sum(-1) / count, 1e-300)
    return count / 2 * (np.log(2 * np.pi * mean) + 1), weight * r / mean[..., None]


_LOSSES: dict[str, Callable] = {"huber": _huber, "squares": _squares, "log_squares": _squares,
                                "likelihood": _likelihood}


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _search(law: Law, table: Table, settings: Settings):
    """(theta, objective, its start, other minima as good) of many starts."""
    problem = Problem(law, table, settings)
    starts = problem.inner(law.starts({n: table.columns[n] for n in law.inputs}, problem.y))
    if settings.start:
        middle = np.median(problem.outer(starts), axis=0)
        for place, param in enumerate(law.params):
            if param.name in settings.start:
                middle[place] = param.fitted(settings.start[param.name])
        starts = problem.inner(middle[None])
    starts = np.unique(starts, axis=0)
    objective = problem.objective()
    first = objective(starts, np.arange(len(starts)))[0]
    starts = starts[np.argsort(first, kind="stable")[:settings.starts]]
    if settings.mean:
        theta, value = _by_default(problem, starts)
    else:
        theta, value = optimise.minimise(objective, starts, problem.low, problem.high,
                                         tolerance=settings.tolerance)
    if not np.isfinite(value).any():
        raise UserError(f"{law.name}: no start gives a finite prediction of {law.output}; check "
                        f"the columns' units.")
    best = int(np.argmin(value))
    polished, lowest = _polish(problem, theta[best], value[best])
    chosen = problem.outer(polished)
    others = _near_minima(law, chosen, problem.outer(theta), value, lowest)
    return chosen, lowest, problem.outer(starts[best]), others


def _near_minima(law: Law, best: np.ndarray, theta: np.ndarray, value: np.ndarray, lowest: float
                 ) -> list[dict[str, float]]:
    """Ends of other starts with nearly the best objective and a parameter 1.5x from it; the
    objective stands in each as "objective"."""
    scale = np.array([1.0 if p.log else max(abs(b), 1e-3) for p, b in
                      zip(law.params, best, strict=True)])
    kept: list[np.ndarray] = [best]
    found = []
    for i in np.argsort(value, kind="stable"):
        if not value[i] <= lowest + _NEAR * abs(lowest) or len(found) == _MOST_MINIMA:
            break
        if all(np.abs((theta[i] - other) / scale).max() > _APART for other in kept):
            kept.append(theta[i])
            found.append({**naturals(law, theta[i]), "objective": float(value[i])})
    return found


def _by_default(problem: Problem, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scipy's L-BFGS with its own tolerances from each start: what --mean is there to show."""
    ends = []
    for start in starts:
        def evaluate(point):
            value, slope = problem.objective()(point[None], np.zeros(1, int))
            return value[0], slope[0]
        ends.append(optimize.minimize(evaluate, start, jac=True, method="L-BFGS-B"))
    return np.array([e.x for e in ends]), np.array([e.fun for e in ends])


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _polish(problem: Problem, theta: np.ndarray, value: float) -> tuple[np.ndarray, float]:
    """L-BFGS of scipy once more from the best point, at the tightest tolerance.

    The objective is scaled to order 1 first: L-BFGS compares slopes with fixed numbers.
    """
    if problem.settings.mean:
        return theta, value
    scale = max(abs(value), 1e-300)

    def scaled(point):
        found, slope = problem.objective()(point[None], np.zeros(1, int))
        return found[0] / scale, slope[0] / scale

    found = optimize.minimize(scaled, theta, jac=True, method="L-BFGS-B",
                              bounds=list(zip(problem.low, problem.high, strict=True)),
                              options={"maxiter": 2000, "ftol": 1e-16, "gtol": 1e-12})
    return (found.x, found.fun * scale) if found.fun * scale < value else (theta, value)


def _project(law: Law, table: Table, settings: Settings):
    """Variable projection: least squares of y over the exponents; the rest by non-negative least
    squares at each."""
    if not isinstance(law, SumLaw) or settings.fixed:
        raise UserError(f"--method=varpro searches the exponents of a sum of powers with nothing "
                        f"fixed: use --method=bfgs for {law.name}.")
    problem = Problem(law, table, settings)
    coefficients = [law.names.index(t.coefficient) for t in law.terms]
    others = [i for i in range(len(law.params)) if i not in coefficients]

    def solve(powers):
        theta = np.zeros(len(law.params))
        theta[others] = powers
        return theta, *optimize.nnls(law.basis(theta, problem.x).T, problem.y)

    bounds = [(law.params[i].low, law.params[i].high) for i in others]
    starts = np.unique(law.starts(problem.x, problem.y)[:, others], axis=0)
    scores = [solve(p)[2] for p in starts]
    best, start = None, None
    for i in np.argsort(scores)[:5]:
        found = optimize.minimize(lambda p: solve(p)[2], starts[i], method="Nelder-Mead",
                                  bounds=bounds, options={"xatol": 1e-10, "fatol": 1e-14,
                                                          "maxiter": 4000})
        if best is None or found.fun < best.fun:
            best, start = found, starts[i]
    theta, factors, norm = solve(best.x)
    theta[coefficients] = np.log(np.maximum(factors, np.exp(-90)))
    first = theta.copy()
    first[others] = start
    return problem.outer(theta), norm**2 / 2, problem.outer(first)


def bootstrap(fitted: Fit, draws: int, *, level: float = 0.95, seed: int = 0,
              noise: float | None = None) -> Fit:
    """The fit with percentile intervals over resampled runs, each refitted from the best fit.

    Args:
        noise: instead of drawing runs, add normal noise of this spread to log y (what seeds do).
    """
    settings = dataclasses.replace(fitted.settings, method="bfgs", mean=False)
    if fitted.settings.method == "varpro":
        settings = dataclasses.replace(settings, objective="squares")
    problem = Problem(fitted.law, fitted.table, settings)
    rng = np.random.default_rng(seed)
    runs = len(problem.y)
    start = np.repeat(problem.inner(fitted.theta)[None], draws, axis=0)
    if noise is None:
        counts = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws).astype(float)
    else:
        counts = np.ones((draws, runs))
        problem.y = problem.y * np.exp(noise * rng.standard_normal((draws, runs)))
    objective = problem.objective(counts)
    if noise is not None:
        objective = _by_draw(problem, problem.y)
    theta, _ = optimise.minimise(objective, start, problem.low, problem.high, tolerance=1e-10)
    samples = problem.outer(theta)
    return dataclasses.replace(fitted, samples=samples,
                               intervals=_percentiles(fitted.law, samples, level),
                               warnings=fitted.warnings + checks.resampled(fitted, samples))


def _by_draw(problem: Problem, drawn: np.ndarray) -> optimise.Objective:
    """The objective where each problem has outputs [S, R] of its own."""
    def evaluate(theta, which):
        problem.y = drawn[which]
        return problem.objective()(theta, which)
    return evaluate


def _percentiles(law: Law, samples: np.ndarray, level: float) -> dict[str, tuple[float, float]]:
    columns: dict[str, list[float]] = {}
    for theta in samples:
        values = naturals(law, theta)
        for name, value in {**values, **law.exponents(values)}.items():
            columns.setdefault(name, []).append(value)
    tails = ((1 - level) / 2, (1 + level) / 2)
    return {n: tuple(float(q) for q in np.quantile(v, tails)) for n, v in columns.items()}


def profile(fitted: Fit, name: str, *, level: float = 0.95) -> tuple[float, float]:
    """The interval in which fixing the parameter raises the objective by no more than F allows.

    The spread of the runs is taken from the fit, whose residuals are taken to be normal: for
    log_squares, squares and likelihood; a Huber fit has bootstrap intervals.
    """
    if fitted.settings.objective == "huber" and fitted.settings.method != "varpro":
        raise UserError("--profile asks for normal residuals: use --objective=log_squares, or "
                        "--bootstrap with huber.")
    law, runs = fitted.law, len(fitted.table)
    place = law.names.index(name)
    free = len(law.params) - len(fitted.settings.fixed)
    threshold = stats.f.ppf(level, 1, runs - free) / (runs - free)
    spread = max(abs(fitted.theta[place]) * 0.05, 0.01)

    def excess(value):
        pinned = {**fitted.settings.fixed, name: law.params[place].natural(value)}
        settings = dataclasses.replace(fitted.settings, fixed=pinned, method="bfgs")
        problem = Problem(law, fitted.table, settings)
        _, found = optimise.minimise(problem.objective(), problem.inner(fitted.theta)[None],
                                     problem.low, problem.high)
        if settings.objective == "likelihood":
            return 2 * (found[0] - fitted.objective) / runs - np.log1p(threshold)
        return found[0] / fitted.objective - 1 - threshold

    ends = [_edge(excess, fitted.theta[place], sign * spread, law.params[place])
            for sign in (-1, 1)]
    low, high = (law.params[place].natural(end) for end in ends)
    return low, high


def _edge(excess: Callable[[float], float], middle: float, step: float, param) -> float:
    """Where `excess` crosses 0 beyond the middle; the bound, or infinity, where it does not."""
    inner = middle
    for _ in range(40):
        outer = float(np.clip(inner + step, param.low, param.high))
        if excess(outer) > 0:
            return optimize.brentq(excess, *sorted((inner, outer)), xtol=1e-6)
        if outer in (param.low, param.high):
            return outer
        inner, step = outer, step * 1.6
    return np.inf if step > 0 else -np.inf


def held_out(law: Law, table: Table, chosen: Sequence[bool], settings: Settings = Settings()
             ) -> dict[str, float]:
    """Fits the runs that are not chosen and predicts those that are: mean and largest relative
    error."""
    chosen = np.asarray(chosen, bool)
    if not chosen.any() or chosen.all():
        raise UserError("held-out runs: at least one run must be held out and one fitted.")
    fitted = fit(law, table.rows(~chosen), settings)
    rest = table.rows(chosen)
    error = np.abs(fitted.predict(rest.columns) / rest.columns[law.output] - 1)
    return {"mean_relative_error": float(error.mean()),
            "largest_relative_error": float(error.max()), "runs": int(chosen.sum())}
