"""Words of a text as numbers, and hashes of every run of n of them.

A word is a run of letters and digits in lower case: GPT-3's comparison of training and evaluation
text ignores case, punctuation and space too (Brown et al. 2020, arXiv:2005.14165, appendix C).
Hashes have 64 bits: among 10^8 runs of words and 10^6 searched ones a false match has a chance of
10^-5.
"""

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np

_WORD = re.compile(r"\w+")
# An odd multiplier makes each place of a word in the run count differently, modulo 2^64.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SENTENCE = re.compile(r"[^.!?\n]+[.!?\n]*")


@functools.lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest())


def words_of(text: str) -> list[str]:
    """The words of a text in order: runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def word_hashes(text: str) -> np.ndarray:
    """uint64 [number of words]: a hash of each word of the text, in order."""
    return hashes_of(words_of(text))


def hashes_of(words: Sequence[str]) -> np.ndarray:
    """uint64 [number of words]: a hash of each word."""
    return np.fromiter(map(_word_hash, words), np.uint64, len(words))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """uint64 [words - n + 1]: a hash of every run of n words; empty for a shorter text.

    words: as word_hashes gives them.
    """
    count = len(words) - n + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for place in range(n):
        total = total * _MULTIPLIER + words[place:place + count]
    return total


def sentence_spans(text: str, sentences: int = 3) -> np.ndarray:
    """uint64 [sentences - 2]: a hash of every three sentences in a row, by which C4 was freed of
    what it holds twice (Raffel et al. 2020, arXiv:1910.10683, section 2.2).

    A sentence ends at . ! ? or a line end; those without a word are left out.
    """
    hashes = []
    for sentence in _SENTENCE.findall(text):
        words = word_hashes(sentence)
        if len(words):
            hashes.append(ngram_hashes(words, len(words))[0])
    return ngram_hashes(np.asarray(hashes, np.uint64), sentences)
