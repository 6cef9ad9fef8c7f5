"""The arithmetic of PPO and GRPO: by hand, and by what trl and rlax make of the same numbers
(scripts/make_trl_vectors.py)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.data.rows import ADVANTAGE, OLD, REFERENCE, RETURN, REWARD, VALUE
from t5x_lite.training import policy, policy_losses
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.policy import RolloutConfig

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "vectors" / "trl"


def read(name):
    return json.loads((VECTORS / f"{name}.json").read_text())


def test_grpo_is_trls():
    """Advantages, losses and gradients of two groups of three answers, by three averages."""
    vectors = read("grpo")
    given = {name: jnp.asarray(vectors[name]) for name in ("mask", "old", "new", "reference", "rewards")}
    rows = {"decoder_loss_weights": given["mask"], OLD: given["old"], REFERENCE: given["reference"],
            REWARD: given["rewards"][:, None] * policy.last_tokens(given["mask"])}
    assert len(vectors["cases"]) == 6
    for case in vectors["cases"]:
        rollout = RolloutConfig(answers=3, clip=case["clip"], clip_high=case["clip_high"],
                                average=case["average"])
        config = ObjectiveConfig("grpo", beta=case["beta"] or 1.0, rollout=rollout,
                                 reference="copy" if case["beta"] else "none")
        batch = policy.with_group_advantages(rows, config)
        np.testing.assert_allclose(batch[ADVANTAGE][:, 0], vectors["advantages"], rtol=1e-5)

        def loss(new, batch=batch, config=config):
            surrogate, _ = policy.clipped_surrogate(new, batch, config.rollout)
            divisors = policy_losses.drawn_weight(batch)
            return policy_losses._of_groups(surrogate, new, None, None, batch, config, divisors)[0]

        value, gradient = jax.value_and_grad(loss)(given["new"])
        assert float(value) == pytest.approx(case["loss"], rel=1e-4, abs=1e-6), case["average"]
        np.testing.assert_allclose(gradient, case["gradient"], atol=1e-6)


def test_ppo_is_rlaxs():
    """The clipped surrogate of one answer, and generalised advantages with the value behind it 0."""
    vectors = read("ppo")
    given = {name: jnp.asarray(vectors[name])[None] for name in ("old", "new", "advantages", "rewards")}
    rollout, batch = RolloutConfig(), {OLD: given["old"], ADVANTAGE: given["advantages"]}
    value, gradient = jax.value_and_grad(lambda new: jnp.mean(
        policy.clipped_surrogate(new, batch, rollout)[0]))(given["new"])
    assert float(value) == pytest.approx(vectors["loss"], rel=1e-5)
    np.testing.assert_allclose(gradient[0], vectors["gradient"], atol=1e-7)
    values = jnp.asarray(vectors["values"])[None]
    for case in vectors["estimated"]:
        found = policy.generalised_advantages(
            given["rewards"], values[:, :-1], jnp.ones([1, 7]), case["discount"], case["trace"])
        np.testing.assert_allclose(found[0], case["advantages"], rtol=1e-5)


def test_advantages_of_rows_by_hand():
    """Two answers of two tokens and one, behind prompts of one and two: nothing beside them counts."""
    weights = jnp.array([[0., 1, 1, 0], [0, 0, 1, 0]])
    dirt = 9 * (1 - weights)
    rows = {"decoder_loss_weights": weights,
            OLD: jnp.array([[0, -1., -2, 0], [0, 0, -3, 0]]),
            REFERENCE: jnp.array([[0, -1.5, -2, 0], [0, 0, -1, 0]]),
            REWARD: jnp.array([[0, 0, 4., 0], [0, 0, 2., 0]]),
            VALUE: jnp.array([[0, 1., 3, 0], [0, 0, 5, 0]]) + dirt}
    config = ObjectiveConfig("ppo", beta=2.0, rollout=RolloutConfig(discount=0.5, trace=0.8, whitened=False))
    # Rewards: -2 x 0.5 = -1, then 4; and 2 - 2 x -2 = 6. Last: 4 - 3 = 1; before: -1 + 1.5 - 1 = -0.5, + 0.4.
    found = policy.with_token_advantages(rows, config)
    np.testing.assert_allclose(found[ADVANTAGE], [[0, -0.1, 1, 0], [0, 0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(found[RETURN], [[0, 0.9, 4, 0], [0, 0, 6, 0]], atol=1e-6)
    whitened = policy.with_token_advantages(rows, ObjectiveConfig(
        "ppo", beta=2.0, rollout=RolloutConfig(discount=0.5, trace=0.8)))[ADVANTAGE]
    assert float(jnp.sum(whitened)) == pytest.approx(0, abs=1e-6) == float(jnp.sum(whitened * dirt))
    assert float(jnp.sum(whitened**2)) == pytest.approx(3, rel=1e-5)   # tokens
    grpo = ObjectiveConfig("grpo", beta=2.0, rollout=RolloutConfig(answers=2, scaled=False))
    np.testing.assert_allclose(policy.with_group_advantages(rows, grpo)[ADVANTAGE],
                               [[0, 1, 1, 0], [0, 0, -1, 0]])
    paid = ObjectiveConfig("grpo", beta=2.0, rollout=RolloutConfig(
        answers=2, scaled=False, kl_in_reward=True))   # 4 - 1 = 3 and 6
    np.testing.assert_allclose(policy.with_group_advantages(rows, paid)[ADVANTAGE],
                               [[0, -1.5, -1.5, 0], [0, 0, 1.5, 0]])


def test_values_are_held_near_those_of_before():
    batch = {VALUE: jnp.array([[1.0]]), RETURN: jnp.array([[3.0]])}
    assert float(policy.value_losses(jnp.array([[2.0]]), batch, 0.0)[0, 0]) == 0.5
    assert float(policy.value_losses(jnp.array([[2.0]]), batch, 0.2)[0, 0]) == pytest.approx(1.8**2 / 2)
    assert float(policy.value_losses(jnp.array([[0.0]]), batch, 0.2)[0, 0]) == 4.5   # the worse one
