"""Every objective on every architecture that can take it learns from context: tiny models beat
the unigram entropy of their held-out targets on the text of Python's own documentation."""

import dataclasses
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.build import build
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.data import batches as data_batches, rows as data_rows, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator
from t5x_lite.layers.config import AttentionConfig, InitConfig, MLPConfig, PositionConfig
from t5x_lite.models.config import BlockConfig, ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import Model
from t5x_lite.training import metrics, objectives, steps
from t5x_lite.training.methods import OptimizerConfig
from t5x_lite.training.objectives import OBJECTIVES, ObjectiveConfig
from t5x_lite.training.schedules import ScheduleConfig

CASES = [  # denoiser, objective; with the architectures of OBJECTIVES, all that there are
    ("causal_lm", "lm"), ("prefix_lm", "prefix_lm"), ("prefix_lm", "seq2seq"),
    ("span_corruption", "seq2seq"), ("span_corruption", "lm"), ("bart", "seq2seq"),
    ("ul2", "seq2seq"), ("ul2", "prefix_lm"), ("bert", "mlm")]


def tiny_model(architecture: str) -> ModelConfig:
    attention = AttentionConfig(num_heads=2, head_dim=16)

    def stack(causal: bool, cross: bool) -> StackConfig:
        block = BlockConfig(attention, attention if cross else None, MLPConfig(mlp_dim=64))
        return StackConfig((SegmentConfig((block,), 1),), causal=causal,
                           position=PositionConfig("t5_bias"), scan=False)

    return ModelConfig(
        architecture, vocab_size=259, embed_dim=32, tie_logits=True,
        encoder=None if architecture == "decoder_only" else stack(False, False),
        decoder=None if architecture == "encoder_only" else stack(
            True, architecture == "encoder_decoder"),
        init=InitConfig(embedding_std=0.2))


