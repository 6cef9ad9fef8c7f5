"""Losses of two answers to one prompt: how much likelier the chosen one is than the rejected one.

With the log-probabilities log pi of both answers y_w (chosen) and y_l (rejected) under the model,
and under a reference pi_ref, the margin of a pair is

    h = log pi(y_w|x) / pi_ref(y_w|x) - log pi(y_l|x) / pi_ref(y_l|x)

An answer's log-probability is the sum over its tokens, EOS included.

Shape letters: B batch, L length; the 2 of [B, 2] are chosen and rejected.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from t5x_lite.data.rows import ANSWER, REFERENCE
from t5x_lite.errors import UserError
from t5x_lite.models.params import BoundModel
from t5x_lite.training import losses


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


# (margin_B, beta, label_smoothing) -> loss_B
LOSSES: dict[str, Callable[[jax.Array, float, float], jax.Array]] = {
    "sigmoid": sigmoid_loss, "ipo": ipo_loss}


@dataclasses.dataclass(frozen=True)
class Reference:
    """Where the reference's log-probabilities come from; neither: they are taken to be equal."""

    from_base: bool = False   # the model under PEFT's additions, in the same step
    from_rows: bool = False   # the data, computed once ahead


REFERENCES = {"base": Reference(from_base=True), "rows": Reference(from_rows=True),
              "none": Reference()}


def target_log_probs(module: BoundModel, hidden_BLD: jax.Array, batch: Mapping, chunk: int
                     ) -> jax.Array:
    """float32 log p(target)_BL of rows that hold preferences.

    Raises:
        UserError: rows whose encoder side has segments.
    """
    if "encoder_segment_ids" in batch:   # the rejected answer would read none of the prompt
        raise UserError("objective.name=seq2seq_dpo: the id 0 of data.vocabulary stands in texts, "
                        "so that an encoder's row is marked as one of several; use a vocabulary whose "
                        "id 0 is padding.")
    return losses.target_log_probs(module.head, module.head_params(), hidden_BLD,
                                   batch["decoder_target_tokens"], chunk=chunk)


def of_answers(log_probs_BL: jax.Array, batch: Mapping) -> jax.Array:
    """float32 [B, 2]: the sums over each answer's tokens."""
    return jnp.stack([jnp.sum(jnp.where(batch[ANSWER] == n, log_probs_BL, 0.0), axis=1)
                      for n in (1, 2)], axis=1)


def scores(module: BoundModel, batch: Mapping, chunk: int = 0) -> jax.Array:
    """float32 [B, 2]: the log-probabilities of both answers, without dropout."""
    hidden, _ = module(batch, None)
    return of_answers(target_log_probs(module, hidden, batch, chunk), batch)


def margins(log_probs_BL: jax.Array, batch: Mapping) -> jax.Array:
    """h_B against the reference that the batch has in REFERENCE, a number a token or the sum at an
    answer's first; without one, the reference finds all answers equally likely."""
    found_B2 = of_answers(log_probs_BL, batch)
    if REFERENCE in batch:
        found_B2 = found_B2 - jax.lax.stop_gradient(of_answers(batch[REFERENCE], batch))
    return found_B2[:, 0] - found_B2[:, 1]


def is_pair(batch: Mapping) -> jax.Array:
    """bool_B: not one of the empty rows that fill evaluation's last batch."""
    return jnp.any(batch[ANSWER] == 2, axis=1)
