"""Fine-tuning on real SQuAD records through TFDS, offline: a T5 on XQuAD, scored as SQuAD is."""

import dataclasses

import pytest

from t5x_lite import train
from t5x_lite.data import described, tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.parallel.sharding import MeshConfig
from tests import tiny_config


@pytest.mark.slow
def test_a_t5_is_fine_tuned_on_xquad(offline_tfds, tmp_path, capsys):
    data_tasks.tensorflow_side()
    from t5x_lite.data import task_metrics, text_to_text
    from tasks import t5_benchmarks
    text_to_text.register(
        "data_test_xquad", text_to_text.TfdsSource("xquad/en:3.0.0", {
            "train": "test[:90%]", "validation": "test[90%:]"}), t5_benchmarks.squad,
        metric_fns=[task_metrics.squad], postprocess_fn=text_to_text.answers)
    base = tiny_config.run("")
    config = dataclasses.replace(
        base, model=dataclasses.replace(base.model, vocab_size=32128), mesh=MeshConfig(data=8),
        data=DataConfig(train="data_test_xquad", validation="data_test_xquad", inputs_length=48,
                        targets_length=6, num_shards=2, shuffle_buffer=8),
        train=dataclasses.replace(base.train, num_steps=4),
        eval=dataclasses.replace(base.eval, every=4, num_batches=1, decode=dataclasses.replace(
            base.eval.decode, max_length=4)))
    [values] = train.run(config, tmp_path).values()
    assert {"metric/em", "metric/f1"} <= values.keys() and values["loss"] > 0
    out = capsys.readouterr().out
    # 1,190 questions of which nine tenths train: 32 rows of 1,071.
    assert "data_test_xquad 100.0%, 0.0299 epochs of 1,071 examples" in out
    assert "of the first 200 inputs, " in out and "are longer than 48 tokens and cut" in out
    assert "of the first 200 targets, " in out
    # Of what fills its rows whatever their lengths, the share alone, and nothing is read.
    name = "python_docs_span_corruption"
    text = DataConfig(train=name, inputs_length=48, targets_length=16)
    assert described.describe_training(text, "seq2seq", 32) == [f"{name} 100.0%"]
