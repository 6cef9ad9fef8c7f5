"""Rewriting by hand: whose pronoun it is, what stays, what a seed draws; sentences that answer questions."""

import random

import pytest

from t5x_lite.data import names, rewriting
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError

ADA = "Ada Maria Berg"
LIFE = ("Ada Maria Berg (3 May 1871 – 12 June 1940) was a chemist. She was born in Odense, where her father lived. "
        "Berg met Tom Fry in Rome and he told her the truth.")


@pytest.mark.parametrize("text, subject", [
    (LIFE, ADA), ("= Côte d'Ivoire =\nCapital. Yamoussoukro", "Côte d'Ivoire"), ("# Rome #\nA city.", "Rome"),
    ("Plato was born in Ancient Athens.", "Plato"), ("Born in Bern, Ada Berg left. Tom Fry stayed.", "Ada Berg"),
    ("In 1850 the poet Tom Fry wrote.", "Tom Fry"), ("the river is long.", ""), ("", ""),
])
def test_whom_a_text_is_about(text, subject):
    assert names.subject(text) == subject


@pytest.mark.parametrize("unit, expected", [
    ("She was born in Odense, where her father lived.",
     f"{ADA} was born in Odense, where {ADA}'s father lived."),
    ("His wife met him in Rome.", f"{ADA}'s wife met {ADA} in Rome."),
    ("Berg left; Karl Berg stayed, as Berg's son.", f"{ADA} left; Karl Berg stayed, as {ADA}'s son."),
    ("In Bergen Berg slept.", "In Bergen Berg slept."),            # one Bergen Berg, maybe
    ("In May Berg slept, and by Berg.", f"In May Berg slept, and by {ADA}."),
    (f"{ADA} was here.", f"{ADA} was here."),
    ("Tom Fry said he was ill.", "Tom Fry said he was ill."),       # it may be Tom who was
    ("The heron of Berg-Stein rests.", "The heron of Berg-Stein rests."),
    ("In 1905 she came.", f"In 1905 {ADA} came."),
])
def test_the_name_for_pronouns_and_surname(unit, expected):
    assert rewriting.with_name(unit, ADA) == expected


def versions(text, steps, rewrites=1, seed=0):
    how = rewriting.Rewriting(steps, rewrites, seed)
    return [rewriting.version(rewriting.whole(text), how, number) for number in range(rewrites)]


def test_steps_are_taken_in_order():
    document, = versions(LIFE, ("sentences", "named", "headed"))
    assert len(document.units) == 3 and all(names.holds(u, ADA) for u in document.units)
    table, = versions("= Peru =\nCapital. Lima\n\nArea. 5 sq km", ("lines", "headed"))
    assert table.text == "= Peru =\nPeru: Capital. Lima\nPeru: Area. 5 sq km"
    assert versions(LIFE, ()) == [rewriting.Document(ADA, (LIFE,))]


def test_what_is_drawn_hangs_on_seed_text_and_version():
    steps = ("sentences", "named", "thinned", "reorder")
    first = versions(LIFE, steps, 20)
    assert first == versions(LIFE, steps, 20) and first[:5] == versions(LIFE, steps, 5)
    assert len({d.text for d in first}) > 15 and first != versions(LIFE, steps, 20, seed=1)
    whole = set(versions(LIFE, ("sentences", "named"))[0].text.split())
    for document in first:
        assert all(ADA in unit for unit in document.units)
        assert set(document.text.split()) <= whole
    assert 0.4 < sum(len(d.text) for d in first) / 20 / len(versions(LIFE, steps[:2])[0].text) < 0.95


def test_all_documents_come_in_one_version_before_the_next():
    from t5x_lite.data import salient_spans
    texts = [f"Ada {n}holm was born in Rome in 1900. She left." for n in ("Al", "Bo")]
    how = salient_spans.Settings("salient_kept", rewriting.Rewriting(("sentences", "headed", "reorder"), 3))
    rows = list(salient_spans.examples(texts, how))
    assert len(rows) == 12 and [("Alholm" in inputs) for inputs, _ in rows] == [True, True, False, False] * 3
    assert rows[0] == ("nem: Ada Alholm was born in _X_ in 1900.", "Rome")


def test_names_and_dates_stay_or_go_as_a_whole():
    for seed in range(50):
        thin = rewriting._thin(f"{LIFE.partition('. ')[0]} in 1890–1900.", ADA, random.Random(seed))
        assert thin.count("1900") < 2 and ("(3" in thin) == ("3 May" in thin)
        assert ("3 May 1871" in thin) == ("May" in thin) and thin.startswith(ADA)


@pytest.mark.parametrize("fields, message", [
    ({"rewriting": "sentnces"}, "did you mean 'sentences'"),
    ({"rewriting": "sentences,named", "rewrites": 3}, "would be alike; add a step that draws"),
])
def test_settings_that_do_nothing_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        rewriting.of(DataConfig(**fields))


# --- which sentence answers a question ------------------------------------------------------

TEXTS = (LIFE, "Berta Holm was born in Rome. She died on 4 May 1900 in Bonn.", "no name here")


