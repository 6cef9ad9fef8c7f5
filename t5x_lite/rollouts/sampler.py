"""Batches that a model makes itself: prompts of the data, its answers, what they were worth.

    rollouts = sampler.make(program, init_from.restore)   # None: the data hold what the objective learns from
    batch = rollouts(state, prompts)                      # what program.train_step takes
"""

from collections.abc import Mapping
from typing import Any

import jax

from t5x_lite import packages
from t5x_lite.build import Program
from t5x_lite.data import (
    chat_prompts,
    rows as data_rows,
    tasks as data_tasks,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.row_names import RECORD
from t5x_lite.parallel import sharding
from t5x_lite.rollouts import judges, rewards
from t5x_lite.rollouts.rewards import Restore, Reward
from t5x_lite.training import rollouts
from t5x_lite.training.policy import REWARD_FIELD
from t5x_lite.training.rollouts import Drawing
from t5x_lite.training.state import State


class Rollouts:
    """Answers to prompts by the model as it is, judged; called under program.activate()."""

    def __init__(self, program: Program, vocabulary, restore: Restore):
        """restore: reads a reward model, see rewards.Restore."""
        of = program.differentiated
        self._reward = _reward(program, vocabulary, restore)
        self._draw = jax.jit(rollouts.make_draw(_drawing(program, vocabulary)))
        names = frozenset(program.abstract_batch())
        self._judged = jax.jit(rollouts.make_judged(of, names), out_shardings=program.batch_sharding)

    def memory(self) -> dict[str, Any]:
        """What the next life of the run judges by, as JSON values; stands in the checkpoint."""
        return self._reward.memory()

    def resume(self, memory: Mapping[str, Any]) -> None:
        """Goes on as the run that kept the memory. Raises UserError where its judge is gone."""
        self._reward.resume(memory)

    def __call__(self, state: State, prompts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """The batch of the state's next step. Raises UserError for a reward that is no number."""
        kept = {name: state[name] for name in ("params", "frozen", "step") if name in state}
        read = {name: x for name, x in prompts.items() if name != RECORD}
        told = self._draw(kept, read)
        return self._judged(told.rows, self._reward(told, prompts))


def _reward(program: Program, vocabulary, restore: Restore) -> Reward:
    """The reward that the run's config names. Raises UserError where it is none, or does not fit the run."""
    rollout = program.config.objective.rollout
    if rollout.judged_by_function:
        return rewards.FunctionReward(program, vocabulary, packages.function(REWARD_FIELD, rollout.reward))
    return rewards.ModelReward(program, vocabulary, judges.judge(program, rollout.reward), restore)


def make(program: Program, restore: Restore) -> Rollouts | None:
    """What makes the batches of an objective that draws answers; None for others.

    restore: reads a reward model, see rewards.Restore.
    """
    if not program.config.objective.draws:
        return None
    return Rollouts(program, data_tasks.vocabulary_of(program.config.data), restore)


def _drawing(program: Program, vocabulary) -> Drawing:
    config, sizes = program.config, dict(program.mesh.shape)
    drop = sharding.GATHERED_AXES if config.eval.gather_params else ()
    kind = data_rows.of(config.objective.learned)
    length = config.data.targets_length
    return Drawing(
        of=program.differentiated,
        places={path: program.rules.spec(info.logical_axes, sizes, drop=drop)
                for path, info in program.table.items()},
        prompts_a_batch=config.train.global_batch_size, row_length=length,
        answer_length=length - kind.shares_row * config.data.inputs_length,
        start_id=data_vocabulary.start_id(vocabulary) if kind.shares_row else 0,
        eos_id=vocabulary.eos_id, seed=config.train.seed,
        stop_ids=chat_prompts.stops(config.data, config.objective.given))
