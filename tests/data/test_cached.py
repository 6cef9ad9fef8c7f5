"""Caches of seqio and Beam: training reads what they hold, and refuses what does not fit."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests.tasks.test_registered import check_saving

LENGTHS = dict(inputs_length=24, targets_length=12, num_shards=2, shuffle_buffer=1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The name of a task over 40 lines, whose tokens may be cached, and the module that has it."""
    folder = tmp_path_factory.mktemp("module")
    (folder / "examples.jsonl").write_text("".join(
        json.dumps({"inputs": f"input {i}", "targets": f"target {i}"}) + "\n" for i in range(40)))
    (folder / "cached_test_tasks.py").write_text(f"""
from t5x_lite.data import records, text_to_text
from t5x_lite.data.preprocessors import each
text_to_text.register("data_test_cached", records.RecordSource(
    "data_test_cached", {{"train": [{str(folder / "examples.jsonl")!r}]}}, records.read_examples),
    lambda ds: each(lambda e: {{**e, "targets": e["answers"][0]}})(
        records.unpack(("inputs", "answers"), lists=("answers",))(ds)), vocabulary="byt5")
""")
    sys.path.insert(0, str(folder))
    yield "data_test_cached", folder
    sys.path.remove(str(folder))


def write_cache(name, folder, files=2):
    """What seqio_cache_tasks writes, without Beam."""
    import seqio
    import tensorflow as tf
    found = seqio.TaskRegistry.get(name)
    dataset = found.preprocess_precache(found.source.get_dataset("train", shuffle=False), seed=0)
    examples = list(dataset)
    place = folder / name
    place.mkdir(parents=True)
    prefix = seqio.get_cached_tfrecord_prefix(str(place), "train")
    for i in range(files):
        with tf.io.TFRecordWriter(f"{prefix}-{i:05}-of-{files:05}") as writer:
            for example in examples[i::files]:
                writer.write(seqio.dict_to_tfexample(example).SerializeToString())
    features = {n: {"shape": [None] * v.shape.rank, "dtype": v.dtype.name}
                for n, v in examples[0].items()}
    for path, content in (
            (seqio.get_cached_info_path(str(place), "train"),
             {"num_shards": files, "features": features, "seqio_version": seqio.__version__}),
            (seqio.get_cached_stats_path(str(place), "train"), {"examples": len(examples)})):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
    (place / "COMPLETED").touch()


def epoch(config):
    """The rows of one epoch of 40 examples, in an order of their own."""
    rows = ShardedRows(config, objective="seq2seq", global_batch_size=40, seed=0, shards=(0, 1))
    parts = next(rows).values()
    both = {n: np.concatenate([p[n] for p in parts]) for n in next(iter(parts))}
    order = np.lexsort(both["decoder_target_tokens"].T)
    return jax.tree.map(lambda a: a[order], both)


def check_cache(folder, name, module_folder):
    plain = DataConfig(train=name, task_modules="cached_test_tasks", **LENGTHS)
    config = DataConfig(train=name, task_modules="cached_test_tasks", cached_tasks=str(folder),
                        **LENGTHS)
    os.rename(module_folder / "examples.jsonl", module_folder / "elsewhere.jsonl")
    try:
        found = epoch(config)   # the source itself is not read
        check_saving(config, "seq2seq")
    finally:
        os.rename(module_folder / "elsewhere.jsonl", module_folder / "examples.jsonl")
    jax.tree.map(np.testing.assert_array_equal, found, epoch(plain))


def test_training_reads_a_cache_and_refuses_one_that_does_not_fit(task, tmp_path, caplog):
    name, module_folder = task
    config = DataConfig(train=name, task_modules="cached_test_tasks", cached_tasks=str(tmp_path),
                        **LENGTHS)
    with pytest.raises(UserError, match=f"no finished cache of '{name}'; make one with seqio_cache"):
        data_tasks.train_mixture(config, "seq2seq")
    write_cache(name, tmp_path)
    check_cache(tmp_path, name, module_folder)
    with pytest.raises(UserError, match=f"{name} was tokenised with another vocabulary"):
        data_tasks.train_mixture(dataclasses.replace(config, vocabulary="python"),
                                 "seq2seq")
    file = next((tmp_path / name).glob("info*"))
    text = DataConfig(train="python_docs_causal_lm", cached_tasks=str(tmp_path))
    data_tasks.train_mixture(text, "lm")
    assert "python_docs_causal_lm has no seqio.CacheDatasetPlaceholder" in caplog.text
    data_tasks.train_mixture(config, "seq2seq")
    file.unlink()
    with pytest.raises(UserError, match="no finished cache"):
        data_tasks.train_mixture(config, "seq2seq")


def test_beam_writes_a_cache_that_training_reads(task, tmp_path):
    pytest.importorskip("apache_beam", reason="pip install '.[beam]' in an environment of its own "
                                              "(cached.py)")
    name, module_folder = task
    result = subprocess.run(
        [sys.executable, "-m", "seqio.scripts.cache_tasks_main", f"--tasks={name}",
         "--module_import=cached_test_tasks", f"--output_cache_dir={tmp_path}", "--min_shards=2"],
        env={**os.environ, "PYTHONPATH": f"{module_folder}:{os.getcwd()}"},
        capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    check_cache(tmp_path, name, module_folder)
