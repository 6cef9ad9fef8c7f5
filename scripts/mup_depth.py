"""Does a maximal-update parametrisation over depth hold here? Rates and changes at several depths.

    python scripts/mup_depth.py --depths=2,8,32

The language model of mup_learning_rates.py at one width, with AdamW, in three ways that are one at the
least depth (m = depth / least depth):

    standard   x + f(norm(x))
    root       x + m^-1/2 f(norm(x)), rates of the blocks times m^-1/2: depth-mup (Yang et al. 2023,
               arXiv:2310.02244), proven there for blocks of one layer; ours are attention and an MLP
    whole      x + m^-1 f(norm(x)), the same rates: CompleteP (Dey et al. 2025, arXiv:2505.01618), which
               model.parametrization=mup has by model.base_depth

Prints the mean loss of the last ten steps by rate, the best rate, and the root mean square of how much the
last hidden states have changed after four steps at a rate of 2^-8, with its slope over the depth.
"""

import argparse
import dataclasses

import jax
import mup_learning_rates as rates_of
import numpy as np

from t5x_lite.build import build
from t5x_lite.config import RunConfig
from t5x_lite.models.config import SegmentConfig
from t5x_lite.scaling import coordinates
from t5x_lite.training.methods import GroupConfig
from t5x_lite.training.schedules import ScheduleConfig

KINDS = {"standard": (0.0, 0.0), "root": (0.5, 0.5), "whole": (1.0, 0.0)}   # powers: branch, rates
_STEPS_OF_CHANGE, _RATE_OF_CHANGE = 4, 2.0 ** -8


def run_config(kind: str, depth: int, least: int, width: int, rows: int, length: int) -> RunConfig:
    """The run of mup_learning_rates.py with `depth` layers."""
    run = rates_of.run_config("adamw", width, 0, rows, length)
    branch, rate = ((depth / least) ** -power for power in KINDS[kind])
    block = run.model.decoder.segments[0].blocks
    decoder = dataclasses.replace(run.model.decoder, segments=(SegmentConfig(block, depth),),
                                  branch_scale=branch)
    groups = (GroupConfig("decoder/segment.*kernel", learning_rate_multiplier=rate),)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, decoder=decoder),
                               optimizer=dataclasses.replace(run.optimizer, groups=groups))


def change(run: RunConfig, seed: int) -> float:
    """How much the last hidden states have changed."""
    schedule = ScheduleConfig("constant", _RATE_OF_CHANGE)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, schedule=schedule))
    return coordinates.change(run, _STEPS_OF_CHANGE, seed)["hidden"]


def main() -> None:
    """Prints a line a kind and depth, and the slopes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", default="2,8,32")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    depths = [int(depth) for depth in options.depths.split(",")]
    rates = [2.0 ** -power for power in rates_of.RATES["adamw"]]
    for kind in KINDS:
        best, changes = [], []
        for depth in depths:
            run = run_config(kind, depth, depths[0], options.width, options.rows, options.length)
            found = rates_of.losses_by_rate(build(run, jax.devices()[:1]), rates, options.steps,
                                            options.seed)
            best.append(rates_of.best_rate(found))
            changes.append(change(run, options.seed))
            print(f"{kind:<9} {depth:>3}  best {best[-1]:.4g}  change {changes[-1]:.4g}  " + "  ".join(
                f"{rate:.4g}: {loss:.3f}" for rate, loss in found.items()), flush=True)
        slope = np.polyfit(np.log(depths), np.log(changes), 1)[0]
        print(f"{kind:<9} best rate falls by {best[0] / best[-1]:.3g}, change's slope {slope:.2f}",
              flush=True)


if __name__ == "__main__":
    main()
