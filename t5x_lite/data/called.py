"""What a text's subject is called, and whom a question means.

Questions call people otherwise than texts do: "Bob Hoskins" for "Robert William Hoskins", "J. W. N. Sullivan" for "John
William Navin Sullivan", "George Bishop" for "Sir George Sidney Bishop CB OBE". `aliases` are what a text's opening
tells by rule; Index.find also takes whoever's opening has all words of the question's name, and, where only some are
there, who has the answer. Imports no TensorFlow.
"""

import collections
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from t5x_lite.data import names

_TITLES = frozenset("""sir dame lord lady dr prof mr mrs ms st saint rev gen col capt don doña baron baroness count
countess princess prince king queen general colonel major captain lieutenant admiral pope cardinal bishop archbishop
sheikh senator justice""".split())
_SUFFIXES = frozenset("jr sr ii iii iv".split())
_SMALL = frozenset("de da di du dos das del della la le van von der den bin ibn al el".split())
_HELPERS = frozenset("was is are were did does do has had name tell".split())   # may open a question before a name
_QUOTED = re.compile(r"\s*[\"“]\s*([^\"”]+?)\s*[\"”]\s*")
_KNOWN = re.compile(rf"\bknown (?:\w+ )*?(?:as|name)\b[ \"“]*({names.NAME.pattern})")
_PARTLY = 0.45    # share of a name's words, the rare counting more, from which an answer may tell who is meant
_USED = 0.02      # share of the questions that call people so, from which documents are asked about so


def aliases(subject: str, opening: str = "") -> dict[str, str]:
    """{kind: name}, each name once: what else a text's subject is called in whole, and by surname.

    "Sir Thomas Alva Edison Jr." -> whole; plain "Thomas Alva Edison"; short "Thomas Edison"; surname "Edison".
    A name with "of" or "and" ("Bosnia and Herzegovina") is not shortened. The opening, a document's first unit, may
    have a title behind the name ("…, 8th Earl of Carlisle") or say how one is known.
    """
    quoted = _QUOTED.search(subject)
    words = _plain(_QUOTED.sub(" ", subject).split())
    after = opening.partition(subject)[2] if subject else ""
    title, known = names.TITLED.match(after), _KNOWN.search(opening)
    found = {
        "whole": subject,
        "plain": " ".join(words),
        "short": _short(words),
        "titled": subject + title[0] if title else "",
        "nickname": f"{quoted[1]} {words[-1]}" if quoted and words else "",
        "known": known[1].rstrip(".") if known else "",
        "surname": words[-1] if len(words) > 1 and _is_shortened(words) and words[-1].lower() not in _SUFFIXES else "",
    }
    kinds = {name: kind for kind, name in reversed(found.items()) if name}   # the first kind of a name
    return {kind: name for kind, name in found.items() if kinds.get(name) == kind}


def _plain(words: list[str]) -> list[str]:
    """Without titles, "Jr." and letters of honour."""
    while len(words) > 2 and words[0].lower().rstrip(".") in _TITLES:
        words = words[1:]
    while len(words) > 2 and (words[-1].lower().rstrip(".") in _SUFFIXES
                              or re.fullmatch(r"(?![IVX]+$)[A-Z]{2,4}", words[-1])):
        words = words[:-1]
    return [word.rstrip(",") for word in words]


def _is_shortened(words: Sequence[str]) -> bool:
    return all(word[0].isupper() or word in _SMALL for word in words)


def _short(words: Sequence[str]) -> str:
    """First and last name, the latter with its small words: "Vítor Godinho", "Ludwig van Beethoven"."""
    if len(words) < 3 or not _is_shortened(words):
        return " ".join(words)
    start = len(words) - 1
    while start > 1 and words[start - 1] in _SMALL:
        start -= 1
    return " ".join([words[0], *words[start:]])


# --- whom a question means ------------------------------------------------------------------

class Document(Protocol):
    """What is read of a rewriting.Document."""

    subject: str
    units: tuple[str, ...]


class Subject(NamedTuple):
    """All documents of one subject."""

    name: str
    documents: tuple[Document, ...]
    aliases: dict[str, str]
    head: frozenset[str]     # words of the opening up to "was" or "is"


