"""`python -m t5x_lite.scaling COMMAND --flag=…`; fit, compare, laws and page need no JAX.

    fit                a law, or the frontier, to any table of runs
    compare            two methods: how much compute one saves over the other
    coordinate_check   activations' change over a model's width (needs JAX)
    laws               names, formulas and sources
    ladder             solve, price, train and fit the runs that identify a law
    page               a table of runs drawn: frontier, parabolas, optimal N and D, residuals

`python -m t5x_lite.scaling COMMAND --help` shows a command's flags.
"""

import argparse
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence

from t5x_lite.errors import UserError, at_least, between, one_of, positive
from t5x_lite.scaling import comparing, fits, frontier, ladder_command, ladder_page, tables
from t5x_lite.scaling.laws import LAWS
from t5x_lite.scaling.numbers_in import numbers


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors, and whose help looks as that of the other doors."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")

    def format_help(self) -> str:
        from t5x_lite import manual  # reads the config's dataclasses, which fits go without
        return manual.parser_text(self, self.description or "")


def _table(options: argparse.Namespace) -> tables.Table:
    if not options.table:
        raise UserError("--table is missing: a CSV, a .jsonl or a folder of workdirs.")
    table = tables.read(options.table, tables.pairs(options.columns, "columns"),
                        where=tables.pairs(options.where, "where"), skip_bad=options.skip_bad,
                        curves=options.law in frontier.OF_CURVES)
    return table.without_highest(options.drop_highest) if options.drop_highest else table


def fit(options: argparse.Namespace) -> dict:
    """The object that `fit` prints."""
    one_of("--law", options.law, [*LAWS, *frontier.APPROACHES])
    between("--level", options.level, 0, 1, open_below=True, open_above=True)
    at_least("--bootstrap", options.bootstrap, 0)
    at_least("--starts", options.starts, 1)
    positive("--delta", options.delta)
    _refuse_unused(options)
    at = numbers(options.at, "at")
    for name, value in at.items():
        positive(f"--at={name}", value)
    if options.law in frontier.APPROACHES and at and set(at) != {"flops"}:
        raise UserError(f"--at={options.at}: --law={options.law} gives the best model of a budget; write "
                        "--at=flops=C.")
    table = _table(options)
    if options.law in frontier.APPROACHES:
        best = frontier.fit(options.law, table, points=options.points, noise=options.noise,
                            draws=options.bootstrap or 1000, level=options.level, seed=options.seed)
        return {**best.as_json(), **_best_at(best, at)}
    settings = fits.Settings(objective=options.objective, method=options.method,
                             delta=options.delta, starts=options.starts, mean=options.mean,
                             fixed=numbers(options.fix, "fix"),
                             start=numbers(options.start, "start"))
    found = fits.fit(LAWS[options.law], table, settings)
    if options.bootstrap:
        found = fits.bootstrap(found, options.bootstrap, level=options.level, seed=options.seed,
                               noise=options.noise or None)
    for name in filter(None, options.profile.split(",")):
        one_of("--profile", name, found.law.names)
        found.intervals[name] = fits.profile(found, name, level=options.level)
    return {**found.as_json(), **_prediction(found, at)}


_OF_LAWS = ("objective", "method", "delta", "starts", "mean", "fix", "start", "profile")


def _refuse_unused(options: argparse.Namespace) -> None:
    """Raises UserError for a flag that the law or approach would not look at."""
    used_by = {**dict.fromkeys(_OF_LAWS, tuple(LAWS)), "points": ("parabola",), "noise": ("akima", *LAWS)}
    unset = _Parser()
    _add_fit(unset)
    for flag, users in used_by.items():
        value = getattr(options, flag)
        if value != unset.get_default(flag) and options.law not in users:
            whose = " or ".join([n for n in users if n not in LAWS] + ["one that `laws` lists"] * (set(LAWS) <= set(users)))
            raise UserError(f"--{flag}={value}: --law={options.law} does not use it; it is for --law={whose}.")


def _best_at(best: frontier.Frontier, at: dict[str, float]) -> dict[str, dict[str, float]]:
    """{"prediction": N* and D*} at --at=flops=C; {} where nothing is asked."""
    if not at:
        return {}
    return {"prediction": {"params": best.params_at(at["flops"]), "tokens": best.tokens_at(at["flops"])}}


def _prediction(found: fits.Fit, at: dict[str, float]) -> dict[str, float]:
    """{"prediction": …} at the inputs of --at; {} where none are given."""
    if not at:
        return {}
    missing = [name for name in found.law.inputs if name not in at]
    if missing:
        raise UserError(f"--at lacks {', '.join(missing)}: {found.law.name} predicts from "
                        f"{', '.join(found.law.inputs)}.")
    return {"prediction": float(found.predict(at)[0])}


