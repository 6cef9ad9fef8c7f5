"""Answers that a model draws and learns from: their rows, their optimum, restarts, meshes, rewards."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import init_from, train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.data import batches as data_batches
from t5x_lite.data.config import DataConfig
from t5x_lite.data.rows import ADVANTAGE, OLD, REFERENCE, REWARD
from t5x_lite.errors import UserError
from t5x_lite.layers.config import InitConfig
from t5x_lite.models.peft import SCALAR_HEAD, PeftConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.rollouts import sampler
from t5x_lite.training import rollouts
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.policy import RolloutConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests.training.test_objectives import tiny_model

HERE = "tests.training.rollout_rewards"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Prompts of different lengths, each with an ending that its record names."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "q" * (i % 4) + f"{i}?", "ending": "é"}) + "\n"
                            for i in range(16)))
    return path


def run_of(name, path, reward="small_letters", tuning=PeftConfig(), data=(), train=(), reference="copy",
           **rollout) -> RunConfig:
    architecture = "encoder_decoder" if name.startswith("seq2seq") else "decoder_only"
    model = dataclasses.replace(tiny_model(architecture), scalar_head=name.endswith("ppo"))
    return RunConfig(
        model=model, peft=tuning, objective=ObjectiveConfig(
            name, reference=reference, rollout=RolloutConfig(
                reward if ":" in reward or "/" in reward else f"{HERE}:{reward}",
                **{"answers": 2, **rollout})),
        data=DataConfig(train=str(path), vocabulary="byt5", num_shards=1, shuffle_buffer=8,
                        cache_dir=str(path.parent), record_length=64,
                        **{"inputs_length": 8, "targets_length": 16, **dict(data)}),
        optimizer=OptimizerConfig(name="adamw", schedule=ScheduleConfig(
            factors="constant", base_learning_rate=1e-2)),
        train=TrainConfig(**{"num_steps": 4, "global_batch_size": 8, "log_every": 1, **dict(train)}),
        checkpoint=CheckpointConfig(every=2), mesh=MeshConfig(data=-1))


def first_batch(program):
    """(the state at the start, the prompts, what is learned from them)."""
    config = program.config
    given = next(data_batches.TrainIterator(
        config.data, objective=config.objective.given, seed=0, sharding=program.batch_sharding,
        global_batch_size=config.train.global_batch_size))
    with program.activate():
        state = program.init_state()
        return state, given, sampler.make(program, init_from.restore)(state, given)


def test_a_row_is_a_prompt_and_one_of_its_answers():
    found = rollouts.lay_out(
        jnp.array([[5, 6, 0], [7, 0, 0]]), jnp.array([2, 1]),
        jnp.array([[[8, 1], [9, 9]], [[1, 0], [0, 1]]]), jnp.array([[2, 2], [1, 2]]), length=5, start=3)
    assert found["decoder_target_tokens"].tolist() == [
        [5, 6, 8, 1, 0], [5, 6, 9, 9, 0], [7, 1, 0, 0, 0], [7, 0, 1, 0, 0]]
    assert found["decoder_input_tokens"].tolist() == [
        [3, 5, 6, 8, 1], [3, 5, 6, 9, 9], [3, 7, 1, 0, 0], [3, 7, 0, 1, 0]]
    assert found["decoder_loss_weights"].tolist() == [
        [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    alone = rollouts.lay_out(jnp.zeros([1, 0], int), jnp.array([0]), jnp.array([[[8, 1]]]),
                             jnp.array([[2]]), length=3, start=0)
    assert alone["decoder_target_tokens"].tolist() == [[8, 1, 0]]


@pytest.mark.parametrize("name", ["grpo", pytest.param("seq2seq_ppo", marks=pytest.mark.slow)])
def test_answers_are_the_same_on_any_mesh_and_measured_as_by_plain_passes(prompts, name):
    found = {}
    for devices in (1, 8):
        program = build(run_of(name, prompts, temperature=0.7), jax.devices()[:devices])
        state, _, found[devices] = first_batch(program)
        abstract = program.abstract_batch()
        assert {n: (x.shape, x.dtype) for n, x in found[devices].items()} == {
            n: (x.shape, x.dtype) for n, x in abstract.items()}
    for array, value in found[1].items():
        np.testing.assert_allclose(np.asarray(found[8][array]), value, rtol=1e-4, atol=1e-5, err_msg=array)
    batch = {n: np.asarray(x) for n, x in found[8].items()}
    weights = batch["decoder_loss_weights"]
    assert weights.shape == (16, 16) and (weights.sum(1) >= 1).all()

    def plain(params, batch):
        module = program.model.bind(params)
        logits = module.head(module.head_params(), module(batch, None)[0]) / 0.7
        targets = batch["decoder_target_tokens"]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]

    params = jax.tree.map(np.asarray, state["params"])
    expected = jax.jit(plain)(params, {n: jnp.asarray(x) for n, x in batch.items()}) * weights
    np.testing.assert_allclose(batch[OLD], expected, atol=2e-5)
    np.testing.assert_allclose(batch[REFERENCE], expected, atol=2e-5)   # at the start
    # Both answers to a prompt stand side by side, drawn apart; rewards at their last tokens.
    assert (batch["decoder_target_tokens"][0::2] != batch["decoder_target_tokens"][1::2]).any()
    assert ((batch[REWARD] != 0).sum(1) <= 1).all() and (batch[ADVANTAGE] * (1 - weights) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "seq2seq_grpo"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(prompts, tmp_path, name):
    """Two passes over two minibatches of two micro-batches, over data that begin anew."""
    run = run_of(name, prompts, epochs=2, minibatches=2, answers=4, train={"accumulation": 2})
    for folder, stops in (("whole", (4,)), ("resumed", (2, 4))):
        for last in stops:
            train.run(dataclasses.replace(run, train=dataclasses.replace(run.train, num_steps=last)),
                      tmp_path / folder)
    lines, params = {}, {}
    for folder in ("whole", "resumed"):
        text = (tmp_path / folder / "metrics.jsonl").read_text()
        lines[folder] = [{n: v for n, v in json.loads(line).items() if n.startswith("train/")}
                         for line in text.splitlines()]
        program = build(run)
        with program.activate():   # evaluation needs no copy of what the run began with
            params[folder] = init_from.restore(program, tmp_path / folder)[0]
    assert lines["whole"] == lines["resumed"]
    first, *_, last = [line for line in lines["whole"] if "train/reward" in line]
    assert first["train/kl"] == 0 < last["train/kl"] and 0 < last["train/clip_fraction"] < 1
    assert {"train/entropy", "train/answer_length", "train/reward"} <= first.keys()
    jax.tree.map(np.testing.assert_array_equal, params["whole"], params["resumed"])
    record = manager.read_record(tmp_path / "whole")
    assert record.step == 4 and any(p.startswith("frozen/reference/") for p in record.arrays)
    read = init_from.read_workdir(str(tmp_path / "whole"))   # as a source of init_from
    assert set(read.shapes) == set(build(run).table)


# --- a bandit whose optimum is known --------------------------------------------------------------

LETTERS = types.SimpleNamespace(   # ids 2 … 7 are a … f, of a reward each
    eos_id=1, zero_in_rows=False, decode=lambda ids: "".join("  abcdef"[i] for i in ids))
WORTH = np.array([0, 0, *map("abcdef".index, "abcdef")]) * 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name, optimum", [("ppo", "tilted"), ("grpo", "tilted"), ("grpo", "hyperbolic")])
def test_a_bandit_meets_its_optimum(prompts, name, optimum):
    """One prompt and answers of one token: p_ref exp(r / beta), within 0.03 of total variation; GRPO
    with its own term of the loss p_ref / (1 + (mean r - r) / beta), the group's mean counting each
    answer itself too."""
    beta, answers = 0.2, 64
    run = run_of(name, prompts, reward="worth", answers=answers, whitened=False, scaled=False,
                 kl_in_reward=optimum == "tilted", value_clip=0.0, value_weight=1.0,
                 data={"inputs_length": 1, "targets_length": 2})
    run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, vocab_size=8, tie_logits=False,
                                       init=InitConfig(logits_std=0.2)),
        objective=dataclasses.replace(run.objective, beta=beta),
        optimizer=OptimizerConfig(name="adam", schedule=ScheduleConfig(
            factors="constant * linear_to_floor", base_learning_rate=0.02, warmup_steps=1,
            floor_fraction=0.02)),
        train=dataclasses.replace(run.train, num_steps=150))
    program = build(run, jax.devices()[:1])
    given = {"prompt_tokens": jnp.full([8, 1], 2), "prompt_mask": jnp.ones([8, 1], int),
             "record_tokens": jnp.tile(jnp.array([1, *b'{"prompt": "a"}', -1]), (8, 1))}

    def choice(params):
        module = program.model.bind(params)
        hidden, _ = module({"decoder_input_tokens": jnp.array([[0, 2]])}, None)
        return jax.nn.softmax(module.head(module.head_params(), hidden)[0, 1])

    with program.activate():
        state, step = program.init_state(), program.jit_train_step()
        before = np.asarray(choice(state["params"]), np.float64)
        draws = sampler.Rollouts(program, LETTERS, init_from.restore)
        for _ in range(150):
            state, _ = step(state, draws(state, given))
        after = np.asarray(choice(state["params"]), np.float64)
    if optimum == "tilted":
        wanted = before * np.exp(WORTH / beta)
        wanted /= wanted.sum()
    else:   # the mean reward is the one with which the shares add up to one
        own = beta * answers / (answers - 1)
        low, high = WORTH.max() - own * 0.999, WORTH.max()
        for _ in range(60):
            mean = (low + high) / 2
            wanted = before / (1 + (mean - WORTH) / own)
            low, high = (mean, high) if wanted.sum() > 1 else (low, mean)
    far = np.abs(before - wanted).sum() / 2
    assert far > 0.1 and np.abs(after - wanted).sum() / 2 < 0.03, (before, wanted, after)


# --- rewards --------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_reward_model_scores_answers_that_end(prompts, tmp_path):
    """By its workdir: as a pass over prompt, answer and EOS has it."""
    plain = run_of("ppo", prompts)
    judge = dataclasses.replace(
        plain, objective=ObjectiveConfig("reward"), mesh=MeshConfig(data=1),
        data=dataclasses.replace(plain.data, targets_length=40))
    program = build(judge, jax.devices()[:1])
    with program.activate():
        state = program.init_state()
    head = jax.random.normal(jax.random.key(1), (32, 1))
    flat = tree.flatten(state["params"]) | {SCALAR_HEAD: head}
    with manager.Checkpointer(tmp_path / "judge", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {**state, "params": tree.unflatten(flat)}, {0: b""},
                          json.dumps(dataclasses.asdict(judge), default=dict))
    ours = build(run_of("grpo", prompts, reward=str(tmp_path / "judge")))
    _, _, batch = first_batch(ours)
    batch = {n: np.asarray(x) for n, x in batch.items()}
    ends = (batch["decoder_loss_weights"] * np.arange(1, 17)).max(1).astype(int)
    inputs = np.pad(batch["decoder_target_tokens"], ((0, 0), (1, 0)))

    def score(params, inputs):
        module = program.model.bind(params)
        return module.scalar_head(module({"decoder_input_tokens": inputs}, None)[0])

    with program.activate():
        scores = np.asarray(jax.jit(score)(tree.unflatten(flat), inputs))
    np.testing.assert_allclose(batch[REWARD].sum(1), scores[np.arange(16), ends], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="is a run with objective.name='grpo': must be one of a reward"):
        manager_run = dataclasses.asdict(ours.config)
        with manager.Checkpointer(tmp_path / "policy", CheckpointConfig()) as checkpointer:
            checkpointer.save(1, {"params": state["params"]}, {0: b""}, json.dumps(manager_run, default=dict))
        sampler.make(build(run_of("grpo", prompts, reward=str(tmp_path / "policy"))), init_from.restore)


@pytest.mark.parametrize("reward, message", [
    ("none_for_q", r"none_for_q' gives nan for the answer .* to the prompt 'q+\d+\?': must be a finite"),
    ("of_text", "of_text' gives 'good' for the answer")])
def test_rewards_that_are_no_numbers_are_refused(prompts, reward, message):
    with pytest.raises(UserError, match=message):
        first_batch(build(run_of("grpo", prompts, reward=reward, train={"global_batch_size": 16})))


def test_a_record_that_is_cut_is_refused(prompts):
    run = run_of("grpo", prompts, train={"global_batch_size": 16})
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, record_length=20))
    with pytest.raises(UserError, match="data.record_length=20 does not hold what belongs to the prompt"):
        first_batch(build(run))


@pytest.mark.parametrize("change, message", [
    (dict(reward="nothing_here"), "rollout_rewards has no function 'nothing_here'"),
    (dict(reward="no.such:thing"), "no module named 'no' on PYTHONPATH"),
    (dict(reward="no/such"), "'no/such': there is no such folder, and it is no MODULE:FUNCTION"),
    (dict(answers=1), "answers=1: must be at least 2. .* compares the answers to a prompt with one"),
    (dict(reference="rows"), "data have no scores of answers that objective.name='grpo' has yet to draw"),
    (dict(reference="base"), "or objective.reference=copy, which keeps a frozen copy"),
    (dict(average="mean"), "objective.rollout.average='mean'.*answers, tokens, length"),
    (dict(minibatches=3), "objective.rollout.answers=16 must be a multiple of 24: 3 minibatches"),
    (dict(data={"targets_length": 8}), "the whole row: the prompt has data.inputs_length=8 of it, the answer the rest; set more"),
    (dict(train={"accumulation": 3}), "1 minibatches .* x 3 micro-batches .train.accumulation.")])
def test_what_cannot_be_is_refused(prompts, change, message):
    with pytest.raises(UserError, match=message):
        sampler.make(build(run_of("grpo", prompts, **change)), init_from.restore)
    with pytest.raises(UserError, match="objective.rollout.reward is empty"):
        run = run_of("grpo", prompts)
        build(dataclasses.replace(run, objective=dataclasses.replace(
            run.objective, rollout=RolloutConfig())))


def test_prompts_without_text_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    with pytest.raises(UserError, match="bad.jsonl, line 2 has an empty prompt"):
        first_batch(build(run_of("grpo", path)))
