"""What speaks against a fit: designs that cannot identify a law, and fits that show it."""

from typing import Any, Protocol

import numpy as np

from t5x_lite.errors import UserError
from t5x_lite.scaling.laws import Law, SumLaw
from t5x_lite.scaling.tables import Table

_SAME = 0.02        # spread of a logarithm below which a column counts as one value
_AT_BOUND = 1e-6
_FLAT = 2.0         # high over low end of an interval beyond which a coefficient is not known
_LADDER = ("run IsoFLOP budgets instead, four or more, each with five sizes on both sides of the "
           "best (python -m t5x_lite.scaling ladder --design=isoflop)")


class Fit(Protocol):
    """What is looked at of a fits.Fit."""

    law: Law
    table: Table
    settings: Any
    theta: np.ndarray
    start: np.ndarray

    @property
    def residuals(self) -> np.ndarray:
        """log y - log prediction, [R]."""


def design(law: Law, table: Table, free: int) -> list[str]:
    """Warnings of a design that hardly identifies the law.

    Raises:
        UserError: one that cannot: fewer runs than parameters, one value of a column, or columns
            that move together.
    """
    runs = len(table)
    if runs < free:
        raise UserError(f"{runs} runs cannot fix the {free} parameters of {law.name}: at least "
                        f"{free + 1} are needed; {_LADDER}.")
    logs = {name: np.log(table.columns[name]) for name in law.inputs
            if np.all(table.columns[name] > 0)}
    if free == len(law.params):
        _check_columns(law, logs)
    warnings = [] if runs > free else [
        f"{runs} runs for {free} parameters: the fit goes through every run and says nothing "
        f"about its own error"]
    warnings += repeated(table, [*law.inputs, law.output])
    if law.output == "loss" and "flops" in table.columns:
        warnings += rising(table)
    for name, values in logs.items():
        if 0 < np.ptp(values) < np.log(4) and name in ("params", "tokens", "flops"):
            warnings.append(f"{name} spans only {np.exp(np.ptp(values)):.2g}x: exponents from less "
                            f"than 4x are not to be extrapolated")
    return warnings


def _check_columns(law: Law, logs: dict[str, np.ndarray]) -> None:
    for name, values in logs.items():
        if np.ptp(values) < _SAME and name != "granularity":
            what = {"params": "one size", "tokens": "one number of tokens",
                    "flops": "one budget"}.get(name, f"one value of {name}")
            raise UserError(f"all runs have {what} ({name}={np.exp(values[0]):.4g}): {law.name} "
                            f"cannot be identified; vary {name}: {_LADDER}.")
    if {"params", "tokens"} <= logs.keys():
        size, seen = logs["params"], logs["tokens"]
        ratio = seen - size
        if np.ptp(ratio) < _SAME and isinstance(law, SumLaw):
            raise UserError(
                f"every run has {np.exp(ratio.mean()):.3g} tokens a parameter: params and tokens "
                f"move together, so {law.name} cannot tell them apart; {_LADDER}.")
        if abs(np.corrcoef(size, seen)[0, 1]) > 0.9999:
            raise UserError(f"params and tokens lie on one line (in logarithms), which leaves "
                            f"{law.name} unidentified; {_LADDER}.")


def repeated(table: Table, names: list[str]) -> list[str]:
    """A warning of rows that are equal in all these columns: seeds differ at least in what they reached."""
    values = np.stack([table.columns[name] for name in names])
    again = len(table) - np.unique(values, axis=1).shape[1]
    if not again:
        return []
    return [f"{again} of {len(table)} rows repeat another exactly: if they are one run written twice, intervals are "
            "too narrow; leave them out"]


def rising(table: Table) -> list[str]:
    """A warning where more compute does not mean less loss."""
    compute, loss = np.log(table.columns["flops"]), np.log(table.columns["loss"])
    if np.ptp(compute) < _SAME or len(table) < 4:
        return []
    if np.corrcoef(compute, loss)[0, 1] > 0.3:
        return ["the loss rises with compute: runs diverged or columns are mistaken; a power law "
                "that falls does not describe them"]
    return []


