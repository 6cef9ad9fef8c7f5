"""What inspect_task says of lengths, unknown names and errors; test_infer.py has its batches."""

import numpy as np
import pytest
import seqio

from t5x_lite import inspect_task
from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError


def inspect(name, objective, inputs_length, targets_length):
    config = DataConfig(vocabulary="byt5", inputs_length=inputs_length,
                        targets_length=targets_length)
    return inspect_task.describe(config, name, "validation", objective, 1, 50)


def test_targets_of_a_decoder_only_model_have_what_inputs_leave(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"inputs": "abcd", "targets": "efg"}\n{"inputs": "a", "targets": "efg"}\n')
    text = inspect(str(path), "lm", 3, 6)
    assert "inputs   mean 2.5, longest 4; 1 of 2 longer than inputs_length=3 and cut" in text
    assert ("targets  mean 4.0, longest 4; 1 of 2 longer than what inputs leave of "
            "targets_length=6 and cut") in text
    assert "0 of 2 longer than targets_length=4 and cut" in inspect(str(path), "seq2seq", 3, 4)


@pytest.mark.parametrize("name, objective", [
    ("fact_passages", "seq2seq"), ("python_docs_span_corruption", "seq2seq"),
    ("python_docs_ul2", "seq2seq"), ("closed_book_qa", "lm"), ("closed_book_qa", "prefix_lm")])
def test_the_commands_own_lengths_fit_every_task(name, objective):
    targets_length = inspect_task.default_targets_length(objective, 512)
    config = DataConfig(inputs_length=512, targets_length=targets_length)
    example = next(data_tasks.eval_examples(config, name, objective=objective, split="train")[1])
    assert example["targets"].size and "inputs" in example


def test_padding_is_told_by_no_id():
    batch = {"encoder_mask": np.array([[1, 1, 1, 0, 0]]),
             "decoder_loss_weights": np.array([[0.0, 0, 1, 0]])}
    assert inspect_task._used(batch, "encoder", 0) == inspect_task._used(batch, "decoder", 0) == 3
    lines = list(inspect_task.side_by_side([7, 0, 0, 0, 0], 3, seqio.ByteVocabulary()))
    assert "7     0     0" in lines[0] and lines[1].endswith("2 x padding")


def test_errors_name_the_commands_flags():
    with pytest.raises(UserError) as error:
        inspect("fact_passages", "seq2seq", 512, 114)
    said = inspect_task.in_flags(str(error.value))
    assert "raise --targets_length by 143, or lower --inputs_length" in said and "data." not in said
    with pytest.raises(UserError) as error:
        inspect("zzzzzzzz", "seq2seq", 8, 8)
    said = inspect_task.in_flags(str(error.value))
    names = data_tasks.task_names(DataConfig())
    assert said.startswith("--task: no task or mixture is called 'zzzzzzzz'; ") and len(said) < 500
    assert f"{len(names)} are known, such as {names[0]}, " in said and "--list prints them" in said
