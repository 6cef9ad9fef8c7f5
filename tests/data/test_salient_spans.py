"""The detector of dates and names: sentences by hand, and human-marked names of Wikipedia."""

import csv

import pytest

from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from tests.helpers import shared_data
from tests.tasks.test_formats import batches


def spans(sentence):
    from t5x_lite.data import names
    return [sentence[s:e] for s, e in names.salient_spans(sentence)]


@pytest.mark.parametrize("sentence, expected", [
    ("Benjamin Franklin was born in Boston on January 17, 1706.",
     ["Benjamin Franklin", "Boston", "January 17, 1706"]),
    ("In 1776 the Declaration of Independence was read on 4 July.",
     ["1776", "Declaration of Independence", "4 July"]),
    ("The river is long.", []),
    ("Bread is made in the 1770s, not 12 or 99999.", ["1770s"]),
    ("When Ludwig van Beethoven's friend came, I may leave.", ["Ludwig van Beethoven"]),
    ("NASA flew in May 1961 with Alan Shepard.", ["NASA", "May 1961", "Alan Shepard"]),
])
def test_spans_by_hand(sentence, expected):
    assert spans(sentence) == expected


def test_sentences():
    from t5x_lite.data import names
    assert names.sentences('Dr. Smith met J. Doe.  "He sang!" She\nleft? 3 stayed.') == [
        "Dr. Smith met J. Doe.", '"He sang!"', "She left?", "3 stayed."]


def test_a_sentence_gives_an_example_a_span():
    from t5x_lite.data import salient_spans
    assert list(salient_spans.examples(["it began in Rome. Then, in 1066, all ended."])) == [
        ("nem: it began in _X_.", "Rome"), ("nem: Then, in _X_, all ended.", "1066")]


def test_names_that_people_marked_are_found():
    """GAP: nine in ten of the names inside sentences are spans, or part of one."""
    from t5x_lite.data import salient_spans
    found = total = 0
    with open(shared_data("corpora/gap-development.tsv"), newline="") as file:
        for row in list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:400]:
            targets = " | ".join(t for _, t in salient_spans.examples([row["Text"]]))
            for name in (row["A"], row["B"]):
                total += 1
                found += name in targets
    assert found / total > 0.9


def test_salient_masking_of_your_own_files(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("it began in Rome.\nThe end came in 476 or in 1453.\n")
    config = DataConfig(validation_files=str(path), vocabulary="byt5", denoising="salient",
                        inputs_length=64, targets_length=16)
    found = sorted(p for p in batches("validation_files", config=config) if p[0])
    assert found == [("nem: The end came in 476 or in _X_.", "1453"),
                     ("nem: it began in _X_.", "Rome")]


def test_an_unknown_masking_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("it began in Rome.\n")
    config = DataConfig(validation_files=str(path), vocabulary="byt5", denoising="salien")
    with pytest.raises(UserError, match="did you mean 'salient'"):
        batches("validation_files", config=config)
