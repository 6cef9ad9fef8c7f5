"""A plan counts the reward model that ppo and grpo ask."""

import dataclasses
import json

import jax
import pytest

from t5x_lite import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.cost.flops import drawing_flops, forward_flops
from t5x_lite.errors import UserError
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import rehearse, show
from t5x_lite.planning.make import Judge, make_plan
from t5x_lite.training.objectives import ObjectiveConfig
from tests.training.test_rollouts import run_of

ROWS = 8 * 2    # prompts x answers


def saved(folder, config):
    """The folder of a run of it that has ended its first step."""
    program = build.build(config, jax.devices()[:1])
    with program.activate(), manager.Checkpointer(folder, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, program.init_state(), {0: b""}, json.dumps(dataclasses.asdict(config), default=dict))
    return str(folder), program


def planned(run):
    return make_plan(dataclasses.replace(run, mesh=MeshConfig()), rehearse.topology("h100:1", count_only=True))


def test_its_parameters_and_its_pass_over_the_answers(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    judge_config = run_of("grpo", prompts)
    judge_config = dataclasses.replace(
        judge_config, mesh=MeshConfig(), objective=ObjectiveConfig("reward"),
        model=dataclasses.replace(judge_config.model, scalar_head=True))
    folder, judge = saved(tmp_path / "judge", judge_config)
    run = run_of("grpo", prompts, reward=folder)
    plan, alone = planned(run), planned(run_of("grpo", prompts))
    assert plan.judge.params_bytes == 4 * judge.num_params
    assert alone.judge == Judge() and plan.arguments == alone.arguments
    assert plan.judge.flops == pytest.approx(forward_flops(judge_config.model, ROWS, 0, 16).total)
    assert plan.drawing_flops == pytest.approx(drawing_flops(run, (0, 16), 8).total + plan.judge.flops)
    assert plan.cost.chip_hours > alone.cost.chip_hours
    said = " ".join(show.screen(plan).split())
    assert "the reward model's parameters" in said and "(the reward model's pass over them included)" in said
    assert "reward model" not in show.screen(alone)
    assert show.to_json(plan)["reward_model_bytes"] == plan.judge.params_bytes
    assert dataclasses.replace(plan, judge=Judge(plan.topology.hbm_bytes)).fits is False


def test_one_that_is_elsewhere_is_said_and_one_of_another_kind_refused(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    plan = planned(run_of("grpo", prompts, reward=str(tmp_path / "nowhere")))
    assert plan.judge.params_bytes == 0
    assert "nowhere' is not here: the reward model's parameters" in show.screen(plan)
    folder, _ = saved(tmp_path / "lm", dataclasses.replace(
        run_of("grpo", prompts), mesh=MeshConfig(), objective=ObjectiveConfig("lm")))
    with pytest.raises(UserError, match="objective.name='lm': must be one of a reward model"):
        planned(run_of("grpo", prompts, reward=folder))
