"""Facts rendered as passages and questions: what is asked, held out, hidden and permuted."""

import collections
import csv

import pytest

from t5x_lite.data import tasks as data_tasks
from t5x_lite.data.config import DataConfig
from t5x_lite.data.tasks import eval_examples, train_mixture

data_tasks.tensorflow_side()

from tasks import facts_qa
from tasks.facts_qa import Fact

NORWAY = (Fact("country", "capital", "Norway", ("Oslo",)),
          Fact("country", "calling_code", "Norway", ("47",)))
PERU = (Fact("country", "capital", "Peru", ("Lima",)),
        Fact("country", "calling_code", "Peru", ("51",)))


def test_the_tables_are_whole():
    """Every row has every column, every entity one row, every relation wordings of both kinds."""
    names = collections.Counter()
    for path in facts_qa.FOLDER.glob("*.tsv"):
        with open(path, encoding="utf-8") as lines:
            rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        assert {len(r) for r in rows} == {len(rows[0])}, path
        if path.name != "templates.tsv":
            names.update(r[0] for r in rows[1:])
            assert all(any(r[1:]) for r in rows), path
    assert max(names.values()) == 1
    assert len(facts_qa.facts()) > 3000 and len(names) > 900
    for key in {(f.kind, f.relation) for f in facts_qa.facts()}:
        statements, asked = facts_qa.templates()[key]
        assert len(statements) >= 5 and len(asked) >= 2
        assert all("{name}" in t and "{answer}" in t for t in statements)
        assert all("{name}" in t and "{answer}" not in t for t in asked)


def test_passages_state_every_fact_of_an_entity_in_varied_words():
    texts = list(facts_qa.passages(NORWAY + PERU, range(30)))
    assert len(texts) == 60 and len(set(texts)) > 40
    assert all("Norway" in t and "Oslo" in t and "47" in t for t in texts[::2])
    assert texts == list(facts_qa.passages(NORWAY + PERU, range(30)))
    assert texts[:2] == list(facts_qa.passages(NORWAY + PERU, [0]))


def test_questions_by_hand():
    every = list(facts_qa.questions(NORWAY[:1], every_wording=True))
    assert every == [("fact question: What is the capital of Norway?", ("Oslo",)),
                     ("fact question: Which city is the capital of Norway?", ("Oslo",))]
    one = list(facts_qa.questions(NORWAY, every_wording=False))
    assert len(one) == 2 and one[0] in every


def test_permuted_answers_are_those_of_others():
    swapped = facts_qa.permuted(NORWAY + PERU)
    assert [(f.name, f.relation, f.answers) for f in swapped] == [
        ("Norway", "capital", ("Lima",)), ("Norway", "calling_code", ("51",)),
        ("Peru", "capital", ("Oslo",)), ("Peru", "calling_code", ("47",))]
    known = facts_qa.facts()
    moved = facts_qa.permuted(known)
    assert collections.Counter(moved) != collections.Counter(known)
    for key, members in facts_qa._by_relation(known).items():
        assert (collections.Counter(f.answers for f in members)
                == collections.Counter(f.answers for f in facts_qa._by_relation(moved)[key]))
    kept = sum(a.answers == b.answers for a, b in zip(known, moved, strict=True))
    assert kept < 0.15 * len(known)   # answers that repeat: continents and the like


def test_halves_share_no_entity(tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path))
    config = DataConfig(train="closed_book_qa", validation="closed_book_qa")
    asked = {split: {e["inputs_pretokenized"].decode() for e in eval_examples(
        config, task, objective="seq2seq", split=split)[1]}
        for task, split in (("closed_book_qa", "train"), ("closed_book_qa", "validation"))}
    held_out = {f.name for f in facts_qa.facts() if facts_qa.is_held_out(f.name)}
    everyone = {f.name for f in facts_qa.facts()}
    assert 0.45 < len(held_out) / len(everyone) < 0.55
    number = {s: sum(f.name in names for f in facts_qa.facts())
              for s, names in (("train", everyone - held_out), ("validation", held_out))}
    assert len(asked["validation"]) == number["validation"]
    assert len(asked["train"]) == 2 * number["train"]
    assert not asked["train"] & asked["validation"]
    dev = {e["inputs_pretokenized"].decode() for split in ("train", "validation")
           for e in eval_examples(config, "closed_book_qa_dev", objective="seq2seq",
                                  split=split)[1]}
    assert dev <= asked["train"]   # what is tuned on is never what is reported


@pytest.mark.parametrize("task", ["fact_passages", "fact_passages_permuted",
                                  "fact_passages_salient"])
def test_passages_become_examples(task, tmp_path, monkeypatch):
    monkeypatch.setenv("T5X_LITE_CACHE", str(tmp_path))
    monkeypatch.setattr(facts_qa, "_VARIANTS", 1)
    monkeypatch.setattr(facts_qa, "facts", lambda: NORWAY + PERU)
    config = DataConfig(train=task, validation=task, inputs_length=24, targets_length=14)
    assert train_mixture(config, "seq2seq")
    _, examples = eval_examples(config, task, objective="seq2seq")
    rows = list(examples)
    if task == "fact_passages_salient":
        pairs = [(e["inputs_pretokenized"].decode(), e["targets_pretokenized"].decode())
                 for e in rows]
        assert all(i.startswith("nem: ") and "_X_" in i for i, _ in pairs)
        assert {t for _, t in pairs} <= {"Norway", "Peru", "Oslo", "Lima"}
    else:
        assert rows and all(len(e["targets"]) <= 33 for e in rows)


def test_the_majority_answer_knows_the_relation_only(monkeypatch):
    names = ["a", "b", "c", "d", "e", "f", "g", "h"]
    asked = [n for n in names if facts_qa.is_held_out(n)]
    seen = [n for n in names if n not in asked]
    assert len(seen) >= 3 and len(asked) >= 2
    cells = [Fact("animal", "class", n, ("bird",) if n == seen[0] else ("fish",)) for n in seen]
    cells += [Fact("animal", "class", n, ("x", "fish") if n == asked[0] else ("bird",))
              for n in asked]
    monkeypatch.setattr(facts_qa, "facts", lambda: tuple(cells))
    assert facts_qa.majority_exact_match() == pytest.approx(100 / len(asked))
