"""What answers that a model drew were worth, and the losses that make the better ones likelier.

PPO (Schulman et al. 2017, arXiv:1707.06347; for language models Ouyang et al. 2022, arXiv:2203.02155)
learns what to expect before each token, a value, and measures a token by how much better it went. GRPO
(Shao et al. 2024, arXiv:2402.03300) has no values: an answer is measured against the others to its prompt.
Both draw answers, take a few steps on them, clipped where the policy has moved away, and pay for leaving a
reference policy. Where a nat of divergence costs beta of reward (ppo; grpo with kl_in_reward), they approach

    p(answer) ~ p_ref(answer) exp(reward / beta)

for each prompt. GRPO's own term of the loss has the gradient of the divergence the other way round, from the
policy to the reference, and its fixed point (with rewards not scaled, and groups so large that their mean is
the expectation) is p_ref(answer) / (1 + (mean reward - reward) / beta).

All functions are pure, of arrays [R, L] that are 0 but at the answer's tokens (data/rows.py).

Shape letters: R answers, those to one prompt side by side, N of them; L positions of a row.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.data.row_names import ADVANTAGE, OLD, REFERENCE, RETURN, REWARD, VALUE
from t5x_lite.errors import Count, Positive, Rate, Share
from t5x_lite.parallel import sharding

Arrays = Mapping[str, jax.Array]
REWARD_FIELD = "objective.rollout.reward"
_EPSILON = 1e-4   # beside the deviation of a group's rewards, as trl has it


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How ppo and grpo draw answers, judge them, and learn from them."""

    # What an answer is worth: "MODULE:FUNCTION" of yours, (prompt, answer, record) -> a number, or
    # the workdir of a reward model.
    reward: str = ""
    answers: Count = 8            # drawn for each prompt of a step
    # Of the policy: what is drawn, and the log-probabilities that are learned from. (Decoding later has its own.)
    temperature: Positive = 1.0
    epochs: Count = 1             # passes over the answers of a step …
    minibatches: Count = 1        # … and optimizer updates a pass, of rows drawn anew for each pass
    clip: Rate = 0.2              # the ratio to the policy that drew counts between 1 - clip …
    clip_high: float = 0.0        # … and 1 + clip_high; 0: 1 + clip
    entropy_weight: float = 0.0   # on the entropy of the policy, which is to stay high
    average: str = "answers"      # grpo: a key of policy.AVERAGES
    # grpo: leaving the reference costs reward, as ppo has it, and not a term of the loss. What they
    # approach differs: docs/objectives.md.
    kl_in_reward: bool = False
    scaled: bool = True           # grpo: rewards less the group's mean are divided by its deviation
    discount: Share = 1.0         # ppo: gamma, of rewards a token later
    trace: Share = 0.95           # ppo: lambda of the generalised advantages
    value_weight: float = 0.1     # ppo: weight of the values' loss
    value_clip: float = 0.2       # ppo: values count so near to those of before; 0: wherever they are
    whitened: bool = True         # ppo: the advantages of a step have mean 0 and deviation 1

    @property
    def judged_by_function(self) -> bool:
        """Whether `reward` has the form MODULE:FUNCTION, and not that of a folder."""
        module, colon, function = self.reward.partition(":")
        return bool(colon) and function.isidentifier() and all(map(str.isidentifier, module.split(".")))


# --- what answers were worth ----------------------------------------------------------------------

def last_tokens(weights_RL: jax.Array) -> jax.Array:
    """bool [R, L]: the answer's last token, of weights that are 1 on its tokens and 0 elsewhere."""
    return (weights_RL > 0) & (_next(weights_RL) == 0)


def _next(x_RL: jax.Array) -> jax.Array:
    """x of the position behind, 0 behind the last."""
    return jnp.pad(x_RL[:, 1:], ((0, 0), (0, 1)))


def generalised_advantages(rewards_RL: jax.Array, values_RL: jax.Array, weights_RL: jax.Array,
                           discount: float, trace: float) -> jax.Array:
    """float32 [R, L] (Schulman et al. 2015, arXiv:1506.02438, equation 16):

        A_t = sum_k (discount trace)^k d_(t+k),   d_t = r_t + discount V_(t+1) - V_t

    values_RL: of the answer up to before each token; behind its last token the value is 0.
    """
    values_RL = values_RL * weights_RL
    surprise_RL = (rewards_RL + discount * _next(values_RL) - values_RL) * weights_RL

    def earlier(later_R, surprise_and_weight_R):
        surprise_R, weight_R = surprise_and_weight_R
        advantage_R = (surprise_R + discount * trace * later_R) * weight_R
        return advantage_R, advantage_R

    _, advantages_LR = jax.lax.scan(earlier, jnp.zeros_like(surprise_RL[:, 0]),
                                    (surprise_RL.T, weights_RL.T), reverse=True)
    return advantages_LR.T


