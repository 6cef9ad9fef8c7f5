"""BIG-bench's task.json: choices are ranked, answers are written; one's own by name and by path."""

import json

import pytest

from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests.helpers import shared_data

SCORED = {"name": "x", "task_prefix": "Choose.", "examples": [
    {"input": "2 + 2", "target_scores": {"3": 0, "4": 1, "four": 1}},
    {"input": "1 + 1", "target_scores": {"2": 1, "5": 0}}]}
PROMPT = "Choose.\nQ: 2 + 2\n  choice: 3\n  choice: 4\n  choice: four\nA:"


def examples(name, tmp_path):
    config = DataConfig(validation=name, vocabulary="byt5", inputs_length=128, targets_length=16,
                        cache_dir=str(tmp_path / "cache"))
    [name] = data_tasks.validation_tasks(config)
    task, found = data_tasks.eval_examples(config, name, objective="seq2seq")
    return task, list(found)


def check_ranked(task, found):
    by_input = sorted((e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode(),
                       bool(e["is_correct"])) for e in found)
    assert by_input[2:] == [(PROMPT, "3", False), (PROMPT, "4", True), (PROMPT, "four", True)]
    targets = [task.postprocess_fn("", example=e, is_target=True) for e in found]
    [metric] = task.score_metric_fns
    right = [float(e["targets_pretokenized"] in (b"four", b"5")) for e in found]
    assert metric(targets, right)["accuracy"] == 50


def test_target_scores_are_choices_by_path_by_name_and_as_published(
        registered, tmp_path, monkeypatch):
    from t5x_lite.data import example_files
    path = tmp_path / "navigate" / "sub" / "task.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(SCORED))
    check_ranked(*examples(str(path), tmp_path))
    example_files.register("data_test_big_bench", {"validation": [str(path)]})
    check_ranked(*examples("data_test_big_bench", tmp_path))
    assert "data_test_big_bench_choices" in registered.names()
    monkeypatch.setenv("T5X_LITE_FILES", str(tmp_path))
    check_ranked(*examples("bigbench_navigate_ranked", tmp_path))
    assert len(examples(f"{path}[50%:]", tmp_path)[1]) == 2
    path.write_text(json.dumps({**SCORED, "append_choices_to_input": False,
                                "example_input_prefix": "", "example_output_prefix": " = "}))
    assert next(example_files.read_choices(str(path)))[0] == "Choose.2 + 2 ="


def test_answers_are_written(tmp_path, registered):
    task, found = examples(str(shared_data("finetune/boolean_expressions.json")), tmp_path)
    assert len(found) == 250 and task.predict_metric_fns and not task.score_metric_fns
    assert ("not ( True ) and ( True ) is", "False") in [
        (e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in found]


@pytest.mark.parametrize("content, message", [
    ({"examples": [{"input": "a", "target": "b"}, {"input": "a", "target_scores": {"b": 1}}]},
     "example 0 has no 'target_scores'; it has 'target'"),
    ({"examples": []}, 'has no list "examples"'),
    ({"examples": [{"input": "a", "target": ["b", ""]}]}, "example 0 has an empty target"),
])
def test_malformed_tasks_are_named(tmp_path, registered, content, message):
    path = tmp_path / "task.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        examples(str(path), tmp_path)
