"""Answers that a model draws and learns from: their rows, their optimum, restarts, meshes, rewards."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import cli, init_from, report, train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.cost import flops
from t5x_lite.cost.flops import drawing_flops
from t5x_lite.cost.tables import quantity
from t5x_lite.data import batches as data_batches, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.data.rows import ADVANTAGE, OLD, REFERENCE, REWARD
from t5x_lite.errors import UserError
from t5x_lite.layers.config import InitConfig
from t5x_lite.log import si
from t5x_lite.models.peft import SCALAR_HEAD, PeftConfig
from t5x_lite.parallel import sharding
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import rehearse, show
from t5x_lite.planning.make import make_plan
from t5x_lite.rollouts import sampler
from t5x_lite.training import rollouts, steps
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.policy import RolloutConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests.helpers import xla_flags
from tests.test_train import finish, free_port
from tests.training.test_objectives import tiny_model

HERE = "tests.training.rollout_rewards"
ROOT = pathlib.Path(__file__).resolve().parents[2]


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
                        cache_dir=str(pathlib.Path(path).parent), record_length=64,
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


@pytest.mark.parametrize("name", ["grpo", pytest.param("seq2seq_ppo", marks=pytest.mark.slow)])
def test_what_the_decoder_drew_with_is_what_teacher_forcing_finds(prompts, name):
    """The sampler's own log-probability of each answer, a token at a time with a cache, is the sum of its
    row's; before and after an update, the reference staying that of the start. Steps and rows draw their own."""
    program = build(run_of(name, prompts, temperature=1.0), jax.devices()[:1])
    state, given, batch = first_batch(program)
    drawing = sampler._drawing(program, data_tasks.vocabulary_of(program.config.data))
    decode = jax.jit(steps.make_decode_step(program.model, drawing.decode))
    read = {n: x for n, x in given.items() if n != "record_tokens"}
    start = np.asarray(batch[REFERENCE]).sum(1)

    def drawn_again(state, read=read, later=0):
        return decode(state["params"], {**rollouts._asked(read, drawing), "row_ids": rollouts._row_ids(
            state["step"] + later, read, drawing)})

    with program.activate():
        decoded = drawn_again(state)
        np.testing.assert_allclose(np.asarray(batch[OLD]).sum(1), np.asarray(decoded.scores).ravel(), rtol=1e-4)
        np.testing.assert_allclose(start, np.asarray(decoded.scores).ravel(), rtol=1e-4)
        assert (drawn_again(state, later=1).tokens != decoded.tokens).any(axis=(1, 2)).all()
        alike = {n: jnp.repeat(x[:1], 8, axis=0) for n, x in read.items()}
        assert len({row.tobytes() for row in np.asarray(drawn_again(state, alike).tokens).reshape(16, -1)}) > 8
        state, _ = program.jit_train_step()(state, batch)
        decoded = drawn_again(state)
        batch = sampler.make(program, init_from.restore)(state, given)
    np.testing.assert_allclose(np.asarray(batch[OLD]).sum(1), np.asarray(decoded.scores).ravel(), rtol=1e-4)
    assert np.abs(np.asarray(batch[OLD] - batch[REFERENCE]).sum(1)).max() > 1e-3


def test_minibatches_have_a_row_of_each_few_side_by_side():
    rows = {"tokens": jnp.arange(24)[:, None] + jnp.zeros([24, 2], int), "weights": jnp.arange(24.0)[:, None]}
    found = [steps.shuffled_minibatches(rows, 3, jax.random.key(seed)) for seed in (0, 1)]
    first, second = (np.asarray(one["tokens"][:, :, 0]) for one in found)
    for tokens in (first, second):   # 3 minibatches of 8, the g-th row of each from rows 3 g, 3 g + 1, 3 g + 2
        assert np.array_equal(np.sort(tokens, axis=0), np.arange(24).reshape(8, 3).T)
    assert (first != second).any() and (first != np.arange(24).reshape(8, 3).T).any()
    np.testing.assert_array_equal(found[0]["weights"][:, :, 0], first)   # the same for every array
    eight = sharding.make_mesh(MeshConfig(data=8), jax.devices())
    with sharding.activate(eight, sharding.Rules(sharding.DEFAULT_RULES)):
        split = {n: sharding.shard(x, "act_batch", None) for n, x in rows.items()}
        elsewhere = jax.jit(lambda x: steps.shuffled_minibatches(x, 3, jax.random.key(0)))(split)
    np.testing.assert_array_equal(elsewhere["tokens"], found[0]["tokens"])


