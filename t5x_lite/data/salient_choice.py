"""Which names and dates to hide: those that look like the answers of a few questions.

A text has many more names than anybody asks for. Ye et al. 2021 (arXiv:2012.15856) learn from the
questions of a closed-book data set which spans to mask, with a network; here it is naive Bayes over the
words around a span, whose positives are the answers of the given questions in their sentences
(evidence.py) and whose negatives are the other spans of the same documents. A span is chosen where it
scores as high as nine of ten of those answers do.

Answers that the detector cannot see, such as ".dz", add their shape: any word of the same pattern is
a span as well. Give training questions: those of the held-out half would tell which facts are asked.
Imports no TensorFlow.
"""

import collections
import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from t5x_lite import files as file_lib
from t5x_lite.data import evidence, names, paths, records, rewriting, text_files
from t5x_lite.errors import UserError

VERSION = 2
_LEFT, _RIGHT = 6, 3       # words of a span's sentence that are looked at
LOST = 0.1                 # share of the questions' own answers that may score below the threshold
_SEEN = 0.02               # share of the answers that a feature must stand beside to speak for a span
_LEAST = 5                 # answers in the text from which to learn
_MOST_SHAPES = 8
_MOST_KNOWN = 256          # answers of small letters ("novelist") that are looked for as they are

Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Finder:
    """Names and dates of a unit; with `weights`, those that score at least `threshold`."""

    shapes: tuple[str, ...] = ()                       # patterns of words that are spans too
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    threshold: float = -math.inf

    def spans(self, unit: str, subject: str) -> list[Span]:
        return [span for span in candidates(unit, self.shapes)
                if not self.weights or self.score(unit, subject, span) >= self.threshold]

    def score(self, unit: str, subject: str, span: Span) -> float:
        return math.fsum(self.weights.get(f, 0.0) for f in features(unit, subject, span))   # in whatever order


ALL = Finder()


@functools.lru_cache(maxsize=1 << 13)
def candidates(unit: str, shapes: tuple[str, ...] = ()) -> tuple[Span, ...]:
    """Names, dates, and words of the shapes, in order, not overlapping."""
    spans = names.salient_spans(unit)
    for shape in shapes:
        more = (m.span() for m in re.finditer(rf"(?<!\S){shape}(?=[\s,;:!?)]|\.?$|\.\s)", unit))
        spans += [(s, e) for s, e in more if all(e <= start or limit <= s for start, limit in spans)]
    return tuple(sorted(spans))


def shape(answer: str) -> str | None:
    """The pattern of a single word: ".dz" -> letters behind a dot. None of several words, and of a plain
    small word, which every word would match."""
    if not answer.strip() or re.search(r"\s", answer) or re.fullmatch(r"[^\W\d_]+", answer):
        return None
    parts = re.findall(r"[a-z]+|[A-Z]+|\d+|.", answer)
    return "".join(_class_of(part) for part in parts)


def _class_of(part: str) -> str:
    for kind in ("[a-z]", "[A-Z]", r"\d"):
        if re.fullmatch(f"{kind}+", part):
            return f"{kind}{{{len(part)}}}" if len(part) < 4 else f"{kind}+"
    return re.escape(part)


@functools.lru_cache(maxsize=1 << 15)   # a document's, which several finders look at one after another
def features(unit: str, subject: str, span: Span) -> frozenset[str]:
    """The words around a span, with their side, and what it is itself: its first letter's kind, its length."""
    text = unit[slice(*span)]
    left, right = unit[:span[0]], unit[span[1]:]
    if subject:
        left, right = left.replace(subject, " \u2022 "), right.replace(subject, " \u2022 ")
    sides = [("<", word) for word in _words(left)[-_LEFT:]] + [
        (">", word) for word in _words(right)[:_RIGHT]]
    first = "9" if text[0].isdigit() else "A" if text[0].isupper() else "a" if text[0].isalpha() else text[0]
    return frozenset({f"{side}{word}" for side, word in sides} | {
        f"={first}", f"={min(len(text.split()), 4)}", f"={any(c.isdigit() for c in text)}"})


def _words(text: str) -> list[str]:
    """Small letters; numbers as 9, names as A: what is said, not of whom."""
    found = re.findall(r"\u2022|\w+", text)
    return ["9" if w[0].isdigit() else w.casefold() if w.islower() or len(w) < 3 else
            f"A{w[:3].casefold()}" for w in found]


def chosen(document: rewriting.Document, finder: Finder) -> tuple[rewriting.Document, list[str]]:
    """(the document without units that have no spans, the texts of all spans, each once, the longest first)."""
    spans = {unit: finder.spans(unit, document.subject) for unit in document.units}
    texts = {unit[s:e] for unit, found in spans.items() for s, e in found}
    units = tuple(unit for unit in document.units if spans[unit])
    return dataclasses.replace(document, units=units), sorted(texts, key=lambda text: (-len(text), text))


