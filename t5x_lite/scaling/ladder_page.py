"""A table of runs as one HTML page: loss over compute with the frontier, IsoFLOP parabolas, optimal
N and D over C beside the papers' lines, residuals, exponents, the prediction. It needs no network.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5x_lite import files
from t5x_lite.scaling import frontier, ladder_results as results, tables
from t5x_lite.scaling.fits import Fit
from t5x_lite.scaling.frontier import Frontier
from t5x_lite.scaling.tables import Table

_LAWS = ("envelope", "parabola", "akima", "hoffmann")
_PF_DAY = 8.64e19     # FLOPs
# name -> (N*(C), D*(C)). Kaplan et al. 2020, table 6 (one epoch, N without embeddings); Hoffmann
# et al. 2022, table 3 (approach 1, all parameters): 67B and 1.5T tokens at 5.76e23 FLOPs.
PAPERS = {
    "Kaplan et al. 2020": (lambda c: 1.3e9 * (c / _PF_DAY) ** 0.73,
                           lambda c: 2e10 * (c / _PF_DAY) ** 0.27),
    "Hoffmann et al. 2022": (lambda c: 67e9 * (c / 5.76e23) ** 0.50,
                             lambda c: 1.5e12 * (c / 5.76e23) ** 0.50)}
_LINE_POINTS = 40


def write(table: str, output: str, *, columns: Mapping[str, str] = {},
          where: Mapping[str, str] | None = None, skip_bad: bool = False, title: str = "",
          laws: Sequence[str] = _LAWS) -> files.Path:
    """Writes the page of a folder of workdirs, or of any table of runs; returns its path.

    Raises:
        UserError: no such table, rows that cannot be fitted, or what draws is not installed.
    """
    from t5x_lite.reporting import page
    runs, curves, found, outcome = _read(files.path(table), columns, where, skip_bad, laws)
    charts = charts_of(runs, curves, found)
    counted = "; ".join(f"{name}: {words}" for name, words in runs.counted.items())
    text = page.rendered(
        pathlib.Path(__file__).parent / "ladder_page.html.j2",
        title=title or files.path(files.absolute(table)).name,
        lead=f"{len(runs)} runs of {len(frontier.budgets(runs))} budgets. {counted}.",
        charts=[{"id": name, "title": chart["title"], "note": chart["note"]}
                for name, chart in charts.items()],
        specs=page.script({name: chart["spec"] for name, chart in charts.items()}),
        fits=_fit_rows(found), outcome=_outcome_rows(outcome), said=outcome)
    return page.saved(text, output)


def _read(path: files.Path, columns, where, skip_bad, laws):
    """(runs, a row an evaluation where there is one, fits, prediction's outcome)."""
    if path.is_dir() and not where:
        return (results.table_of(path, columns), results.table_of(path, columns, curves=True),
                results.fitted(path, laws, columns), results.compared(path, columns))
    runs = tables.read(path, columns, where=where, skip_bad=skip_bad)
    runs.require(("params", "flops", "loss"), "the page")
    return runs, None, results.fitted_to(runs, None, laws), None


def charts_of(runs: Table, curves: Table | None, found: Mapping[str, results.Found]
              ) -> dict[str, dict[str, Any]]:
    """{id: title, note, Vega-Lite spec} of each chart that there is something to draw for."""
    optima = next((found[name] for name in ("parabola", "akima")
                   if isinstance(found.get(name), Frontier)), None)
    laws = [fit for fit in found.values() if isinstance(fit, Fit)]
    charts = {"compute": _compute(runs, curves, optima, laws)}
    if optima is not None:
        charts["isoflop"] = _isoflop(runs, optima)
        for name, field in (("params", "N"), ("tokens", "D")):
            charts[f"optimal_{name}"] = _optimal(name, field, found, optima)
    for fit in laws[:1]:
        charts["residuals"] = _residuals(fit)
    return charts


# --- charts -----------------------------------------------------------------------------------------

def _axis(field: str, title: str, *, log: bool = True) -> dict[str, Any]:
    scale = {"type": "log", "nice": False} if log else {"type": "linear", "nice": False,
                                                        "zero": False}
    return {"field": field, "type": "quantitative", "scale": scale,
            "axis": {"title": title, "format": "~s" if log else "~g"}}


def _spec(layers: list[dict]) -> dict[str, Any]:
    return {"$schema": "https://vega.github.io/schema/vega-lite/v6.json", "width": "container",
            "height": 340, "layer": layers, "resolve": {"scale": {"color": "shared"}},
            "config": {"view": {"stroke": None}, "axis": {"gridColor": "#eee"}}}


def _layer(values: list[dict], mark: Mapping[str, Any], **encoding) -> dict[str, Any]:
    return {"data": {"values": values}, "mark": dict(mark), "encoding": encoding}


def _rows(table: Table, names: Sequence[str]) -> list[dict[str, float]]:
    kept = [name for name in names if name in table.columns]
    return [dict(zip(kept, map(float, row), strict=True)) for row in
            zip(*(table.columns[name] for name in kept), strict=True)]


_SIZE = {"field": "params", "type": "quantitative", "title": "N",
         "scale": {"type": "log", "scheme": "viridis", "nice": False},
         "legend": {"format": "~s", "type": "gradient"}}
_TIP = [{"field": name, "type": "quantitative", "format": ".4~g"}
        for name in ("params", "tokens", "flops", "loss")]


def _compute(runs: Table, curves: Table | None, optima: Frontier | None, laws: Sequence[Fit]):
    x, y = _axis("flops", "FLOPs"), _axis("loss", "loss (nats a token)")
    layers = []
    if curves is not None and "run" in curves.columns:
        layers.append(_layer(_rows(curves, ("flops", "loss", "params", "run")),
                             {"type": "line", "opacity": 0.5}, x=x, y=y, color=_SIZE,
                             detail={"field": "run"}))
    layers.append(_layer(_rows(runs, ("flops", "loss", "params", "tokens")),
                         {"type": "point", "filled": True, "size": 40}, x=x, y=y, color=_SIZE,
                         tooltip=_TIP))
    if optima is not None:
        best = [{"flops": o.flops, "loss": o.loss} for o in optima.optima]
        layers.append(_layer(best, {"type": "line", "color": "#d62728", "strokeDash": [5, 3],
                                    "point": {"color": "#d62728"}}, x=x, y=y))
    note = ("A point is a run's end, a thin line its evaluations; the dashed red line goes through the "
            "lowest points of the parabolas: the frontier." if optima is not None else
            "A point is a run's end, a thin line its evaluations.")
    return {"title": "Loss over compute", "note": note, "spec": _spec(layers)}


def _isoflop(runs: Table, optima: Frontier):
    points, lines = [], []
    for group in frontier.budgets(runs):
        part = runs.rows(group)
        budget = f"{float(np.exp(np.log(part.columns['flops']).mean())):.3g}"
        points += [{**row, "budget": budget} for row in
                   _rows(part, ("params", "tokens", "flops", "loss"))]
        size, loss = np.log(part.columns["params"]), part.columns["loss"]
        if len(np.unique(size.round(6))) < 3:
            continue
        curve = np.polyfit(size - size.mean(), loss, 2)
        places = np.linspace(size.min(), size.max(), _LINE_POINTS)
        lines += [{"params": float(np.exp(p)), "loss": float(v), "budget": budget}
                  for p, v in zip(places, np.polyval(curve, places - size.mean()), strict=True)]
    x, y = _axis("params", "N"), _axis("loss", "loss (nats a token)", log=False)
    color = {"field": "budget", "type": "ordinal", "title": "FLOPs",
             "sort": [p["budget"] for p in points], "scale": {"scheme": "plasma"}}
    best = [{"params": o.params, "loss": o.loss} for o in optima.optima]
    return {"title": "IsoFLOP parabolas", "note": f"Lowest points by {optima.approach}: crosses.",
            "spec": _spec([
                _layer(lines, {"type": "line"}, x=x, y=y, color=color),
                _layer(points, {"type": "point", "filled": True, "size": 50}, x=x, y=y, color=color,
                       tooltip=_TIP),
                _layer(best, {"type": "point", "shape": "cross", "size": 90, "color": "black",
                              "filled": True}, x=x, y=y)])}


def _optimal(name: str, field: str, found: Mapping[str, results.Found], optima: Frontier):
    """Optimal N or D over C: each approach's optima and line, and the papers' lines."""
    budgets = [o.flops for o in optima.optima]
    places = np.geomspace(min(budgets) / 2, max(budgets) * 8, _LINE_POINTS)
    points, lines = [], []
    for approach, fit in found.items():
        if isinstance(fit, Frontier) and approach not in frontier.OF_CURVES:
            points += [{"flops": o.flops, "value": getattr(o, name), "by": approach}
                       for o in fit.optima]
        line = _line(fit, field)
        lines += [{"flops": float(c), "value": float(line(c)), "by": approach}
                  for c in places if line]
    papers = [{"flops": float(c), "value": float(pair[field == "D"](c)), "by": paper}
              for paper, pair in PAPERS.items() for c in places]
    x, y = _axis("flops", "FLOPs"), _axis("value", field)
    color = {"field": "by", "type": "nominal", "title": None}
    dash = {"type": "line", "strokeDash": [4, 4]}
    words = "parameters" if field == "N" else "tokens"
    return {"title": f"Optimal {words} over compute",
            "note": "Points are the optima of each budget, lines what each approach says beyond them; "
                    "dashed are the papers', whose N, D and vocabularies are others.",
            "spec": _spec([_layer(lines, {"type": "line"}, x=x, y=y, color=color),
                           _layer(papers, dash, x=x, y=y, color=color),
                           _layer(points, {"type": "point", "filled": True, "size": 60}, x=x, y=y,
                                  color=color)])}


def _line(fit: results.Found, field: str) -> Callable[[float], float] | None:
    """N* or D* as a function of C; None where the fit says nothing of it."""
    if isinstance(fit, Frontier):
        return fit.params_at if field == "N" else fit.tokens_at
    if not isinstance(fit, Fit) or "N_of_C" not in fit.exponents:
        return None
    if field == "N":
        return lambda c: results.params_by_law(fit, c)
    return lambda c: c / results.flops_over_nd(fit.table) / results.params_by_law(fit, c)


def _residuals(fit: Fit):
    rows = _rows(fit.table, ("params", "tokens", "flops", "loss"))
    values = [{**row, "residual": 100 * float(r)} for row, r in
              zip(rows, fit.residuals, strict=True)]
    place = "flops" if "flops" in fit.table.columns else fit.law.inputs[0]
    return {"title": f"Residuals of {fit.law.name}",
            "note": f"{fit.law.formula}. Measured less fitted, per cent of the loss; a trend over "
                    f"compute or over size says that the law does not describe these runs.",
            "spec": _spec([
                _layer([{"zero": 0}], {"type": "rule", "color": "#888"},
                       y={"field": "zero", "type": "quantitative"}),
                _layer(values, {"type": "point", "filled": True, "size": 60},
                       x=_axis(place, "FLOPs" if place == "flops" else place),
                       y=_axis("residual", "residual (%)", log=False), color=_SIZE, tooltip=_TIP)])}


# --- tables -----------------------------------------------------------------------------------------

def _fit_rows(found: Mapping[str, results.Found]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, fit in found.items():
        if isinstance(fit, str):
            rows.append([name, "–", "–", "–", fit])
            continue
        cells = [results.cell(fit.exponents.get(key), fit.intervals.get(key))
                 for key in ("N_of_C", "D_of_C")]
        what = ", ".join(f"{key} {value:.4g}" for key, value in fit.parameters.items()) \
            if isinstance(fit, Fit) else f"{len(fit.optima)} optima"
        rows.append([name, *cells, what, "; ".join(fit.warnings)])
    return ["approach", "N* ~ C^a (95 %)", "D* ~ C^b (95 %)", "found", "remarks"], rows


def _outcome_rows(outcome: Mapping[str, Any] | None) -> tuple[list[str], list[list[str]]]:
    rows = [[name, results.cell(one["loss"], one.get("interval"), ".4f"), f"{one['error']:+.2%}",
             {True: "yes", False: "no"}.get(one.get("inside"), "–")]
            for name, one in (outcome or {}).get("predicted", {}).items()]
    return ["approach", "predicted (95 %)", "error", "inside"], rows
