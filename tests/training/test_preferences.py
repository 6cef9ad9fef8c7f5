"""Preferences: DPO and IPO by hand, their rows, files, reference scores, and models that learn them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import inspect_task, score_preferences, train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.manager import CheckpointConfig
from t5x_lite.config import EvalConfig, RunConfig, TrainConfig
from t5x_lite.data import batches as data_batches, rows as data_rows
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import losses, objectives, preferences, steps
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig
from tests.training.test_objectives import tiny_model

NAMES = {"dpo": "decoder_only", "seq2seq_dpo": "encoder_decoder"}
LORA = PeftConfig("lora", rank=4, alpha=32.0)


# --- the losses -----------------------------------------------------------------------------------

@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_losses_by_hand(eps):
    h, beta = np.array([-3.0, 0.0, 0.5, 40.0]), 0.3
    logistic = lambda x: 1 / (1 + np.exp(-x))
    found = preferences.sigmoid_loss(jnp.asarray(h), beta, eps)
    np.testing.assert_allclose(found, -(1 - eps) * np.log(logistic(beta * h))
                               - eps * np.log(logistic(-beta * h)), rtol=1e-4)
    assert float(found[1]) == pytest.approx(math.log(2))
    slope = jax.vmap(jax.grad(lambda x: preferences.sigmoid_loss(x, beta, eps)))(jnp.asarray(h))
    np.testing.assert_allclose(   # the weight of equation 7's gradient
        slope, beta * (eps * logistic(beta * h) - (1 - eps) * logistic(-beta * h)), atol=1e-6)
    np.testing.assert_allclose(
        preferences.ipo_loss(jnp.asarray(h), beta, eps),
        (1 - eps) * (h - 1 / 0.6)**2 + eps * (h + 1 / 0.6)**2, rtol=1e-5)


# --- rows and files -------------------------------------------------------------------------------

def test_a_row_holds_both_answers_apart():
    import tensorflow as tf
    example = {"inputs": tf.constant([5, 6]), "targets": tf.constant([7, 1]),
               "rejected": tf.constant([8, 9, 1]), "reference": tf.constant([-1.5, -2.5])}
    made = {n: x.numpy().tolist() for n, x in data_rows.of(
        "scored_preferences").convert(example, 1)["decoder"].items()}
    assert made == {
        "decoder_target_tokens": [5, 6, 7, 1, 5, 6, 8, 9, 1],
        "decoder_loss_weights": [0, 0, 1, 1, 0, 0, 0, 0, 0],
        "decoder_segment_ids": [1, 1, 1, 1, 2, 2, 2, 2, 2],
        "decoder_positions": [0, 1, 2, 3, 0, 1, 2, 3, 4],
        "decoder_answer": [0, 0, 1, 1, 0, 0, 2, 2, 2],
        "decoder_reference": [0, 0, -1.5, 0, 0, 0, -2.5, 0, 0]}
    sides = data_rows.of("seq2seq_preferences").convert(example, 1)
    assert sides["encoder"]["encoder_input_tokens"].numpy().tolist() == [5, 6]
    assert sides["decoder"]["decoder_target_tokens"].numpy().tolist() == [7, 1, 8, 9, 1]
    assert "decoder_reference" not in sides["decoder"]
    with pytest.raises(UserError, match="two answers.*is for objective.name=lm or prefix_lm"):
        data_rows.of("preferences").weighted({}, True)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """48 questions whose chosen answer ends in a full stop, the rejected one in none."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}?", "chosen": f"{a}.", "rejected": a}) + "\n"
                            for i, a in enumerate("yes no maybe".split() * 16)))
    return path


@pytest.mark.parametrize("change, message", [
    ({"rejected": None}, "line 2 has no 'rejected' that is a string"),
    ({"rejected": "a"}, "line 2: the chosen and the rejected answer are the same, 'a'"),
    ({"chosen": " "}, "line 2 has an empty answer 'chosen'"),
    ({"reference_chosen": math.nan}, "line 2 has reference_chosen=nan, which must be a finite"),
    ({"reference_rejected": None}, "line 2 has reference_rejected=None")])
