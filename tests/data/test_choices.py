"""Objective "choices": T-Few's losses by hand, rows of several choices, and a run that ranks."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from configs import t_few
from t5x_lite import build as build_lib, config as configs, train
from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.models import peft
from t5x_lite.models.language_model import Model
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import losses, metrics, objectives, steps
from t5x_lite.training.objectives import ObjectiveConfig
from tests import tiny, tiny_config

# --- the losses -----------------------------------------------------------------------------------

def test_choice_losses_by_hand():
    # Right: tokens of probability 1/2, 1/4. Wrong: one of 1/10; two of 1/5, 1/5. Then padding.
    p = np.array([[0.5, 0.25, 0.1, 0.2, 0.2, 0.9], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    segments = jnp.asarray([[1, 1, 2, 3, 3, 0], [0, 0, 0, 0, 0, 0]])
    unlikely, ranking, first = losses.choice_losses(jnp.log(jnp.asarray(p, jnp.float32)), segments)
    expected = [0, 0, *(-math.log(1.01 - x) for x in (0.1, 0.2, 0.2)), 0]
    np.testing.assert_allclose(unlikely[0], expected, rtol=1e-6)
    scores = [math.sqrt(1 / 8), 0.1, 0.2]   # exp of the mean log-probability
    assert float(ranking[0]) == pytest.approx(-math.log(scores[0] / sum(scores)), rel=1e-6)
    assert not np.any(unlikely[1]) and ranking[1] == 0 and first.tolist() == [1, 0]


def test_a_sure_wrong_token_keeps_the_gradient_finite():
    def total(logits):
        unlikely, ranking, _ = losses.choice_losses(jax.nn.log_softmax(logits)[..., 0],
                                                    jnp.asarray([[1, 2, 0, 0]]))
        return jnp.sum(unlikely) + jnp.sum(ranking)
    grads = jax.grad(total)(jnp.asarray([[[-300.0, 0.0], [300.0, 0.0], [5.0, 0.0], [0.0, 0.0]]]))
    assert np.isfinite(grads).all() and not np.any(grads[0, 2:])


# --- rows -----------------------------------------------------------------------------------------

RUN = dataclasses.replace(tiny.seq2seq(), objective=ObjectiveConfig("choices", z_loss=0.0))
CHOICES = [[[5, 6, 1], [7, 1], [8, 9, 1]], [[10, 1], [11, 12, 13, 1]]]   # of two questions


def rows(repeat=1) -> dict:
    """The questions' rows, all choices side by side."""
    names = ("decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids",
             "decoder_positions")
    batch = {name: np.zeros((2, tiny.TARGETS), np.int32) for name in names}
    for i, choices in enumerate(CHOICES):
        place = 0
        for number, tokens in enumerate(choices, 1):
            part = slice(place, place + len(tokens))
            for name, value in zip(names, ([0, *tokens[:-1]], tokens, number, range(len(tokens))),
                                   strict=True):
                batch[name][i, part] = value
            place += len(tokens)
    batch["decoder_loss_weights"] = (batch["decoder_segment_ids"] == 1).astype(np.float32)
    batch["encoder_input_tokens"] = np.asarray(
        tiny.batch(2)["encoder_input_tokens"])
    return {name: jnp.asarray(np.tile(x, (repeat, 1))) for name, x in batch.items()}


@pytest.fixture(scope="module")
def model():
    return Model(RUN.model)


def log_probs(model, batch):
    def run(params, batch):
        module = model.bind(params)
        return losses.target_log_probs(module.head, module.head_params(), module(batch)[0],
                                       batch["decoder_target_tokens"])
    return np.asarray(jax.jit(run)(tiny.params(RUN), batch))


def test_choices_of_a_row_are_scored_as_if_each_had_its_own(model):
    together = log_probs(model, rows())
    each = [(i, tokens) for i, choices in enumerate(CHOICES) for tokens in choices]
    padded = np.array([[*tokens, *[0] * (4 - len(tokens))] for _, tokens in each])
    alone = log_probs(model, {
        "encoder_input_tokens": rows()["encoder_input_tokens"][np.array([i for i, _ in each])],
        "decoder_input_tokens": jnp.asarray(np.pad(padded[:, :-1], ((0, 0), (1, 0)))),
        "decoder_target_tokens": jnp.asarray(padded)})
    for i in range(2):
        expected = [alone[row, :len(tokens)] for row, (j, tokens) in enumerate(each) if i == j]
        expected = np.concatenate(expected)
        np.testing.assert_allclose(together[i, :len(expected)], expected, rtol=2e-5)


def test_the_loss_adds_up_the_three(model):
    batch = rows()
    lp, segments = log_probs(model, batch), np.asarray(batch["decoder_segment_ids"])
    config = dataclasses.replace(RUN.objective, unlikelihood=0.5, length_normalized=2.0)

    @jax.jit
    def both(params):
        module, divisors = model.bind(params), objectives.totals(config, batch)
        return (objectives.loss(module, batch, None, config, divisors),
                objectives.loss(module, batch, None, ObjectiveConfig(z_loss=0.0), divisors)[0])

    (value, sums), plain = both(tiny.params(RUN))
    likelihood = -lp[segments == 1].mean()
    unlikelihood = -np.log(1.01 - np.exp(lp[segments > 1])).mean()
    ranking = [-np.log(np.exp(b[0]) / np.sum(np.exp(b))) for b in (
        [lp[i][segments[i] == c].mean() for c in range(1, len(CHOICES[i]) + 1)] for i in range(2))]
    assert float(value) == pytest.approx(
        likelihood + 0.5 * unlikelihood + 2.0 * np.mean(ranking), rel=1e-5)
    assert float(sums["length_normalized"][0]) == pytest.approx(np.sum(ranking), rel=1e-5)
    assert float(plain) == pytest.approx(likelihood, rel=1e-5)


