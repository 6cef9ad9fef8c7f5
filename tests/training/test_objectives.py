"""Every objective on every architecture that can take it learns from context: tiny models beat
the unigram entropy of their held-out targets on the text of Python's own documentation."""

import pydoc_data.topics

import jax
import pytest

from t5x_lite.build import build
from t5x_lite.config import RunConfig, TrainConfig
from t5x_lite.data import batches as data_batches
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator
from t5x_lite.layers.attention import AttentionConfig
from t5x_lite.layers.linear import InitConfig
from t5x_lite.layers.mlp import MLPConfig
from t5x_lite.layers.position import PositionConfig
from t5x_lite.models.blocks import BlockConfig, SegmentConfig, StackConfig
from t5x_lite.models.language_model import ModelConfig
from t5x_lite.training import metrics, objectives
from t5x_lite.training.objectives import OBJECTIVES, ObjectiveConfig
from t5x_lite.training.optimizers import OptimizerConfig
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


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two files of whole topics: training and held-out ones."""
    folder = tmp_path_factory.mktemp("texts")
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    (folder / "train.txt").write_text("\n\n".join(topics[5:]))
    (folder / "held_out.txt").write_text("\n\n".join(topics[:5]))
    return folder


@pytest.mark.parametrize("denoising,objective", [
    pytest.param(*case, marks=[pytest.mark.slow] * (case == ("ul2", "prefix_lm")))
    for case in CASES])
def test_learns_more_than_frequencies(texts, denoising, objective):
    architecture, = OBJECTIVES[objective]
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
    experiment = build(run, jax.devices()[:1])
    read = dict(objective=objective, sharding=experiment.batch_sharding)
    train = data_batches.TrainIterator(run.data, global_batch_size=16, seed=0, **read)
    held_out = list(data_batches.eval_batches(run.data, "validation_files", batch_size=16,
                                      max_batches=4, **read))
    with experiment.activate():
        state, step = experiment.init_state(), experiment.jit_train_step()
        for _ in range(run.train.num_steps):
            state, _ = step(state, next(train))
        evaluate, sums = jax.jit(lambda params, batch: objectives.loss(
            experiment.model.bind(params), batch, None, run.objective, {"weight": 1.0})[1]), {}
        for batch in held_out:
            sums = metrics.add(sums, jax.device_get(evaluate(state["params"], batch)))
        if (denoising, objective) in SAMPLED:
            inputs, _, target = Evaluator(experiment).samples(state["params"], 1)[0]
            assert inputs and target
    loss, unigram = metrics.divide(sums)["loss"], data_batches.unigram_entropy(held_out)
    assert loss < unigram - 0.1, f"{loss:.3f} nats a token, of {unigram:.3f}"


SAMPLED = {("causal_lm", "lm"), ("span_corruption", "lm"), ("bert", "mlm")}
STEPS = {"bert": 250, "ul2": 150}   # few targets, and many kinds of them


def test_every_objective_has_a_case():
    assert {objective for _, objective in CASES} == set(OBJECTIVES) - {"choices"}   # no denoiser's


@pytest.mark.parametrize("name,architecture,message", [
    ("lm", "encoder_only", "use mlm"), ("seq2seq", "decoder_only", "use lm or prefix_lm"),
    ("mml", "encoder_only", "did you mean 'mlm'")])
def test_what_does_not_fit_is_refused(name, architecture, message):
    with pytest.raises(UserError, match=message):
        objectives.validate(ObjectiveConfig(name=name), architecture)
