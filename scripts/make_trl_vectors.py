"""Makes tests/vectors/trl/*.json: losses and gradients of trl, and of rlax, on small random inputs.

    python -m venv --system-site-packages /tmp/rl && /tmp/rl/bin/pip install trl==1.16.0 && \\
        /tmp/rl/bin/pip install --no-deps rlax==0.1.9 chex dm-env toolz
    /tmp/rl/bin/python scripts/make_trl_vectors.py

The libraries' own functions are called. trl's are methods of trainers, here without a model: what it
would give (scores, log-probabilities) is an input, with respect to which the gradients are. So the
files need no weights, and tests compare everywhere. Inputs are stored beside results.
"""

import collections
import json
import pathlib
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from trl import GRPOTrainer, RewardTrainer
from trl.trainer.utils import nanstd

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "tests" / "vectors" / "trl"


def _trainer(**fields) -> mock.MagicMock:
    """What stands for a trainer's `self`."""
    trainer = mock.MagicMock(**fields)
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    trainer._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    trainer.model.training = False
    return trainer


def _rounded(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.round(scale * rng.normal(size=shape), 3)


def reward() -> dict:
    """RewardTrainer.compute_loss of six pairs: - log sigmoid(chosen - rejected), the mean."""
    scores = torch.tensor(_rounded(np.random.default_rng(0), 6, 2, scale=2), requires_grad=True)
    trainer = _trainer(_total_train_tokens=0)
    trainer.args.center_rewards_coefficient = None

    def model(**_):   # trl has the chosen answers first, then the rejected ones
        return types.SimpleNamespace(logits=scores.T.reshape(-1, 1))

    loss = RewardTrainer.compute_loss(trainer, model, {})
    loss.backward()
    return {"scores": scores.tolist(), "loss": loss.item(), "gradient": scores.grad.tolist()}


def grpo() -> dict:
    """GRPOTrainer._compute_loss of two groups of three answers, by each average of ours."""
    rng = np.random.default_rng(1)
    lengths = [5, 2, 4, 1, 3, 5]
    mask = torch.tensor([[float(i < n) for i in range(5)] for n in lengths], dtype=torch.float64)
    old = torch.tensor(-np.abs(_rounded(rng, 6, 5)))
    new = old + torch.tensor(_rounded(rng, 6, 5, scale=0.3))
    reference = old + torch.tensor(_rounded(rng, 6, 5, scale=0.3))
    rewards = torch.tensor(_rounded(rng, 6))
    groups = rewards.view(2, 3)
    spread = nanstd(groups, dim=1)   # as _generate_and_score_completions has it
    advantages = ((groups - groups.mean(1, keepdim=True)) / (spread[:, None] + 1e-4)).view(-1)
    cases = []
    for average, loss_type in (("answers", "grpo"), ("tokens", "bnpo"), ("length", "dr_grpo")):
        for beta, low, high in ((0.0, 0.2, 0.2), (0.1, 0.2, 0.28)):
            given = new.clone().requires_grad_()
            trainer = _trainer(
                loss_type=loss_type, beta=beta, epsilon_low=low, epsilon_high=high,
                aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
                importance_sampling_level="token", use_vllm=False, _entropy_bonus_enabled=False,
                max_completion_length=5)
            trainer.args.delta = None
            trainer.args.use_bias_correction_kl = False
            trainer._get_per_token_logps_and_entropies = \
                lambda *_, given=given, **__: (given, torch.ones_like(given), None)
            zeros = torch.zeros(6, 5, dtype=torch.long)
            loss = GRPOTrainer._compute_loss(trainer, None, {
                "prompt_ids": zeros, "prompt_mask": zeros, "completion_ids": zeros,
                "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old,
                "ref_per_token_logps": reference})
            loss.backward()
            cases.append({"average": average, "beta": beta, "clip": low, "clip_high": high,
                          "loss": loss.item(), "gradient": given.grad.tolist()})
    return {"rewards": rewards.tolist(), "advantages": advantages.tolist(), "mask": mask.tolist(),
            "old": old.tolist(), "new": new.tolist(), "reference": reference.tolist(),
            "cases": cases}


def ppo() -> dict:
    """rlax's clipped surrogate and generalised advantages of one answer of seven tokens."""
    # distrax needs a TensorFlow Probability that JAX has left behind; these functions need neither.
    sys.modules["distrax"] = mock.MagicMock()
    import rlax
    rng = np.random.default_rng(2)
    old, advantages = -np.abs(_rounded(rng, 7)), _rounded(rng, 7)
    new = old + _rounded(rng, 7, scale=0.3)
    rewards, values = _rounded(rng, 7), _rounded(rng, 8)
    values[-1] = 0   # behind the answer

    def surrogate(new):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(new - old), jnp.asarray(advantages), 0.2)

    loss, gradient = jax.value_and_grad(surrogate)(jnp.asarray(new))
    estimated = [rlax.truncated_generalized_advantage_estimation(
        jnp.asarray(rewards), jnp.full(7, discount), trace, jnp.asarray(values)).tolist()
        for discount, trace in ((1.0, 0.95), (0.9, 0.5))]
    return {"old": old.tolist(), "new": new.tolist(), "advantages": advantages.tolist(),
            "loss": float(loss), "gradient": gradient.tolist(), "rewards": rewards.tolist(),
            "values": values.tolist(), "estimated": [
                {"discount": 1.0, "trace": 0.95, "advantages": estimated[0]},
                {"discount": 0.9, "trace": 0.5, "advantages": estimated[1]}]}


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for make in (reward, grpo, ppo):
        text = json.dumps(make(), separators=(",", ":"))
        (FOLDER / f"{make.__name__}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
