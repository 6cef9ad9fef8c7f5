"""The best step by a metric and early stop: ties, NaN, names, retention, resumes."""

import math

import jax
import pytest

from t5x_lite import eval as eval_main, experiment, init_from, train
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.best import Best, find, parse
from t5x_lite.config import replace
from t5x_lite.errors import UserError
from t5x_lite.evaluation.evaluator import Evaluator
from tests import tiny_config


def seen(metric, values, patience=0):
    best = Best(metric)
    improved = [best.see(10 * i, {"t": {metric.split(":")[-1]: v}}) for i, v in enumerate(values, 1)]
    return best, improved


def test_the_first_of_equal_values_stays_and_nan_is_never_better():
    best, improved = seen("loss", [math.nan, 2.0, 2.0, math.nan, -math.inf, 1.5, 3.0])
    assert improved == [False, True, False, False, False, True, False]
    assert (best.value, best.step, best.since) == (1.5, 60, 1)
    assert best.is_over(1) and not best.is_over(2) and not best.is_over(0)


def test_more_is_better_where_the_table_or_the_user_says_so():
    assert seen("em", [10.0, 5.0, 20.0])[1] == [True, False, True]
    assert seen("max:mine", [10.0, 5.0, 20.0])[1] == [True, False, True]
    assert seen("min:mine", [10.0, 5.0, 20.0])[1] == [True, True, False]
    assert parse("task/metric/mean_3class_f1")[1] == 1


@pytest.mark.parametrize("metric", ["los", "mine", "min:", "most:loss_of"])
def test_a_metric_of_unknown_direction_is_refused(metric):
    with pytest.raises(UserError, match="min:.*loss, perplexity"):
        parse(metric)


def test_names_are_found_with_and_without_their_task():
    two = {"a": {"loss": 1.0, "metric/em": 5.0}, "b": {"loss": 2.0, "metric/f1": 6.0},
           "all": {"loss": 1.5}}
    assert find("loss", two) == 1.5 and find("a/loss", two) == 1.0
    assert find("em", two) == find("metric/em", two) == find("a/em", two) == 5.0
    with pytest.raises(UserError, match="no evaluation.*a/loss, a/metric/em, b/loss"):
        find("bleu", two)
    del two["all"]
    with pytest.raises(UserError, match="several tasks.*a/loss or b/loss"):
        find("loss", two)


def test_a_memory_of_another_metric_or_a_lost_step_begins_anew():
    memory = Best("loss", 1.0, 20, 3).memory()
    assert Best.resumed("loss", memory, [10, 20]) == Best("loss", 1.0, 20, 3)
    assert Best.resumed("loss", memory, None).since == 3
    assert Best.resumed("loss", memory, [30]) == Best("loss")
    assert Best.resumed("accuracy", memory, [20]) == Best("accuracy")
    assert Best.resumed("", memory, None).metric == ""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    config = replace(tiny_config.run(text), "checkpoint.best", "loss")
    for field, value in (("eval.every", 1), ("checkpoint.every", 100), ("checkpoint.keep_last", 1),
                         ("eval.stop_after", 2), ("train.num_steps", 9)):
        config = replace(config, field, value)
    return config


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses by evaluation: improves at steps 2 and 3, then never."""
    values = {0: 9.0, 1: math.nan, 2: 5.0, 3: 4.0, 4: 4.0, 5: 6.0, 6: 7.0}
    monkeypatch.setattr(Evaluator, "evaluate", lambda self, params: {
        "validation_files": {"loss": values[current[0]], "accuracy": 0.5, "perplexity": 1.0}})
    current = [0]
    original = train._evaluate

    def evaluate(session, evaluator, meter, state, step):
        current[0] = step
        return original(session, evaluator, meter, state, step)
    monkeypatch.setattr(train, "_evaluate", evaluate)


def test_a_run_keeps_the_best_stops_early_and_is_finished(config, losses, tmp_path, capsys):
    train.run(replace(config, "train.num_steps", 4), tmp_path)   # as if it had been stopped there
    assert manager.all_steps(tmp_path) == [3, 4]
    train.run(config, tmp_path)
    assert manager.all_steps(tmp_path) == [3, 4, 5]   # best, verified by the step after it, last
    said = capsys.readouterr().out
    assert "stopped early after step 5" in said and "the best loss is 4, of step 3" in said
    assert experiment.is_finished(tmp_path, config)
    assert not experiment.is_finished(tmp_path, replace(config, "eval.stop_after", 5))
    train.run(config, tmp_path)   # the same again: nothing is trained
    assert manager.all_steps(tmp_path) == [3, 4, 5]
    assert manager.read_record(tmp_path, "best").step == 3
    assert manager.read_record(tmp_path / "checkpoints" / "best").step == 3
    assert eval_main.steps_to_evaluate(tmp_path, "best") == ["best"]
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "3")
    with pytest.raises(UserError, match="best step, 3, was not kept.*It has 4, 5"):
        manager.read_record(tmp_path, "best")


def test_init_from_the_best(config, losses, tmp_path):
    train.run(config, tmp_path / "a")
    source = init_from.open_source(f"{tmp_path}/a/checkpoints/best")
    found = source.read("token_embedding/embedding", jax.numpy.float32)
    best = init_from.open_source(f"{tmp_path}/a/checkpoints/3")
    last = init_from.open_source(f"{tmp_path}/a")
    assert (found == best.read("token_embedding/embedding", jax.numpy.float32)).all()
    assert (found != last.read("token_embedding/embedding", jax.numpy.float32)).any()


def test_what_cannot_be_is_refused_in_time(config, losses, tmp_path):
    with pytest.raises(UserError, match="no evaluation gives that metric.*validation_files/loss"):
        train.run(replace(config, "checkpoint.best", "em"), tmp_path)
    assert manager.all_steps(tmp_path) == []
    with pytest.raises(UserError, match="set data.validation"):
        train.run(replace(config, "data.validation_files", ""), tmp_path / "b")
    with pytest.raises(UserError, match="has no checkpoint|no checkpoint"):
        manager.read_record(tmp_path, "best")