def test_micro_batches_add_up():
    run = dataclasses.replace(RUN, train=dataclasses.replace(RUN.train, global_batch_size=4))
    batch = rows(2)
    batch["decoder_segment_ids"] = batch["decoder_segment_ids"].at[3].set(0)   # an empty row
    batch["decoder_loss_weights"] = batch["decoder_loss_weights"].at[3].set(0)
    program = build_lib.build(run, jax.devices()[:1])
    whole, parts = (jax.jit(lambda p, n=n: steps.gradients(
        dataclasses.replace(program.differentiated, parts=n), p, batch, None)[0])(tiny.params(run))
        for n in (1, 2))
    tiny.assert_close(parts, jax.tree.map(np.asarray, whole))


# --- data and a run -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Registers colours and colours_choices: the right choice stands in the question."""
    data_tasks.tensorflow_side()
    from t5x_lite.data import choices
    words = "red green blue grey pink teal".split()
    path = tmp_path_factory.mktemp("colours") / "colours.jsonl"
    path.write_text("".join(json.dumps({
        "question": f"{w} or {v}", "choices": [v, w], "label": 1}) + "\n"
        for w in words for v in words if v != w))
    choices.register_files("data_test_colours", {
        "train": [str(path)], "validation": [str(path)]})
    return DataConfig(train="data_test_colours_choices", validation="data_test_colours",
                      vocabulary="byt5", inputs_length=48, targets_length=16, num_shards=1,
                      shuffle_buffer=8, cache_dir=str(path.parent))


def test_rows_hold_all_choices_the_right_one_first(colours):
    made = ShardedRows(colours, objective="choices", global_batch_size=4, seed=0, shards=[0])
    batch = next(made)[0]
    vocabulary = data_tasks.vocabulary_of(colours)
    for i in range(4):
        question = vocabulary.decode(batch["encoder_input_tokens"][i].tolist())
        segments, targets = batch["decoder_segment_ids"][i], batch["decoder_target_tokens"][i]
        right, wrong = (vocabulary.decode(targets[segments == n].tolist()) for n in (1, 2))
        assert question == f"Question: {right} or {wrong}\nAnswer:"
        assert (targets[np.append(np.diff(segments) != 0, False)] == 1).all()   # EOS ends each
        n = int((segments == 1).sum())
        assert batch["decoder_positions"][i, :n + 2].tolist() == [*range(n), 0, 1]
        assert batch["decoder_input_tokens"][i, [0, n]].tolist() == [0, 0]
        assert batch["decoder_loss_weights"][i].sum() == n
    state = made.state([0])
    expected = next(made)[0]
    again = ShardedRows(colours, objective="choices", global_batch_size=4, seed=0, shards=[0])
    again.restore(state)
    jax.tree.map(np.testing.assert_array_equal, next(again)[0], expected)


def test_choices_end_with_the_eos_of_a_tokenizer_json(colours, tmp_path):
    words = "[UNK] red green blue grey pink teal or Question : Answer </s>".split()
    path = tmp_path / "tokenizer.json"
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))
    eos = words.index("</s>")
    config = dataclasses.replace(colours, vocabulary=str(path))
    batch = next(ShardedRows(config, objective="choices", global_batch_size=4, seed=0,
                             shards=[0]))[0]
    for row in range(4):
        right, end, wrong, *rest = batch["decoder_target_tokens"][row, :4].tolist()
        assert [end, *rest] == [eos, eos] and eos not in (right, wrong)
        assert batch["encoder_input_tokens"][row, 2:5].tolist() == [right, words.index("or"), wrong]
        assert batch["decoder_segment_ids"][row].tolist() == [1, 1, 2, 2] + [0] * 12


def test_of_several_right_choices_training_keeps_one():
    data_tasks.tensorflow_side()
    import tensorflow as tf

    from t5x_lite.data import choices
    record = tf.data.Dataset.from_tensors(
        {"q": "q", "c": ["a", "b", "c", "d"], "l": [3, 1]})
    read = lambda r: (r["q"], r["c"], r["l"])
    [one] = choices.together(read)(record).as_numpy_iterator()
    assert one["targets"].tolist() == [b"b", b"a", b"c"]
    marks = [e["is_correct"] for e in choices.choices(read)(record).as_numpy_iterator()]
    assert marks == [False, True, False, True]


@pytest.mark.slow
def test_a_run_on_choices(colours, tmp_path):
    base = tiny_config.run("")
    config = dataclasses.replace(
        base, data=colours, objective=RUN.objective, mesh=MeshConfig(data=8),
        optimizer=dataclasses.replace(base.optimizer, name="adam"),
        train=dataclasses.replace(base.train, num_steps=8),
        eval=dataclasses.replace(base.eval, num_batches=1, every=8))
    held_out = train.run(config, tmp_path)
    lines = [x for x in metrics.read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in x]
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    for name in ("unlikelihood", "length_normalized", "rank_accuracy"):
        assert math.isfinite(lines[-1][f"train/{name}"])
    [values] = held_out.values()
    assert "metric/accuracy" in values
    with pytest.raises(UserError, match="set data.packing=False"):
        build_lib.build(configs.replace(config, "data.packing", True))


def test_t_few_trains_the_papers_numbers():
    """0.02 % of T0-3B, which Liu et al. 2022 give as 540K."""
    run = t_few.run("3b")
    table = Model(run.model).table
    assert sum(i.size for i in peft.Tuning(table, run.peft).trainable.values()) == 540_672
