"""What is counted of each block of documents, by workers that know nothing of one another.

`measure` is a pure function of a block; the sums of blocks are the sums of the corpus, in any order,
so that processes or Beam's workers may share the work.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from datasketch import MinHash

from t5x_lite.corpus import ngrams, overlap, patterns
from t5x_lite.corpus.documents import Block, Corpus
from t5x_lite.corpus.overlap import EvaluationSet
from t5x_lite.corpus.patterns import Groups

SHINGLE = 5            # words of a run by which near duplicates are told
PERMUTATIONS = 64      # of MinHash …
SCHEME = "affine32"    # … with random linear functions modulo a prime
_LANGUAGE_SAMPLE = 300   # characters that a language is told by
_LOWEST_32_BITS = np.uint64(0xFFFFFFFF)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to look for."""

    block_list: frozenset[str] = frozenset()
    groups: Groups = dataclasses.field(default_factory=dict)
    evaluation: Sequence[EvaluationSet] = ()
    vocabulary: str = ""     # "" counts no tokens
    languages: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known of one document."""

    digest: bytes                   # of its text without space at either end: equal, exact duplicates
    signature: np.ndarray | None    # uint32 [PERMUTATIONS]; None where it has fewer words than a run
    blocked: bool                   # it holds a word of the block list
    overlaps: tuple[frozenset[int], ...]   # by evaluation set: the examples that stand in it


@dataclasses.dataclass
class Counts:
    """Sums over documents."""

    documents: int = 0
    characters: int = 0
    utf8_bytes: int = 0
    words: int = 0
    tokens: int = 0
    lengths: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    languages: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    hosts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    years: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    personal: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    personal_documents: collections.Counter = dataclasses.field(
        default_factory=collections.Counter)
    groups: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    blocked_groups: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    # evaluation set by number -> examples found by three sentences (overlap.py)
    span_examples: dict[int, set[int]] = dataclasses.field(default_factory=dict)

    def add(self, other: "Counts") -> None:
        """Adds the other's sums to these."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, collections.Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                for key, examples in theirs.items():
                    mine.setdefault(key, set()).update(examples)
            else:
                setattr(self, field.name, mine + theirs)


# (corpus, settings) -> `measure` of its blocks, in the corpus' order.
Workers = Callable[[Corpus, Settings], Iterator[tuple[Counts, list[Row]]]]


def measure(block: Block, settings: Settings) -> tuple[Counts, list[Row]]:
    """The sums of a block, and a row a document in its order."""
    counts, rows = Counts(), []
    tokens = _token_counter(settings.vocabulary)
    for document in block:
        text = document.text
        words = ngrams.words_of(text)
        hashes = ngrams.hashes_of(words)
        counts.documents += 1
        counts.characters += len(text)
        counts.utf8_bytes += len(text.encode("utf-8", "replace"))
        counts.words += len(words)
        counts.tokens += tokens(text)
        counts.lengths[length_bin(len(words))] += 1
        if settings.languages:
            counts.languages[language(text)] += 1
        if document.host:
            counts.hosts[document.host] += 1
        if document.year:
            counts.years[document.year] += 1
        personal = patterns.personal_data(text)
        counts.personal.update(personal)
        counts.personal_documents.update(personal.keys())
        blocked = patterns.mentions(words, settings.block_list)
        for group, names in settings.groups.items():
            if patterns.mentions(words, names):
                counts.groups[group] += 1
                counts.blocked_groups[group] += blocked
        overlaps = []
        for number, evaluation in enumerate(settings.evaluation):
            by_words, by_spans = overlap.examples_in(hashes, text, evaluation)
            overlaps.append(frozenset(by_words))
            counts.span_examples.setdefault(number, set()).update(by_spans)
        rows.append(Row(hashlib.blake2b(text.strip().encode("utf-8", "replace"),
                                        digest_size=16).digest(),
                        signature(hashes), blocked, tuple(overlaps)))
    return counts, rows


def length_bin(words: int) -> int:
    """The power of two at or below a number of words; 0 for none."""
    return 1 << (words.bit_length() - 1) if words else 0


def shingles(words: np.ndarray) -> np.ndarray:
    """The distinct hashes of the runs of SHINGLE words, uint64, sorted.

    words: as ngrams.word_hashes gives them.
    """
    return np.unique(ngrams.ngram_hashes(words, SHINGLE))


def signature(words: np.ndarray) -> np.ndarray | None:
    """MinHash of a document's runs of words, uint32 [PERMUTATIONS] (Broder 1997)."""
    runs = shingles(words)
    if not len(runs):
        return None
    sketch = MinHash(num_perm=PERMUTATIONS, hashfunc=_identity, scheme=SCHEME,
                     permutations=_permutations())
    sketch.update_batch((runs & _LOWEST_32_BITS).tolist())
    return sketch.hashvalues


@functools.lru_cache(maxsize=1)
def _permutations():
    """The random functions of every signature; drawing them costs more than a short text does."""
    return MinHash(num_perm=PERMUTATIONS, seed=1, scheme=SCHEME).permutations


def sketch_of(signature_P: np.ndarray) -> MinHash:
    """A signature, uint32 [PERMUTATIONS], as datasketch's index wants it."""
    return MinHash(num_perm=PERMUTATIONS, scheme=SCHEME, permutations=_permutations(),
                   hashvalues=signature_P)


def _identity(value: int) -> int:
    return value


def language(text: str) -> str:
    """ISO 639-1 of the text's first 300 characters, as py3langid tells it; "" where it has no
    letters."""
    sample = text[:_LANGUAGE_SAMPLE]
    if not any(map(str.isalpha, sample)):
        return ""
    import py3langid
    return py3langid.classify(sample)[0]


@functools.lru_cache(maxsize=4)
def _token_counter(vocabulary: str):
    if not vocabulary:
        return lambda text: 0
    from t5x_lite.data import vocabularies
    loaded = vocabularies.load(vocabulary)
    return lambda text: len(loaded.encode(text))


def merged_overlaps(rows: Sequence[Row], number: int) -> set[int]:
    """The examples of an evaluation set that stand in any of the documents."""
    return set().union(*(row.overlaps[number] for row in rows))


def summary(settings: Settings, counts: Counts, rows: Sequence[Row]
            ) -> Mapping[str, Mapping[str, int]]:
    """{evaluation set: examples, how many are too short to look for, stand in the corpus by 13
    words, by three sentences, and documents that hold one}."""
    return {evaluation.name: {
        "examples": evaluation.examples, "short": evaluation.short,
        "by_words": len(merged_overlaps(rows, number)),
        "by_sentences": len(counts.span_examples.get(number, ())),
        "documents": sum(bool(row.overlaps[number]) for row in rows)}
        for number, evaluation in enumerate(settings.evaluation)}
