"""Rewriting text ahead of the denoiser: data.rewriting=sentences,named,headed,reorder, data.rewrites=5.

What a model reads in one form alone it gives back in that form alone: a birthplace is filled into its
sentence and not found for the question (Allen-Zhu & Li 2023, arXiv:2309.14316). Their cure is more than
one form of each text, and the name in every sentence. The steps are rows of a table, taken in order:

    sentences   cut into sentences
    lines       cut at line ends, for text of one statement a line
    named       he, she, his, her and the surname alone become the name of the text's subject
    headed      "NAME: " in front of every sentence without the name
    reorder     the sentences in another order
    thinned     words left out, but for the name; names and dates stay or go as a whole

A document is one unit until a step cuts it. `subject` finds whom it is about (names.py). With
data.rewrites each document comes in so many versions; what is drawn for one hangs on
data.rewriting_seed, the document's text and the version's number alone. All documents come in one version,
then in the next: versions of one side by side would be learned and forgotten together. All of it happens ahead of
tf.data, whose place in the result is saved as in any other text. Imports no TensorFlow.
"""

import dataclasses
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from t5x_lite.data import names
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError, known

VERSION = 2           # raise it whenever the same text gives other text
MOST_THINNED = 0.6   # of the words that may go, at most


@dataclasses.dataclass(frozen=True)
class Document:
    """A text in units: one, the whole, until a step cuts it."""

    subject: str
    units: tuple[str, ...]
    glue: str = " "      # between units, where they become one text again

    @property
    def text(self) -> str:
        return self.glue.join(self.units)


def _sentences(document: Document, rng: random.Random) -> Document:
    units = [s for unit in document.units for s in names.sentences(unit)]
    return dataclasses.replace(document, units=tuple(units))


def _lines(document: Document, rng: random.Random) -> Document:
    lines = "\n".join(document.units).split("\n")
    return dataclasses.replace(document, units=tuple(filter(None, map(str.strip, lines))), glue="\n")


# --- the name in every sentence -------------------------------------------------------------

_PRONOUN = re.compile(r"\b(he|she|his|her|hers|him|himself|herself)\b", re.IGNORECASE)
# What stands behind "her" where it is no possessive: "met her in Rome", "made her the queen".
_NOT_OWNED = re.compile(r"\s*(?:$|[.,;:!?)]|(?:in|at|on|to|for|from|by|with|as|of|and|or|but|the|a|an|"
                        r"when|while|where|after|before|during|until|because|that|who|was|were|is)\b)")


def with_name(unit: str, subject: str) -> str:
    """The unit with the subject's name for he, she and the surname: "His wife" -> "Ada Berg's wife".

    Only where the unit says nobody else's name first, whom the pronoun may mean: "Tom Fry said he …".
    """
    if not subject:
        return unit
    unit = _whole_name(unit, subject)
    out, end = [], 0
    for match in _PRONOUN.finditer(unit):
        before = unit[:match.start()]
        if _others(before, subject):
            break
        word = match[0].lower()
        owned = word == "his" or (word == "her" and not _NOT_OWNED.match(unit, match.end()))
        if word in ("himself", "herself"):
            continue
        out += [unit[end:match.start()], subject + ("'s" if owned or word == "hers" else "")]
        end = match.end()
    return "".join(out) + unit[end:]


def _others(text: str, subject: str) -> bool:
    """Whether the text has a name of several words other than the subject's: another person's, maybe."""
    spans = [text[s:e] for s, e in names.salient_spans(text)]
    return any(" " in span and not span[0].isdigit() and subject not in span for span in spans)


def _whole_name(unit: str, subject: str) -> str:
    """The unit with the whole name for the surname where it stands alone."""
    first, _, _ = subject.partition(" ")
    surname = subject.rpartition(" ")[2]
    if first == surname:
        return unit
    capital = r"[^\W\d_a-z][\w'’.-]*"
    alone = re.compile(rf"(?<![\w'’.-])(?<!\b{re.escape(subject[:-len(surname)])}){re.escape(surname)}"
                       rf"(?![\w-])(?! {capital})")
    def whole(match: re.Match) -> str:
        word = unit[:match.start()].rstrip().rpartition(" ")[2]
        other = word[:1].isupper() and word.lower().strip(".,'\"") not in names.OPENERS
        return match[0] if other and unit[:match.start()].endswith(" ") else subject
    return alone.sub(whole, unit)


