"""`python -m t5x_lite.scaling COMMAND --flag=…`, without JAX or TensorFlow.

    fit      a law, or the frontier, to any table of runs
    laws     names, formulas and sources
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from t5x_lite.errors import UserError, nearest
from t5x_lite.scaling import fits, frontier, tables
from t5x_lite.scaling.laws import LAWS


class _Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help.")


def pairs(text: str, flag: str) -> dict[str, str]:
    """{"a": "b"} of "a=b,…"."""
    found = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise UserError(f"--{flag}: {part!r} must be NAME=VALUE.")
        found[name.strip()] = value.strip()
    return found


def number(text: str, flag: str) -> float:
    """The number of a flag."""
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--{flag}={text}: must be a number.") from error


def _table(options: argparse.Namespace) -> tables.Table:
    if not options.table:
        raise UserError("--table is missing: a CSV, a .jsonl or a folder of workdirs.")
    table = tables.read(options.table, pairs(options.columns, "columns"),
                        where=pairs(options.where, "where"), skip_bad=options.skip_bad)
    return table.without_highest(options.drop_highest) if options.drop_highest else table


def fit(options: argparse.Namespace) -> dict:
    """The object that `fit` prints."""
    names = [*LAWS, *frontier.APPROACHES]
    if options.law not in names:
        raise UserError(f"--law={options.law}: must be one of {', '.join(names)}."
                        f"{nearest(options.law, names)}")
    if not 0 < options.level < 1:
        raise UserError(f"--level={options.level}: must lie between 0 and 1.")
    if options.bootstrap < 0 or options.starts < 1:
        raise UserError("--bootstrap must be at least 0 and --starts at least 1.")
    table = _table(options)
    if options.law in frontier.APPROACHES:
        return frontier.fit(options.law, table, points=options.points, noise=options.noise,
                            draws=options.bootstrap or 1000, level=options.level,
                            seed=options.seed).as_json()
    fixed = {n: number(v, "fix") for n, v in pairs(options.fix, "fix").items()}
    start = {n: number(v, "start") for n, v in pairs(options.start, "start").items()}
    settings = fits.Settings(objective=options.objective, method=options.method,
                             delta=options.delta, starts=options.starts, mean=options.mean,
                             fixed=fixed, start=start)
    found = fits.fit(LAWS[options.law], table, settings)
    if options.bootstrap:
        found = fits.bootstrap(found, options.bootstrap, level=options.level, seed=options.seed,
                               noise=options.noise or None)
    for name in filter(None, options.profile.split(",")):
        if name not in found.law.names:
            raise UserError(f"--profile={name}: {found.law.name} has {', '.join(found.law.names)}.")
        found.intervals[name] = fits.profile(found, name, level=options.level)
    shown = found.as_json()
    if options.at:
        at = {n: number(v, "at") for n, v in pairs(options.at, "at").items()}
        if missing := set(found.law.inputs) - set(at):
            raise UserError(f"--at needs {', '.join(sorted(missing))}.")
        shown["prediction"] = float(found.predict(at)[0])
    return shown


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
    parser.add_argument("--seed", type=int, default=0)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    _add_table(parser)
    parser.add_argument("--law", default="hoffmann")
    parser.add_argument("--objective", default="huber", help=", ".join(fits.OBJECTIVES))
    parser.add_argument("--method", default="bfgs", help="bfgs or varpro")
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss")
    parser.add_argument("--starts", type=int, default=500)
    parser.add_argument("--mean", action="store_true", help="average the objective; misleads")
    parser.add_argument("--fix", default="", help="PARAMETER=VALUE,…")
    parser.add_argument("--start", default="", help="PARAMETER=VALUE,…: begin there alone")
    parser.add_argument("--bootstrap", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.0, help="spread of log loss over seeds")
    parser.add_argument("--profile", default="", help="parameters whose profile interval to give")
    parser.add_argument("--points", type=int, default=0, help="parabola: runs about each minimum")
    parser.add_argument("--at", default="", help="params=N,tokens=D: predict there")


COMMANDS: dict[str, tuple[Callable, Callable]] = {
    "fit": (_add_fit, fit), "laws": (lambda parser: None, laws)}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for a UserError."""
    parser = _Parser(prog="python -m t5x_lite.scaling", description=__doc__,
                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, (add, _) in COMMANDS.items():
        chosen = commands.add_parser(name, allow_abbrev=False)
        add(chosen)
        chosen.add_argument("--json", action="store_true", help="print one JSON object")
    try:
        options = parser.parse_args(argv)
        found = COMMANDS[options.command][1](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
