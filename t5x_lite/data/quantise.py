"""Continuous arrays as codes: patches, and the nearest of k-means' centres.

    vectors = patches(images, 2)                  # [n, H, W] -> [n, places, 4]
    book = fit(vectors.reshape(-1, 4), 64, seed=0)
    codes = book.encode(vectors)                  # [n, places], 0 to 63
    images = unpatch(book.decode(codes), 2, (8, 8))

Shape letters: P places of an array, D numbers of a vector, K codes.
"""

import dataclasses

import numpy as np

from t5x_lite.errors import UserError


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Centres, float32 [K, D]: a code is the number of the nearest one, by squared distance."""

    centres: np.ndarray

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """int32 codes [...] of vectors [..., D].

        Raises:
            UserError: vectors of another size, or numbers that are not finite.
        """
        vectors = np.asarray(vectors, np.float32)
        size = self.centres.shape[1]
        if vectors.shape[-1] != size:
            raise UserError(f"vectors of {vectors.shape[-1]} numbers, and a codebook of {size}: encode "
                            "what it was fitted on")
        if not np.isfinite(vectors).all():
            raise UserError("vectors hold a number that is not finite; leave such vectors out")
        # |x - c|^2 without |x|^2, which is the same for every centre; around the centres' middle and in
        # float64, since far from 0 the two terms nearly cancel.
        middle = self.centres.mean(0, dtype=np.float64)
        flat, centres = vectors.reshape(-1, size) - middle, self.centres - middle
        distances = np.sum(centres**2, 1) - 2 * flat @ centres.T
        return distances.argmin(1).astype(np.int32).reshape(vectors.shape[:-1])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The centres [..., D] of codes [...].

        Raises:
            UserError: a code that the codebook has not.
        """
        codes = np.asarray(codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < len(self.centres):
            raise UserError(f"codes from {codes.min()} to {codes.max()}, and a codebook of "
                            f"{len(self.centres)}: codes are 0 to {len(self.centres) - 1}")
        return self.centres[codes]


def fit(vectors: np.ndarray, num_codes: int, seed: int = 0) -> Codebook:
    """The codebook of k-means (Lloyd's algorithm from k-means++, scikit-learn) over vectors [n, D].

    Raises:
        UserError: fewer different vectors than codes, or numbers that are not finite.
    """
    import sklearn.cluster
    vectors = np.asarray(vectors, np.float32)
    if not np.isfinite(vectors).all():
        raise UserError("vectors hold a number that is not finite; leave such vectors out")
    different = len(np.unique(vectors, axis=0))
    if different < num_codes:
        raise UserError(f"{num_codes} codes of {different} different vectors: fit at most {different}")
    found = sklearn.cluster.KMeans(num_codes, n_init=1, random_state=seed).fit(vectors)
    return Codebook(found.cluster_centers_.astype(np.float32))


def patches(images: np.ndarray, size: int) -> np.ndarray:
    """[n, H, W] -> [n, P, size * size], places by rows, as numbers of the same type.

    Raises:
        UserError: a height or width that `size` does not divide.
    """
    count, height, width = images.shape
    if height % size or width % size:
        raise UserError(f"images of {height} x {width} are no patches of {size} x {size}")
    parts = images.reshape(count, height // size, size, width // size, size)
    return parts.transpose(0, 1, 3, 2, 4).reshape(count, -1, size * size)


def unpatch(vectors: np.ndarray, size: int, shape: tuple[int, int]) -> np.ndarray:
    """The images [n, H, W] that `patches` took apart; shape: (H, W)."""
    height, width = shape
    parts = vectors.reshape(-1, height // size, width // size, size, size)
    return parts.transpose(0, 1, 3, 2, 4).reshape(-1, height, width)
