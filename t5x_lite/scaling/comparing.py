"""`python -m t5x_lite.scaling compare`: its flags, its screen and its picture."""

import argparse
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5x_lite import packages
from t5x_lite.errors import UserError
from t5x_lite.scaling import arms, compare as comparison, tables


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of compare."""
    parser.add_argument("--arms", default="", help="two: A,B, words of a table's column; without "
                        "--table, folders of workdirs")
    parser.add_argument("--table", default="", help="a CSV or .jsonl")
    parser.add_argument("--columns", default="", help="flops=COL,loss=COL,budget=COL,…")
    parser.add_argument("--where", default="", help="rows to take: COL=VALUE,COL2=A|B")
    parser.add_argument("--arm_column", default="arm", help="of a table, that names the arm")
    parser.add_argument("--seed_column", default="", help="runs of one seed are pairs")
    parser.add_argument("--tuned", default="", help="columns that were tuned at each budget: lr,…")
    parser.add_argument("--over", default="flops", help="what is saved: flops, tokens, hours, …")
    parser.add_argument("--metric", default="eval/all/loss", help="of workdirs' metrics.jsonl")
    parser.add_argument("--floor", default="shared",
                        help=f"irreducible loss: {', '.join(comparison.FLOORS)}")
    parser.add_argument("--noise", type=float, default=0.0,
                        help="spread of log loss over seeds, where it is known")
    parser.add_argument("--skip_bad", action="store_true", help="leave out runs without numbers")
    parser.add_argument("--level", type=float, default=0.95, help="of intervals")
    parser.add_argument("--output", default="", help="a picture: .png, .pdf or .svg")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The object that `compare` prints."""
    names = [name.strip() for name in options.arms.split(",") if name.strip()]
    if len(names) != 2 or names[0] == names[1]:
        raise UserError(f"--arms={options.arms}: must be two arms, --arms=A,B; compare more of "
                        f"them two at a time.")
    if options.noise < 0 or not np.isfinite(options.noise):
        raise UserError(f"--noise={options.noise}: must be a spread of log loss, at least 0.")
    one, other = _read(options, names)
    pairs = arms.pair(one, other)
    found = comparison.fit(pairs, floor=options.floor, noise=options.noise, level=options.level)
    result = comparison.conclude(found, options.over)
    if options.output:
        draw(found, result, options.output)
        result["output"] = options.output
    return result


def _read(options: argparse.Namespace, names: list[str]) -> list[arms.Runs]:
    if not options.table:
        return arms.from_folders(names, options.metric, over=options.over,
                                 skip_bad=options.skip_bad)
    columns = tables.pairs(options.columns, "columns")
    if columns and options.over not in ("flops", *columns):
        columns[options.over] = options.over
    return arms.from_table(
        options.table, names, columns, over=options.over, arm=options.arm_column,
        seed=options.seed_column, tuned=[n for n in options.tuned.split(",") if n],
        where=tables.pairs(options.where, "where"), skip_bad=options.skip_bad)


def show(result: Mapping[str, Any]) -> str:
    """The screen."""
    first, second = result["arms"]
    over, level = result["over"], f"{result['level']:.0%}"
    lines = [result["verdict"], "",
             f"{first} against {second}: {result['pairs']} pairs of runs at {result['budgets']} "
             f"budgets; {result['tuning']['said']}", "",
             f"loss = E + A {over}^-alpha, E {_FLOOR_SAID[result['floor']]}, with {level} "
             f"intervals"]
    for name, fit in result["fits"].items():
        lines.append(f"  {name:<16} E {fit['E']:.4g} {_interval(fit['E_interval'])}   "
                     f"alpha {fit['alpha']:.4g} {_interval(fit['alpha_interval'])}   "
                     f"A {fit['A']:.4g}")
    lines += ["", f"ratio of {over} to reach the same loss, {first} over {second} (above 1: "
              f"{second} needs less)",
              f"  {over:>12}  {'loss ' + first:>14}  {'loss ' + second:>14}  {'ratio':>7}  "
              f"{level} interval"]
    for row in result["by_budget"]:
        losses = "  ".join(f"{loss:>14.5g}" for loss in row["losses"])
        outside = "" if row["inside"] else "  (reaches beyond the budgets)"
        lines.append(f"  {row[over]:>12.4g}  {losses}  {row['ratio']:>7.4g}  "
                     f"{_interval(row['interval'])}{outside}")
    trend, smallest = result["trend"], result["smallest_difference"]
    lines += [f"  {'middle':>12}  {'':>14}  {'':>14}  {result['ratio']['ratio']:>7.4g}  "
              f"{_interval(result['ratio']['interval'])}", "",
              f"trend: the ratio changes by {trend['ratio_per_decade']:.4g} "
              f"{_interval(trend['interval'])} over ten times the {over}; {trend['said']}",
              f"smallest difference seen in {smallest['power']:.0%} of cases: a ratio of "
              f"{smallest['ratio']:.4g} in the middle"]
    if result["crossing"]:
        low, high = (f"{end:.4g}" if end else "beyond the budgets" for end in
                     result["crossing"]["interval"])
        lines.append(f"crossing: {result['crossing']['at']:.4g} {over} [{low}, {high}]")
    lines += [f"warning: {text}" for text in result["warnings"]]
    return "\n".join(lines)


_FLOOR_SAID = {"shared": "one for both", "own": "one for each", "none": "0"}


def _interval(ends) -> str:
    return f"[{ends[0]:.4g}, {ends[1]:.4g}]"


def draw(found: comparison.Comparison, result: Mapping[str, Any], output: str) -> None:
    """Writes the picture to a file.

    Raises:
        UserError: a file name that no picture has, or that cannot be written.
    """
    if pathlib.Path(output).suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output={output}: must end with .png, .pdf or .svg.")
    try:
        picture(found, result).savefig(output, dpi=120)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror}).") from error


def picture(found: comparison.Comparison, result: Mapping[str, Any]):
    """A matplotlib figure: losses with both laws, and the ratio with its interval, over budgets."""
    Figure = packages.needed("matplotlib.figure", "plots", "pictures").Figure
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    over = result["over"]
    x = np.geomspace(found.pairs.x.min(), found.pairs.x.max(), 100)
    for i, name in enumerate(found.pairs.names):
        fit = result["fits"][name]
        left.plot(x, fit["E"] + fit["A"] * x**-fit["alpha"], color=f"C{i}", label=name)
        left.plot(found.pairs.x[i], found.pairs.loss[i], ".", color=f"C{i}")
    left.set_ylabel("loss")
    left.legend(frameon=False)
    curve = comparison.ratios(found, x)
    right.plot(x, [row["ratio"] for row in curve], color="C2")
    right.fill_between(x, [row["interval"][0] for row in curve],
                       [row["interval"][1] for row in curve], color="C2", alpha=0.2, linewidth=0)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_ylabel("{} to the same loss, {} / {}".format(over, *result["arms"]))
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel(over)
        axes.grid(alpha=0.3)
    return figure