def test_a_steps_minibatches_are_its_own(prompts, monkeypatch):
    """Each pass and each step draws others."""
    program = build(run_of("grpo", prompts, epochs=2, minibatches=2), jax.devices()[:1])
    seen = []
    kept = steps.shuffled_minibatches
    def noted(batch, parts, key):
        jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k).tolist())), jax.random.key_data(key))
        return kept(batch, parts, key)
    monkeypatch.setattr(steps, "shuffled_minibatches", noted)
    state, _, batch = first_batch(program)
    with program.activate():
        step = jax.jit(program.train_step)
        for _ in range(2):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 4


@pytest.mark.parametrize("name, reference, passes", [("grpo", "copy", 3), ("seq2seq_ppo", "none", 2)])
def test_drawing_is_counted_and_said(prompts, name, reference, passes):
    """A forward pass over the rows to draw them, one to measure them, one for the reference."""
    run = run_of(name, prompts, reference=reference, epochs=2, minibatches=4, answers=4)
    program = build(run, jax.devices()[:1])
    lengths = (8, 16) if name.startswith("seq2seq") else (0, 16)
    whole = flops.forward_flops(run.model, 8 * 4, *lengths)
    drawing = drawing_flops(run, lengths, 8)
    assert drawing.total == pytest.approx(passes * whole.total) and program.lengths == lengths
    update = 8 * 4 * 2 * program.flops_per_sequence   # each of 32 rows twice
    cost = program.row_cost
    assert 8 * 4 * 2 * cost.flops == pytest.approx(update + drawing.total)
    assert 8 * 4 * 2 * (cost.flops - cost.flops_no_head) == pytest.approx(
        64 * program.step_flops(1)["logits"] + passes * whole.logits)
    said = f"8 prompts x 4 answers x {lengths}, 2 x 4 updates"
    header = report.header(program)
    assert said in header and f"{si(update, 'FLOP')}, and {si(drawing.total, 'FLOP')} to draw and measure" in header
    plan = make_plan(dataclasses.replace(run, mesh=MeshConfig()), rehearse.topology("h100:1", count_only=True))
    assert plan.model_flops == pytest.approx(update)
    peak = plan.topology.chip.matmul_flops_per_second(program.policy.matmul_dtype)
    assert plan.cost.chip_hours == pytest.approx(4 * (update + drawing.total) / peak / 0.4 / 3600)   # 4 steps
    screen = " ".join(show.screen(plan).split())
    assert f"note: drawing the answers and measuring them takes {quantity(drawing.total, 'FLOP')} a step" in screen
    assert said in screen and show.to_json(plan)["drawing_flops"] == drawing.total
    plain = dataclasses.replace(run, objective=ObjectiveConfig("lm" if name == "grpo" else "seq2seq"))
    assert drawing_flops(plain, lengths, 8).total == 0


CONFIG = """
from t5x_lite.config import to_config_dict
from tests.training.test_rollouts import run_of
def get_config(reward):
    return to_config_dict(run_of("grpo", {path!r}, reward=reward, minibatches=2, epochs=2, answers=4))
"""