# One of each architecture and loss; `make test-all` runs the others, 15 s each.
QUICK = {("causal_lm", "lm"), ("span_corruption", "seq2seq"), ("prefix_lm", "prefix_lm"),
         ("bert", "mlm")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of whole topics: training and held-out ones."""
    folder = tmp_path_factory.mktemp("texts")
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    (folder / "train.txt").write_text("\n\n".join(topics[5:]))
    (folder / "held_out.txt").write_text("\n\n".join(topics[:5]))
    return folder


@pytest.mark.parametrize("denoising,objective", [
    pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES])
def test_learns_more_than_frequencies(texts, denoising, objective):
    architecture, = OBJECTIVES[objective].architectures
    decoder_only = architecture == "decoder_only"
    run = RunConfig(
        model=tiny_model(architecture), objective=ObjectiveConfig(name=objective),
        data=DataConfig(train_files=str(texts / "train.txt"), text_document="paragraph",
                        validation_files=str(texts / "held_out.txt"), vocabulary="byt5",
                        denoising=denoising, inputs_length=64, num_shards=1, shuffle_buffer=50,
                        targets_length=144 if decoder_only else 80),
        optimizer=OptimizerConfig(name="adamw", schedule=ScheduleConfig(
            factors="constant", base_learning_rate=1e-2)),
        train=TrainConfig(num_steps=STEPS.get(denoising, 100), global_batch_size=16))
    program = build(run, jax.devices()[:1])
    read = dict(objective=objective, sharding=program.batch_sharding)
    train = data_batches.TrainIterator(run.data, global_batch_size=16, seed=0, **read)
    held_out = list(data_batches.eval_batches(run.data, "validation_files", batch_size=16,
                                      max_batches=4, **read))
    with program.activate():
        state, step = program.init_state(), program.jit_train_step()
        for _ in range(run.train.num_steps):
            state, _ = step(state, next(train))
        evaluate, sums = jax.jit(lambda params, batch: objectives.loss(
            program.model.bind(params), batch, None, run.objective, {"weight": 1.0})[1]), {}
        for batch in held_out:
            sums = metrics.add(sums, jax.device_get(evaluate(state["params"], batch)))
        if (denoising, objective) in SAMPLED:
            inputs, _, target = Evaluator(program).samples(state["params"], 1)[0]
            assert inputs and target
    loss, unigram = metrics.divide(sums)["loss"], data_batches.unigram_entropy(held_out)
    assert loss < unigram - 0.1, f"{loss:.3f} nats a token, of {unigram:.3f}"


SAMPLED = {("causal_lm", "lm"), ("span_corruption", "lm"), ("bert", "mlm")}
STEPS = {"bert": 250, "ul2": 150}   # few targets, and many kinds of them


def test_every_objective_has_a_case():
    of_tasks_alone = {name for name, row in OBJECTIVES.items() if not data_rows.of(row.rows).takes}
    assert of_tasks_alone == {"choices", "dpo", "seq2seq_dpo", "reward", "seq2seq_reward"}
    drawing = {name for name in OBJECTIVES if ObjectiveConfig(name).draws}   # test_rollouts.py
    assert {objective for _, objective in CASES} == set(OBJECTIVES) - of_tasks_alone - drawing


@pytest.mark.parametrize("name,architecture,message", [
    ("lm", "encoder_only", "use mlm"), ("seq2seq", "decoder_only", "use lm or prefix_lm"),
    ("mml", "encoder_only", "did you mean 'mlm'")])
def test_what_does_not_fit_is_refused(name, architecture, message):
    with pytest.raises(UserError, match=message):
        objectives.validate(ObjectiveConfig(name=name), architecture)


def test_an_objective_registered_from_outside_trains(texts, monkeypatch):
    """A row of each table, as docs/extending.md shows: targets count by their place in the row."""
    kind = data_rows.of("lm")

    def weighed(example, eos_id):
        import tensorflow as tf
        decoder = kind.convert(example, eos_id)["decoder"]
        places = tf.range(tf.size(decoder["decoder_target_tokens"]))
        return {"decoder": {**decoder, "decoder_place": places}}

    def loss(module, batch, key, config, divisors, parts=1):
        weights = batch["decoder_loss_weights"] * (batch["decoder_place"] < 9)
        return objectives.likelihood(module, {**batch, "decoder_loss_weights": weights}, key, config,
                                     divisors, parts)

    def divisors(batch):
        return {"weight": jnp.sum(batch["decoder_loss_weights"] * (batch["decoder_place"] < 9))}

    monkeypatch.setitem(data_rows.ROWS, "placed", dataclasses.replace(
        kind, convert=weighed,
        made={"decoder": {**kind.made["decoder"], "decoder_place": "int32"}}))
    monkeypatch.setitem(objectives.OBJECTIVES, "early_lm", objectives.Objective(
        ("decoder_only",), "placed", loss, divisors))
    run = RunConfig(
        model=tiny_model("decoder_only"), objective=ObjectiveConfig(name="early_lm"),
        data=DataConfig(train_files=str(texts / "train.txt"), text_document="paragraph",
                        vocabulary="byt5", targets_length=32, num_shards=1),
        train=TrainConfig(global_batch_size=4, accumulation=2))
    program = build(run, jax.devices()[:1])
    batch = next(data_batches.TrainIterator(
        run.data, objective=run.objective.rows, global_batch_size=4, seed=0,
        sharding=program.batch_sharding))
    abstract = program.abstract_batch()
    assert {n: (x.shape, x.dtype) for n, x in batch.items()} == {
        n: (x.shape, x.dtype) for n, x in abstract.items()}
    with program.activate():
        state, sums = program.jit_train_step()(program.init_state(), batch)
    assert int(state["step"]) == 1
    assert float(sums["loss"][1]) == 4 * 9   # targets that count


def test_held_out_loss_is_plain_however_training_smooths(texts):
    """Issue 12: perplexity and bits per byte of two runs must compare."""
    run = RunConfig(
        model=tiny_model("decoder_only"), objective=ObjectiveConfig("lm", label_smoothing=0.2),
        data=DataConfig(targets_length=16), train=TrainConfig(global_batch_size=4))
    program = build(run, jax.devices()[:1])
    rng = np.random.default_rng(0)
    batch = {name: jnp.asarray(rng.integers(1, 50, x.shape), x.dtype)
             for name, x in program.abstract_batch().items()}
    with program.activate():
        state = program.init_state()
        found = jax.jit(program.eval_step)(state["params"], batch, jnp.ones(259))
        _, trained = program.jit_train_step()(jax.tree.map(jnp.copy, state), batch)
        module = program.model.bind(state["params"])
        logits = module.head(module.head_params(), module(batch, None)[0])
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["decoder_target_tokens"][..., None],
                                axis=-1)[..., 0]
    plain = -jnp.sum(log_p * batch["decoder_loss_weights"])
    np.testing.assert_allclose(found["loss"][0], plain, rtol=1e-5)
    assert abs(float(trained["loss"][0] / plain) - 1) > 0.01


ZERO = {"inputs": [5, 0, 6, 1], "targets": [0, 7, 1, 8, 0, 1], "rejected": [0, 4, 1],
        "reference": [-1.5, -2.5]}


def with_9_for_0(tokens: list) -> list:
    return [9 if token == 0 else token for token in tokens]


def padded_row(name: str, example: dict, start: int) -> tuple[dict, int]:
    """(a batch of this example and an empty row, as the pipeline makes it; its positions that are
    not padding), of an objective."""
    import tensorflow as tf
    kind = data_rows.of(ObjectiveConfig(name, reference="rows").rows)
    if not kind.pairs:   # inputs where nothing is asked, -1
        example = {**example, "targets": [-1, *example["inputs"][1:3], -1]}
    sides = kind.convert({n: tf.constant(tokens) for n, tokens in example.items()}, 1)
    used = sum(int(tf.size(sides[side][next(iter(made))])) for side, made in kind.made.items())
    row = data_tasks.tensorflow_side()._finish_row(
        sides, kind.lengths(DataConfig(inputs_length=7, targets_length=20)), start, marked=True)
    return {n: jnp.stack([x.numpy(), 0 * x.numpy()]) for n, x in row.items()}, used


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not ObjectiveConfig(name).draws])
def test_id_0_in_a_text_is_a_token_like_others(name):
    """The loss is that of a vocabulary in which another token has its id, and padding is neither."""
    config = ObjectiveConfig(name, reference="rows")
    model = Model(dataclasses.replace(tiny_model(*OBJECTIVES[name].architectures),
                                      scalar_head=OBJECTIVES[name].scalar_head))
    params = jax.jit(model.init)(jax.random.key(0))
    order = jnp.arange(259).at[jnp.array([0, 9])].set(jnp.array([9, 0]))
    renamed = {**params, "token_embedding": {
        "embedding": params["token_embedding"]["embedding"][order]}}
    named = {n: with_9_for_0(x) if n != "reference" else x for n, x in ZERO.items()}
    found = {}
    for what, values, example, start in (("0", params, ZERO, 0), ("9", renamed, named, 9)):
        batch, used = padded_row(name, example, start)
        total, sums = jax.jit(lambda p, b: objectives.loss(
            model.bind(p), b, None, config, objectives.totals(config, b)))(values, batch)
        found[what] = [float(total), *jax.tree.leaves(jax.device_get(sums))]
        assert int(steps._filled_of(data_rows.of(config.rows), batch)) == used
    np.testing.assert_allclose(found["0"], found["9"], rtol=1e-5)
