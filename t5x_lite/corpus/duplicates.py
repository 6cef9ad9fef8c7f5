"""Documents that a corpus holds twice, exactly or nearly.

Exact duplicates have equal texts, space at either end apart. Near ones share at least 80 % of their
distinct runs of five words (Jaccard's index; Lee et al. 2022, arXiv:2107.06499, with theirs). MinHash
finds pairs that may be near; each is then measured on its texts, so that no pair is a guess.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from datasketch import MinHashLSH

from t5x_lite.corpus import measure, ngrams
from t5x_lite.corpus.documents import Document
from t5x_lite.corpus.measure import Row

NEAR = 0.8        # Jaccard's index from which two documents are near duplicates
_SEARCHED = 0.6   # … and from which MinHash has to propose a pair, which keeps misses rare
# Of pages of one template each is like all others, and their pairs grow by the square: from so many
# earlier ones on that are alike by so much (of their signatures), a document is measured against these
# and stands for nobody itself.
_MANY, _ALIKE = 64, 0.9


def exact(rows: Sequence[Row]) -> dict[int, int]:
    """{document: the first one with the same text}, numbers in the order of the corpus."""
    first: dict[bytes, int] = {}
    copies = {}
    for number, row in enumerate(rows):
        original = first.setdefault(row.digest, number)
        if original != number:
            copies[number] = original
    return copies


def candidates(rows: Sequence[Row], copies: Mapping[int, int]) -> list[tuple[int, int]]:
    """Pairs (earlier, later) that MinHash holds for near; exact copies are left out."""
    index = MinHashLSH(threshold=_SEARCHED, num_perm=measure.PERMUTATIONS)
    pairs = []
    for number, row in enumerate(rows):
        if row.signature is None or number in copies:
            continue
        sketch = measure.sketch_of(row.signature)
        earlier = sorted(map(int, index.query(sketch)))
        alike = _alike(rows, earlier, row.signature) if len(earlier) >= _MANY else []
        if len(alike) >= _MANY:
            pairs += [(other, number) for other in alike[:_MANY]]
            continue
        pairs += [(other, number) for other in earlier]
        index.insert(number, sketch)
    return sorted(pairs)


def _alike(rows: Sequence[Row], earlier: Sequence[int], signature_P: np.ndarray) -> list[int]:
    """Those of the earlier documents whose signatures agree in _ALIKE of their places or more."""
    signatures = [rows[number].signature for number in earlier]
    share = np.mean(np.stack([s for s in signatures if s is not None]) == signature_P, axis=1)
    return [number for number, same in zip(earlier, share, strict=True) if same >= _ALIKE]


def near(documents: Iterable[Document], pairs: Sequence[tuple[int, int]]) -> dict[int, int]:
    """{document: the first of its near duplicates}, by Jaccard's index of the candidates' texts.

    documents: the whole corpus again, in its order.
    """
    wanted = {number for pair in pairs for number in pair}
    runs: dict[int, np.ndarray] = {}
    for number, document in enumerate(documents):
        if number in wanted:
            runs[number] = measure.shingles(ngrams.word_hashes(document.text))
    copies: dict[int, int] = {}
    for earlier, later in pairs:   # sorted: chains lead to their first document
        if later not in copies and jaccard(runs[earlier], runs[later]) >= NEAR:
            copies[later] = copies.get(earlier, earlier)
    return copies


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The share of what either of two sets of distinct values holds that both hold."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)
