"""The losses of ppo and grpo over a module: losses of the table of objectives, made of policy.py's.

Shape letters: B answers, L length, D model.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.data.row_names import OLD, REFERENCE, REWARD
from t5x_lite.models.params import BoundModel
from t5x_lite.training import losses, policy

Batch = Mapping[str, jax.Array]


def drawn_weight(batch: Batch) -> dict[str, jax.Array]:
    """What the losses are divided by: the tokens of the answers that the model drew, and their number."""
    has_answer_B = jnp.any(batch["decoder_loss_weights"] > 0, axis=1)
    return {"weight": jnp.sum(batch["decoder_loss_weights"], dtype=jnp.float32),
            "answers": jnp.sum(has_answer_B, dtype=jnp.float32)}


def drawn(module: BoundModel, batch: Batch, config: Any
          ) -> tuple[jax.Array, jax.Array, jax.Array, dict]:
    """(log p(token), entropy, both float32 [B, L], hidden_BLD, auxiliary values) of the policy that answers
    are drawn from: the model at rollout.temperature, without dropout."""
    hidden, aux = module(batch, None)
    log_probs_BL, entropies_BL = losses.drawn_scores(
        lambda head, x: module.head(head, x) / config.rollout.temperature, module.head_params(),
        hidden, batch["decoder_target_tokens"], chunk=config.logits_chunk)
    return log_probs_BL, entropies_BL, hidden, aux


def _policy(module: BoundModel, batch: Batch, key: jax.Array | None, config: Any,
            divisors: Mapping[str, jax.Array], parts: int = 1, *, own: Callable
            ) -> tuple[jax.Array, dict[str, Any]]:
    """The clipped surrogate and what a method adds, of answers that the model drew; a loss of the table.

    Args:
        key: unused, for a ratio compares the same function at two times.
        own: (surrogate_BL, log_probs_BL, module, hidden_BLD, batch, config, divisors) -> (the
            method's loss, its metrics).
    """
    log_probs_BL, entropies_BL, hidden, aux = drawn(module, batch, config)
    weights_BL = batch["decoder_loss_weights"]
    surrogate_BL, clipped_BL = policy.clipped_surrogate(log_probs_BL, batch, config.rollout)
    value, metrics = own(surrogate_BL, log_probs_BL, module, hidden, batch, config, divisors)
    entropy = jnp.sum(entropies_BL * weights_BL)
    if config.rollout.entropy_weight:
        value = value - config.rollout.entropy_weight * entropy / divisors["weight"]
    weight, answers = jnp.sum(weights_BL), drawn_weight(batch)["answers"]
    left_BL = policy.divergence(batch[OLD], batch[REFERENCE]) * weights_BL
    metrics = {"loss": (value * divisors["weight"], weight), "entropy": (entropy, weight),
               "clip_fraction": (jnp.sum(clipped_BL * weights_BL), weight),
               "reward": (jnp.sum(batch[REWARD]), answers), "kl": (jnp.sum(left_BL), answers),
               "answer_length": (weight, answers), **metrics}
    total, aux = losses.with_aux(value, aux, parts)
    return total, {**jax.lax.stop_gradient(metrics), **aux}


def _of_tokens(surrogate_BL, log_probs_BL, module, hidden, batch, config, divisors):
    """PPO: the mean over tokens, and the values' loss."""
    weights_BL = batch["decoder_loss_weights"]
    errors_BL = policy.value_losses(module.scalar_head(hidden), batch, config.rollout.value_clip)
    error = jnp.sum(errors_BL * weights_BL)
    total = jnp.sum(surrogate_BL * weights_BL) + config.rollout.value_weight * error
    return total / divisors["weight"], {"value_loss": (error, jnp.sum(weights_BL))}


def _of_groups(surrogate_BL, log_probs_BL, module, hidden, batch, config, divisors):
    """GRPO: an average of AVERAGES, with the divergence from the reference (Shao et al. 2024,
    equation 3)."""
    if config.compares_with_base and not config.rollout.kl_in_reward:
        surrogate_BL = surrogate_BL + config.beta * policy.divergence(log_probs_BL, batch[REFERENCE])
    counts_BL = policy.AVERAGES[config.rollout.average](batch["decoder_loss_weights"], divisors)
    return jnp.sum(surrogate_BL * counts_BL), {}


PPO = functools.partial(_policy, own=_of_tokens)
GRPO = functools.partial(_policy, own=_of_groups)
