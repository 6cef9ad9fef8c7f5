"""Which evaluation examples stand in a corpus, by runs of 13 words and by three sentences.

An example is found in a document where a run of 13 of its words is one of the document's (GPT-3,
Brown et al. 2020, arXiv:2005.14165, appendix C). A shorter example counts where all its words
stand in a row, from 8 words on; one of fewer words says nothing and is only counted. By three
sentences is the stricter look of T5's own data (ngrams.sentence_spans).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_lite.corpus import ngrams

WORDS = 13
FEWEST_WORDS = 8


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """The hashes to look for, sorted, and which example each belongs to."""

    name: str
    examples: int                          # in all
    short: int                             # of fewer than FEWEST_WORDS words: not looked for
    hashes: Mapping[int, np.ndarray]       # run length in words -> uint64 [grams], sorted
    owners: Mapping[int, np.ndarray]       # run length in words -> int32 [grams], the example
    spans: np.ndarray                      # uint64 [spans], sorted: three sentences in a row
    span_owners: np.ndarray                # int32 [spans]


def evaluation_set(name: str, texts: Sequence[str]) -> EvaluationSet:
    """The index of an evaluation set's examples."""
    by_length: dict[int, list[tuple[np.ndarray, int]]] = {}
    spans: list[tuple[np.ndarray, int]] = []
    short = 0
    for number, text in enumerate(texts):
        words = ngrams.word_hashes(text)
        length = min(len(words), WORDS)
        if length < FEWEST_WORDS:
            short += 1
            continue
        by_length.setdefault(length, []).append((ngrams.ngram_hashes(words, length), number))
        spans.append((ngrams.sentence_spans(text), number))
    hashes, owners = {}, {}
    for length, grams in by_length.items():
        hashes[length], owners[length] = _sorted(grams)
    span_hashes, span_owners = _sorted(spans)
    return EvaluationSet(name, len(texts), short, hashes, owners, span_hashes, span_owners)


def _sorted(parts: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all the examples in order, and the example of each."""
    if not parts:
        return np.zeros(0, np.uint64), np.zeros(0, np.int32)
    hashes = np.concatenate([h for h, _ in parts])
    owners = np.concatenate([np.full(len(h), number, np.int32) for h, number in parts])
    order = np.argsort(hashes, kind="stable")
    return hashes[order], owners[order]


def examples_in(words: np.ndarray, text: str, evaluation: EvaluationSet
                ) -> tuple[set[int], set[int]]:
    """(examples found by runs of words, examples found by three sentences) in one document.

    words: of the document, as ngrams.hashes_of gives them.
    """
    by_words: set[int] = set()
    for length, hashes in evaluation.hashes.items():
        by_words |= _owners(ngrams.ngram_hashes(words, length), hashes, evaluation.owners[length])
    by_spans: set[int] = set()
    if len(evaluation.spans):
        by_spans = _owners(ngrams.sentence_spans(text), evaluation.spans, evaluation.span_owners)
    return by_words, by_spans


def _owners(grams: np.ndarray, hashes: np.ndarray, owners: np.ndarray) -> set[int]:
    """The examples that any of the document's hashes belongs to."""
    if not len(grams) or not len(hashes):
        return set()
    left = np.searchsorted(hashes, grams, "left")
    right = np.searchsorted(hashes, grams, "right")
    hits = np.flatnonzero(right > left)
    return {int(owner) for i in hits for owner in owners[left[i]:right[i]]}