def test_malformed_lines_are_named(tmp_path, change, message):
    good = {"inputs": "q", "chosen": "a", "rejected": "b", "reference_chosen": -1.0,
            "reference_rejected": -2}
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    config = DataConfig(train=str(path), vocabulary="byt5", inputs_length=8, targets_length=32,
                        num_shards=1, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=message):
        next(ShardedRows(config, objective="scored_preferences", global_batch_size=2, seed=0,
                         shards=[0]))


def test_an_objective_that_leaves_rejected_answers_out_says_so(pairs, capsys):
    config = DataConfig(train=str(pairs), vocabulary="byt5", inputs_length=8, targets_length=32,
                        num_shards=1, cache_dir=str(pairs.parent))
    for objective, said in (("seq2seq", "pairs.jsonl also gives rejected, which rows of seq2seq"),
                            ("preferences", None)):
        ShardedRows(config, objective=objective, global_batch_size=2, seed=0, shards=[0])
        out = capsys.readouterr().out
        assert said in out if said else "also gives" not in out


# --- models ---------------------------------------------------------------------------------------

def run_of(name, path, tuning=LORA, **objective) -> RunConfig:
    return RunConfig(
        model=tiny_model(NAMES[name]), objective=ObjectiveConfig(name=name, **objective), peft=tuning,
        data=DataConfig(train=str(path), validation=str(path), vocabulary="byt5", inputs_length=8,
                        targets_length=40, num_shards=1, shuffle_buffer=8,
                        cache_dir=str(path.parent)),
        optimizer=OptimizerConfig(name="adamw", schedule=ScheduleConfig(
            factors="constant", base_learning_rate=1e-2)),
        train=TrainConfig(num_steps=4, global_batch_size=8, accumulation=2),
        eval=EvalConfig(batch_size=20))


def rows_of(program):
    config = program.config
    return data_batches.TrainIterator(config.data, objective=config.objective.rows, seed=0,
                                      global_batch_size=config.train.global_batch_size,
                                      sharding=program.batch_sharding)


def apart(batch, answer):
    """The batch with one of the two answers alone in each row, as an ordinary objective has it."""
    table = {n: np.asarray(x) for n, x in batch.items()}
    found = {n: x for n, x in table.items() if n.startswith("encoder")}
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_loss_weights")
    found |= {n: np.zeros_like(table[n]) for n in names}
    table["decoder_loss_weights"] = (table["decoder_answer"] == answer).astype(np.float32)
    for row, segments in enumerate(table["decoder_segment_ids"]):
        places = np.flatnonzero(segments == answer)
        for n in names:
            found[n][row, :len(places)] = table[n][row, places]
    return found


def plainly(model, params, batch):
    """float32 [B, 2]: the log-probability of each answer, a forward pass each."""
    scores = []
    for answer in (1, 2):
        part = apart(batch, answer)
        module = model.bind(params)
        hidden, _ = module(part, None)
        tokens = losses.target_log_probs(module.head, module.head_params(), hidden,
                                         part["decoder_target_tokens"])
        scores.append(jnp.sum(tokens * part["decoder_loss_weights"], axis=1))
    return jnp.stack(scores, axis=1)


