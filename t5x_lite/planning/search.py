"""A search: plans one config after another until a step fits, then meshes for the best bound."""

import logging
from collections.abc import Iterator

import jax

from t5x_lite.build import build
from t5x_lite.config import RunConfig
from t5x_lite.cost import tables
from t5x_lite.errors import UserError
from t5x_lite.planning import rehearse, remedies
from t5x_lite.planning.make import ROOM, Plan, Trial, best, make_plan
from t5x_lite.planning.rehearse import Topology

_log = logging.getLogger(__name__)


def search(first: Plan, most_compilations: int = 8) -> list[Trial]:
    """Plans until one fits, then meshes for the best bound; the first trial is the plan given.

    What does not build, or whose state alone is too large, costs no compilation. Without a
    compiler the state alone is counted, until it fits in a few ways.
    """
    if not first.topology.compiler:
        return [Trial("as given", first, _state_outcome(first.topology, first.arguments)),
                *_by_state(first)]
    trials = [Trial("as given", first, _outcome(first))]
    _log_trial(trials[0])
    devices, left = len(first.topology.devices), most_compilations
    for changes, config in remedies.remedies(first.config, devices):
        if left == 0 or best(trials) is not None:
            break
        left -= _try(trials, first, changes, config)
    fitting = best(trials)
    if fitting is None or "mesh" in fitting.changes:
        return trials
    for changes, config in remedies.meshes(fitting.plan.config, devices):
        if left == 0:
            break
        left -= _try(trials, first, changes, config)
    return trials


def _try(trials: list[Trial], first: Plan, changes: str, config: RunConfig) -> int:
    """Adds the trial of a config; the compilations that it took, 0 or 1."""
    trial, compilations = _trial(first, changes, config)
    trials.append(trial)
    _log_trial(trial)
    return compilations


def _trial(first: Plan, changes: str, config: RunConfig) -> tuple[Trial, int]:
    if first.topology.compiler == rehearse.GPU_COMPILER and "remat=offload" in changes:
        return Trial(changes, None, "not tried: the compiler of described GPUs sees no host's "
                                    "memory"), 0
    try:
        plan = make_plan(config, first.topology, first.assumptions)
    except UserError as error:
        return Trial(changes, None, f"refused: {error}"), 0
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        return Trial(changes, None, f"the compiler failed: {reason}"), 1
    return Trial(changes, plan, _outcome(plan)), int(plan.compiled is not None)


def _log_trial(trial: Trial) -> None:
    _log.info("tried %s: %s", trial.changes, trial.outcome)


def _by_state(first: Plan, enough: int = 6) -> Iterator[Trial]:
    """What makes the state smaller, until it leaves room `enough` times."""
    whole = sum(first.arguments.values())
    for changes, config in remedies.remedies(first.config, len(first.topology.devices)):
        if enough == 0:
            return
        if "mesh" not in changes and "sharding" not in changes:
            continue
        try:
            arguments = rehearse.argument_bytes(build(config, first.topology.devices))
        except UserError as error:
            yield Trial(changes, None, f"refused: {error}")
            continue
        if sum(arguments.values()) >= whole:
            continue
        enough -= sum(arguments.values()) <= first.topology.hbm_bytes
        yield Trial(changes, None, _state_outcome(first.topology, arguments))


def _state_outcome(topology: Topology, arguments: dict[str, int]) -> str:
    used, shown = sum(arguments.values()), tables.binary_bytes
    room = topology.hbm_bytes - used
    return f"parameters, optimizer state and batch {shown(used)}: " \
        + (f"{ROOM} {shown(room)} for temporaries" if room >= 0 else "too large")


def _outcome(plan: Plan) -> str:
    verdict = {True: "fits", False: "too large", None: "unknown"}[plan.fits]
    return f"{verdict}, peak {tables.binary_bytes(plan.peak_bytes)}, a step takes at least " \
           f"{tables.duration(plan.roofline.bound_seconds)}"
