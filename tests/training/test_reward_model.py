"""Reward models: rows, Bradley and Terry's loss by trl's vectors, answers apart, learning, restarts."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.config import CheckpointConfig
from t5x_lite.config import EvalConfig
from t5x_lite.data import rows as data_rows
from t5x_lite.errors import UserError
from t5x_lite.evaluation.predictor import Predictor
from t5x_lite.formats import assignment
from t5x_lite.models import peft
from t5x_lite.models.peft import SCALAR_HEAD, PeftConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import objectives, preferences, steps
from t5x_lite.training.objectives import ObjectiveConfig
from tests.training import test_preferences
from tests.training.test_preferences import pairs, rows_of  # noqa: F401 (a fixture)

VECTORS = pathlib.Path(__file__).resolve().parents[1] / "vectors" / "trl"
NAMES = {"reward": "decoder_only", "seq2seq_reward": "encoder_decoder"}


def run_of(name, path, tuning=PeftConfig(), **objective):
    plain = test_preferences.run_of({"reward": "dpo", "seq2seq_reward": "seq2seq_dpo"}[name], path, tuning)
    return dataclasses.replace(
        plain, model=dataclasses.replace(plain.model, scalar_head=True),
        objective=ObjectiveConfig(name=name, **objective))


def test_the_loss_is_trls():
    vectors = json.loads((VECTORS / "reward.json").read_text())

    def loss(scores_B2):
        return jnp.mean(preferences.sigmoid_loss(scores_B2[:, 0] - scores_B2[:, 1], 1.0, 0.0))

    found, gradient = jax.value_and_grad(loss)(jnp.asarray(vectors["scores"]))
    assert float(found) == pytest.approx(vectors["loss"], rel=1e-6)
    np.testing.assert_allclose(gradient, vectors["gradient"], atol=1e-7)


def test_a_row_has_a_place_where_each_answer_has_been_read():
    import tensorflow as tf
    example = {"inputs": tf.constant([5, 6]), "targets": tf.constant([7, 1]),
               "rejected": tf.constant([8, 9, 1])}
    made = {n: x.numpy().tolist() for n, x in data_rows.of("rankings").convert(
        example, 1)["decoder"].items()}
    assert made == {
        "decoder_target_tokens": [5, 6, 7, 1, 0, 5, 6, 8, 9, 1, 0],
        "decoder_loss_weights": [0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2],
        "decoder_positions": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5],
        "decoder_answer": [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 2]}
    sides = data_rows.of("seq2seq_rankings").convert(example, 1)
    assert sides["encoder"]["encoder_input_tokens"].numpy().tolist() == [5, 6]
    assert sides["decoder"]["decoder_answer"].numpy().tolist() == [0, 0, 1, 0, 0, 0, 2]


def apart(batch):
    """Of each answer: (a batch of rows that hold it alone, the place of its EOS in each)."""
    table = {n: np.asarray(x) for n, x in batch.items()}
    for answer in (1, 2):
        inputs, last = np.zeros_like(table["decoder_input_tokens"]), []
        for row, segments in enumerate(table["decoder_segment_ids"]):
            tokens = table["decoder_input_tokens"][row, segments == answer]
            inputs[row, :len(tokens)] = tokens
            last.append(len(tokens) - 1)
            assert tokens[-1] == 1
        encoder = {n: x for n, x in table.items() if n.startswith("encoder")}
        yield {**encoder, "decoder_input_tokens": inputs}, (np.arange(len(last)), last)


@pytest.mark.parametrize("name", ["reward", pytest.param("seq2seq_reward", marks=pytest.mark.slow)])
def test_it_learns_and_equals_answers_apart(pairs, name):  # noqa: F811
    """LoRA's base stays and the head trains in full; two micro-batches."""
    program = build(run_of(name, pairs, PeftConfig("lora", rank=4, alpha=32.0)), jax.devices()[:1])
    assert SCALAR_HEAD in program.trainable and program.tuning.keeps_base
    rows, of, seen = rows_of(program), program.differentiated, []
    with program.activate():
        state, step = program.init_state(), program.jit_train_step()
        for _ in range(20):
            state, sums = step(state, next(rows))
            seen.append({n: float(x[0] / x[1]) for n, x in sums.items()})
        batch = next(rows)

        def expected(trained):
            flat = of.tuning.combine(tree.flatten(trained), tree.flatten(state["frozen"]))
            module = program.model.bind(tree.unflatten(flat))
            chosen, rejected = (module.scalar_head(module(part, None)[0])[places]
                                for part, places in apart(batch))
            return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))

        value, wanted = jax.jit(jax.value_and_grad(expected))(state["params"])
        found, sums = jax.jit(lambda p: steps.gradients(
            of, p, batch, None, base=state["frozen"]))(state["params"])
        held_out = jax.jit(program.eval_step)(program.whole_params(state), batch, jnp.ones(384))
    assert seen[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert seen[-1]["loss"] < 0.2 and seen[-1]["pair_accuracy"] == 1
    for measured in (sums, held_out):
        assert float(measured["loss"][0] / measured["loss"][1]) == pytest.approx(float(value), rel=1e-4)
        assert float(measured["loss"][1]) == 8 == float(measured["pair_accuracy"][0])
    for path, want in tree.flatten(wanted).items():
        error = np.max(np.abs(np.asarray(tree.flatten(found)[path] - want)))
        assert error <= 1e-3 * np.max(np.abs(np.asarray(want))), path


@pytest.mark.slow
def test_starts_from_a_language_model_and_resumes_on_another_mesh(pairs, tmp_path, capsys):  # noqa: F811
    """The head is left fresh, which is said; it is sharded, saved and restored like all else."""
    plain = test_preferences.run_of("dpo", pairs, PeftConfig(), reference="none")
    source = build(plain, jax.devices()[:1])
    with source.activate():
        state = source.init_state()
    with manager.Checkpointer(tmp_path / "lm", CheckpointConfig()) as checkpointer:
        checkpointer.save(1, state, {0: b""}, json.dumps(dataclasses.asdict(plain), default=dict))
    run = run_of("reward", pairs)
    run = dataclasses.replace(
        run, init_from=str(tmp_path / "lm"),
        train=dataclasses.replace(run.train, accumulation=1, log_every=1, num_steps=3),
        eval=EvalConfig(every=3, batch_size=16, samples=1), checkpoint=CheckpointConfig(every=2))
    held_out = {}
    for name, stops, mesh in (("whole", (3,), MeshConfig(fsdp=8)),
                              ("resumed", (2, 3), MeshConfig(data=-1))):
        for last in stops:
            (found,) = train.run(dataclasses.replace(run, mesh=mesh, train=dataclasses.replace(
                run.train, num_steps=last)), tmp_path / name).values()
        held_out[name] = found
    said = capsys.readouterr()
    assert "fresh    scalar_head/kernel" in said.out + said.err
    assert "of a pair, " in said.out + said.err and "perplexity" not in held_out["whole"]
    assert held_out["whole"]["loss"] == pytest.approx(held_out["resumed"]["loss"], rel=1e-4)
    assert held_out["whole"]["margin"] > 0


def test_a_language_model_need_not_hold_the_head(pairs):  # noqa: F811
    table = build(run_of("reward", pairs), jax.devices()[:1]).table
    held = {path: info.shape for path, info in table.items() if path != SCALAR_HEAD}
    plan = assignment.assign(table, held, (), "lm", peft.added(table))
    assert plan.fresh == (SCALAR_HEAD,) and table[SCALAR_HEAD].logical_axes == ("embed", None)
    assert assignment.assign(table, held | {SCALAR_HEAD: (32, 1)}, (), "rm", peft.added(table)).fresh == ()


def test_what_cannot_be_learned_is_refused(pairs, tmp_path):  # noqa: F811
    run = run_of("reward", pairs)
    with pytest.raises(UserError, match="'reward' learns a number a position: set model.scalar_head"):
        build(dataclasses.replace(run, model=dataclasses.replace(run.model, scalar_head=False)),
              jax.devices()[:1])
    with pytest.raises(UserError, match="label_smoothing=0.5 is the share of pairs"):
        build(run_of("reward", pairs, label_smoothing=0.5), jax.devices()[:1])
    with pytest.raises(UserError, match="'reward' writes no answers"):
        Predictor(build(run, jax.devices()[:1]), None, run.eval.decode)
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"prompt": "q", "chosen": "a"}\n')
    with pytest.raises(UserError, match="line 1 has no 'rejected' that is a string"):
        rows_of(build(dataclasses.replace(run, data=dataclasses.replace(
            run.data, train=str(lacking))), jax.devices()[:1]))
    assert {objectives.OBJECTIVES[name].scalar_head for name in NAMES} == {True}
