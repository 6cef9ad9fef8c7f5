"""`python -m t5x_lite.scaling ladder`: a ladder from its budgets to its fits, one command.

    WORKDIR/ladder.json        what it is solved from; other flags for the same folder are refused
    WORKDIR/ARM/SEED[/STAGE]/  the runs, which t5x_lite.experiment trains resumably
    WORKDIR/prediction.json    by --predict: the loss of a larger run, written before it is trained
    WORKDIR/fits.json, .md     fits by each approach of the design; how the prediction came out
    WORKDIR/ladder.html        the same drawn, see ladder_page.py
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from t5x_lite import files
from t5x_lite.errors import UserError, at_least, positive
from t5x_lite.scaling import ladder_results as results, tables
from t5x_lite.scaling.numbers_in import numbers_list


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--config", default="configs/experiments/ladder.py:lm",
                        help="FILE:ARG whose run is resized")
    parser.add_argument("--override", action="append", default=[], help="field=value of that run")
    parser.add_argument("--workdir", default="", help="where the runs and the fits go")
    parser.add_argument("--design", default="isoflop", help="isoflop, kaplan, ratio or cooldown")
    parser.add_argument("--budgets", default="", help="FLOPs, as in 1e10,1e11,1e12")
    parser.add_argument("--params", default="", help="sizes, as in 1e5,1e6")
    parser.add_argument("--tokens", default="", help="positions, as in 1e6,1e7")
    parser.add_argument("--ratio", type=float, default=20.0, help="tokens a parameter")
    parser.add_argument("--sizes", type=int, default=5, help="models of a budget")
    parser.add_argument("--factor", type=float, default=2.0, help="between one size and the next")
    parser.add_argument("--seeds", type=int, default=1, help="of each size")
    parser.add_argument("--aspect", type=float, default=32.0, help="width over layers")
    parser.add_argument("--unit", type=int, default=0, help="of widths; 0: the config's head dim")
    parser.add_argument("--rule", default="deepseek", help="of batch and rate: deepseek, step_law, "
                                                            "base (the config's own)")
    parser.add_argument("--rate_factor", type=float, default=1.0, help="on the rule's rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--decay", type=float, default=0.2, help="share that a cool-down takes")
    parser.add_argument("--evaluations", type=int, default=5, help="of each run")
    parser.add_argument("--multiple", type=int, default=0,
                        help="rows a step are a multiple of it; 0: of the devices here")
    parser.add_argument("--predict", type=float, default=0.0,
                        help="then predict, and train, a run of so many times the largest budget")
    parser.add_argument("--columns", default="", help="what is counted: params=COL,flops=COL")
    parser.add_argument("--max_hours", type=float, default=1.0, help="refuse a dearer ladder")
    parser.add_argument("--watts", type=float, default=0.0, help="of this machine")
    parser.add_argument("--dollars_per_hour", type=float, default=0.0, help="of a chip")
    parser.add_argument("--launcher", default="local", help="where the runs run, as in "
                        "t5x_lite.experiment: local, local:N (N at a time) or slurm")
    parser.add_argument("--slurm", action="append", default=[],
                        help="option=value of the cluster, over SLURM of the config")
    parser.add_argument("--plan_only", action="store_true", help="print the cost and stop")


def ladder(options: argparse.Namespace) -> dict[str, Any]:
    """Solves, prices, trains, fits; the object that the command prints."""
    # JAX, which fits go without.
    from t5x_lite.scaling import ladder_cost, ladder_page, ladders
    positive("--max_hours", options.max_hours)
    at_least("--predict", options.predict, 0)
    if not options.workdir and not options.plan_only:
        raise UserError("--workdir is missing: the folder of the ladder's runs (or --plan_only).")
    columns = tables.pairs(options.columns, "columns")
    launch = _launch(options.config, options.launcher, options.slurm)
    chosen = ladders.Ladder(
        options.design, numbers_list(options.budgets, "budgets"), options.sizes, options.factor,
        numbers_list(options.params, "params"), numbers_list(options.tokens, "tokens"),
        options.ratio, options.seeds, options.aspect, options.unit, options.rule, options.rate_factor,
        options.warmup, options.decay, options.evaluations,
        options.multiple or ladder_cost.apart(ladder_cost.device_count))
    base = ladders.base_config(options.config, options.override)
    rungs = ladders.rungs(base, chosen)
    top = max(rung.flops for rung in rungs)
    further = [ladders.predicted(base, chosen, max(r.params for r in rungs), options.predict * top)
               ] if options.predict else []   # its size is not known yet, its budget is
    pace = ladder_cost.priced(ladder_cost.apart(ladder_cost.measure, [*rungs, *further]),
                              options.watts, options.dollars_per_hour)
    say = sys.stderr if options.json else sys.stdout
    print(ladder_cost.describe([*rungs, *further], pace), file=say, flush=True)
    ladder_cost.refuse_above([*rungs, *further], pace, options.max_hours)
    if options.plan_only:
        return ladder_cost.total([*rungs, *further], pace)
    workdir = files.path(files.absolute(options.workdir))
    ladders.write_plan(workdir, base, chosen)
    _train(workdir, say, launch)
    laws = ladders.DESIGNS[chosen.design].laws
    if options.predict and results.read_prediction(workdir) is None:
        _predict(workdir, base, chosen, options.predict * top, columns, laws)
    if options.predict:
        _train(workdir, say, launch)
    found = results.fitted(workdir, laws, columns)
    outcome = results.compared(workdir, columns)
    text = results.summary(found, outcome)
    files.write_whole(workdir / "fits.md", text)
    said = {"fits": results.as_json(found), "prediction": outcome}
    files.write_whole(workdir / "fits.json", json.dumps(said, indent=1) + "\n")
    ladder_page.write(str(workdir), str(workdir / "ladder.html"), columns=columns, laws=laws)
    print(text, file=say, flush=True)
    return {"workdir": str(workdir), "runs": len(rungs) + len(further), **said} if options.json else \
        {"written": f"{workdir}/fits.md, fits.json, ladder.html"}


def _launch(config: str, launcher: str, options: Sequence[str]) -> list[str]:
    """The flags of t5x_lite.experiment that say where the runs run: of the cluster's options those of
    FILE:ARG's module, then those given. Raises UserError for an unknown launcher or option."""
    from t5x_lite.running import launchers
    from t5x_lite.scaling import ladders
    name = launchers.kind_of(launcher).options
    of_config = getattr(ladders.base_module(config)[0], name, {}) if name else {}
    launchers.options_of(options)
    return [f"--launcher={launcher}",
            *(f"--slurm={option}={json.dumps(value)}" for option, value in of_config.items()),
            *(f"--slurm={text}" for text in options)]