@pytest.mark.parametrize("name, loss", [("dpo", "sigmoid"), ("seq2seq_dpo", "ipo")])
def test_loss_and_gradients_equal_those_of_answers_apart(pairs, name, loss):
    """Under LoRA, away from the start: the reference is the model without it."""
    run = run_of(name, pairs, beta=0.5, label_smoothing=0.1, preference_loss=loss)
    program = build(run, jax.devices()[:1])
    batch, of = next(rows_of(program)), program.differentiated
    with program.activate():
        state = program.init_state()
        moved = jax.tree.map(lambda x: x + 0.1, state["params"])
        flat = tree.flatten(state["frozen"])

        def expected(trained):
            tuned = tree.unflatten(of.tuning.combine(tree.flatten(trained), flat))
            base = tree.unflatten({p: flat[p] for p in program.table})
            scores = plainly(program.model, tuned, batch) - plainly(program.model, base, batch)
            h = scores[:, 0] - scores[:, 1]
            if loss == "ipo":
                return jnp.mean(0.9 * (h - 1)**2 + 0.1 * (h + 1)**2)
            return jnp.mean(-0.9 * jnp.log(jax.nn.sigmoid(0.5 * h))
                            - 0.1 * jnp.log(jax.nn.sigmoid(-0.5 * h)))

        value, wanted = jax.jit(jax.value_and_grad(expected))(moved)
        found, sums = jax.jit(lambda p: steps.gradients(
            of, p, batch, None, base=state["frozen"]))(moved)
    assert float(sums["loss"][0] / sums["loss"][1]) == pytest.approx(float(value), rel=1e-5)
    assert float(sums["margin"][1]) == 8   # pairs, of two micro-batches
    for path, want in tree.flatten(wanted).items():
        error = np.max(np.abs(np.asarray(tree.flatten(found)[path] - want)))
        assert error <= 2e-4 * np.max(np.abs(np.asarray(want))), path


@pytest.mark.parametrize("name", ["dpo", pytest.param("seq2seq_dpo", marks=pytest.mark.slow)])
def test_starts_at_ln_2_and_learns(pairs, name):
    program = build(run_of(name, pairs), jax.devices()[:1])
    rows, seen = rows_of(program), []
    with program.activate():
        state, step = program.init_state(), program.jit_train_step()
        before = jax.jit(program.eval_step)(program.whole_params(state), next(rows), jnp.ones(384))
        for _ in range(25):
            state, sums = step(state, next(rows))
            seen.append({n: float(x[0] / x[1]) for n, x in sums.items() if n != "noise_scale"})
        after = jax.jit(program.eval_step)(program.whole_params(state), next(rows), jnp.ones(384))
    assert seen[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert seen[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert seen[-1]["loss"] < 0.5 and seen[-1]["margin"] > 5 and seen[-1]["pair_accuracy"] == 1
    rate = lambda sums, n: float(sums[n][0] / sums[n][1])
    assert rate(after, "margin") > rate(before, "margin") + 5   # from no reference


def test_scores_in_the_rows_are_those_of_the_model_that_they_start_from(pairs, tmp_path):
    run = run_of("dpo", pairs, tuning=PeftConfig(), reference="rows")
    scorer = build(score_preferences.as_scorer(run, str(pairs)), jax.devices()[:1])
    with scorer.activate():
        params = scorer.init_params()
    scored = tmp_path / "scored.jsonl"
    assert score_preferences.write(scorer, params, str(pairs), str(scored)) == 48
    records = list(map(json.loads, scored.read_text().splitlines()))
    assert [r["prompt"] for r in records] == [f"q{i}?" for i in range(48)]
    assert all(r["reference_chosen"] < 0 for r in records)

    other = tmp_path / "other.jsonl"
    other.write_text('{"inputs": "q", "targets": "a"}\n')
    with pytest.raises(UserError, match="--input=.* take a .jsonl file of"):
        score_preferences.write(scorer, params, str(other), str(scored))
    with pytest.raises(UserError, match="needs inputs, targets, rejected, reference.*score_pref"):
        rows_of(build(run, jax.devices()[:1]))
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, train=str(scored)))
    program = build(run, jax.devices()[:1])
    rows, abstract = rows_of(program), program.abstract_batch()
    with program.activate():
        state, step = program.init_state(), program.jit_train_step()
        for number in range(2):
            batch = next(rows)
            assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
                n: (x.shape, x.dtype) for n, x in abstract.items()}
            state, sums = step(state, batch)
            loss = float(sums["loss"][0] / sums["loss"][1])
            assert (loss == pytest.approx(math.log(2), rel=1e-5)) == (number == 0)


