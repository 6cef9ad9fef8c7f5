"""Salient span masking: a sentence, one of its names or dates hidden, to be filled in."""

import re
from collections.abc import Iterator, Sequence

import seqio
import tensorflow as tf

from t5x_lite.data import records, text_files, text_to_text

PREFIX, MASK = "nem: ", "_X_"
_VERSION = 1   # raise it whenever the detector finds other spans
def mask_salient_spans(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """{"text", "spans": {"start", "limit"} in bytes} -> inputs and targets, a span an example."""
    plain = tf.autograph.experimental.do_not_convert

    def one(text, start, limit):
        hidden = [PREFIX, tf.strings.substr(text, 0, start), MASK,
                  tf.strings.substr(text, limit, -1)]
        return {"inputs": tf.strings.join(hidden),
                "targets": tf.strings.substr(text, start, limit - start)}

    def spans(example):
        starts, limits = (tf.cast(example["spans"][k], tf.int32) for k in ("start", "limit"))
        return tf.data.Dataset.from_tensor_slices((starts, limits)).map(
            plain(lambda start, limit: one(example["text"], start, limit)))

    return dataset.flat_map(plain(spans))


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
_NAME = re.compile(rf"{_WORD}(?: (?:(?:of|the|de|da|di|du|la|le|van|von|der|den|bin|ibn|al|and)"
                   rf" ){{0,2}}{_WORD})*")
# Words that open sentences and are no names; after one of them the name may still go on.
_OPENERS = frozenset("""a an the this that these those he she it they we i you his her its their our
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
    for match in _NAME.finditer(sentence):
        start, limit = _trimmed(sentence, *match.span())
        words = sentence[start:limit].split()
        opens = start == 0 or sentence[:start].rstrip().endswith((":", ";")) or (
            not sentence[:start].strip("\"“‘([ "))
        acronym = len(words) == 1 and words[0].isupper() and len(words[0]) > 1
        if not words or (opens and len(words) == 1 and not acronym) or words == ["I"]:
            continue
        if all(limit <= s or start >= e for s, e in spans):
            spans.append((start, limit))
    return sorted(spans)


def _trimmed(sentence: str, start: int, limit: int) -> tuple[int, int]:
    """The span without opening words that are no names, possessives and final punctuation."""
    while start < limit:
        word, _, _ = sentence[start:limit].partition(" ")
        if word.lower().strip(".'’") not in _OPENERS:
            break
        start = min(start + len(word) + 1, limit)
    text = re.sub(r"(?:['’]s?|[.&-]+)$", "", sentence[start:limit])
    # Initials keep their dot: "George W." was cut from "George W. Bush" only by a line end.
    return start, start + len(text)


def examples(text: str) -> Iterator[tuple[str, str]]:
    """(inputs, targets) of every salient span of every sentence of a text."""
    for sentence in sentences(text):
        for start, limit in salient_spans(sentence):
            yield f"{PREFIX}{sentence[:start]}{MASK}{sentence[limit:]}", sentence[start:limit]


def task(name: str, files: Sequence[str], split: str, document: str,
         vocabulary: seqio.Vocabulary) -> seqio.Task:
    """A task over the salient spans of text files; it is not registered.

    document: what a document of a plain text file is, as in text_files.read_documents.
    """
    def spans(path: str) -> Iterator[tuple[str, str]]:
        for text in text_files.read_documents([path], document):
            yield from examples(text)

    source = records.RecordSource(f"salient_spans-{document}-v{_VERSION}", {split: files}, spans)
    return seqio.Task(
        name, source=source,
        preprocessors=text_to_text.preprocessors(records.unpack(("inputs", "targets"))),
        output_features={f: seqio.Feature(vocabulary, add_eos=True)
                         for f in ("inputs", "targets")})