# --- learning it ----------------------------------------------------------------------------

def questions_of(path: str, field: str) -> list[evidence.Question]:
    """The questions of a .jsonl, .json or .tsv file with or without a slice. Raises UserError for a
    file without any, and for a question without an answer."""
    matched = paths.EXAMPLES.fullmatch(path)
    if matched is None:
        raise UserError(f"{field}={path!r}: must be a .jsonl, .json or .tsv file of questions")
    pattern, start, stop = matched.groups()
    lines = [example for file in text_files.find_files([pattern], field)
             for example in records.read_examples(file)]
    lines = lines[len(lines) * int(start or 0) // 100:len(lines) * int(stop or 100) // 100]
    if not lines:
        raise UserError(f"{field}={path!r} holds no question")
    for number, (inputs, answers) in enumerate(lines, 1):
        if not any(answer.strip() for answer in answers):
            raise UserError(f"{field}={path!r}: question {number}, {inputs[:60]!r}, has no answer")
    return [evidence.Question(inputs, tuple(answers)) for inputs, answers in lines]


def digest(like: str) -> str:
    """Of the files as they are; "" without any."""
    if not like:
        return ""
    pattern = paths.EXAMPLES.fullmatch(like)
    stats = [file_lib.state_of(file) for file in paths.matches(pattern[1])] if pattern else []
    return hashlib.sha256(repr((stats, VERSION)).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def learned(files: tuple[str, ...], document: str, steps: tuple[str, ...], like: str) -> Finder:
    """The finder of spans like the answers of these questions in the text of the files.

    Raises UserError where the text answers fewer than _LEAST of them.
    """
    if not like:
        return ALL
    documents = [rewriting.cut(text, steps) for text in text_files.read_documents(files, document)]
    found = [e for e in evidence.find(documents, questions_of(like, "data.salient_like")) if e.unit]
    if len(found) < _LEAST:
        raise UserError(f"data.salient_like={like!r}: the text answers {len(found)} of its questions, too few "
                        f"to learn from; give at least {_LEAST} whose sentences stand in it")
    return train(documents, found)


def train(documents: Iterable[rewriting.Document], found: Sequence[evidence.Evidence], lost: float = LOST,
          known: tuple[str, ...] | None = None) -> Finder:
    """Naive Bayes on the evidence against all other spans of the documents that it is from.

    lost: the share of the answers in the evidence that may score below the threshold.
    known: patterns of plain words that are spans too (known_answers; of the evidence, where it is None).
    """
    unseen = (shape(e.answer) for e in found if not e.is_detected)
    shapes = tuple(s for s, n in collections.Counter(filter(None, unseen)).most_common(_MOST_SHAPES) if n > 1)
    shapes += known_answers(found) if known is None else known
    subjects = {e.subject for e in found}
    positives = [features(e.unit, e.subject, e.span) for e in found]
    answers = {(e.unit, e.span) for e in found}
    negatives = [features(unit, d.subject, span) for d in documents if d.subject in subjects
                 for unit in d.units for span in candidates(unit, shapes) if (unit, span) not in answers]
    weights = _log_odds(positives, negatives)
    finder = Finder(shapes, weights)
    scores = sorted(finder.score(e.unit, e.subject, e.span) for e in found
                    if e.is_detected or shapes)
    return dataclasses.replace(finder, threshold=scores[int(len(scores) * lost)] if scores else -math.inf)


def known_answers(found: Iterable[evidence.Evidence]) -> tuple[str, ...]:
    """A pattern of the answers that are no name and have no shape ("novelist"); none without any."""
    plain = collections.Counter(e.answer for e in found if not e.is_detected and len(e.answer.strip()) > 2
                                and not shape(e.answer))
    known = sorted((answer for answer, _ in plain.most_common(_MOST_KNOWN)), key=len, reverse=True)
    return (f"(?:{'|'.join(map(re.escape, known))})",) if known else ()


def _log_odds(positives: Sequence[frozenset[str]], negatives: Sequence[frozenset[str]]) -> dict[str, float]:
    """log p(feature | answer) / p(feature | other span), half an occurrence added to each.

    A feature of fewer than _SEEN of the answers says nothing for them: a single name beside one answer
    would outweigh all else, as other spans are many.
    """
    counts = [collections.Counter(f for features in group for f in features)
              for group in (positives, negatives)]
    sizes = len(positives) + 1, len(negatives) + 1
    weights = {f: math.log((counts[0][f] + 0.5) / sizes[0]) - math.log((counts[1][f] + 0.5) / sizes[1])
               for f in counts[0] | counts[1]}
    least = max(2, _SEEN * len(positives))
    return {f: weight if counts[0][f] >= least else min(weight, 0.0) for f, weight in weights.items()}