def laws(_: argparse.Namespace) -> dict:
    """{law: formula, source, inputs, parameters}."""
    return {law.name: {"formula": law.formula, "source": law.source, "inputs": law.inputs,
                       "output": law.output, "parameters": law.names} for law in LAWS.values()}


def show(found: dict, indent: str = "") -> str:
    """An object as lines for people."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", show(value, indent + "  ")]
        elif isinstance(value, list) and value and not isinstance(value[0], (int, float)):
            lines += [f"{indent}{name}", *(f"{indent}  {item}" for item in value)]
        else:
            lines.append(f"{indent}{name:<12} "
                         f"{value if not isinstance(value, float) else f'{value:.6g}'}")
    return "\n".join(lines)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", default="", help="a CSV, .jsonl, .gz of them, or a folder")
    parser.add_argument("--columns", default="", help="params=COL,flops=COL*1e18,loss=COL,…")
    parser.add_argument("--where", default="", help="rows to take: COL=VALUE,COL2=A|B")
    parser.add_argument("--drop_highest", type=int, default=0, help="leave out the worst losses")
    parser.add_argument("--skip_bad", action="store_true", help="leave out rows without numbers")
    parser.add_argument("--level", type=float, default=0.95, help="of intervals")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn: bootstrap, starts")


def _add_fit(parser: argparse.ArgumentParser) -> None:
    _add_table(parser)
    parser.add_argument("--law", default="hoffmann", help="a name that `laws` lists, or envelope, parabola, akima")
    parser.add_argument("--objective", default="huber", help=", ".join(fits.OBJECTIVES))
    parser.add_argument("--method", default="bfgs", help="bfgs or varpro")
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss")
    parser.add_argument("--starts", type=int, default=500, help="points that the search begins at")
    parser.add_argument("--mean", action="store_true", help="average the objective; misleads")
    parser.add_argument("--fix", default="", help="PARAMETER=VALUE,…")
    parser.add_argument("--start", default="", help="PARAMETER=VALUE,…: begin there alone")
    parser.add_argument("--bootstrap", type=int, default=0, help="draws of the runs, for intervals; 0: none")
    parser.add_argument("--noise", type=float, default=0.0, help="spread of log loss over seeds")
    parser.add_argument("--profile", default="", help="parameters whose profile interval to give")
    parser.add_argument("--points", type=int, default=0, help="parabola: runs about each minimum, odd")
    parser.add_argument("--at", default="", help="params=N,tokens=D: predict there")


def page(options: argparse.Namespace) -> dict:
    """Draws a table of runs."""
    if not options.table:
        raise UserError("--table is missing: a CSV, a .jsonl or a folder of workdirs.")
    columns, where = (tables.pairs(getattr(options, n), n) for n in ("columns", "where"))
    file = ladder_page.write(options.table, options.output, columns=columns, where=where,
                             skip_bad=options.skip_bad, title=options.title)
    return {"written": str(file)}


def _add_page(parser: argparse.ArgumentParser) -> None:
    _add_table(parser)
    parser.add_argument("--output", default="ladder.html", help="the page to write")
    parser.add_argument("--title", default="", help="its heading")


def _later(module: str) -> tuple[Callable, Callable, Callable]:
    """The row of a command whose module needs JAX, which is imported where it is used."""
    def of(name: str) -> Callable:
        return lambda *args: getattr(
            importlib.import_module(f"t5x_lite.scaling.{module}"), name)(*args)
    return of("add_flags"), of("command"), of("show")


# {command: (adds its flags, what it prints as JSON, that for people)}
COMMANDS: dict[str, tuple[Callable, Callable, Callable]] = {
    "fit": (_add_fit, fit, show), "laws": (lambda parser: None, laws, show),
    "compare": (comparing.add_flags, comparing.compare, comparing.show),
    "ladder": (ladder_command.add, ladder_command.ladder, show),
    "page": (_add_page, page, show),
    "coordinate_check": _later("coordinates")}


def _of_json(value: object) -> object:
    """The value with null for what JSON has no number for: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: _of_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_of_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for a UserError."""
    parser = _Parser(prog="python -m t5x_lite.scaling", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    argv = sys.argv[1:] if argv is None else list(argv)
    for name, (add, _, _) in COMMANDS.items():
        about = re.search(rf"^    {name} +(.*)$", __doc__ or "", re.M)
        chosen = commands.add_parser(name, allow_abbrev=False, description=(
            f"python -m t5x_lite.scaling {name}: {about.group(1) if about else ''}"))
        if name in argv[:1]:
            add(chosen)
        chosen.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse_args(argv)
        found = COMMANDS[options.command][1](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(_of_json(found), allow_nan=False) if options.json else COMMANDS[options.command][2](found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
