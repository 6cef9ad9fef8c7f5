"""Questions that a text answers, made from the wording of a few: "where was • born", asked of every subject.

    data.denoising=salient_asked, data.salient_like=qa.jsonl[:50%]

What is filled into its own sentence is not found for a question (closed_book_any_text.py). Lewis et al. 2021
(arXiv:2102.07033) therefore have a model write the questions that a text answers, before anybody asks. Here the
training questions are the writer: one without its subject's name is a wording; of each wording that recurs, the spans
that look like its answers are learned as in salient_choice.py, and a document whose best span scores as high as nearly
all of those answers (LOST) is asked that question, with its own subject in it. Spans that were read wrongly become
wrong answers, so that this is worth what the detector is.

Give training questions alone: the wording of the others would tell what is asked. Imports no TensorFlow.
"""

import collections
import functools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from t5x_lite.data import called, evidence, names, rewriting, salient_choice, text_files
from t5x_lite.errors import UserError

SLOT = "\u2022"
LOST = 0.02      # share of a wording's own answers that may score below its threshold
LEAST = 5        # questions of a wording that the text answers, from which to learn what it asks for
ALIKE = 0.5      # share of a wording's answers that another's finder gives, where both ask for the same
WORSE = 0.05     # share of the answers that one finder for two wordings may lose
MOST = 16        # wordings of a relation that are asked


class Relation(NamedTuple):
    """What several wordings ask for: questions without their names, how often each stood, which spans answer."""

    wordings: Mapping[str, int]
    finder: salient_choice.Finder

    def answer(self, document: rewriting.Document) -> str:
        """What a document says to it; "" where no span looks like an answer."""
        subject = document.subject
        spans = [(self.finder.score(unit, subject, span), -place, unit[slice(*span)])
                 for place, unit in enumerate(document.units) for span in self.finder.spans(unit, subject)
                 if not _is_name(unit, subject, span)]
        return max(spans)[2] if spans else ""


Answers = Sequence[tuple[Relation, str]]


class Asker(NamedTuple):
    """Relations, whom the text is about, and how often the questions call people by which kind of name."""

    relations: tuple[Relation, ...]
    index: called.Index
    kinds: Mapping[str, int]

    def answers(self, document: rewriting.Document) -> Answers:
        """What a document answers, its units as they were cut."""
        found = ((relation, relation.answer(document)) for relation in self.relations)
        return [(relation, answer) for relation, answer in found if answer]

    def questions(self, document: rewriting.Document, answers: Answers, number: int) -> list[tuple[str, str]]:
        """(question, answer) of each relation for a version of the document, its wording and the subject's name drawn as
        often as the given questions have them; none where a name may mean somebody else."""
        names_ = self.names(document.subject)
        rng = random.Random(f"asked/{number}/{document.subject}")
        return [(_drawn(rng, relation.wordings).replace(SLOT, _drawn(rng, names_)), answer)
                for relation, answer in answers if names_]

    def names(self, subject: str) -> dict[str, int]:
        """{name: how often questions call people so} of those that mean this subject alone."""
        known = self.index.subjects.get(subject)
        return {name: self.kinds[kind] for kind, name in (known.aliases if known else {}).items()
                if self.kinds.get(kind) and self.index.by_name.get(name.casefold()) is known}