def mention(question: str) -> str:
    """The longest name in a question, "" without capitals: "Where was Ada Berg, 2nd Duchess of Ulm born?"."""
    found = [""]
    for match in names.NAME.finditer(question):
        start, limit = names.trimmed(question, *match.span())
        while question[start:limit].partition(" ")[0].lower() in _HELPERS:
            start = min(start + question[start:limit].find(" ") + 1, limit) if " " in question[start:limit] else limit
        title = names.TITLED.match(question[limit:])
        found.append(question[start:limit] + (title[0] if title else ""))
    return max(found, key=len)


class Index:
    """Whom each name in a text may mean; what two subjects may be called is nobody's, unless it is all of one's name."""

    def __init__(self, documents: Iterable[Document]):
        groups: dict[str, list[Document]] = collections.defaultdict(list)
        for document in documents:
            groups[document.subject].append(document)
        self.subjects = {name: _subject(name, group) for name, group in groups.items() if name}
        named: dict[str, dict[str, Subject]] = collections.defaultdict(dict)
        for subject in self.subjects.values():
            for name in subject.aliases.values():
                named[name.casefold()][subject.name] = subject
        whole = {subject.name.casefold(): subject for subject in self.subjects.values()}
        self.by_name = {name: whole.get(name) or next(iter(group.values())) for name, group in named.items()
                        if name in whole or len(group) == 1}
        self._with_word: dict[str, list[Subject]] = collections.defaultdict(list)
        for subject in self.subjects.values():
            for word in subject.head:
                self._with_word[word].append(subject)

    def find(self, question: str, has_answer: Callable[[Subject], bool]) -> tuple[Subject, str] | None:
        """(whom the question means, what it calls them); None where that cannot be told."""
        name, folded = mention(question), question.casefold()
        alias = max((a for a in self.by_name if a in folded and names.places(folded, a)
                     and self._counts(a, name)), key=len, default="")
        if alias and (len(alias) >= len(name) or alias not in name.casefold()):
            return self.by_name[alias], _as_written(question, alias)
        subject = self._by_words(name, has_answer)
        if subject:
            return subject, name
        return (self.by_name[alias], _as_written(question, alias)) if " " in alias else None

    def _counts(self, alias: str, name: str) -> bool:
        """Whether an alias of one word is a whole name, or is all that the question calls somebody."""
        subject = self.by_name[alias]
        return " " in alias or alias == subject.name.casefold() or alias == name.casefold()

    def _by_words(self, name: str, has_answer: Callable[[Subject], bool]) -> Subject | None:
        """The one subject whose opening has all words of a name, or the most of those that have the answer."""
        words = [w for w in _words(name) if w not in _TITLES and w not in _SMALL and w not in ("of", "the", "and")]
        if not words:
            return None
        rare = {w: math.log((len(self.subjects) + 1) / (max(len(self._with_word.get(w, ())), 1) - 0.5)) for w in words}
        candidates = {s.name: s for w in words if len(w) > 1 for s in self._with_word.get(w, ())}
        shares = {n: sum(rare[w] for w in words if _has(s.head, w)) / sum(rare.values()) for n, s in candidates.items()}
        for least, test in ((0.999, lambda s: True), (_PARTLY, has_answer)):
            best = [n for n, share in shares.items() if share >= least and test(candidates[n])]
            top = [n for n in best if shares[n] == max(map(shares.get, best))]
            if len(top) == 1:
                return candidates[top[0]]
        return None


def _subject(name: str, documents: Sequence[Document]) -> Subject:
    opening = next((d.units[0] for d in documents if d.units), "")
    head = re.split(r"\b(?:was|is|were|are)\b", opening[:300])[0]
    return Subject(name, tuple(documents), aliases(name, opening), frozenset(_words(f"{name} {head}")))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _has(head: frozenset[str], word: str) -> bool:
    """Whether a word stands there, or for an initial, one that begins with it."""
    return word in head or (len(word) == 1 and any(w[0] == word for w in head))


def _as_written(question: str, alias: str) -> str:
    """The alias in the letters of the question."""
    return re.search(rf"(?<!\w){re.escape(alias)}(?!\w)", question, re.IGNORECASE)[0]


def kinds_used(pairs: Sequence[tuple[Subject, str]]) -> dict[str, int]:
    """{kind of alias: how many of some questions call their subject so}, of at least _USED of them; the whole name always."""
    counts = collections.Counter(kind for subject, name in pairs for kind, alias in subject.aliases.items()
                                 if alias.casefold() == name.casefold())
    return {"whole": 1} | {kind: n for kind, n in counts.items() if n >= max(2, _USED * len(pairs))}
