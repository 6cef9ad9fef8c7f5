"""What drawing the answers takes that ppo and grpo learn from, beside the updates (training/rollouts.py).

It is counted as forward passes over the answers' rows: one to draw them (a token read with a cache costs the
same), one for their log-probabilities, and one for the reference's, where there is one. What judges them is not
counted: a Python function has no FLOPs, and a reward model is of a run of its own.
"""

from typing import Any

from t5x_lite.cost import flops
from t5x_lite.cost.flops import Flops


def drawing_flops(config: Any, lengths: tuple[int, int], prompts: int, causal_half: bool = False) -> Flops:
    """FLOPs of drawing and measuring the answers to so many prompts; none of an objective that draws none.

    Args:
        config: RunConfig.
        lengths: positions of a row on the encoder's and the decoder's side.
    """
    objective = config.objective
    passes = (2 + objective.compares_with_base) if objective.draws else 0
    return flops.forward_flops(config.model, prompts * objective.per_row, *lengths,
                               causal_half=causal_half) * passes


def flops_a_row(config: Any, lengths: tuple[int, int], causal_half: bool = False) -> Flops:
    """The share of it that each row has, as often as it is learned from."""
    return drawing_flops(config, lengths, 1, causal_half) * (1 / config.objective.learned_per_row)


def rows_line(config: Any, lengths: tuple[int, int], rows: int) -> str:
    """What a step learns from, given so many rows of data, as screens say it."""
    objective = config.objective
    if not objective.draws:
        return f"{rows:,} sequences x {lengths}"
    passes, updates = objective.passes
    again = f", {passes} x {updates} updates" if objective.passes != (1, 1) else ""
    return f"{rows:,} prompts x {objective.per_row} answers x {lengths}{again}"