def _train(workdir: files.Path, say, launch: Sequence[str]) -> None:
    """The folder's runs, by t5x_lite.experiment in a process of its own.

    Raises:
        UserError: it ended otherwise than well.
    """
    config = importlib.util.find_spec("configs.experiments.ladder").origin
    status = subprocess.run(
        [sys.executable, "-m", "t5x_lite.experiment", f"--workdir={workdir}",
         f"--config={config}:{workdir}/ladder.json", *launch], stdout=say).returncode
    if status:
        raise UserError(f"the ladder's runs ended with status {status}, for the reason above; the same "
                        f"command goes on from what is finished.")


def _predict(workdir, base, chosen, compute: float, columns, laws) -> None:
    """Fits what is there and writes the prediction of one larger run."""
    from t5x_lite.scaling import ladder_cost, ladders
    found = results.fitted(workdir, laws, columns)
    size = ladders.balanced(base, chosen, compute) if ladders.DESIGNS[chosen.design].keeps_ratio \
        else results.optimal_params(found, compute)
    run = ladders.predicted(base, chosen, size, compute)
    counts = ladder_cost.apart(ladder_cost.parameter_counts, run.config)
    name = {"params": "params_no_embed_head", **columns}["params"]
    params = float(counts.get(name, run.params))
    results.write_prediction(workdir, {
        "flops": compute, "params": size, "run": {"params": params, "tokens": run.tokens,
                                                 "flops": run.flops},
        "predicted": results.predictions(found, params, run.tokens, run.flops),
        "fits": results.as_json(found)})