def test_inspect_task_tells_what_is_cut(pairs):
    config = dataclasses.replace(run_of("dpo", pairs).data, targets_length=24)
    shown = inspect_task.describe(config, str(pairs), "train", "dpo", 1, 48)
    assert "targets of the first 48 examples: mean 5.3, longest 7; 32 longer than 4 tokens" in shown
    assert "inputs of the first 48 examples: mean 3.8, longest 4; 0 longer than 8" in shown


def test_rows_resume(pairs):
    config = run_of("dpo", pairs).data
    made, again = (ShardedRows(config, objective="preferences", global_batch_size=4, seed=0,
                               shards=[0]) for _ in range(2))
    next(made)
    again.restore(made.state([0]))
    jax.tree.map(np.testing.assert_array_equal, next(again)[0], next(made)[0])


@pytest.mark.parametrize("change, message", [
    (dict(tuning=PeftConfig()), "'none' trains parameters of the model itself.*reference=none"),
    (dict(tuning=PeftConfig("lora", also=(".*_norm/scale",))), r"itself \(peft.also\): use one"),
    (dict(reference="bass"), "objective.reference='bass'.*did you mean 'base'"),
    (dict(preference_loss="hinge"), "objective.preference_loss='hinge'.*sigmoid, ipo"),
    (dict(label_smoothing=0.6), "objective.label_smoothing=0.6 is the share of pairs")])
def test_what_cannot_be_learned_is_refused(pairs, change, message):
    with pytest.raises(UserError, match=message):
        build(run_of("dpo", pairs, **change), jax.devices()[:1])


def test_without_a_reference_anything_may_train(pairs):
    build(run_of("dpo", pairs, tuning=PeftConfig(), reference="none"), jax.devices()[:1])
    config = dataclasses.replace(run_of("dpo", pairs).data, targets_length=19)
    with pytest.raises(UserError, match="holds two answers of .* set at least 20"):
        next(ShardedRows(config, objective="preferences", global_batch_size=2, seed=0, shards=[0]))


def test_every_preference_objective_has_both_kinds_of_rows():
    for name in NAMES:
        row = objectives.OBJECTIVES[name]
        assert data_rows.of(row.rows).compares and "reference" in data_rows.of(row.scored).features


@pytest.mark.slow
def test_with_an_average_a_run_is_evaluated_by_it_and_goes_on(pairs, tmp_path):
    """Of LoRA's parameters alone; held-out margins are of the average, not of the last step."""
    run = run_of("dpo", pairs)
    run = dataclasses.replace(
        run, train=dataclasses.replace(run.train, ema_decay=0.5, log_every=1, accumulation=1),
        eval=EvalConfig(every=2, batch_size=16, num_batches=1, metrics=False),
        checkpoint=CheckpointConfig(every=2), mesh=MeshConfig(data=-1))
    held_out = {}
    for name, stops in (("whole", (4,)), ("resumed", (2, 4))):
        for steps_ in stops:
            found = train.run(dataclasses.replace(run, train=dataclasses.replace(
                run.train, num_steps=steps_)), tmp_path / name)
        (held_out[name],) = found.values()
    assert held_out["whole"]["margin"] == held_out["resumed"]["margin"] != 0
    program = build(run)
    averaged, last = (tree.flatten(manager.restore_params(
        tmp_path / "resumed", program.abstract_state["params"], averaged=choice)[0])
        for choice in (True, False))
    assert {path.rpartition("/")[2] for path in averaged} == {"lora_a", "lora_b"}
    assert any((np.asarray(averaged[path]) != np.asarray(last[path])).any() for path in averaged)
    without = train.run(dataclasses.replace(run, train=dataclasses.replace(
        run.train, ema_decay=0.0)), tmp_path / "without")
    assert next(iter(without.values()))["margin"] != held_out["whole"]["margin"]
