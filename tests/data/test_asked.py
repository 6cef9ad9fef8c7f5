"""Questions that a text answers, worded as some given ones are, by hand."""

import json

import pytest

from t5x_lite.data import asked, called, evidence, rewriting, salient_choice, salient_spans
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
    (relation,) = asker.relations
    assert relation.wordings == {"Where was \u2022 born?": 6}
    documents = map(rewriting.cut, ("Ada Rigaholm was born in Riga. She died in Rome on 4 May 1900.",
                                    "Tom Fry died in Rome."))
    assert [asker.questions(d, asker.answers(d), 0) for d in documents] == [[("Where was Ada Rigaholm born?", "Riga")], []]
    assert [asked._is_name("Panama and Panama City", "Panama", span) for span in ((0, 6), (11, 22))] == [True, False]


def test_a_subject_is_asked_about_as_the_questions_call_others():
    cut = [rewriting.cut(f"{name} was born in {place}.") for name, place in (
        ("Ada Eva Berg", "Rome"), ("Ada Ida Berg", "Bonn"), ("Tom Al Fry", "Oslo"), ("Tom Fry", "Pisa"), ("Jo Al Ek", "Ulm"))]
    index = called.Index(cut)
    assert "ada berg" not in index.by_name and index.by_name["tom fry"].documents == (cut[3],)
    (found,) = evidence.find(cut, [evidence.Question("where was Jo Ek born", ("Ulm",))])
    assert found.answer == "Ulm" and found.called == "Jo Ek"
    assert asked.wording(found.question.text, found.called) == "where was \u2022 born"
    asker = asked.Asker((asked.Relation({"\u2022?": 1}, salient_choice.ALL),), index, {"whole": 1, "short": 3})
    assert [asker.names(d.subject) for d in cut[::4]] == [{"Ada Eva Berg": 1}, {"Jo Al Ek": 1, "Jo Ek": 3}]
    asks = {asker.questions(cut[4], asker.answers(cut[4]), number)[0] for number in range(20)}
    assert asks == {("Jo Al Ek?", "Ulm"), ("Jo Ek?", "Ulm")}


def test_wordings_that_ask_the_same_share_a_finder():
    cut = [rewriting.cut(f"Ada {p}holm, a {job}, was born in {p}. She died in {q} on 4 May 1900.")
           for p, q, job in zip(CITIES, reversed(CITIES), ["cook", "poet"] * 6, strict=True)]
    told = [evidence.Question(way.format(f"Ada {p}holm"), (p,)) for p in CITIES[:10]
            for way in ("where was {} born", "birthplace of {}?")]
    told += [evidence.Question(f"{p}holm, Ada Riga's home: where was Ada {p}holm from", (p,)) for p in CITIES[10:11]]
    told += [evidence.Question(f"who was Ada {p}holm", (["cook", "poet"][i % 2],)) for i, p in enumerate(CITIES[:6])]
    told += [evidence.Question(f"where did Ada {p}holm die", (q,)) for p, q in zip(CITIES[:6], CITIES[::-1], strict=False)]
    asker = asked.learn(cut, evidence.find(cut, told))
    wordings = [set(relation.wordings) for relation in asker.relations]
    assert next(w for w in wordings if "where was \u2022 born" in w) == {
        "where was \u2022 born", "birthplace of \u2022?", "Lyonholm, Ada Riga's home: where was \u2022 from"}
    assert {"who was \u2022"} in wordings and {"where did \u2022 die"} in wordings and len(wordings) == 3
    assert sorted(answer for _, answer in asker.answers(cut[11])) == ["Riga", "Rome", "poet"]


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