def group_advantages(rewards_R: jax.Array, answers: int, scaled: bool) -> jax.Array:
    """float32 [R]: each reward less the mean of its prompt's `answers` rewards; scaled: over their
    deviation (of a sample: n - 1 below) plus 1e-4 (Shao et al. 2024, section 4.1.2)."""
    groups_BN = sharding.reshape(rewards_R, (rewards_R.shape[0] // answers, answers), "act_batch", None)
    centred_BN = groups_BN - jnp.mean(groups_BN, axis=1, keepdims=True)
    if scaled:
        centred_BN /= jnp.std(groups_BN, axis=1, ddof=1, keepdims=True) + _EPSILON
    return sharding.reshape(centred_BN, rewards_R.shape, "act_batch")


def _whitened(x_RL: jax.Array, weights_RL: jax.Array) -> jax.Array:
    """x with mean 0 and deviation 1 over the weighted positions of all rows."""
    count = jnp.maximum(jnp.sum(weights_RL), 1.0)
    centred_RL = (x_RL - jnp.sum(x_RL * weights_RL) / count) * weights_RL
    return centred_RL * jax.lax.rsqrt(jnp.sum(jnp.square(centred_RL)) / count + 1e-8)


def _less_divergence(rows: Arrays, config: Any) -> jax.Array:
    """The rewards [R, L] less what each token costs, beta (log p - log p_ref)."""
    return rows[REWARD] - config.beta * (rows[OLD] - rows[REFERENCE])


def with_group_advantages(rows: Arrays, config: Any) -> dict[str, jax.Array]:
    """GRPO's rows: every token of an answer has the answer's own advantage. config: ObjectiveConfig."""
    rollout, weights_RL = config.rollout, rows["decoder_loss_weights"]
    rewards_R = jnp.sum(_less_divergence(rows, config) if rollout.kl_in_reward else rows[REWARD], axis=1)
    advantages_R = group_advantages(rewards_R, rollout.answers, rollout.scaled)
    return {**rows, ADVANTAGE: advantages_R[:, None] * weights_RL}


def with_token_advantages(rows: Arrays, config: Any) -> dict[str, jax.Array]:
    """PPO's rows. A token costs beta (log p - log p_ref), and the last one brings the answer's reward
    (Ouyang et al. 2022, equation 2, without its pre-training term). config: ObjectiveConfig."""
    rollout, weights_RL = config.rollout, rows["decoder_loss_weights"]
    advantages_RL = generalised_advantages(_less_divergence(rows, config), rows[VALUE], weights_RL, rollout.discount,
                                           rollout.trace)
    returns_RL = advantages_RL + rows[VALUE] * weights_RL
    if rollout.whitened:
        advantages_RL = _whitened(advantages_RL, weights_RL)
    return {**rows, ADVANTAGE: advantages_RL, RETURN: returns_RL}


# --- losses a token -------------------------------------------------------------------------------

def clipped_surrogate(log_probs_RL: jax.Array, rows: Arrays, rollout: RolloutConfig
                      ) -> tuple[jax.Array, jax.Array]:
    """(loss [R, L], bool [R, L] where clipping took the gradient away) of Schulman et al. 2017,
    equation 7: - min(ratio A, clipped ratio A)."""
    ratio_RL = jnp.exp(log_probs_RL - rows[OLD])
    high = rollout.clip_high or rollout.clip
    plain_RL = -ratio_RL * rows[ADVANTAGE]
    clipped_RL = -jnp.clip(ratio_RL, 1 - rollout.clip, 1 + high) * rows[ADVANTAGE]
    return jnp.maximum(plain_RL, clipped_RL), clipped_RL > plain_RL


def divergence(log_probs_RL: jax.Array, reference_RL: jax.Array) -> jax.Array:
    """An estimate, never negative, of the divergence from the reference at tokens that the policy drew:
    p_ref / p - log(p_ref / p) - 1 (Shao et al. 2024, equation 4)."""
    log_ratio_RL = reference_RL - log_probs_RL
    return jnp.exp(log_ratio_RL) - log_ratio_RL - 1


def value_losses(values_RL: jax.Array, rows: Arrays, clip: float) -> jax.Array:
    """(V - return)^2 / 2, [R, L]; with a clip the larger of it and that of a value which is held so near
    to the one of when the answer was drawn."""
    plain_RL = jnp.square(values_RL - rows[RETURN])
    if not clip:
        return plain_RL / 2
    held_RL = rows[VALUE] + jnp.clip(values_RL - rows[VALUE], -clip, clip)
    return jnp.maximum(plain_RL, jnp.square(held_RL - rows[RETURN])) / 2


# --- how losses of tokens become one --------------------------------------------------------------

def _by_answers(weights_RL: jax.Array, divisors: Arrays) -> jax.Array:
    lengths_R1 = jnp.maximum(jnp.sum(weights_RL, axis=1, keepdims=True), 1.0)
    return weights_RL / lengths_R1 / divisors["answers"]


# (weights_RL, {"weight": tokens of the batch, "answers": its answers}) -> what each token counts, in sum:
#   answers   each answer the same: the mean over its tokens, then over answers (Shao et al. 2024)
#   tokens    each token the same (DAPO, Yu et al. 2025, arXiv:2503.14476)
#   length    each token one L-th of an answer, L the row's length: long answers count more, and a token as
#             much in any (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783)
AVERAGES: dict[str, Callable[[jax.Array, Arrays], jax.Array]] = {
    "answers": _by_answers,
    "tokens": lambda weights_RL, divisors: weights_RL / divisors["weight"],
    "length": lambda weights_RL, divisors: weights_RL / (weights_RL.shape[1] * divisors["answers"]),
}