def _drawn(rng: random.Random, weights: Mapping[str, int]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _is_name(unit: str, subject: str, span: salient_choice.Span) -> bool:
    """Whether the span is the name or a part of it; "Panama City" is no part of "Panama"."""
    return any(start <= span[0] and span[1] <= limit for start, limit in names.places(unit, subject))


def wording(question: str, name: str) -> str:
    """The question with a slot for the name, in whatever letters it stands there."""
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", SLOT, question, flags=re.IGNORECASE) if name else question


def by_wording(found: Sequence[evidence.Evidence], least: int = LEAST) -> dict[str, list[evidence.Evidence]]:
    """The evidence of each wording of which there are so many, the commonest first."""
    groups: dict[str, list[evidence.Evidence]] = collections.defaultdict(list)
    for e in found:
        if e.unit:
            groups[wording(e.question.text, e.called or e.subject)].append(e)
    return {text: group for text, group in sorted(groups.items(), key=lambda item: -len(item[1]))
            if SLOT in text and len(group) >= least}


def learn(documents: Sequence[rewriting.Document], found: Sequence[evidence.Evidence]) -> Asker:
    """What the questions ask for, from the documents that answer them.

    Wordings come the commonest first. One joins a relation where a single finder gives the answers of both as often as
    their own do; a rare one where the relation's finder gives its answers (ALIKE), and is not asked otherwise.
    """
    index = called.Index(documents)
    train = functools.partial(salient_choice.train, documents, lost=LOST, known=salient_choice.known_answers(
        e for e in found if e.unit))
    groups: list[dict[str, list[evidence.Evidence]]] = []
    finders: list[salient_choice.Finder] = []
    for text, group in by_wording(found, 1).items():
        shares = [_agreement(finder, group, index) for finder in finders]
        place = max(range(len(shares)), key=shares.__getitem__, default=None)
        near = place is not None and shares[place] >= ALIKE
        if near and (len(group) < LEAST or _one_serves(groups[place], group, train, index)):
            groups[place][text] = group
            if len(group) >= LEAST:
                finders[place] = train(_together(groups[place]))
        elif len(group) >= LEAST:
            groups.append({text: group})
            finders.append(train(group))
    relations = tuple(Relation(_commonest(of), train(_together(of))) for of in groups)
    return Asker(relations, index, called.kinds_used([(index.subjects[e.subject], e.called) for of in groups
                                                      for e in _together(of)]))


def _one_serves(groups: Mapping[str, list[evidence.Evidence]], group: list[evidence.Evidence], train: Callable,
                index: called.Index) -> bool:
    """Whether one finder gives the answers of a relation and of a wording as often as one each."""
    apart = _together(groups), group
    own = sum(_agreement(train(part), part, index) * len(part) for part in apart)
    both = [*apart[0], *group]
    return _agreement(train(both), both, index) * len(both) >= (1 - WORSE) * own


def _together(groups: Mapping[str, list[evidence.Evidence]]) -> list[evidence.Evidence]:
    return [e for group in groups.values() for e in group]


def _commonest(groups: Mapping[str, list[evidence.Evidence]]) -> dict[str, int]:
    return {text: len(groups[text]) for text in sorted(groups, key=lambda text: -len(groups[text]))[:MOST]}


def _agreement(finder: salient_choice.Finder, group: Sequence[evidence.Evidence], index: called.Index) -> float:
    """The share of some answers that a finder gives."""
    relation = Relation({}, finder)
    right = sum(any(relation.answer(d) in e.question.answers for d in index.subjects[e.subject].documents) for e in group)
    return right / len(group)


@functools.lru_cache(maxsize=4)
def learned(files: tuple[str, ...], document: str, steps: tuple[str, ...], like: str) -> Asker:
    """The wordings of the questions in `like` and what they ask for in the text of the files.

    Raises UserError without questions, and where no wording recurs among those that the text answers.
    """
    if not like:
        raise UserError("data.denoising='salient_asked' asks as some questions do: set data.salient_like to a "
                        "file of training questions, qa.jsonl[:50%], or take salient_kept")
    documents = [rewriting.cut(text, steps) for text in text_files.read_documents(files, document)]
    found = evidence.find(documents, salient_choice.questions_of(like, "data.salient_like"))
    if not by_wording(found):
        raise UserError(f"data.salient_like={like!r}: no wording stands {LEAST} times among its questions that "
                        f"the text answers ({sum(bool(e.unit) for e in found)} of {len(found)}), so that nothing can "
                        "be asked likewise; take data.denoising=salient_kept")
    return learn(documents, found)
