"""Facts to read in passages and to be asked for without them: closed-book QA on a laptop.

The tables of tasks/facts/ were made for this project: an entity a line, a relation a column,
several accepted answers between "|". templates.tsv renders each fact as varied statements and
questions. Whether reading the passages of all entities teaches to answer questions about those
whose questions were never seen is what configs/experiments/closed_book_qa.py measures.

    fact_passages             span corruption of passages about every entity
    fact_passages_permuted    the same with the answers of each relation permuted among the
                              entities: as much text of the same form that knows nothing true
    fact_passages_salient     the same passages, one of their names or dates hidden (nem:)
    fact_wordings             words hidden in the same passages; each fact's held-out wording is one
                              that the training text never uses for it
    fact_wordings_dev         the same without that wording, another held out: to choose settings on
    closed_book_qa            train: questions about half of the entities, two wordings each;
                              validation: about the other half, one wording each
    closed_book_qa_dev        both from that first half, 4 : 1, to choose hyperparameters on

"fact question: What is the capital of Norway?" -> "Oslo". Scored by exact match and F1 over the
accepted answers after SQuAD's normalisation.
"""

import collections
import csv
import dataclasses
import functools
import hashlib
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import seqio

from t5x_lite.data import preprocessors, records, salient_spans, spans, task_metrics, text_to_text
from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.data.records import unpack
from t5x_lite.data.span_corruption import span_corruption
from t5x_lite.data.word_spans import word_spans

FOLDER = pathlib.Path(__file__).parent / "facts"
PREFIX = "fact question: "
_TEMPLATES = "templates.tsv"
_VARIANTS = 40           # passages an entity for training; one more is held out
_NOISE_DENSITY = 0.3     # of span corruption: a fact takes few tokens of a passage
_WORD_DENSITY = 0.2      # of hidden words
_VERSION = 1             # raise it when the same tables give other text

Relation = tuple[str, str]   # (kind of entity, relation)


@dataclasses.dataclass(frozen=True)
class Fact:
    """One cell of a table; answers: the accepted ones, the usual one first."""

    kind: str
    relation: str
    name: str
    answers: tuple[str, ...]


@functools.cache
def facts() -> tuple[Fact, ...]:
    """All cells that are not empty, in the order of the tables."""
    found = []
    for path in sorted(FOLDER.glob("*.tsv")):
        if path.name == _TEMPLATES:
            continue
        for row in _rows(path):
            name = row.pop("name")
            found += [Fact(path.stem, relation, name, tuple(cell.split("|")))
                      for relation, cell in row.items() if cell]
    return tuple(found)


@functools.cache
def templates() -> Mapping[Relation, tuple[tuple[str, ...], tuple[str, ...]]]:
    """{(kind, relation): (statements, questions)} with {name} and {answer} to be filled in."""
    found: dict[Relation, tuple[list[str], list[str]]] = collections.defaultdict(lambda: ([], []))
    for row in _rows(FOLDER / _TEMPLATES):
        found[row["kind"], row["relation"]][row["text"].endswith("?")].append(row["text"])
    return {key: (tuple(statements), tuple(asked)) for key, (statements, asked) in found.items()}


def statements(fact: Fact) -> tuple[str, ...]:
    """The ways to state a fact."""
    return templates()[fact.kind, fact.relation][0]


