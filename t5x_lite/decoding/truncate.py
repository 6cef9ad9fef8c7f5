"""Which tokens may be drawn: what cuts off the tail of a next-token distribution before sampling.

TRUNCATIONS has a row for each, in the order in which they are applied, which is transformers'; add a
row to add one, and its field to decode.DecodeConfig. All see logits after the temperature, and what an
earlier one left; each keeps at least the most probable token.

Shapes: R rows, V vocabulary; float32 logits [R, V] -> the same with NEG_INF where a token is cut off.
Thresholds are found by bisection on the float's bits (32 passes; on CPU 13 times faster than a sort for
32 x 32128).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from t5x_lite.decoding.beam import NEG_INF


def keep_top_k(logits_RV, k: int):
    """Masks all but the k largest logits; those equal to the k-th stay (Fan et al. 2018,
    arXiv:1805.04833)."""
    k = min(k, logits_RV.shape[1])
    keys = _ordered_bits(logits_RV)
    return _keep_largest(logits_RV, keys, lambda kept: jnp.sum(kept, axis=1) >= k)


def keep_top_p(logits_RV, p: float):
    """Keeps the smallest set of most probable tokens whose probabilities sum to at least p.

    Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751). Tokens equal to the least probable kept
    one stay.
    """
    probs_RV = jax.nn.softmax(logits_RV)
    keys = _ordered_bits(probs_RV)
    return _keep_largest(
        logits_RV, keys, lambda kept: jnp.sum(jnp.where(kept, probs_RV, 0), axis=1) >= p)


def keep_min_p(logits_RV, p: float):
    """Keeps the tokens with P(x) >= p * max P, a bound that follows how sure the model is.

    Min-p sampling (Nguyen et al. 2024, arXiv:2407.01082, equations 1 and 2).
    """
    probs_RV = jax.nn.softmax(logits_RV)
    return jnp.where(probs_RV < p * jnp.max(probs_RV, axis=1, keepdims=True), NEG_INF, logits_RV)


def keep_typical(logits_RV, mass: float):
    """Keeps the tokens whose surprise is closest to the entropy, until their probabilities sum to mass.

    Locally typical sampling (Meister et al. 2022, arXiv:2202.00666, equation 10): the smallest set
    that minimises sum |H + log P(x)| with P(set) >= mass, H = -sum P log P. Equal ones stay.
    """
    log_probs_RV = jax.nn.log_softmax(logits_RV)
    probs_RV = jnp.exp(log_probs_RV)
    entropy_R1 = -jnp.sum(jnp.where(probs_RV > 0, probs_RV * log_probs_RV, 0), axis=1, keepdims=True)
    keys = _ordered_bits(-jnp.abs(entropy_R1 + log_probs_RV))
    return _keep_largest(
        logits_RV, keys, lambda kept: jnp.sum(jnp.where(kept, probs_RV, 0), axis=1) >= mass)


def keep_above_epsilon(logits_RV, epsilon: float):
    """Keeps the tokens with P(x) >= epsilon, and the most probable one.

    Epsilon sampling (Hewitt et al. 2022, arXiv:2210.15191, section 4.1).
    """
    probs_RV = jax.nn.softmax(logits_RV)
    cut = (probs_RV < epsilon) & (logits_RV < jnp.max(logits_RV, axis=1, keepdims=True))
    return jnp.where(cut, NEG_INF, logits_RV)


class Truncation(NamedTuple):
    """A row: the function (logits_RV, value) -> logits_RV, and the value that switches it off."""

    keep: Callable
    off: float


# Fields of DecodeConfig, in the order in which they are applied.
TRUNCATIONS = {
    "top_k": Truncation(keep_top_k, 0),
    "top_p": Truncation(keep_top_p, 1.0),
    "min_p": Truncation(keep_min_p, 0.0),
    "typical_p": Truncation(keep_typical, 1.0),
    "epsilon": Truncation(keep_above_epsilon, 0.0),
}


def truncate(logits_RV, config):
    """The logits after all truncations that a DecodeConfig switches on."""
    for field, row in TRUNCATIONS.items():
        value = getattr(config, field)
        if value != row.off:
            logits_RV = row.keep(logits_RV, value)
    return logits_RV


def _ordered_bits(x):
    """int32 that order as the float32 do."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _keep_largest(logits_RV, keys_RV, enough: Callable):
    """Masks what lies below the largest threshold on `keys_RV` whose kept set is `enough`.

    enough(kept_RV bool) -> bool[R], monotone: true of a larger set where true of a smaller.
    Bisection over the 32 bits of the key; should rounding leave even the full row not
    enough, the full row is kept.
    """
    rows = keys_RV.shape[0]

    def halve(_, bounds):
        low, high = bounds
        # the mean without overflow, rounded up
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        ok = enough(keys_RV >= middle[:, None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    low, _ = lax.fori_loop(0, 32, halve, (jnp.full(rows, limits.min, jnp.int32),
                                          jnp.full(rows, limits.max, jnp.int32)))
    return jnp.where(keys_RV >= low[:, None], logits_RV, NEG_INF)