def _named(document: Document, rng: random.Random) -> Document:
    units = tuple(with_name(unit, document.subject) for unit in document.units)
    return dataclasses.replace(document, units=units)


def _headed(document: Document, rng: random.Random) -> Document:
    subject = document.subject
    if not subject:
        return document
    units = [u if names.holds(u, subject) else f"{subject}: {u}" for u in document.units]
    return dataclasses.replace(document, units=tuple(units))


# --- what is drawn --------------------------------------------------------------------------

def _reorder(document: Document, rng: random.Random) -> Document:
    return dataclasses.replace(document, units=tuple(rng.sample(document.units, len(document.units))))


def _thinned(document: Document, rng: random.Random) -> Document:
    units = [_thin(unit, document.subject, rng) for unit in document.units]
    return dataclasses.replace(document, units=tuple(units))


def _thin(unit: str, subject: str, rng: random.Random) -> str:
    """Words left out at a rate that is drawn first, uniform up to MOST_THINNED."""
    rate = rng.uniform(0, MOST_THINNED)
    kept = [piece for piece, must in _pieces(unit, subject) if must or rng.random() >= rate]
    return " ".join(kept)


def _pieces(unit: str, subject: str) -> Iterator[tuple[str, bool]]:
    """(words that stay or go together, whether they must stay): the name, other names and dates, words."""
    named = names.places(unit, subject)
    found = [span for span in names.salient_spans(unit)
             if all(span[1] <= start or limit <= span[0] for start, limit in named)]
    spans = sorted([*named, *found])
    end = 0
    for place, (start, limit) in enumerate(spans):
        following = spans[place + 1][0] if place + 1 < len(spans) else len(unit)
        before = re.fullmatch(r"(.*?)(\S*)", unit[end:start], re.DOTALL)   # a bracket stays with its word
        tail = re.match(r"\S*", unit[limit:following])[0]
        yield from ((word, False) for word in before[1].split())
        yield before[2] + unit[start:limit] + tail, (start, limit) in named
        end = limit + len(tail)
    yield from ((word, False) for word in unit[end:].split())


# --- by name --------------------------------------------------------------------------------

class Step(NamedTuple):
    """A step and whether it draws."""

    run: Callable[[Document, random.Random], Document]
    draws: bool = False


STEPS = {
    "sentences": Step(_sentences),
    "lines": Step(_lines),
    "named": Step(_named),
    "headed": Step(_headed),
    "reorder": Step(_reorder, draws=True),
    "thinned": Step(_thinned, draws=True),
}


CUTS = ("sentences", "lines")


class Rewriting(NamedTuple):
    """The steps in order, how many versions of a document, and the seed of what is drawn."""

    steps: tuple[str, ...] = ()
    rewrites: int = 1
    seed: int = 0


NONE = Rewriting()


def of(config: DataConfig) -> Rewriting:
    """The fields of a config. Raises UserError for an unknown step, and for versions that would be alike."""
    steps = tuple(filter(None, map(str.strip, config.rewriting.split(","))))
    for name in steps:
        known("data.rewriting", "step", name, STEPS)
    if config.rewrites > 1 and not any(STEPS[name].draws for name in steps):
        drawing = ", ".join(name for name, step in STEPS.items() if step.draws)
        raise UserError(f"data.rewrites={config.rewrites} with data.rewriting={config.rewriting!r}: its "
                        f"versions would be alike; add a step that draws ({drawing}), or set it to 1")
    return Rewriting(steps, config.rewrites, config.rewriting_seed)


def cut(text: str, steps: tuple[str, ...] = ()) -> Document:
    """The document in units as `steps` cut it and otherwise as it is; in sentences where none does."""
    how = next((name for name in steps if name in CUTS), CUTS[0])
    return STEPS[how].run(whole(text), random.Random(0))


def of_unit(subject: str, unit: str, rewriting: Rewriting) -> str:
    """One unit by the steps, in its first version."""
    return version(Document(subject, (unit,)), rewriting, 0).text


def whole(text: str) -> Document:
    """A text as one unit."""
    return Document(names.subject(text), (text,))


def version(document: Document, rewriting: Rewriting, number: int) -> Document:
    """The document in one of its versions, 0 … rewrites - 1."""
    rng = random.Random(f"{rewriting.seed}/{number}/{document.text}")
    for name in rewriting.steps:
        document = STEPS[name].run(document, rng)
    return document
