"""Rows of texts without labels, and their stream beside the labelled one."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite.data import batches, described, rows as data_rows, tasks as data_tasks, views
from t5x_lite.data.batches import ShardedRows, TrainIterator
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError

ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def tokens(text, end=True):
    """ByT5's ids by hand."""
    return [byte + 3 for byte in text.encode()] + [1] * end


def lines(count, label=lambda i: "ab"[i % 2], **more):
    """Texts t0, t1, … with labels and whatever else."""
    return "".join(json.dumps({"inputs": f"t{i}", "targets": label(i), **more}) + "\n" for i in range(count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("unlabelled")
    (path / "few.jsonl").write_text(lines(8))
    (path / "many.jsonl").write_text(lines(40))
    (path / "other_labels.jsonl").write_text(lines(40, lambda i: "nonsense"))
    (path / "bare.jsonl").write_text("".join(json.dumps({"text": f"t{i}"}) + "\n" for i in range(40)))
    (path / "bare.txt").write_text("".join(f"t{i}\n" for i in range(40)))
    (path / "filled.jsonl").write_text("".join(
        json.dumps({"inputs": f"t{i}", "filled": [f"f{i}", f"g{i}"]}) + "\n" for i in range(40)))
    return path


def config(folder, texts="many.jsonl", **changes):
    given = DataConfig(train=str(folder / "few.jsonl"), validation=str(folder / "few.jsonl"),
                       unlabelled=str(folder / texts), classes="a,b", unlabelled_ratio=2, vocabulary="byt5",
                       inputs_length=8, targets_length=6, num_shards=2, shuffle_buffer=4)
    return dataclasses.replace(given, **changes)


def rows_of(given, objective="seq2seq", shards=(0, 1), batch=4):
    return ShardedRows(given, objective=objective, global_batch_size=batch, seed=0, shards=shards,
                       stream=data_tasks.unlabelled)


def texts_of(rows, prefix="weak/"):
    return [bytes(i - 3 for i in row if i > 2).decode()
            for part in rows.values() for row in part[f"{prefix}encoder_input_tokens"].tolist()]


# --- one row by hand --------------------------------------------------------------------------

def test_an_encoder_reads_a_text_once_for_all_classes(folder):
    row = {name: x[0].tolist() for name, x in next(rows_of(config(folder, classes="a,bc")))[0].items()}
    text = row.pop("weak/encoder_input_tokens")
    assert text[:2] == tokens("t", end=False) + [text[1]] and 1 in text
    used = text.index(1) + 1
    assert row == {
        "weak/encoder_mask": [1] * used + [0] * (8 - used),
        "weak/decoder_target_tokens": [*tokens("a"), *tokens("bc"), 0],
        "weak/decoder_input_tokens": [0, *tokens("a", end=False), 0, *tokens("bc", end=False), 0],
        "weak/decoder_segment_ids": [1, 1, 2, 2, 2, 0], "weak/decoder_positions": [0, 1, 0, 1, 2, 0],
        "weak/decoder_loss_weights": [1.0] * 5 + [0.0]}


def test_a_decoder_reads_the_text_before_each_class(folder):
    given = config(folder, classes="a,bc", inputs_length=3, targets_length=6)
    row = {name: x[0].tolist() for name, x in next(rows_of(given, "lm"))[0].items()}
    text = row["weak/decoder_target_tokens"][:row["weak/decoder_loss_weights"].index(1.0)]
    n = len(text)
    assert 1 not in text   # as infer reads on from it
    targets = [*text, *tokens("a"), *text, *tokens("bc")]
    pad = [0] * (2 * 6 - len(targets))
    assert row["weak/decoder_target_tokens"] == targets + pad
    assert row["weak/decoder_segment_ids"] == [1] * (n + 2) + [2] * (n + 3) + pad
    assert row["weak/decoder_loss_weights"] == [0.0] * n + [1.0] * 2 + [0.0] * n + [1.0] * 3 + pad
    assert row["weak/decoder_input_tokens"][n + 2] == 0   # every segment starts anew
    prefix = {name: x[0].tolist() for name, x in next(rows_of(given, "prefix_lm"))[0].items()}
    # The token read where the first of a class is predicted is the last of the text, or its EOS.
    where = np.flatnonzero(prefix["weak/decoder_loss_weights"])
    assert prefix["weak/decoder_prefix"][where[0]] == 1 == prefix["weak/decoder_prefix"][where[2]]
    assert prefix["weak/decoder_prefix"][where[1]] == 0


@pytest.mark.slow
def test_rows_have_the_shapes_that_the_program_is_compiled_for(folder):
    for objective, names in (("seq2seq", "dropout,spans"), ("choices", "plain"), ("lm", "plain"),
                             ("prefix_lm", "plain,plain")):
        given = config(folder, views=names, inputs_length=4, targets_length=8)
        train = given if objective != "choices" else dataclasses.replace(given, train=given.unlabelled)
        kind = data_rows.of(objective)
        expected = views.rows_of(kind, train).arrays(views.row_config(train, kind))
        found = next(rows_of(train, objective))[1]
        assert {n: (x.shape[1], str(x.dtype)) for n, x in found.items()} == expected
        for prefix in views.prefixes_of(given):
            part = views.part(found, prefix)
            assert part["decoder_segment_ids"].max() == 2 and part.keys() >= kind.arrays(given).keys()


@pytest.mark.slow
def test_views_of_one_text(folder):
    """Spans stand behind sentinels from the top, and EOS stays; "filled" is another text."""
    long = folder / "long.jsonl"
    long.write_text(json.dumps({"inputs": "abcdefghijklmnopqrstuvwxyz"}) + "\n" * 2)
    given = config(folder, "long.jsonl", views="plain,spans", inputs_length=32, num_shards=1)
    first = next(rows_of(given, shards=[0], batch=1))[0]
    found = rows_of(given, shards=[0], batch=1)
    seen = [next(found)[0] for _ in range(3)]
    for row in seen:
        assert row["weak/encoder_input_tokens"][0, :27].tolist() == tokens("abcdefghijklmnopqrstuvwxyz")
        hidden = row["strong/encoder_input_tokens"][0]
        hidden = hidden[hidden > 0].tolist()
        assert hidden[-1] == 1 and [i for i in hidden if i > 200] == [258, 257, 256]   # 8 of 26, spans of 3
        kept = [i for i in hidden[:-1] if i < 200]
        assert len(kept) == 26 - 8 and kept == sorted(kept)
        assert row["strong/encoder_mask"].sum() == 26 - 8 + 3 + 1
    assert len({row["strong/encoder_input_tokens"].tobytes() for row in seen}) > 1   # drawn anew
    np.testing.assert_array_equal(first["strong/encoder_input_tokens"], seen[0]["strong/encoder_input_tokens"])

    filled = rows_of(config(folder, "filled.jsonl", views="plain,filled"))
    for _ in range(20):
        rows = next(filled)
        for text, other in zip(texts_of(rows), texts_of(rows, "strong/"), strict=True):
            assert other[0] in "fg" and other[1:] == text[1:]


# --- the stream -------------------------------------------------------------------------------

@pytest.mark.slow
def test_labels_are_never_read(folder):
    """Other labels, or none: the same rows, bit for bit where the file is the same otherwise."""
    for name in ("many.jsonl", "other_labels.jsonl", "bare.jsonl", "bare.txt"):
        stream = rows_of(config(folder, name))
        found = {text for _ in range(20) for text in texts_of(next(stream))}
        assert found == {f"t{i}" for i in range(40)}
    same = folder / "same"
    rows = []
    for label in ("a", "nonsense"):
        same.mkdir(exist_ok=True)
        (same / "texts.jsonl").write_text(lines(40, lambda i, label=label: label))
        stream = rows_of(config(folder, "same/texts.jsonl"))
        rows.append([next(stream) for _ in range(5)])
    jax.tree.map(np.testing.assert_array_equal, *rows)


def iterator(given, batch=4, **kwargs):
    return TrainIterator(given, objective="seq2seq", global_batch_size=batch, seed=0, sharding=ONE_DEVICE, **kwargs)


def test_the_labelled_rows_are_those_of_a_run_without(folder):
    beside, alone = iterator(config(folder)), iterator(config(folder, unlabelled="", classes=""))
    for _ in range(3):
        batch, plain = next(beside), next(alone)
        assert {x.shape[0] for n, x in batch.items() if n.startswith("weak/")} == {8}
        jax.tree.map(np.testing.assert_array_equal, views.labelled(batch), plain)


def test_both_streams_resume_at_their_places(folder):
    given = config(folder, views="dropout,spans")
    run = iterator(given)
    for _ in range(3):
        next(run)
    states = run.state()
    assert sorted(states) == [0, 1, 2, 3]   # two shards of each
    expected = [next(run) for _ in range(3)]
    again = iterator(given)
    again.restore(states)
    for wanted in expected:
        jax.tree.map(np.testing.assert_array_equal, next(again), wanted)
    # A process that reads the second shard alone sees its rows.
    second = rows_of(given, shards=[1], batch=8)
    second.restore({1: states[3]})
    for name, x in next(second)[1].items():
        np.testing.assert_array_equal(x, np.asarray(expected[0][name])[4:])


@pytest.mark.slow
def test_a_checkpoint_of_other_streams_is_refused(folder):
    given = config(folder)
    states, alone = iterator(given).state(), dataclasses.replace(given, unlabelled="")
    with pytest.raises(UserError, match="data.unlabelled the checkpoint has one, and this run reads none"):
        iterator(alone).restore(states)
    with pytest.raises(UserError, match="data.unlabelled the checkpoint has none, and this run reads some"):
        iterator(given).restore(iterator(alone).state())
    for change in (dict(classes="b,a"), dict(views="dropout"), dict(views="spans")):
        changed = dataclasses.replace(given, **change)
        if change != dict(views="dropout"):   # the same rows, whatever the model drops
            with pytest.raises(UserError, match="preprocessors"):
                iterator(changed).restore(states)


@pytest.mark.slow
def test_growing_batches_and_reading_ahead_keep_the_ratio(folder):
    ahead, plain = iterator(config(folder)), iterator(config(folder))
    ahead.read_ahead(2)
    for size in (2, 4):
        first, second = ahead.take(size), plain.take(size)
        assert first["weak/encoder_input_tokens"].shape == (2 * size, 8)
        jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_run_says_what_it_reads(folder):
    said = described.describe_training(config(folder), "seq2seq", 100)
    assert said[-1].endswith("many.jsonl_unlabelled 100.0%, 5 epochs of 40 texts, seen as plain")


# --- held out ---------------------------------------------------------------------------------

def test_held_out_texts_know_their_class(folder):
    given = config(folder, unlabelled="", classes="b,a,c")
    found = list(batches.graded_batches(given, data_tasks.validation_tasks(given)[0], objective="seq2seq",
                                        batch_size=5, sharding=ONE_DEVICE))
    rows = np.concatenate([np.asarray(b["weak/decoder_right"]) for b in found])
    assert rows[0].tolist() == [0, 0, 1, 1, 0, 0] and rows[1].tolist() == [1, 1, 0, 0, 0, 0]   # a, b
    assert not rows[8:].any() and len(rows) == 10   # the last batch is filled up


@pytest.mark.parametrize("change, message", [
    (dict(classes="a,d"), "data.train='.*few.jsonl' has the label 'b', which is none of data.classes='a,d'"),
    (dict(targets_length=3), "data.targets_length=3 is too short for data.classes='a,b'.*at least 4"),
    (dict(views="filled"), "many.jsonl, line 1 has no \"filled\".*t5x_lite.refill"),
    (dict(unlabelled="no_such_task"), "data.unlabelled: no task or mixture is called 'no_such_task'"),
    (dict(unlabelled="nowhere.txt"), "data.unlabelled='nowhere.txt': no such file"),
])
def test_wrong_input_is_refused_by_name(folder, change, message):
    with pytest.raises(UserError, match=message):
        iterator(config(folder, **change))


def test_an_unlabelled_task_of_another_vocabulary_is_refused(folder):
    given = config(folder, vocabulary="", train="closed_book_qa", unlabelled="python_docs_span_corruption")
    with pytest.raises(UserError, match="data.unlabelled='python_docs_span_corruption' has another vocabulary "
                                        "than data.train='closed_book_qa'.*set data.vocabulary=facts"):
        data_tasks.unlabelled(given, "seq2seq")


@pytest.mark.parametrize("change, objective, message", [
    (dict(classes=""), "seq2seq", "list the labels as they are written"),
    (dict(classes="a"), "seq2seq", "at least two classes, each once"),
    (dict(classes="a,b,a"), "seq2seq", "at least two classes, each once"),
    (dict(), "mlm", "objective.name='mlm' has none of"),
    (dict(), "preferences", "use seq2seq, choices, lm or prefix_lm"),
    (dict(views="span"), "seq2seq", "no view is called 'span'.*did you mean 'spans'"),
    (dict(views="plain,plain,spans"), "seq2seq", "name one view, or a weak and a strong one"),
    (dict(views=""), "seq2seq", "name one view")])
def test_what_cannot_be_is_refused_at_the_door(folder, change, objective, message):
    with pytest.raises(UserError, match=message):
        views.validate(config(folder, **change), data_rows.of(objective), objective)


def test_a_held_out_label_that_is_no_class_is_refused(folder):
    given = config(folder, unlabelled="", validation=str(folder / "other_labels.jsonl"))
    with pytest.raises(UserError, match="data.validation='.*other_labels.jsonl' has a label that is none of"):
        list(batches.graded_batches(given, data_tasks.validation_tasks(given)[0], objective="seq2seq",
                                    batch_size=4, sharding=ONE_DEVICE))


def test_classes_that_the_vocabulary_cannot_write(folder):
    given = config(folder, vocabulary="facts", classes="a,low▁bar", targets_length=16)
    with pytest.raises(UserError, match="data.classes: the vocabulary writes"):
        rows_of(given)