def fitted(fit: Fit) -> list[str]:
    """Warnings of a fit: at its start, on a bound, flat."""
    law, warnings = fit.law, []
    free = [i for i, name in enumerate(law.names) if name not in fit.settings.fixed]
    if free and np.allclose(fit.theta[free], fit.start[free], rtol=1e-5, atol=1e-7):
        warnings.append("the fit stayed at its starting point: the optimiser saw no slope; sum the "
                        "objective (no --mean), or give other starts")
    bound = [law.names[i] for i in free if _on_bound(law, i, fit.theta[i])]
    if bound:
        warnings.append(f"{', '.join(bound)} sits on a bound: the runs do not identify it; add "
                        f"runs at larger budgets, or --fix it")
    vanished = _vanished(fit)
    if vanished:
        warnings.append(f"{', '.join(vanished)} contributes under 0.1 per cent everywhere: the "
                        f"runs say nothing about that term")
    if set(bound) & {"alpha", "beta"} == set() and (flat := _flat(fit, free)):
        warnings.append(flat)
    return warnings


def _on_bound(law: Law, place: int, value: float) -> bool:
    param = law.params[place]
    return bool(value - param.low < _AT_BOUND or param.high - value < _AT_BOUND)


def _vanished(fit: Fit) -> list[str]:
    """Coefficients of terms that are nowhere a thousandth of the prediction."""
    if not isinstance(fit.law, SumLaw):
        return []
    x = {n: fit.table.columns[n] for n in fit.law.inputs}
    _, slope = fit.law.evaluate(fit.theta, x)
    shares = {t.coefficient: slope[fit.law.names.index(t.coefficient)].max() for t in fit.law.terms}
    return [name for name, share in shares.items() if share < 1e-3]


def _flat(fit: Fit, free: list[int]) -> str:
    """Names coefficients whose own uncertainty, exponents free, spans more than a factor."""
    x = {n: fit.table.columns[n] for n in fit.law.inputs}
    slope = fit.law.evaluate(fit.theta, x)[1][free]                 # [F, R]
    spread = max(fit.residuals.std(), 1e-9)
    scale = np.maximum(np.linalg.norm(slope, axis=1), 1e-300)
    information = (slope / scale[:, None]) @ (slope / scale[:, None]).T
    values, vectors = np.linalg.eigh(information)
    if values[0] < 1e-12 * values[-1]:
        weak = [fit.law.names[free[i]] for i in np.flatnonzero(np.abs(vectors[:, 0]) > 0.3)]
        return (f"the objective is flat along {', '.join(weak)}: the runs do not tell them apart; "
                f"compare predictions and exponents, not these")
    if fit.settings.objective == "huber":
        # Runs beyond delta count as in a least absolute deviation, whose errors are larger.
        spread *= np.sqrt(np.pi / 2)
    errors = spread * np.sqrt(np.diag(np.linalg.inv(information))) / scale
    wide = [fit.law.names[i] for i, error in zip(free, errors, strict=True)
            if fit.law.params[i].log and 2 * 1.96 * error > np.log(_FLAT)]
    if not wide:
        return ""
    return (f"the objective is flat along {' and '.join(wide)}: they move with their exponents "
            f"over more than {_FLAT:g}x; compare exponents, predictions and the objective, not "
            f"them")


def resampled(fit: Fit, samples: np.ndarray) -> list[str]:
    """Warnings of a bootstrap: draws that end on bounds."""
    warnings = []
    for i, param in enumerate(fit.law.params):
        if param.name in fit.settings.fixed:
            continue
        share = np.mean([_on_bound(fit.law, i, value) for value in samples[:, i]])
        low, high = np.quantile(samples[:, i], (0.025, 0.975))
        if param.log and high - low > np.log(_FLAT):
            warnings.append(f"flat along {param.name}: 95 % of the draws span "
                            f"{np.exp(low):.3g} to {np.exp(high):.3g}; compare exponents, "
                            f"predictions and the objective, not it")
        if share > 0.05:
            warnings.append(f"{param.name} ends on a bound in {share:.0%} of the bootstrap's "
                            f"draws: its interval is cut off there")
    return warnings
