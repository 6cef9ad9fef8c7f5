"""Beam search as a state machine over log-probabilities; decode.py drives it.

Shapes: B inputs, K beams, C candidates, T history width, V vocabulary.

Each input has K live beams, which grow, and K finished ones, which ended. A step ranks the
K V continuations by summed log-probability and looks at the best C = (1 + end tokens) K of
them, enough that K unended ones are always among these: the best K unended become the live
beams, and those that ended compete with the finished beams by score, which is

    sum of log-probabilities / penalty(length),   length with the end token.

An input is done when it is full of finished beams and its best live beam could not beat the
worst of them, and then it no longer changes, whatever the rest of the batch does.

The rules differ in four points:

                        "t5x" (T5X, flax, GNMT)          "transformers" (early_stopping=False)
    penalty             ((5 + length) / 6) ** alpha      length ** alpha
    may end             any of the C candidates          only the best K of them
    bound on a live     its score at max_length (exact:  its score at its present length (a
      beam              nothing is missed)               heuristic for alpha > 0)
    at max_length       live beams are dropped, unless   live beams count as finished
                        none is finished: then they are
                        the result, scored by their
                        plain sums

GNMT: arXiv:1609.08144, equation 14 (without its coverage term).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Finite, as in T5X, so that sums and differences stay defined.
NEG_INF = -1e7
# No real sequence is this improbable: below it stand banned tokens and unused beams.
_IMPOSSIBLE = NEG_INF / 2

RULES = ("t5x", "transformers")


class Beams(NamedTuple):
    """Both sets of beams, best first; an unused finished slot has length 0."""

    live_tokens: jax.Array  # int32 [B, K, T], as decoding's history
    live_scores: jax.Array  # float32 [B, K], sums
    finished_tokens: jax.Array
    finished_scores: jax.Array  # float32 [B, K], over the penalty
    finished_lengths: jax.Array  # int32 [B, K]
    active: jax.Array  # bool [B]


def penalty(length, config):
    """What a sum of log-probabilities is divided by; `config` is a DecodeConfig."""
    length = jnp.asarray(length, jnp.float32)
    base = (5 + length) / 6 if config.beam_rule == "t5x" else length
    return base ** config.length_penalty


def start(history_BT, prefix_B, config) -> Beams:
    """One live beam that counts, the prompt; K - 1 that lose to all of its continuations."""
    size = config.beam_size
    tokens = jnp.broadcast_to(history_BT[:, None], (history_BT.shape[0], size,
                                                   history_BT.shape[1]))
    nothing = jnp.full(tokens.shape[:2], NEG_INF, jnp.float32)
    return Beams(live_tokens=tokens, live_scores=nothing.at[:, 0].set(0.0),
                 finished_tokens=tokens, finished_scores=nothing,
                 finished_lengths=jnp.zeros(tokens.shape[:2], jnp.int32),
                 active=prefix_B < config.max_length)


def advance(beams: Beams, log_probs_BKV, step, width: int, prefix_B, config):
    """(beams, source_BK): one more token; live beam k now continues the former source_BK[k].

    The token goes to history column width + step, and makes the length
    prefix_B + step + 1.
    """
    size, vocab = log_probs_BKV.shape[1:]
    length_B1 = (prefix_B + step + 1)[:, None]
    last_B1 = length_B1 >= config.max_length
    transformers = config.beam_rule == "transformers"

    total_BKV = beams.live_scores[:, :, None] + log_probs_BKV
    count = min((1 + len(config.end_ids)) * size, size * vocab)
    total_BC, flat_BC = lax.top_k(total_BKV.reshape(-1, size * vocab), count)
    source_BC, token_BC = flat_BC // vocab, flat_BC % vocab
    tokens_BCT = _gather(beams.live_tokens, source_BC)
    tokens_BCT = lax.dynamic_update_slice_in_dim(
        tokens_BCT, token_BC[..., None], width + step, axis=2)

    ended_BC = jnp.isin(token_BC, jnp.array(config.end_ids))
    live_scores, keep_BK = lax.top_k(jnp.where(ended_BC, NEG_INF, total_BC), size)

    finishes_BC = (total_BC > _IMPOSSIBLE) & (
        (ended_BC | last_B1) & (jnp.arange(count) < size) if transformers else ended_BC)
    scores_BC = jnp.where(finishes_BC, total_BC / penalty(length_B1, config), NEG_INF)
    # former ones come first and so win ties
    finished_scores, best_BK = lax.top_k(
        jnp.concatenate([beams.finished_scores, scores_BC], axis=1), size)
    finished_lengths = _gather(jnp.concatenate(
        [beams.finished_lengths, jnp.where(finishes_BC, length_B1, 0)], axis=1), best_BK)
    finished_tokens = _gather(
        jnp.concatenate([beams.finished_tokens, tokens_BCT], axis=1), best_BK)

    bound_length = length_B1[:, 0] if transformers else config.max_length
    hopeless_B = jnp.all(finished_lengths > 0, axis=1) & (
        finished_scores[:, -1] >= live_scores[:, 0] / penalty(bound_length, config))
    new = Beams(_gather(tokens_BCT, keep_BK), live_scores, finished_tokens, finished_scores,
                finished_lengths, active=~hopeless_B & ~last_B1[:, 0])
    choose = lambda a, b: jnp.where(beams.active.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(choose, new, beams), _gather(source_BC, keep_BK)


def best(beams: Beams, config):
    """(history_BKT, scores_BK, lengths_BK) of the result, best first."""
    live_lengths = jnp.where(beams.live_scores > _IMPOSSIBLE, config.max_length, 0)
    none_finished = jnp.all(beams.finished_lengths == 0, axis=1, keepdims=True)
    return (jnp.where(none_finished[..., None], beams.live_tokens, beams.finished_tokens),
            jnp.where(none_finished, beams.live_scores, beams.finished_scores),
            jnp.where(none_finished, live_lengths, beams.finished_lengths))


def _gather(x, index):
    """x[b, index[b, i]] for x [B, K, …] and index [B, C]."""
    return jax.vmap(lambda x, i: x[i])(x, index)
