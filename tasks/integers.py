"""Small problems of integers, made on the spot: what is learned by heart, and what is understood.

    modular_addition      a, b -> (a + b) mod 97, of all pairs: 45 % to train on, the others held out
                          (Power et al. 2022, arXiv:2201.02177)
    noisy_classes         12 letters of 10 -> one of 10 classes, by a random linear teacher; of the
                          2,000 training examples 20 % have a class drawn at random, held-out ones none
                          (Nakkiran et al. 2019, arXiv:1912.02292, with images)
    noisy_classes_clean   the same without the noise

Numbers are the bytes of ByT5's ids, 3 + n, without an end token: an example is `inputs` and one
target. `register` does the same for arrays of yours.
"""

import functools
from collections.abc import Callable

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import vocabularies
from t5x_lite.errors import UserError

Split = tuple[np.ndarray, np.ndarray]   # inputs [n, L] and targets [n, M], of bytes, 0 to 255
_FIRST = 3                              # ByT5's ids of padding, end and unknown come before
MODULUS, SHARE = 97, 0.45
LETTERS, LENGTH, CLASSES, NOISE = 10, 12, 10, 0.2
EXAMPLES = {"train": 2000, "validation": 2000}


def register(name: str, make: Callable[[], dict[str, Split]], splits: tuple[str, ...] = (
        "train", "validation")) -> seqio.Task:
    """Adds a task whose examples `make` gives, a split each, on first use.

    Raises:
        UserError: on use, numbers that are no bytes.
    """
    feature = seqio.Feature(vocabularies.load("byt5"), add_eos=False)

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None):
        inputs, targets = (_ids(name, numbers) for numbers in make()[split])
        return tf.data.Dataset.from_tensor_slices({"inputs": inputs, "targets": targets})

    return seqio.TaskRegistry.add(
        name, source=seqio.FunctionDataSource(dataset, splits=splits), preprocessors=[],
        output_features={"inputs": feature, "targets": feature})


def _ids(name: str, numbers: np.ndarray) -> np.ndarray:
    if numbers.min() < 0 or numbers.max() >= 256:
        raise UserError(f"{name} has numbers from {numbers.min()} to {numbers.max()}; they must be "
                        f"bytes, 0 to 255.")
    return numbers.astype(np.int32) + _FIRST


@functools.cache
def modular_addition(modulus: int = MODULUS, share: float = SHARE) -> dict[str, Split]:
    """All pairs and their sums, in one random order; the first `share` of them to train on."""
    pairs = np.stack(np.meshgrid(np.arange(modulus), np.arange(modulus)), -1).reshape(-1, 2)
    pairs = np.random.default_rng(0).permutation(pairs)
    sums = pairs.sum(1, keepdims=True) % modulus
    cut = round(share * len(pairs))
    return {"train": (pairs[:cut], sums[:cut]), "validation": (pairs[cut:], sums[cut:])}


@functools.cache
def noisy_classes(noise: float = NOISE) -> dict[str, Split]:
    """Letters and classes; a share `noise` of the training classes is drawn at random."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(LENGTH, LETTERS, CLASSES))
    found = {}
    for split, count in EXAMPLES.items():
        letters = rng.integers(0, LETTERS, (count, LENGTH))
        scores = weights[np.arange(LENGTH), letters].sum(1)
        classes = scores.argmax(1)
        drawn, is_noisy = rng.integers(0, CLASSES, count), rng.random(count) < noise
        if split == "train":
            classes = np.where(is_noisy, drawn, classes)
        found[split] = letters, classes[:, None]
    return found


register("modular_addition", modular_addition)
register("noisy_classes", noisy_classes)
register("noisy_classes_clean", functools.partial(noisy_classes, noise=0.0))
