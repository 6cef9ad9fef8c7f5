"""Which sentence of a text answers a question: the document of the question's name, the unit with the answer.

Found by names and whole words, without a model; what is not found is counted, not guessed. Storage is
probed on these sentences, the answer hidden (closed_book.py), and what kind of name a data set asks for is learned
from them (salient_choice.py). Imports no TensorFlow.
"""

import collections
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from t5x_lite.data import called, names, rewriting


class Question(NamedTuple):
    """A question and its accepted answers."""

    text: str
    answers: tuple[str, ...]


class Evidence(NamedTuple):
    """What a text says to a question; each field is empty where it says nothing."""

    question: Question
    subject: str = ""                   # of the document whose subject the question names
    unit: str = ""                      # its sentence with an answer …
    span: tuple[int, int] = (0, 0)      # … and where the answer stands in it
    called: str = ""                    # what the question calls the subject

    @property
    def answer(self) -> str:
        return self.unit[slice(*self.span)]

    @property
    def is_detected(self) -> bool:
        """Whether the detector of names and dates finds this very answer."""
        return self.span[1] > 0 and self.span in names.salient_spans(self.unit)

    @property
    def keeps_name(self) -> bool:
        """Whether its sentence also holds the subject's name, outside the answer."""
        return bool(self.unit) and any(limit <= self.span[0] or self.span[1] <= start
                                       for start, limit in names.places(self.unit, self.subject))


def find(documents: Sequence[rewriting.Document], questions: Iterable[Question]) -> list[Evidence]:
    """The evidence of each question, in order."""
    index = called.Index(documents)
    return [_of(question, index) for question in questions]


def _of(question: Question, index: called.Index) -> Evidence:
    meant = index.find(question.text, lambda subject: bool(_answers(question, subject)))
    if meant is None:
        return Evidence(question)
    subject, name = meant
    found = [Evidence(question, subject.name, unit, span, name) for unit, span in _answers(question, subject)]
    if not found:
        return Evidence(question, subject.name, called=name)
    wanted = _words(question.text) - _words(subject.name) - _words(name)
    counts = collections.Counter(word for d in subject.documents for unit in d.units for word in _words(unit) & wanted)
    return max(found, key=lambda e: (round(_closeness(e.unit, counts), 1), e.is_detected, -len(e.unit)))


def _answers(question: Question, subject: called.Subject) -> list[tuple[str, tuple[int, int]]]:
    """(unit, where in it) of all that may answer."""
    return [(unit, span) for document in subject.documents for unit in document.units
            for answer in question.answers for span in names.places(unit, answer)]


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def _closeness(unit: str, counts: Mapping[str, int]) -> float:
    """How much of the question a unit says; a word that few units have counts more."""
    return sum(1 / counts[word] for word in _words(unit) if word in counts)


def rewritten(evidence: Evidence, rewriting_steps: rewriting.Rewriting) -> tuple[str, tuple[int, int]]:
    """The unit by some steps, and where the answer stands in it: it is counted from the end, as names come in front."""
    before = names.places(evidence.unit, evidence.answer)
    unit = rewriting.of_unit(evidence.subject, evidence.unit, rewriting_steps)
    after = names.places(unit, evidence.answer)
    if len(after) < len(before):   # it was a part of the name
        return evidence.unit, evidence.span
    return unit, after[before.index(evidence.span) - len(before)]


def coverage(found: Sequence[Evidence]) -> dict[str, int]:
    """How many questions there are, and of how many the text tells the answer in a form to learn from."""
    return {
        "questions": len(found),
        "whose name is the subject of a document": sum(bool(e.subject) for e in found),
        "whose answer stands in it": sum(bool(e.unit) for e in found),
        "as a name or date that the detector finds": sum(e.is_detected for e in found),
        "in a sentence that also holds the whole name": sum(e.keeps_name for e in found),
    }
