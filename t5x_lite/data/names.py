"""Names, dates and sentences of a text, found by capitals and patterns. Imports no TensorFlow."""

import re

_MONTH = (r"(?:January|February|March|April|May|June|July|August|September|October|November|"
          r"December|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)")
_YEAR = r"(?:1[0-9]{3}|20[0-9]{2})"
_DATE = re.compile(
    rf"\b(?:\d{{1,2}}(?:st|nd|rd|th)?(?: of)? {_MONTH}(?:,? {_YEAR})?"   # 4 July 1776
    rf"|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? {_YEAR})?"              # July 4, 1776
    rf"|{_MONTH},? {_YEAR}"                                             # July 1776
    rf"|{_YEAR}s?"                                                         # 1776, 1770s
    r")(?!\w)")
_WORD = r"[^\W\d_a-z][\w'’.&-]*"   # begins with a capital letter, of any script that has them
NAME = re.compile(rf"{_WORD}(?: (?:(?:of|the|de|da|di|du|la|le|van|von|der|den|bin|ibn|al|and)"
                   rf" ){{0,2}}{_WORD})*")
# Words that open sentences and are no names; after one of them the name may still go on.
OPENERS = frozenset("""a an the this that these those he she it they we i you his her its their our
my your in on at by for from with as of to after before during when while where if although though
since until under over between among and but or nor so yet both each all some many most one two
three several other another there here what who which why how not no also however then thus once
according despite unlike like because about into upon through within without more such only just
even still first second later early both either neither every any""".split())
_ABBREVIATIONS = frozenset("mr mrs ms dr prof st sr jr gen col capt sgt rev hon no vs etc inc ltd "
                           "co jan feb mar apr aug sept oct nov dec u.s u.k".split())
_SENTENCE_END = re.compile(r"[.!?][\"”’')\]]*\s+(?=[\"“‘(\[]?[^\W_a-z])")


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; line breaks inside one become spaces."""
    sentences, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        before = text[start:match.start()].rsplit(None, 1)
        word = before[-1].lower().lstrip("(\"“") if before else ""
        if text[match.start()] == "." and (word in _ABBREVIATIONS or len(word) == 1):
            continue   # "Dr. Smith", "J. Smith"
        sentences.append(text[start:match.end()])
        start = match.end()
    return [s for s in (" ".join(part.split()) for part in (*sentences, text[start:])) if s]


def salient_spans(sentence: str) -> list[tuple[int, int]]:
    """(start, limit) in characters of the dates and names, in order, not overlapping.

    A single capitalised word that opens the sentence is no name unless it is longer than one
    word or all its letters after the first are not small: "Paris is" cannot be told from
    "Bread is" and is left out.
    """
    spans = [m.span() for m in _DATE.finditer(sentence) if m.group() not in ("May", "March")]
    for match in NAME.finditer(sentence):
        start, limit = trimmed(sentence, *match.span())
        words = sentence[start:limit].split()
        opens = start == 0 or sentence[:start].rstrip().endswith((":", ";")) or (
            not sentence[:start].strip("\"“‘([ "))
        acronym = len(words) == 1 and words[0].isupper() and len(words[0]) > 1
        if not words or (opens and len(words) == 1 and not acronym) or words == ["I"]:
            continue
        if all(limit <= s or start >= e for s, e in spans):
            spans.append((start, limit))
    return sorted(spans)


def trimmed(sentence: str, start: int, limit: int) -> tuple[int, int]:
    """The span without opening words that are no names, possessives and final punctuation."""
    while start < limit:
        word, _, _ = sentence[start:limit].partition(" ")
        if word.lower().strip(".'’") not in OPENERS:
            break
        start = min(start + len(word) + 1, limit)
    text = re.sub(r"(?:['’]s?|[.&-]+)$", "", sentence[start:limit])
    # Initials keep their dot: "George W." was cut from "George W. Bush" only by a line end.
    return start, start + len(text)


# --- whom a text is about -------------------------------------------------------------------

_HEADING = re.compile(r"\s*(?:=+\s*(.+?)\s*=+|#+\s*(.+?)\s*#*)\s*")
_PREAMBLE = frozenset("born raised educated known named sir dame".split())
# Behind a name: ", 8th Earl of Carlisle", ", Duke of Saxe-Weimar", ", 1st Baronet".
TITLED = re.compile(rf",(?: \d+(?:st|nd|rd|th) {_WORD}(?: {_WORD})*| {_WORD}(?: {_WORD})*(?= of ))"
                    rf"(?: of {_WORD}(?:(?: and)? {_WORD})*)?")
# Behind a first name: ' "Bert" Nelson', " d'Évreux".
_NICKNAMED = re.compile(rf" ?[\"“] ?[^\"”\d]{{1,25}}[\"”] ?({NAME.pattern})| [dl]['’]{NAME.pattern}")


def subject(text: str) -> str:
    """Whom or what a text is about, "" where nothing tells: its heading ("= Algeria =", "# Algeria"), or
    the name that its first sentence begins with, or the first name of several words in it, or any."""
    first_line = text.lstrip().partition("\n")[0]
    heading = _HEADING.fullmatch(first_line)
    if heading:
        return heading[1] or heading[2]
    first = (sentences(first_line) or [""])[0]
    names = [first[slice(*trimmed(first, *m.span()))] for m in NAME.finditer(first)]
    names = [n for n in names if n and n.lower() not in _PREAMBLE and not _DATE.fullmatch(n)]
    opening = [_extended(first, n) for n in names if first.startswith(n)]
    return next(iter([*opening, *(n for n in names if " " in n), *names]), "")


def _extended(text: str, name: str) -> str:
    """The name that a text begins with, with what belongs to it: 'Albert "Bert" Nelson', "Hugh, 2nd Baron Ulm"."""
    behind = _NICKNAMED.match(text[len(name):]) or (" " not in name and TITLED.match(text[len(name):]))
    return name + behind[0].rstrip(".,") if behind else name


def holds(text: str, name: str) -> bool:
    """Whether the name stands in the text as whole words, in these letters."""
    return bool(places(text, name))


def places(text: str, name: str) -> list[tuple[int, int]]:
    """(start, limit) of the name's occurrences as whole words."""
    if not name or name not in text:
        return []
    return [m.span() for m in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
