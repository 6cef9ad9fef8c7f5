"""Every registered training task: its iterator is saved, restored and goes on as before."""

import json
import shutil

import jax
import numpy as np
import pytest

from t5x_lite.data import (
    batches as data_batches,
    tasks as data_tasks,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests.helpers import shared_data
from tests.tasks import test_formats

LENGTHS = dict(inputs_length=64, targets_length=64, num_shards=2, shuffle_buffer=8)


def check_saving(config, objective, steps=4):
    make = lambda shards=(0, 1): ShardedRows(config, objective=objective, global_batch_size=6,
                                             seed=0, shards=shards)
    rows = make()
    for _ in range(steps):
        next(rows)
    states = rows.state([0, 1])
    expected = [next(rows) for _ in range(steps)]
    for shards in ((0, 1), (1,)):
        again = make(shards)
        again.restore(states)
        for wanted in expected:
            found = next(again)
            jax.tree.map(np.testing.assert_array_equal, found, {s: wanted[s] for s in shards})
    for features in expected[-1].values():
        assert features["decoder_loss_weights"].mean() > 0.1   # real examples, not padding
    return states


def training_names(prefix):
    import seqio

    import tasks
    data_tasks.tensorflow_side()
    tasks.register_all()
    names = sorted(seqio.TaskRegistry.names() | seqio.MixtureRegistry.names())
    return [name for name in names if name.startswith(prefix)]


def objective_of(name):
    return {"causal_lm": "lm", "bert": "mlm"}.get(name.split("_", 1)[1].removeprefix(
        "docs_").removeprefix("source_"), "seq2seq")


FACTBOOK = {"factbook_sections", "factbook_sections_dev", "factbook_span_corruption",
            *(f"factbook_sections_20_{seed}" for seed in range(5))}
CODES = ("digit_pixels", "digit_codes", "digit_drawing", "digit_reading", "gridworld", "gridworld_blind")
INTEGERS = ("modular_addition", "noisy_classes", "noisy_classes_clean")


def test_no_registered_task_is_forgotten():
    covered = [name for prefix in ("python_", "source_", "c4_", "wikipedia_")
               for name in training_names(prefix)]
    assert len(covered) == 44
    elsewhere = ("data_test_", "p3")   # made by tests, and by tasks/p3.py on demand
    others = {n for n in training_names("") if not n.startswith(elsewhere)} - set(covered)
    assert others == test_formats.names() | {*INTEGERS, *CODES, "chat_sums"} | FACTBOOK


@pytest.mark.slow
def test_integers_are_saved_and_restored():
    for name in INTEGERS:
        check_saving(DataConfig(train=name, **LENGTHS | {"targets_length": 8}), "seq2seq")
    for name in CODES:
        check_saving(DataConfig(train=name, **LENGTHS | {"inputs_length": 24}), "lm")
    check_saving(DataConfig(train="chat_sums", vocabulary="byt5", **LENGTHS), "lm")


@pytest.mark.slow
def test_python_tasks_are_saved_and_restored():
    names = training_names("python_") + training_names("source_")
    assert len(names) == 29
    for name in names:
        if "_source_" in name:
            continue   # the same preprocessors over another source, which the mixtures read
        check_saving(DataConfig(train=name, **LENGTHS), objective_of(name))


@pytest.mark.slow
def test_c4_through_tfds_is_saved_and_restored(offline_tfds):
    for name in training_names("c4_"):
        check_saving(DataConfig(train=name, **LENGTHS), objective_of(name))


def test_c4_rows_decode_to_its_pages(offline_tfds):
    config = DataConfig(train="c4_span_corruption", validation="c4_span_corruption", **LENGTHS)
    vocabulary = data_tasks.vocabulary_of(config)
    assert vocabulary.vocab_size == 32100
    pages = shared_data("corpora/wikitext-2.valid.txt").read_text()
    squeeze = lambda text: "".join(text.split()).replace("<unk>", "")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    batch = next(data_batches.eval_batches(config, "c4_span_corruption", objective="seq2seq",
                                   batch_size=4, sharding=sharding))
    for tokens in np.asarray(batch["encoder_input_tokens"]):
        tokens = tokens[tokens > 0]
        sentinel = np.flatnonzero(tokens >= 32000)[0]
        start = vocabulary.decode(tokens[:sentinel].tolist())
        known = [part for part in start.split("\u2047") if part.strip()]   # between unknowns
        assert known and all(squeeze(part).replace("unk>", "") in squeeze(pages) for part in known)


def test_wikipedia_is_read_article_by_article(offline_tfds, tmp_path):
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds
    titles = [f"{i:05}" for i in range(5004)]
    articles = {"title": titles, "text": [f"article {t} is short ." for t in titles]}
    text = tfds.features.Text()
    tfds.dataset_builders.store_as_tfds_dataset(
        name="wikipedia", config="20230601.en", version="1.0.0", data_dir=str(tmp_path),
        features=tfds.features.FeaturesDict({"title": text, "text": text}), disable_shuffling=True,
        split_datasets={"train": tf.data.Dataset.from_tensor_slices(articles)})
    seqio.set_tfds_data_dir_override(str(tmp_path))
    rows = {}
    for split in ("train", "validation"):
        _, examples = data_tasks.eval_examples(DataConfig(targets_length=16), split=split,
                                               task="wikipedia_causal_lm", objective="lm")
        rows[split] = np.concatenate([e["targets"] for e in examples])   # windows end to end
    vocabulary = data_tasks.vocabulary_of(DataConfig(vocabulary="t5"))
    text = data_vocabulary.text_of(vocabulary, rows["train"])
    assert [t for t in titles if t in text] == titles[5000:]
    assert (rows["validation"] == vocabulary.eos_id).sum() == 5000


def test_c4_without_data_names_the_folder(tmp_path, monkeypatch):
    import seqio
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    seqio.set_tfds_data_dir_override(str(tmp_path))
    try:
        from tasks import c4
        source = c4.PreparedTfdsDataSource("c4/en:3.0.2", ("train",))
        with pytest.raises(UserError, match=f"not in TFDS_DATA_DIR={tmp_path}"):
            source.list_shards("train")
    finally:
        seqio.set_tfds_data_dir_override(None)


def test_t5_vocabulary_that_is_not_there(monkeypatch, tmp_path):
    data_tasks.tensorflow_side()
    from t5x_lite.data import vocabularies
    monkeypatch.setenv("T5X_LITE_T5_VOCAB", str(tmp_path / "t5.model"))
    with pytest.raises(UserError, match="T5X_LITE_T5_VOCAB=.*t5.model does not exist"):
        _ = vocabularies.T5Vocabulary().vocab_size
    monkeypatch.delenv("T5X_LITE_T5_VOCAB")
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr(vocabularies, "T5_MODEL", "gs://localhost.invalid/t5.model")
    monkeypatch.setattr(vocabularies.urllib.request, "urlopen", _unreachable)
    with pytest.raises(UserError, match="cannot be reached .* set T5X_LITE_T5_VOCAB"):
        _ = vocabularies.T5Vocabulary().vocab_size


def _unreachable(url, timeout):
    raise OSError("no route")


def test_your_own_sentencepiece_file(tmp_path):
    plain = shared_data("vocab/cc_all.32000.sentencepiece.model")
    ready = shared_data("vocab/cc_all.32000.100extra.sentencepiece.model")
    sizes = {data_tasks.vocabulary_of(DataConfig(vocabulary=str(p))).vocab_size for p in (plain, ready)}
    assert sizes == {32100}
    with pytest.raises(UserError, match="pad, eos, unk = -1, 2, 0"):
        data_tasks.vocabulary_of(DataConfig(vocabulary=str(shared_data("vocab/sp_test_1000.model"))))


def test_text_files_are_saved_and_restored_and_keep_their_state_on_a_copy(tmp_path):
    """The content counts, not where a file lies or when it was written."""
    from t5x_lite.data import document_cache
    lines = [f"line {i} of a text about nothing in particular" for i in range(40)]
    states = {}
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("\n".join(lines))
        config = DataConfig(train_files=str(tmp_path / folder / "*.txt"), vocabulary="byt5",
                            cache_dir=str(tmp_path / f"cache_{folder}"), **LENGTHS)
        states[folder] = check_saving(config, "seq2seq", steps=3)
    shutil.rmtree(tmp_path / "cache_a")
    rows, expected = (ShardedRows(config, objective="seq2seq", global_batch_size=6, seed=0,
                                  shards=(0, 1)) for _ in range(2))
    rows.restore(states["a"])
    expected.restore(states["b"])
    for _ in range(20):   # several epochs, every file among them
        jax.tree.map(np.testing.assert_array_equal, next(rows), next(expected))
    document_cache.set_root("")
    (tmp_path / "b" / "y.jsonl").write_text(json.dumps({"text": "one more document"}))
    more = ShardedRows(DataConfig(train_files=f"{tmp_path}/b/*", vocabulary="byt5", **LENGTHS),
                       objective="seq2seq", global_batch_size=6, seed=0, shards=(0, 1))
    with pytest.raises(UserError, match="files: .* in the checkpoint"):
        more.restore(states["a"])
