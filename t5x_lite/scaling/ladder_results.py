"""What a ladder's folder says: fits by each approach of its design, a prediction, how it came out."""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite import files
from t5x_lite.errors import UserError
from t5x_lite.scaling import fits, frontier, tables
from t5x_lite.scaling.fits import Fit
from t5x_lite.scaling.frontier import Frontier
from t5x_lite.scaling.laws import LAWS
from t5x_lite.scaling.tables import Table

PREDICTION, PREDICTED = "prediction.json", "predicted"   # a file of the folder, and an arm
Found = Fit | Frontier | str     # a fit, or why there is none


def table_of(workdir: files.Path, columns: Mapping[str, str], *, curves: bool = False,
             predicted: bool = False) -> Table:
    """The ladder's runs without the predicted one, or that one alone."""
    table = tables.read(workdir, columns, labels=("workdir",), curves=curves)
    chosen = np.array([name.split("/")[0] == PREDICTED for name in table.labels["workdir"]])
    return table.rows(chosen if predicted else ~chosen)


def seed_noise(table: Table) -> float:
    """The spread of log loss between seeds of one arm; 0 where no arm has two."""
    arms: dict[str, list[float]] = {}
    if "workdir" not in table.labels:
        return 0.0
    for name, loss in zip(table.labels["workdir"], table.columns["loss"], strict=True):
        parts = [part for part in name.split("/") if not part.startswith("seed_")]
        arms.setdefault("/".join(parts), []).append(float(np.log(loss)))
    groups = [values for values in arms.values() if len(values) > 1]
    if not groups:
        return 0.0
    squares = sum(np.var(values) * len(values) for values in groups)
    return float(np.sqrt(squares / sum(len(values) - 1 for values in groups)))


def fitted(workdir: files.Path, names: Sequence[str], columns: Mapping[str, str] = {}, *,
           draws: int = 200) -> dict[str, Found]:
    """{law or approach: its fit with intervals, or in words why there is none}."""
    return fitted_to(table_of(workdir, columns), table_of(workdir, columns, curves=True), names,
                     draws=draws)


def fitted_to(table: Table, curves: Table | None, names: Sequence[str], *, draws: int = 200
              ) -> dict[str, Found]:
    """{law or approach: its fit, or in words why there is none} of tables that have been read; without
    curves there is no envelope."""
    found: dict[str, Found] = {}
    for name in names:
        runs = curves if name in frontier.OF_CURVES else table
        if runs is None:
            continue
        try:
            if name in frontier.APPROACHES:
                found[name] = frontier.fit(name, runs, noise=seed_noise(table), draws=draws)
            else:
                found[name] = fits.bootstrap(fits.fit(LAWS[name], table), draws)
        except UserError as error:
            found[name] = str(error)
    return found


def optimal_params(found: Mapping[str, Found], compute: float) -> float:
    """The size to train at a budget: the geometric mean of what the approaches say.

    Raises:
        UserError: none of them says anything.
    """
    sizes = [fit.params_at(compute) for fit in found.values() if isinstance(fit, Frontier)]
    sizes += [params_by_law(fit, compute) for fit in found.values()
              if isinstance(fit, Fit) and "N_of_C" in fit.exponents]
    if not sizes:
        why = " ".join(str(fit) for fit in found.values())
        raise UserError(f"no size can be predicted from this ladder: {why}")
    return float(np.exp(np.mean(np.log(sizes))))


def params_by_law(fit: Fit, compute: float) -> float:
    """N* of L = E + A N^-alpha + B D^-beta under C = k N D, k as the runs have it."""
    values, k = fit.parameters, flops_over_nd(fit.table)
    ratio = values["alpha"] * values["A"] / (values["beta"] * values["B"])
    return float(ratio ** (1 / (values["alpha"] + values["beta"]))
                 * (compute / k) ** (values["beta"] / (values["alpha"] + values["beta"])))


def flops_over_nd(table: Table) -> float:
    """C / (N D) of these runs, which is 6 where C was counted so."""
    runs = table.columns
    return float(np.exp(np.mean(np.log(runs["flops"] / runs["params"] / runs["tokens"]))))


def predictions(found: Mapping[str, Found], params: float, tokens: float, compute: float,
                level: float = 0.95, seed: int = 0) -> dict[str, dict[str, Any]]:
    """{approach: loss, and an interval where the fit was bootstrapped} of a run.

    The interval holds the parameters' uncertainty and the scatter of the runs about the fit. Of a
    frontier a power law goes through the losses of its optima.
    """
    said: dict[str, dict[str, Any]] = {}
    at = {"params": params, "tokens": tokens, "flops": compute}
    for name, fit in found.items():
        if isinstance(fit, Frontier):
            said.update(_of_frontier(name, fit, compute))
        elif isinstance(fit, Fit):
            said[name] = {"loss": float(fit.predict(at)[0]), **_interval(fit, at, level, seed)}
    return said