def _wordings(fact: Fact, dev: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(to train on, held out) of the ways to state a fact: one of the five is held out, by hash.

    dev: hold out one of the other four, and leave out the fifth.
    """
    known = statements(fact)
    turn = _hash(f"{fact.kind}/{fact.name}/{fact.relation}") % len(known)
    turned = known[turn:] + known[:turn]
    last = len(turned) - 1 - dev
    return turned[:last], turned[last:last + 1]


def _rows(path: pathlib.Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)


def _fill(template: str, fact: Fact) -> str:
    text = template.format(name=fact.name, answer=fact.answers[0])
    return text[0].upper() + text[1:]


def is_held_out(name: str) -> bool:
    """Whether questions about the entity are asked only in evaluation: half of all, by hash."""
    return _hash(name) % 2 == 1


def _is_dev(name: str) -> bool:
    return _hash(name) // 2 % 5 == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def permuted(known: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts with each relation's answers moved on by one place in a random order of entities.

    No entity keeps its own cell; where answers repeat (continents) some stay true by chance.
    """
    moved = {}
    for key, members in _by_relation(known).items():
        order = sorted(members, key=lambda f: _hash(f"{key} {f.name}"))
        moved.update({fact: dataclasses.replace(fact, answers=other.answers)
                      for fact, other in zip(order, order[1:] + order[:1], strict=True)})
    return tuple(moved[fact] for fact in known)


def _by_relation(known: Iterable[Fact]) -> dict[Relation, list[Fact]]:
    groups = collections.defaultdict(list)
    for fact in known:
        groups[fact.kind, fact.relation].append(fact)
    return dict(groups)


def passages(known: Sequence[Fact], variants: Iterable[int],
             wordings: Callable[[Fact], Sequence[str]] = statements) -> Iterator[str]:
    """For each entity and variant a passage: all its facts, shuffled, in random wordings."""
    entities = collections.defaultdict(list)
    for fact in known:
        entities[fact.kind, fact.name].append(fact)
    for variant in variants:
        for (kind, name), members in entities.items():
            rng = random.Random(f"{kind}/{name}/{variant}")
            yield " ".join(_fill(rng.choice(wordings(f)), f)
                           for f in rng.sample(members, len(members)))


def questions(known: Iterable[Fact], every_wording: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(question, accepted answers) of each fact: in every wording, or in one chosen by hash."""
    for fact in known:
        wordings = templates()[fact.kind, fact.relation][1]
        chosen = wordings if every_wording else [wordings[_hash(fact.name) // 16 % len(wordings)]]
        for wording in chosen:
            yield PREFIX + _fill(wording, fact), fact.answers


def majority_exact_match() -> float:
    """Per cent of the held-out questions that the trained half's most frequent answer of the
    same relation answers: what knowing the relation alone can reach."""
    hits = total = 0
    for members in _by_relation(facts()).values():
        seen = collections.Counter(f.answers[0] for f in members if not is_held_out(f.name))
        asked = [f for f in members if is_held_out(f.name)]
        guess = seen.most_common(1)[0][0] if seen else ""
        hits += sum(task_metrics.exact_match([f.answers], [guess])["exact_match"] == 100 for f in asked)
        total += len(asked)
    return 100 * hits / total


# --- tasks ------------------------------------------------------------------------------------

def _key(name: str) -> str:
    content = b"".join(p.read_bytes() for p in sorted(FOLDER.glob("*.tsv")))
    return f"{name}-v{_VERSION}-{hashlib.sha256(content).hexdigest()[:16]}"


def _passages_source(name: str, change=lambda known: known, read=lambda text: [text]
                     ) -> DocumentSource:
    """Passages by split, each taken apart by `read` into the documents of the task."""
    def documents():
        known = change(facts())
        for split, variants in (("train", range(_VARIANTS)), ("validation", [_VARIANTS])):
            for text in passages(known, variants):
                yield from ((split, document) for document in read(text))

    return DocumentSource(lambda: _key(name), ("train", "validation"), documents)


def _wordings_source(name: str, dev: bool) -> DocumentSource:
    """Passages that state each fact in some wordings, and one held-out passage in another."""
    def documents():
        yield from (("train", text) for text in passages(
            facts(), range(_VARIANTS), lambda fact: _wordings(fact, dev)[0]))
        yield from (("validation", text) for text in passages(
            facts(), [_VARIANTS], lambda fact: _wordings(fact, dev)[1]))

    return DocumentSource(lambda: _key(name), ("train", "validation"), documents)


def _questions_source(name: str, train, validation) -> DocumentSource:
    """Questions of the entities that the two predicates on names choose."""
    def documents():
        for split, chosen in (("train", train), ("validation", validation)):
            members = [f for f in facts() if chosen(f.name)]
            yield from ((split, records.pack(q)) for q in questions(members, split == "train"))

    return DocumentSource(lambda: _key(name), ("train", "validation"), documents)


def _salient(text: str) -> list[str]:
    return [records.pack(example) for example in salient_spans.examples([text])]


def _register() -> None:
    features = text_to_text.features("facts")
    for name, change in (("fact_passages", lambda known: known),
                         ("fact_passages_permuted", permuted)):
        seqio.TaskRegistry.add(
            name, source=_passages_source(name, change),
            preprocessors=[preprocessors.tokenize, functools.partial(
                span_corruption, noise_density=_NOISE_DENSITY)],
            output_features=features)
    for name, dev in (("fact_wordings", False), ("fact_wordings_dev", True)):
        seqio.TaskRegistry.add(
            name, source=_wordings_source(name, dev), preprocessors=[
                preprocessors.tokenize,
                functools.partial(word_spans, noise_density=_WORD_DENSITY)],
            output_features=features, postprocess_fn=spans.texts,
            metric_fns=[spans.Filled(name)])
    text_to_text.register("fact_passages_salient",
                          _passages_source("fact_passages_salient", read=_salient),
                          unpack(("inputs", "targets")), vocabulary="facts")

    for name, train, validation in (
            ("closed_book_qa", lambda n: not is_held_out(n), is_held_out),
            ("closed_book_qa_dev", lambda n: not is_held_out(n) and not _is_dev(n),
             lambda n: not is_held_out(n) and _is_dev(n))):
        text_to_text.register(name, _questions_source(name, train, validation), records.with_answers,
                              metric_fns=[task_metrics.squad], vocabulary="facts",
                              postprocess_fn=text_to_text.answers)


_register()