def started(tmp_path, folder, devices, *more, reward="small_letters"):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices)}
    return subprocess.Popen(
        [sys.executable, "-m", "t5x_lite.train", f"--config={tmp_path}/config.py:{reward}",
         f"--workdir={tmp_path / folder}", *more],
        env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def two(tmp_path, folder, **kwargs):
    coordinator = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [started(tmp_path, folder, 4, coordinator, "--num_processes=2", f"--process_id={i}", **kwargs)
            for i in range(2)]


@pytest.mark.slow
def test_two_processes_draw_and_learn_as_one(prompts, tmp_path):
    """2 processes x 4 devices: each judges its own answers; a reward that one refuses ends both."""
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(prompts)))
    finish(started(tmp_path, "one", 8))
    for process in two(tmp_path, "both"):
        finish(process)
    lines = {}
    for folder in ("one", "both"):
        text = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        lines[folder] = [{n: line[n] for n in ("step", *(f"train/{m}" for m in (
            "reward", "kl", "loss", "entropy", "answer_length")))}
            for line in map(json.loads, text) if "train/reward" in line]
    assert len(lines["one"]) == 4 and lines["one"][-1]["train/kl"] > 0
    for one, both in zip(lines["one"], lines["both"], strict=True):
        assert both == pytest.approx(one, rel=1e-4, abs=1e-6)
    ended = [(process.communicate(timeout=600)[1], process.returncode)
             for process in two(tmp_path, "refused", reward="none_for_q2")]
    assert any(status == 2 and "none_for_q2' gives nan for the answer" in said for said, status in ended), ended
    assert {status for _, status in ended} <= {2, cli.EXIT_PEER}, ended


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
@pytest.mark.parametrize("name, optimum", [
    ("ppo", "tilted"), ("grpo", "tilted"), ("grpo", "hyperbolic"), ("seq2seq_ppo", "tilted"),
    ("seq2seq_grpo", "tilted"), ("seq2seq_grpo", "hyperbolic")])
def test_a_bandit_meets_its_optimum(prompts, name, optimum):
    """One prompt and answers of one token: p_ref exp(r / beta), within 0.03 of total variation; GRPO
    with its own term of the loss p_ref / (1 + (mean r - r) / beta), the group's mean counting each
    answer itself too."""
    beta, answers, apart = 0.2, 64, name.startswith("seq2seq")
    run = run_of(name, prompts, reward="worth", answers=answers, whitened=False, scaled=False,
                 kl_in_reward=optimum == "tilted", value_clip=0.0, value_weight=1.0,
                 data={"inputs_length": 1, "targets_length": 1 if apart else 2})
    run = dataclasses.replace(
        run, model=dataclasses.replace(run.model, vocab_size=8, tie_logits=False,
                                       init=InitConfig(logits_std=0.2)),
        objective=dataclasses.replace(run.objective, beta=beta),
        optimizer=OptimizerConfig(name="adam", schedule=ScheduleConfig(
            factors="constant * linear_to_floor", base_learning_rate=0.02, warmup_steps=1,
            floor_fraction=0.02)),
        train=dataclasses.replace(run.train, num_steps=150))
    program = build(run, jax.devices()[:1])
    prompt = "encoder_input_tokens, encoder_mask" if apart else "prompt_tokens, prompt_mask"
    given = dict(zip(prompt.split(", "), (jnp.full([8, 1], 2), jnp.ones([8, 1], int)), strict=True))
    given["record_tokens"] = jnp.tile(jnp.array([1, *b'{"prompt": "a"}', -1]), (8, 1))

    def choice(params):
        module = program.model.bind(params)
        asked = {n: x[:1] for n, x in given.items() if n.startswith("encoder")}
        hidden, _ = module({**asked, "decoder_input_tokens": jnp.array([[0] if apart else [0, 2]])}, None)
        return jax.nn.softmax(module.head(module.head_params(), hidden)[0, -1])

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
    with manager.Checkpointer(tmp_path / "broken", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {**state, "params": tree.unflatten(flat | {SCALAR_HEAD: head * jnp.nan})}, {0: b""},
                          json.dumps(dataclasses.asdict(judge), default=dict))
    with pytest.raises(UserError, match="broken' gives nan for the answer .* to the prompt .*must be a finite"):
        first_batch(build(run_of("grpo", prompts, reward=str(tmp_path / "broken"))))
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
