"""scikit-learn's 1,797 handwritten digits (8 x 8, 17 greys) as tokens: pixels, codes, and words beside them.

    digit_pixels     64 greys, row by row
    digit_codes      16 codes, of patches of 2 x 2: the nearest of 64 centres of k-means over the training
                     digits' patches
    digit_drawing    "draw a seven: " -> codes, text and image in one row
    digit_reading    codes -> "seven", the same rows read the other way; scored by accuracy

1,437 digits to train on and 360 held out, in one random order. The first two are for
objective.name=lm alone; the others share the vocabulary bytes+codes:64 and may be mixed.
"""

import functools

import numpy as np

from t5x_lite.data import arrays, quantise, task_metrics
from t5x_lite.data.arrays import Example

GREYS, SIDE, PATCH, CODES = 17, 8, 2, 64
TRAIN = 1437
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Split = dict[str, tuple[np.ndarray, np.ndarray]]   # images [n, 8, 8] of 0 to 16, classes [n]


@functools.cache
def images() -> Split:
    """The digits of each split."""
    import sklearn.datasets
    found = sklearn.datasets.load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    parts = {"train": order[:TRAIN], "validation": order[TRAIN:]}
    return {split: (found.images[places].astype(np.int32), found.target[places])
            for split, places in parts.items()}


@functools.cache
def codebook() -> quantise.Codebook:
    """The centres of the training digits' patches."""
    vectors = quantise.patches(images()["train"][0], PATCH)
    return quantise.fit(vectors.reshape(-1, PATCH**2), CODES)


def codes(digits: np.ndarray) -> np.ndarray:
    """int32 [n, 16] of images [n, 8, 8]."""
    return codebook().encode(quantise.patches(digits, PATCH))


def pixels_of_codes(numbers: np.ndarray) -> np.ndarray:
    """The images [n, 8, 8] that codes [n, 16] stand for."""
    return quantise.unpatch(codebook().decode(numbers), PATCH, (SIDE, SIDE))


def _pixels() -> dict[str, list[Example]]:
    return {split: [{"targets": (digit.ravel(),)} for digit in digits]
            for split, (digits, _) in images().items()}


def _codes() -> dict[str, list[Example]]:
    return {split: [{"targets": (row,)} for row in codes(digits)] for split, (digits, _) in images().items()}


def _drawing() -> dict[str, list[Example]]:
    return {split: [{"inputs": (f"draw a {WORDS[number]}: ",), "targets": (row,)}
                    for row, number in zip(codes(digits), numbers, strict=True)]
            for split, (digits, numbers) in images().items()}


def _reading() -> dict[str, list[Example]]:
    return {split: [{"inputs": (row, " is "), "targets": (WORDS[number],)}
                    for row, number in zip(codes(digits), numbers, strict=True)]
            for split, (digits, numbers) in images().items()}


_BOTH = ("inputs", "targets")
arrays.register("digit_pixels", _pixels, f"codes:{GREYS}")
arrays.register("digit_codes", _codes, f"codes:{CODES}")
arrays.register("digit_drawing", _drawing, f"bytes+codes:{CODES}", features=_BOTH, ends=True)
arrays.register("digit_reading", _reading, f"bytes+codes:{CODES}", features=_BOTH, ends=True,
                metric_fns=[task_metrics.accuracy])