def _interval(fit: Fit, at: Mapping[str, float], level: float, seed: int
              ) -> dict[str, list[float]]:
    """{"interval": …} of a bootstrapped fit's prediction; {} of another."""
    if fit.samples is None:
        return {}
    x = {name: np.atleast_1d(at[name]) for name in fit.law.inputs}
    drawn = np.array([fit.law.evaluate(theta, x)[0][0] for theta in fit.samples])
    scatter = fit.residuals.std() * np.random.default_rng(seed).standard_normal(len(drawn))
    ends = np.quantile(np.exp(drawn + scatter), ((1 - level) / 2, (1 + level) / 2))
    return {"interval": [float(end) for end in ends]}


def _of_frontier(name: str, fit: Frontier, compute: float) -> dict[str, dict[str, float]]:
    """Predictions of a power law through the lowest losses, without and with a floor."""
    columns = {"flops": [o.flops for o in fit.optima], "loss": [o.loss for o in fit.optima]}
    optima, said = tables.from_columns(columns), {}
    for law, words in (("kaplan_c", "power law"), ("frontier", "power law with a floor")):
        try:
            line = fits.fit(LAWS[law], optima)
        except UserError:   # fewer optima than the law has parameters: the other law speaks
            continue
        said[f"{name}, {words}"] = {"loss": float(line.predict({"flops": compute})[0])}
    return said


def write_prediction(workdir: files.Path, said: Mapping[str, Any]) -> None:
    """WORKDIR/prediction.json, which nothing writes a second time.

    Raises:
        UserError: a prediction is there.
    """
    path = workdir / PREDICTION
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        files.write_new(path, json.dumps({"written": now, **said}, indent=1) + "\n")
    except FileExistsError:
        raise UserError(f"{path} was written before: a prediction is made once.") from None


def read_prediction(workdir: files.Path) -> dict[str, Any] | None:
    """What `write_prediction` wrote; None where nothing is predicted."""
    path = workdir / PREDICTION
    return json.loads(path.read_text()) if path.is_file() else None


def compared(workdir: files.Path, columns: Mapping[str, str] = {}) -> dict[str, Any] | None:
    """The prediction beside what its run measured; None where either is missing."""
    said = read_prediction(workdir)
    if said is None:
        return None
    try:
        table = table_of(workdir, columns, predicted=True)
    except UserError:   # no run has been evaluated
        return None
    if not len(table):
        return None
    measured = float(table.columns["loss"][0])
    rows = {name: {**one, "error": one["loss"] / measured - 1, **(
        {"inside": one["interval"][0] <= measured <= one["interval"][1]} if "interval" in one
        else {})} for name, one in said["predicted"].items()}
    return {"written": said["written"], "measured": measured,
            "run": {n: float(table.columns[n][0]) for n in ("params", "tokens", "flops")},
            "predicted": rows}


def as_json(found: Mapping[str, Found]) -> dict[str, Any]:
    """The fits as one object; of what could not be fitted, why."""
    return {name: {"refused": fit} if isinstance(fit, str) else fit.as_json()
            for name, fit in found.items()}


def summary(found: Mapping[str, Found], outcome: Mapping[str, Any] | None) -> str:
    """Markdown: exponents by approach, then prediction against measurement."""
    lines = ["| approach | N* ~ C^a (95 %) | D* ~ C^b (95 %) | remarks |", "|---|---|---|---|"]
    for name, fit in found.items():
        if isinstance(fit, str):
            lines.append(f"| {name} | – | – | {fit} |")
            continue
        cells = [cell(fit.exponents.get(key), fit.intervals.get(key)) for key in ("N_of_C", "D_of_C")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {'; '.join(fit.warnings)} |")
    counted = next((fit.counted if isinstance(fit, Frontier) else fit.table.counted
                    for fit in found.values() if not isinstance(fit, str)), {})
    lines += ["", "Counted: " + "; ".join(f"{n} are {w}" for n, w in counted.items()) + "."]
    if outcome:
        lines += ["", f"Predicted on {outcome['written']}, before the run was trained; measured: "
                      f"{outcome['measured']:.4f}.", "", "| approach | predicted (95 %) | error |",
                  "|---|---|---|"]
        lines += [f"| {name} | {cell(one['loss'], one.get('interval'), '.4f')} "
                  f"| {one['error']:+.2%} |" for name, one in outcome["predicted"].items()]
    return "\n".join(lines) + "\n"


def cell(value: float | None, interval: Sequence[float] | None, form: str = ".3f") -> str:
    """"0.500 (0.480 … 0.520)", or a dash of nothing."""
    if value is None:
        return "–"
    ends = f" ({interval[0]:{form}} … {interval[1]:{form}})" if interval else ""
    return f"{value:{form}}{ends}"
