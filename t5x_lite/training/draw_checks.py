"""What a run whose objective draws answers cannot be combined with."""

from typing import Any

from t5x_lite.data import rows as data_rows
from t5x_lite.errors import UserError


def check_draws(run: Any) -> None:
    """Raises UserError where answers cannot be drawn or learned from, or have no room behind their prompts.

    run: a config.RunConfig.
    """
    objective, data, kept = run.objective, run.data, run.sharding
    if not objective.draws:
        return
    _check_updates(run)
    if {kept.places.params, kept.places.opt_state} != {"device"}:
        raise UserError(f"objective.name={objective.name!r} draws and updates where all of the state is on "
                        f"the device: set sharding.offload=none (now {kept.offload!r}).")
    if data_rows.of(objective.learned).shares_row and data.targets_length <= data.inputs_length:
        raise UserError(f"data.targets_length={data.targets_length} is the whole row: the prompt has data."
                        f"inputs_length={data.inputs_length} of it, the answer the rest; set more.")


def _check_updates(run: Any) -> None:
    """Raises UserError for what a step of drawn answers does not learn by."""
    objective = run.objective
    if run.data.unlabelled:
        raise UserError(f"data.unlabelled={run.data.unlabelled!r} are learned from beside labelled rows, and "
                        f"objective.name={objective.name!r} draws its own: set data.unlabelled= and "
                        "objective.unlabelled.loss= (both empty).")
    if run.optimizer.delay_after is not None and objective.passes != (1, 1):
        epochs, minibatches = objective.passes
        raise UserError(f"optimizer.delay_after={run.optimizer.delay_after} puts an update off by a step, and a "
                        f"step makes several: objective.rollout.epochs={epochs} x minibatches={minibatches}. "
                        "Set optimizer.delay_after=None, or both to 1.")