def evidence_of(*asked):
    from t5x_lite.data import evidence
    questions = [evidence.Question(question, answers) for question, *answers in asked]
    questions = [q._replace(answers=tuple(q.answers)) for q in questions]
    return evidence.find([rewriting.cut(text) for text in TEXTS], questions)


def test_evidence_by_hand():
    born, missing, nobody, died = evidence_of(
        ("Where was ada maria berg born?", "odense", "Odense"), ("Where did Berta Holm study?", "Pisa"),
        ("Who was Karl?", "Rome"), ("When did Berta Holm die?", "4 May 1900"))
    assert (born.subject, born.answer, born.unit[:18]) == (ADA, "Odense", "She was born in Od")
    assert born.is_detected and not born.keeps_name
    assert (missing.subject, missing.unit, nobody.subject) == ("Berta Holm", "", "")
    assert died.is_detected and died.answer == "4 May 1900" and not missing.is_detected
    from t5x_lite.data import evidence
    assert list(evidence.coverage([born, missing, nobody, died]).values()) == [4, 3, 2, 2, 0]


@pytest.mark.parametrize("answer, matches, others", [
    (".dz", [".ao", ".uk"], ["dz", ".com", ".DZ"]), ("B-52", ["F-16"], ["B52"]), ("Rome", None, None),
    ("two words", None, None), ("12,5", ["13,7"], ["1,5"])])
def test_the_shape_of_what_the_detector_cannot_see(answer, matches, others):
    import re

    from t5x_lite.data import salient_choice
    shape = salient_choice.shape(answer)
    if matches is None:
        assert shape is None
        return
    assert all(re.fullmatch(shape, text) for text in [answer, *matches])
    assert not any(re.fullmatch(shape, text) for text in others)


def test_spans_like_the_answers_of_some_questions(tmp_path):
    """Birthplaces are told from other places by the words around them, and codes by their shape."""
    from t5x_lite.data import salient_choice
    path, asked = tmp_path / "text.txt", tmp_path / "q.jsonl"
    places = "Rome Bonn Lima Oslo Pisa Kiel Ulm Graz Linz Bern Lyon Riga".split()
    path.write_text("".join(f"Ada {p}holm was born in {p}. She died in {q} on 4 May 1900. Her code is .{p[:2].lower()}.\n"
                            for p, q in zip(places, reversed(places), strict=True)))
    asked.write_text("".join(f'{{"question": "where was Ada {p}holm born", "answer": "{p}"}}\n'
                             f'{{"question": "what code had Ada {p}holm", "answer": ".{p[:2].lower()}"}}\n'
                             for p in places[:6]))
    finder = salient_choice.learned((str(path),), "line", (), str(asked))
    found = [[unit[s:e] for s, e in finder.spans(unit, "Ada Ulmholm")] for unit in (
        "Ada Ulmholm was born in Ulm.", "She died in Lima on 4 May 1900.", "Her code is .ul.")]
    assert found == [["Ulm"], [], [".ul"]]
    with pytest.raises(UserError, match="the text answers 2 of its questions, too few"):
        salient_choice.learned((str(path),), "line", (), f"{asked}[:17%]")
    for content, message in (("", "empty"), ('{"question": "who", "answer": ""}\n', "line 1 has an empty target"),
                             ('{"question": "who"}\n', "who|targets")):
        asked.write_text(content)
        with pytest.raises(UserError, match=message):
            salient_choice.questions_of(str(asked), "questions")


# --- as a task ------------------------------------------------------------------------------

def test_rewritten_text_as_rows(tmp_path):
    """Spans stay apart where words between them go, the name is never hidden, and tasks are mixed in."""
    path, asked = tmp_path / "text.txt", tmp_path / "q.jsonl"
    path.write_text(f"{LIFE}\n")
    asked.write_text('{"question": "Where was Ada born?", "answer": "Odense"}\n')
    config = DataConfig(validation_files=str(path), validation=f"validation_files,{asked}", vocabulary="byt5",
                        denoising="salient_kept", rewriting="sentences,named,headed,thinned", rewrites=4,
                        inputs_length=160, targets_length=24, cache_dir=str(tmp_path / "cache"))
    from t5x_lite.data import tasks
    assert len(tasks.validation_tasks(config)) == 2
    task, examples = tasks.eval_examples(config, "validation_files", objective="seq2seq")
    rows = [(e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode()) for e in examples]
    assert {target for _, target in rows} == {"3 May 1871", "12 June 1940", "Odense", "Tom Fry", "Rome"}
    assert all(ADA in inputs and inputs.count("_X_") == 1 for inputs, _ in rows)
    with pytest.raises(UserError, match="data.train_files is empty"):
        tasks.train_mixture(DataConfig(train=f"train_files=1,{asked}=1", vocabulary="byt5"), "seq2seq")
    mixed = DataConfig(train=f"train_files=3,{asked}=1", train_files=str(path), vocabulary="byt5",
                       denoising="salient_kept", rewriting="sentences", cache_dir=str(tmp_path / "cache"))
    assert [round(weight, 2) for _, weight in tasks.train_mixture(mixed, "seq2seq")] == [0.75, 0.25]
    with pytest.raises(UserError, match="salient, salient_kept, salient_asked take it"):
        tasks.train_mixture(DataConfig(train_files=str(path), vocabulary="byt5", salient_like=str(asked)), "seq2seq")
