"""Whole words are hidden and filled in: which ones, in what room, and how well they were filled."""

import numpy as np
import pytest
import seqio
import tensorflow as tf

from t5x_lite.data import spans, vocabularies, vocabulary as data_vocabulary, word_spans
from t5x_lite.errors import UserError
from tasks import facts_qa

FACTS = vocabularies.load("facts")
TEXT = "The capital of Norway is Oslo. In 1965 the company Benetton was founded."


def mask(begins, marks, room, density, mean, seed=0):
    seeds = np.array([[seed, 1], [seed, 2]])
    return word_spans.word_mask(tf.constant(begins), tf.constant(marks), room, density, mean,
                                seeds).numpy()


def test_a_word_is_hidden_whole_and_its_punctuation_stays():
    ids = FACTS.encode(TEXT)
    begins_V, marks_V = word_spans.word_marks(FACTS)
    begins, marks = begins_V[ids], marks_V[ids]
    assert begins.sum() == len(TEXT.split()) and marks.sum() == 2   # the full stops
    word = np.cumsum(begins)
    seen = set()
    for seed in range(40):
        hidden = mask(begins, marks, 100, 0.3, 1.5, seed)
        assert hidden.any() and not hidden[0] and not hidden[marks & (word == word.max())].any()
        for number in set(word):
            of_word = (word == number) & ~marks
            assert hidden[of_word].all() or not hidden[of_word].any()
        # a full stop is hidden inside of a span alone
        assert all(hidden[i + 1] for i in np.flatnonzero(hidden & marks))
        seen |= set(word[hidden])
    assert seen == set(range(2, word.max()))   # every word but those at the edges


def test_spans_without_room_stay_in_the_text():
    begins, marks = np.ones(20, bool), np.zeros(20, bool)
    whole = mask(begins, marks, 100, 0.5, 2.0)
    starts = whole & ~np.concatenate([[False], whole[:-1]])
    assert whole.sum() == 10 and starts.sum() > 3
    cut = mask(begins, marks, 6, 0.5, 2.0)
    assert cut.sum() + (cut & ~np.concatenate([[False], cut[:-1]])).sum() <= 6
    assert cut.any() and not (cut & ~whole).any() and not mask(begins, marks, 1, 0.5, 2.0).any()


@pytest.mark.parametrize("begins", [[False], [True], [True, True], [False, True], [False] * 5])
def test_windows_without_a_whole_word_hide_nothing(begins):
    begins = np.array(begins)
    assert not mask(begins, np.zeros_like(begins), 9, 0.5, 1.0).any()


def test_inputs_and_targets_hold_the_text_between_them():
    feature = seqio.Feature(FACTS, add_eos=True)
    tokens = FACTS.encode(" ".join([TEXT] * 9))
    lengths = {"inputs": 24, "targets": 12}
    made = list(word_spans.word_spans(
        tf.data.Dataset.from_tensors({"targets": tokens}), lengths,
        {"inputs": feature, "targets": feature}, noise_density=0.3).as_numpy_iterator())
    assert len(made) == -(-len(tokens) // 23)
    for i, row in enumerate(made):
        assert all(len(row[name]) <= lengths[name] and row[name][-1] == 1 for name in lengths)
        inputs, targets = (data_vocabulary.text_of(FACTS, row[name]) for name in lengths)
        filled = spans.fillings(targets)
        hidden = [n for n in spans.neighbours(inputs)]
        for number in hidden:
            inputs = inputs.replace(f"<extra_id_{number}>", filled[number])
        whole = FACTS.decode(tokens[i * 23:(i + 1) * 23])
        assert "".join(inputs.split()) == "".join(whole.split())


def test_bytes_and_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="do not say where words begin"):
        word_spans.word_marks(vocabularies.load("byt5"))
    feature = {name: seqio.Feature(FACTS) for name in ("inputs", "targets")}
    for lengths, settings, message in (
            ({"inputs": 4, "targets": 9}, {}, "hold no hidden word"),
            ({"inputs": 40, "targets": 9}, {"noise_density": 1.0}, "between 0 and 1"),
            ({"inputs": 2000, "targets": 2000}, {"noise_density": 0.5}, "has 100")):
        with pytest.raises(UserError, match=message):
            word_spans.word_spans(tf.data.Dataset.range(1), lengths, feature, **settings)


# --- how well they are filled -------------------------------------------------------------------

INPUTS = "The <extra_id_0> of Norway <extra_id_1>. In <extra_id_2> it rains"
TARGET = "<extra_id_0> capital <extra_id_1> is Oslo <extra_id_2> Bergen <extra_id_3>"


def test_fillings_neighbours_and_a_passage():
    assert spans.fillings(TARGET) == {"0": "capital", "1": "is Oslo", "2": "Bergen", "3": ""}
    assert spans.fillings("x <extra_id_0> a <extra_id_0> b") == {"0": "a"}
    assert spans.neighbours(INPUTS) == {
        "0": ("The", "of"), "1": ("Norway", "."), "2": ("In", "it")}
    assert spans.neighbours("<extra_id_0> x <extra_id_1>") == {"0": ("", "x"), "1": ("x", "")}
    filled = "<extra_id_0> capital <extra_id_1> is Rome <extra_id_9> x"
    assert spans.read(INPUTS, filled, TARGET) == (
        "The [capital] of Norway [is Rome, not: is Oslo]. In […, not: Bergen] it rains")
    assert spans.hidden(INPUTS) and not spans.hidden("no span")


def test_counting_takes_the_commonest_filling():
    rows = [(INPUTS, TARGET)] * 2 + [("The <extra_id_0> of Rome", "<extra_id_0> city <extra_id_1>")] * 3
    commonest, between = spans.count(rows)
    assert commonest == "city" and between[("The", "of")] == "city"
    assert between[("In", "it")] == "Bergen" and spans.count([]) == ("", {})


def test_the_metric_counts_spans(monkeypatch):
    monkeypatch.setattr(spans, "_counted", lambda task: ("Bergen", {("The", "of"): "capital"}))
    predictions = ["<extra_id_0> capital <extra_id_1> . <extra_id_2>"]
    found = spans.Filled("any")([(INPUTS, TARGET)], predictions)
    assert found == pytest.approx({"spans_exact": 100 / 3, "spans_of_words": 100 / 3,
                                   "spans_most_frequent": 100 / 3,
                                   "spans_between_same_words": 200 / 3})


# --- the facts in held-out wordings ---------------------------------------------------------------

def test_no_held_out_sentence_stands_in_the_training_text():
    facts = facts_qa.facts()[:120]
    for dev in (False, True):
        for fact in facts:
            train, held_out = facts_qa._wordings(fact, dev)
            assert len(held_out) == 1 and not set(train) & set(held_out)
            assert len(train) == len(facts_qa.statements(fact)) - 1 - dev
        held = {facts_qa._fill(facts_qa._wordings(f, dev)[1][0], f) for f in facts}
        known = {fact: facts_qa._wordings(fact, dev)[0] for fact in facts}
        text = " ".join(facts_qa.passages(facts, range(3), known.get))
        assert not [sentence for sentence in held if sentence in text]
    fact = facts[0]
    assert facts_qa._wordings(fact)[1] != facts_qa._wordings(fact, True)[1]
    assert facts_qa._wordings(fact)[1][0] not in facts_qa._wordings(fact, True)[0]
