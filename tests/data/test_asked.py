"""Questions that a text answers, worded as some given ones are, by hand."""

import json

import pytest

from t5x_lite.data import asked, evidence, names, rewriting, salient_choice, salient_spans
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError

CITIES = "Rome Bonn Lima Oslo Pisa Kiel Ulm Graz Linz Bern Lyon Riga".split()


@pytest.fixture
def files(tmp_path):
    """A text of twelve persons, and questions about the first six in two wordings, one of which recurs."""
    text, questions = tmp_path / "text.txt", tmp_path / "q.jsonl"
    text.write_text("".join(f"Ada {p}holm was born in {p}. She died in {q} on 4 May 1900.\n"
                            for p, q in zip(CITIES, reversed(CITIES), strict=True)))
    asked_of = [(f"Where was ada {p}holm born?", p) for p in CITIES[:6]] + [("When did Ada Romeholm die?", "4 May 1900")]
    questions.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in asked_of))
    return str(text), str(questions)


def test_the_wording_is_the_question_without_its_name():
    assert asked.wording("where was ada BERG born, Ada Bergs?", "Ada Berg") == "where was \u2022 born, Ada Bergs?"
    groups = asked.by_wording([evidence.Evidence(evidence.Question(q, ("x",)), "Ada", unit) for q, unit in (
        *[("is Ada in", "u")] * asked.LEAST, *[("no name", "u")] * 9, *[("was Ada in", "")] * 9, ("did Ada go", "u"))])
    assert list(groups) == ["is \u2022 in"]


def test_every_document_is_asked_what_it_answers(files):
    text, questions = files
    asker = asked.learned((text,), "line", ("sentences",), questions)
    (wording,) = asker.wordings
    assert wording.text == "Where was \u2022 born?"
    documents = map(rewriting.cut, ("Ada Rigaholm was born in Riga. She died in Rome on 4 May 1900.",
                                    "Tom Fry died in Rome."))
    assert [asker.questions(d) for d in documents] == [[("Where was Ada Rigaholm born?", "Riga")], []]
    assert [asked._is_name("Panama and Panama City", "Panama", span) for span in ((0, 6), (11, 22))] == [True, False]


def test_a_subject_is_asked_about_by_its_other_names_too():
    assert [names.aliases(name) for name in ("Sir Thomas Alva Edison Jr.", "Ada Berg", "Ludwig van Beethoven", "")] == [
        ["Sir Thomas Alva Edison Jr.", "Thomas Alva Edison", "Thomas Edison"], ["Ada Berg"], ["Ludwig van Beethoven"], []]
    cut = [rewriting.cut(f"{name} was born in {place}.") for name, place in (
        ("Ada Eva Berg", "Rome"), ("Ada Ida Berg", "Bonn"), ("Tom Al Fry", "Oslo"), ("Tom Fry", "Pisa"), ("Jo Al Ek", "Ulm"))]
    named = evidence.by_name(cut)
    assert "ada berg" not in named and named["tom fry"] == [cut[3]] and named["jo ek"] == named["jo al ek"] == [cut[4]]
    found = evidence.find(cut, [evidence.Question("where was Jo Ek born", ("Ulm",))])
    assert found[0].answer == "Ulm" and asked.wording(found[0].question.text, found[0].subject) == "where was \u2022 born"
    asker = asked.Asker((asked.Wording("\u2022?", salient_choice.ALL),), {n: g[0].subject for n, g in named.items()})
    assert asker.questions(cut[4]) == [("Jo Al Ek?", "Ulm"), ("Jo Ek?", "Ulm")] and asker.questions(cut[0]) == [
        ("Ada Eva Berg?", "Rome")]


def test_questions_stand_behind_each_version_of_their_document(files):
    text, questions = files
    steps = ("sentences", "headed", "reorder")
    asker = asked.learned((text,), "line", steps, questions)
    how = salient_spans.Settings("salient_asked", rewriting.Rewriting(steps, 2), questions)
    rows = list(salient_spans.examples(open(text).read().splitlines()[:2], how, asker=asker))
    own = ("Where was Ada Romeholm born?", "Rome"), ("Where was Ada Bonnholm born?", "Bonn")
    assert [row for row in rows if row in own] == [*own, *own]
    assert rows.index(own[0]) == 3 and len(rows) == 16   # three spans of the first: Rome; Riga, the day


def test_as_a_task_and_what_is_refused(files, tmp_path):
    from t5x_lite.data import tasks
    text, questions = files
    config = DataConfig(validation_files=text, vocabulary="byt5", denoising="salient_asked", salient_like=questions,
                        inputs_length=96, targets_length=24, cache_dir=str(tmp_path / "cache"))
    _, examples = tasks.eval_examples(config, "validation_files", objective="seq2seq")
    found = {(e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in examples}
    made = {f"Where was Ada {p}holm born?" for p in CITIES}
    assert {inputs for inputs, _ in found if not inputs.startswith("nem: ")} == made
    assert ("nem: Ada Romeholm was born in _X_.", "Rome") in found
    for like, message in (("", "set data.salient_like to a file of training questions"),
                          (f"{questions}[:40%]", "no wording stands 5 times among its questions .*2 of 2")):
        with pytest.raises(UserError, match=message):
            asked.learned((text,), "line", (), like)
