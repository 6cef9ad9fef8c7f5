"""Losses of texts without labels, by the probabilities of the classes that they may have, and how their
weight rises.

With log p_BC of the classes (training/unlabelled.py), of one view of a text or of a weak and a strong one.
Rows below the threshold have a loss of 0 and count in the mean all the same (FixMatch, equation 4).

Shape letters: B rows, C classes.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5x_lite.errors import Positive, Share


@dataclasses.dataclass(frozen=True)
class UnlabelledConfig:
    """What is learned of data.unlabelled."""

    loss: str = ""              # a key of LOSSES; "": nothing
    weight: float = 1.0         # of its mean, beside the objective's own …
    ramp: str = "constant"      # … and how it rises to that: constant, linear or sigmoid, …
    ramp_from: int = 0          # … from this step (0 is the first) …
    ramp_to: int = 0            # … to this one
    # What the likeliest class's probability must reach for a row to be learned from, and, in evaluation,
    # to count as a pseudo-label; 0: all do.
    threshold: Share = 0.0
    temperature: Positive = 1.0   # uda: of the weak view's probabilities; below 1 sharpens them


# --- losses ---------------------------------------------------------------------------------------

def entropy(views_BC: Sequence[jax.Array], config: UnlabelledConfig) -> jax.Array:
    """H_B = - sum_c p_c log p_c, the conditional entropy that is minimised (Grandvalet & Bengio 2005,
    "Semi-supervised learning by entropy minimization", which maximises the likelihood less its multiple).
    The threshold plays no part."""
    log_probs_BC, = views_BC
    return -jnp.sum(jnp.exp(log_probs_BC) * log_probs_BC, axis=1)


def pseudo_label(views_BC: Sequence[jax.Array], config: UnlabelledConfig) -> jax.Array:
    """- log p_k of the likeliest class k (Lee 2013, "Pseudo-label", equation 15), 0 where p_k is below the
    threshold."""
    log_probs_BC, = views_BC
    return _cross_entropy_of_likeliest(log_probs_BC, log_probs_BC, config)


def fixmatch(views_BC: Sequence[jax.Array], config: UnlabelledConfig) -> jax.Array:
    """- log q_k, the strong view's loss on the weak view's likeliest class k; 0 where p_k is below the
    threshold (Sohn et al. 2020, arXiv:2001.07685, equation 4). k has no gradient."""
    weak_BC, strong_BC = views_BC
    return _cross_entropy_of_likeliest(weak_BC, strong_BC, config)


def uda(views_BC: Sequence[jax.Array], config: UnlabelledConfig) -> jax.Array:
    """D_KL(p' || q) from the weak view's p, sharpened to p' = softmax(log p / temperature), to the strong
    view's q; 0 where max p is below the threshold (Xie et al. 2020, arXiv:1904.12848, equation 1 and
    section 3.2). p has no gradient."""
    weak_BC, strong_BC = views_BC
    target_BC = jax.lax.stop_gradient(jax.nn.log_softmax(weak_BC / config.temperature, axis=1))
    divergence_B = jnp.sum(jnp.exp(target_BC) * (target_BC - strong_BC), axis=1)
    return jnp.where(is_confident(weak_BC, config.threshold), divergence_B, 0.0)


def _cross_entropy_of_likeliest(target_BC: jax.Array, log_probs_BC: jax.Array, config: UnlabelledConfig
                                ) -> jax.Array:
    chosen = jax.nn.one_hot(jnp.argmax(target_BC, axis=1), target_BC.shape[1], dtype=log_probs_BC.dtype)
    loss_B = -jnp.sum(chosen * log_probs_BC, axis=1)
    return jnp.where(is_confident(target_BC, config.threshold), loss_B, 0.0)


def is_confident(log_probs_BC: jax.Array, threshold: float) -> jax.Array:
    """bool_B: whether the likeliest class is at least so probable."""
    return jax.lax.stop_gradient(jnp.max(jnp.exp(log_probs_BC), axis=1) >= threshold)


class Loss(NamedTuple):
    """A row of LOSSES."""

    # (log-probabilities [B, C] of each view, the weak one first) -> loss_B
    of_rows: Callable[[Sequence[jax.Array], UnlabelledConfig], jax.Array]
    views: int = 1
    stops_weak: bool = False   # whether the weak view has no gradient, and its pass none either


LOSSES = {
    "entropy": Loss(entropy),
    "pseudo_label": Loss(pseudo_label),
    "fixmatch": Loss(fixmatch, 2, stops_weak=True),
    "uda": Loss(uda, 2, stops_weak=True),
}


# --- the weight over the steps --------------------------------------------------------------------

# name -> fn(share of the way from ramp_from to ramp_to, 0 to 1) -> multiplier of the weight
RAMPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda share: share,                                 # Lee 2013, equation 16
    "sigmoid": lambda share: jnp.exp(-5 * jnp.square(1 - share)),   # Laine & Aila 2017 (arXiv:1610.02242)
}


def weight_at(config: UnlabelledConfig, step: jax.Array | int) -> jax.Array:
    """float32 scalar: the weight at a step, counted from 0 before the update."""
    way = max(1, config.ramp_to - config.ramp_from)
    share = jnp.clip((jnp.float32(step) - config.ramp_from) / way, 0.0, 1.0)
    return jnp.float32(config.weight) * RAMPS[config.ramp](share)
