"""Codes as tokens: vocabularies, codebooks, tasks of arrays, digits and a gridworld with a known policy."""

import json
import math

import jax
import numpy as np
import pytest
import tensorflow as tf

from configs.experiments import (
    digits as digits_experiment,
    gridworld as gridworld_experiment,
    ladder,
)
from t5x_lite import inspect_task
from t5x_lite.build import build
from t5x_lite.data import (
    arrays,
    quantise,
    rows as data_rows,
    tasks as data_tasks,
    vocabularies,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.batches import ShardedRows
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tasks import digits, gridworld


def rows_of(task, folder, kind="lm", rows=2, **fields):
    config = DataConfig(**{"train": task, "inputs_length": 24, "targets_length": 64, "num_shards": 1,
                           "shuffle_buffer": 1, "cache_dir": str(folder)} | fields)
    return next(ShardedRows(config, objective=kind, global_batch_size=rows, seed=0, shards=[0]))[0]


# --- vocabularies ---------------------------------------------------------------------------------

def test_codes_stand_behind_the_special_ids_and_beside_bytes():
    numbers = vocabularies.load("codes:17")
    assert numbers.encode("0 16  5") == [3, 19, 8] and numbers.decode([3, 19, 8, 1, 4]) == "0 16 5"
    assert (numbers.vocab_size, numbers.pad_id, numbers.eos_id) == (20, 0, 1)
    both = vocabularies.load("bytes+codes:64")
    text = "Größe <0>日<63>a"
    ids = both.encode(text)
    assert both.decode(ids) == text and both.vocab_size == 3 + 256 + 64
    assert ids[:2] == [ord("G") + 3, ord("r") + 3] and both.codes(ids) == [0, 63]
    assert both.id_bytes()[ids].sum() == len("Größe 日a".encode())
    assert numbers == vocabularies.load("codes:17") != vocabularies.load("codes:18")
    assert both != vocabularies.load("codes:64") and vocabularies.name_of(both) == "bytes+codes:64"
    assert numbers.encode_tf(tf.constant("3 4")).numpy().tolist() == [6, 7]
    assert numbers.encode("0" * 20 + "5 " + "0" * 30) == [8, 3] and both.encode(f"<{'0' * 20}5>") == [264]
    assert both.decode(both.encode("<٣>")) == "<٣>" and vocabularies.load(f"codes:{'0' * 20}17") == numbers


@pytest.mark.parametrize("name, text, message", [
    ("codes:17", "3 17", "'3 17' holds the code 17, which is not in data.vocabulary=codes:17: its codes are "
                         "0 to 16"),
    ("codes:17", "3 a", "'a' is no code: .*bytes.codes:17 reads text"),
    ("codes:17", "-1", "'-1' is no code"), ("codes:17", "9" * 40, "not in data.vocabulary=codes:17"),
    ("bytes+codes:64", "x<64>", "holds the code 64")])
def test_codes_beyond_the_vocabulary_are_named(name, text, message):
    with pytest.raises(UserError, match=message):
        vocabularies.load(name).encode(text)


def test_vocabularies_that_cannot_be_are_named():
    with pytest.raises(UserError, match="'codes:0': from 1 to"):
        vocabularies.load("codes:0")
    with pytest.raises(UserError, match="'codes:x' is unknown: .*codes:N"):
        vocabularies.load("codes:x")


def test_files_of_integer_sequences(tmp_path):
    path = tmp_path / "counts.jsonl"
    path.write_text(json.dumps({"inputs": "1 2 3", "targets": "4 5"}) + "\n")
    row = rows_of(str(path), tmp_path, vocabulary="codes:6", inputs_length=4, targets_length=8)
    assert row["decoder_target_tokens"][0].tolist() == [4, 5, 6, 7, 8, 1, 0, 0]
    assert row["decoder_loss_weights"][0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0]


# --- codebooks ------------------------------------------------------------------------------------

def test_a_code_is_the_nearest_centre():
    vectors = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    books = [quantise.fit(vectors, size) for size in (1, 4, 16)]
    np.testing.assert_allclose(books[0].centres[0], vectors.mean(0), atol=1e-6)
    errors = []
    for book in books:
        codes = book.encode(vectors)
        distances = ((vectors[:, None] - book.centres) ** 2).sum(-1)
        assert codes.tolist() == distances.argmin(1).tolist()
        errors.append(((book.decode(codes) - vectors) ** 2).mean())
        np.testing.assert_array_equal(book.encode(book.centres), np.arange(len(book.centres)))
    assert errors[0] > errors[1] > errors[2]
    again = quantise.fit(vectors, 16)
    np.testing.assert_array_equal(again.centres, books[2].centres)


def test_a_code_is_the_nearest_centre_far_from_zero():
    vectors = (np.random.default_rng(0).normal(size=(500, 4)) + 1e4).astype(np.float32)
    book = quantise.Codebook(vectors[::8])
    distances = ((vectors[:, None].astype(np.float64) - book.centres) ** 2).sum(-1)
    assert book.encode(vectors).tolist() == distances.argmin(1).tolist()


def test_patches_come_together_again():
    images = np.arange(2 * 4 * 6).reshape(2, 4, 6)
    parts = quantise.patches(images, 2)
    assert parts.shape == (2, 6, 4) and parts[0, 1].tolist() == [2, 3, 8, 9]
    np.testing.assert_array_equal(quantise.unpatch(parts, 2, (4, 6)), images)


def test_what_cannot_be_quantised_is_named():
    book = quantise.Codebook(np.zeros((2, 3), np.float32))
    for wrong, message in ((lambda: book.encode(np.zeros((4, 2))), "vectors of 2 numbers.*codebook of 3"),
                           (lambda: book.encode([[0, 0, np.nan]]), "not finite"),
                           (lambda: book.decode([0, 2]), "codes from 0 to 2.*codes are 0 to 1"),
                           (lambda: quantise.fit(np.zeros((9, 2)), 2), "2 codes of 1 different vectors"),
                           (lambda: quantise.fit([[np.inf]], 1), "not finite"),
                           (lambda: quantise.patches(np.zeros((1, 4, 5)), 2), "4 x 5 are no patches of 2 x 2")):
        with pytest.raises(UserError, match=message):
            wrong()


# --- tasks ----------------------------------------------------------------------------------------

def test_digits_as_pixels_and_as_codes(tmp_path):
    import sklearn.datasets
    held = digits.images()
    images = np.concatenate([held["train"][0], held["validation"][0]])
    assert sorted(map(bytes, images.astype(np.int8))) == sorted(
        map(bytes, sklearn.datasets.load_digits().images.astype(np.int8)))
    known = {tuple(image.ravel() + 3) for image in held["train"][0]}
    row = rows_of("digit_pixels", tmp_path)
    assert all(tuple(ids) in known for ids in row["decoder_target_tokens"])
    assert row["decoder_loss_weights"].all()
    codes = digits.codes(held["validation"][0])
    error = np.mean((digits.pixels_of_codes(codes) - held["validation"][0]) ** 2)
    assert error < 0.05 * np.var(held["validation"][0])
    row = rows_of("digit_codes", tmp_path, targets_length=16)
    assert row["decoder_target_tokens"].shape == (2, 16) and row["decoder_target_tokens"].min() >= 3


def test_words_and_codes_in_one_row(tmp_path):
    vocabulary = vocabularies.load("bytes+codes:64")
    rows = rows_of("digit_drawing=1,digit_reading=1", tmp_path, rows=16)
    texts = [vocabulary.decode(ids) for ids in rows["decoder_target_tokens"]]
    drawn = [text for text in texts if text.startswith("draw a ")]
    assert 0 < len(drawn) < 16
    assert all(len(vocabulary.codes(vocabulary.encode(text))) == 16 for text in texts)
    assert all(text.split(" is ")[1] in digits.WORDS for text in texts if text not in drawn)


def test_a_task_of_codes_wants_their_vocabulary(tmp_path):
    for name, message in (("byt5", "'digit_drawing' is made of codes, which data.vocabulary=byt5 has not"),
                          ("codes:64", "holds the text 'draw a .*: use bytes.codes:64"),
                          ("bytes+codes:8", "digit_drawing, train, example 0 holds the code .*codes:8")):
        with pytest.raises(UserError, match=message):
            rows_of("digit_drawing", tmp_path, vocabulary=name)


def test_arrays_of_several_lengths_keep_them():
    made = lambda: {"train": [{"targets": ([1, 2],)}, {"targets": ([3],)}]}
    source = arrays.ArraySource("some", made, ("train",), vocabularies.load("codes:4"))
    found = [x["targets"].tolist() for x in source.get_dataset("train").as_numpy_iterator()]
    assert found == [[4, 5], [6]] and source.num_input_examples("train") == 2


@pytest.mark.parametrize("made", [{"train": []}, {}])
def test_a_split_without_examples_is_named(made):
    source = arrays.ArraySource("some", lambda: made, ("train",), vocabularies.load("codes:4"))
    with pytest.raises(UserError, match="the split 'train' of 'some' holds no example"):
        source.get_dataset("train")


def test_inspect_task_shows_codes(tmp_path):
    config = DataConfig(inputs_length=2, targets_length=43, cache_dir=str(tmp_path))
    shown = inspect_task.describe(config, "gridworld", "validation", "lm", 1, 9)
    assert f"CodeVocabulary, {3 + gridworld.CODES} ids" in shown and "metrics     walks" in shown
    first = f"{gridworld.RETURN + gridworld.distances()[0]} 0 "
    assert first in shown


# --- the gridworld --------------------------------------------------------------------------------

def test_shortest_paths_are_shortest():
    """By hand for the corner's neighbours, and by trying all paths of fewer steps for one cell."""
    found = gridworld.distances()
    assert set(found) == {gridworld.GOAL, *gridworld.FREE} and found[gridworld.GOAL - gridworld.SIDE] == 1
    for start in gridworld.FREE:
        path = gridworld.shortest(start)
        assert gridworld.arrives(start, path) == len(path) == found[start]
        reached = {start}
        for _ in range(found[start] - 1):
            reached |= {gridworld.step(cell, a) for cell in reached for a in range(4)}
        assert gridworld.GOAL not in reached


def test_walks_tell_their_return_and_are_walked():
    made, blind = gridworld.trajectories(False), gridworld.trajectories(True)
    for example, other in zip(made["train"][::97], blind["train"][::97], strict=True):
        (told, start), [targets] = example["inputs"][0], example["targets"]
        actions = [code - gridworld.ACTION for code in targets[::2]]
        assert gridworld.arrives(start, actions) == len(actions) == told - gridworld.RETURN
        assert targets[-1] == gridworld.GOAL
        assert other["inputs"] == ([gridworld.RETURN, start],) and other["targets"] == example["targets"]
    best = [" ".join(map(str, example["targets"][0])) for example in made["validation"]]
    assert gridworld.walks(best, best) == {"arrives": 100, "shortest": 100}
    assert gridworld.walks(best, [""] * len(best)) == {"arrives": 0, "shortest": 0}
    assert data_tasks.find("gridworld", "data.train", DataConfig()).metric_fns == [gridworld.walks]


# --- the experiment's n-gram ----------------------------------------------------------------------

def test_ngrams_by_hand():
    """Witten and Bell on one row: "0 0 1", asked about "0"."""
    train, held_out = np.array([[0, 0, 1]]), np.array([[0]])
    unigram = (2 + 2 * 0.5) / (3 + 2)   # 2 of 3 tokens, 2 kinds
    assert digits_experiment.ngram_bits(train, held_out, 0, 2) == pytest.approx(-math.log2(unigram))
    assert digits_experiment.place_bits(train[:, :1], held_out, 2) == pytest.approx(-math.log2(2 / 3))
    first = (1 + 1 * unigram) / (1 + 1)   # at a row's beginning: once, one kind
    assert digits_experiment.ngram_bits(train, held_out, 1, 2) == pytest.approx(-math.log2(first))


@pytest.mark.parametrize("run", [
    *(digits_experiment.run(arm) for arm in digits_experiment.ARMS), gridworld_experiment.run("gridworld", 0),
    ladder.run("text"), ladder.run("digits")], ids=lambda run: run.name)
def test_experiments_build_and_hold_their_tasks(run):
    program = build(run, jax.devices()[:1])
    for task, _ in data_tasks.train_mixture(run.data, "lm"):
        vocabulary = task.output_features["targets"].vocabulary
        data_vocabulary.check_vocabulary(vocabulary, program.config.model.vocab_size, sentinels=False)
        limits = data_rows.of("lm").task_lengths(task, run.data.inputs_length, run.data.targets_length)
        if task.source.__class__ is arrays.ArraySource:
            for example in task.source.get_dataset("train", shuffle=False).take(300).as_numpy_iterator():
                assert len(example.get("inputs", ())) <= limits.get("inputs", 0)
                assert len(example["targets"]) + task.output_features["targets"].add_eos <= limits["targets"]
