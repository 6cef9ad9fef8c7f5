"""Losses of two answers to one prompt: how much likelier the chosen one is than the rejected one.

With the log-probabilities log pi of both answers y_w (chosen) and y_l (rejected) under the model,
and under a reference pi_ref, the margin of a pair is

    h = log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)

An answer's log-probability is the sum over its tokens, EOS included.

Shape letters: B batch, L length; the 2 of [B, 2] are chosen and rejected.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp


def sigmoid_loss(margin_B: jax.Array, beta: float, label_smoothing: float) -> jax.Array:
    """DPO's loss_B (Rafailov et al. 2023, arXiv:2305.18290, equation 7), conservative where a share
    of the labels is taken to be wrong (Mitchell 2023, "A note on DPO with noisy preferences").

        - (1 - label_smoothing) log sigmoid(beta h) - label_smoothing log sigmoid(-beta h)
    """
    return -((1 - label_smoothing) * jax.nn.log_sigmoid(beta * margin_B)
             + label_smoothing * jax.nn.log_sigmoid(-beta * margin_B))


def ipo_loss(margin_B: jax.Array, beta: float, label_smoothing: float) -> jax.Array:
    """IPO's loss_B (Azar et al. 2023, arXiv:2310.12036, equation 17): (h - 1 / (2 beta))^2.

    A pair with the wrong label, of which label_smoothing is the share, has -h for h.
    """
    target = 1 / (2 * beta)
    return ((1 - label_smoothing) * jnp.square(margin_B - target)
            + label_smoothing * jnp.square(margin_B + target))


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A loss of margins."""

    of_margins: Callable[[jax.Array, float, float], jax.Array]   # (margin_B, beta, label_smoothing) -> loss_B
    by_token: bool = False   # margins of log-probabilities a token, which length does not change


# ipo_by_token is IPO as its authors' results are computed and as trl has it; ipo is the paper's equation.
LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid_loss), "ipo": PreferenceLoss(ipo_loss),
    "ipo_by_token": PreferenceLoss(ipo_loss, by_token=True)}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where the reference's log-probabilities come from; neither: they are taken to be equal."""

    from_base: bool = False   # the untuned model, in the same step: that under PEFT's additions, or …
    copied: bool = False      # … of which a frozen copy is kept, beside what trains
    from_rows: bool = False   # the data, computed once ahead


REFERENCES = {"base": Reference(from_base=True), "copy": Reference(from_base=True, copied=True),
              "rows": Reference(from_rows=True), "none": Reference()}


def of_answers(log_probs_BL: jax.Array, answer_BL: jax.Array) -> jax.Array:
    """float32 [B, 2]: the sums over each answer's tokens.

    answer_BL: 1 at the chosen answer's tokens, 2 at the rejected one's, else 0.
    """
    return jnp.stack([jnp.sum(jnp.where(answer_BL == n, log_probs_BL, 0.0), axis=1)
                      for n in (1, 2)], axis=1)


def margins(log_probs_BL: jax.Array, answer_BL: jax.Array, reference_BL: jax.Array | None,
            by_token: bool = False) -> jax.Array:
    """h_B against the reference's log-probabilities, a number a token or the sum at an answer's
    first; None: a reference that finds all answers equally likely. by_token: of means over an answer's
    tokens instead of sums."""
    found_B2 = of_answers(log_probs_BL, answer_BL)
    if reference_BL is not None:
        found_B2 = found_B2 - jax.lax.stop_gradient(of_answers(reference_BL, answer_BL))
    if by_token:
        found_B2 = found_B2 / jnp.maximum(of_answers(jnp.ones_like(log_probs_BL), answer_BL), 1.0)
    return found_B2[:, 0] - found_B2[:, 1]


def is_pair(answer_BL: jax.Array) -> jax.Array:
    """bool_B: not one of the empty rows that fill evaluation's last batch."""
    return jnp.any(answer_BL == 2, axis=1)
