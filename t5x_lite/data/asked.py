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
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t5x_lite.data import evidence, names, rewriting, salient_choice, text_files
from t5x_lite.errors import UserError

SLOT = "\u2022"
LOST = 0.02      # share of a wording's own answers that may score below its threshold
LEAST = 5        # questions of a wording that the text answers, from which to learn what it asks for


class Wording(NamedTuple):
    """A question without its name, and which spans of a text answer it."""

    text: str
    finder: salient_choice.Finder

    def answer(self, document: rewriting.Document) -> str:
        """What a document says to it; "" where no span looks like an answer."""
        subject = document.subject
        spans = [(self.finder.score(unit, subject, span), -place, unit[slice(*span)])
                 for place, unit in enumerate(document.units) for span in self.finder.spans(unit, subject)
                 if not _is_name(unit, subject, span)]
        return max(spans)[2] if spans else ""


class Asker(NamedTuple):
    """Wordings, and whose name each name is (evidence.by_name, to subjects)."""

    wordings: tuple[Wording, ...]
    subjects: Mapping[str, str]

    def questions(self, document: rewriting.Document) -> list[tuple[str, str]]:
        """(question, answer) of each wording that the document answers, by each of its subject's names; the
        document's units are as they were cut."""
        subject = document.subject
        called = [name for name in names.aliases(subject) if self.subjects.get(name.casefold()) == subject]
        answers = ((w.text, w.answer(document)) for w in self.wordings)
        return [(text.replace(SLOT, name), answer) for text, answer in answers if answer for name in called]


def _is_name(unit: str, subject: str, span: salient_choice.Span) -> bool:
    """Whether the span is the name or a part of it; "Panama City" is no part of "Panama"."""
    return any(start <= span[0] and span[1] <= limit for start, limit in names.places(unit, subject))


def wording(question: str, subject: str) -> str:
    """The question with a slot for the name, in whatever letters and by whichever of its forms it stands there."""
    for name in sorted(names.aliases(subject), key=len, reverse=True):
        text, count = re.subn(rf"(?<!\w){re.escape(name)}(?!\w)", SLOT, question, flags=re.IGNORECASE)
        if count:
            return text
    return question


def by_wording(found: Sequence[evidence.Evidence]) -> dict[str, list[evidence.Evidence]]:
    """The evidence of each wording of which there are LEAST, the commonest first."""
    groups: dict[str, list[evidence.Evidence]] = collections.defaultdict(list)
    for e in found:
        if e.unit:
            groups[wording(e.question.text, e.subject)].append(e)
    return {text: group for text, group in sorted(groups.items(), key=lambda item: -len(item[1]))
            if SLOT in text and len(group) >= LEAST}


def learn(documents: Sequence[rewriting.Document], groups: Mapping[str, Sequence[evidence.Evidence]]) -> Asker:
    """What each wording asks for, from the documents that answer it."""
    subjects = {name: group[0].subject for name, group in evidence.by_name(documents).items()}
    return Asker(tuple(Wording(text, salient_choice.train(documents, group, LOST)) for text, group in groups.items()),
                 subjects)


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
    groups = by_wording(found)
    if not groups:
        raise UserError(f"data.salient_like={like!r}: no wording stands {LEAST} times among its questions that "
                        f"the text answers ({sum(bool(e.unit) for e in found)} of {len(found)}), so that nothing can "
                        "be asked likewise; take data.denoising=salient_kept")
    return learn(documents, groups)
