"""Tasks over arrays of codes, with text beside them where there is some.

    def digits() -> dict[str, list[Example]]:
        return {"train": [{"targets": (codes,)}, …], "validation": […]}

    register("digit_pixels", digits, "codes:17")

A feature of an example is a tuple of parts, each an array of codes or, under bytes+codes:N, a text:
("a seven: ", codes). Without "inputs" an example is for objective.name=lm alone. The ids follow from the run's
vocabulary, so that data.vocabulary=bytes+codes:N mixes such a task with others.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import vocabularies
from t5x_lite.data.codes import CodeVocabulary, TextAndCodes
from t5x_lite.errors import UserError

Part = str | np.ndarray | Sequence[int]
Example = Mapping[str, tuple[Part, ...]]


class ArraySource(seqio.FunctionDataSource):
    """Examples of `make`, called on first use, as ids of a vocabulary."""

    def __init__(self, name: str, make: Callable[[], Mapping[str, Sequence[Example]]],
                 splits: Sequence[str], vocabulary: seqio.Vocabulary):
        self._name, self._make, self._splits_of = name, make, tuple(splits)
        self._vocabulary = vocabulary
        super().__init__(self._dataset, splits=self._splits_of)

    def of(self, vocabulary: seqio.Vocabulary) -> "ArraySource":
        """The same in the ids of another vocabulary.

        Raises:
            UserError: it has no codes.
        """
        if not isinstance(vocabulary, CodeVocabulary):
            raise UserError(f"{self._name!r} is made of codes, which data.vocabulary="
                            f"{vocabularies.name_of(vocabulary)} has not: use "
                            f"{vocabularies.name_of(self._vocabulary)}")
        return ArraySource(self._name, self._make, self._splits_of, vocabulary)

    def num_input_examples(self, split: str) -> int:
        return len(self._make().get(split, ()))

    def _dataset(self, split: str, shuffle_files: bool = False, seed: int | None = None
                 ) -> tf.data.Dataset:
        examples = self._make().get(split)
        if not examples:
            raise UserError(f"the split {split!r} of {self._name!r} holds no example: what makes the task is "
                            "to give it some, or name the splits that it has (arrays.register(splits=…))")
        columns = {name: [self._ids(example[name], f"{self._name}, {split}, example {number}")
                          for number, example in enumerate(examples)] for name in examples[0]}
        held = {name: (_padded(rows), np.array([len(row) for row in rows], np.int32))
                for name, rows in columns.items()}
        return tf.data.Dataset.from_tensor_slices(held).map(tf.autograph.experimental.do_not_convert(
            lambda x: {name: ids[:size] for name, (ids, size) in x.items()}))

    def _ids(self, parts: Iterable[Part], where: str) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if not isinstance(part, str):
                ids += self._vocabulary.ids(part, where)
                continue
            if not isinstance(self._vocabulary, TextAndCodes):
                raise UserError(f"{where} holds the text {part[:20]!r}, and data.vocabulary="
                                f"{self._vocabulary.path} has codes alone: use bytes+{self._vocabulary.path}")
            ids += self._vocabulary.encode(part)
        return ids


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    table = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for number, row in enumerate(rows):
        table[number, :len(row)] = row
    return table


def register(name: str, make: Callable[[], Mapping[str, Sequence[Example]]], vocabulary: str, *,
             features: Sequence[str] = ("targets",), splits: Sequence[str] = ("train", "validation"),
             ends: bool = False, metric_fns: Sequence[Callable] = (),
             postprocess_fn: Callable | None = None) -> seqio.Task:
    """Adds the task of what `make` gives, {split: examples}, to seqio's registry.

    vocabulary: codes:N or bytes+codes:N. ends: whether targets end in EOS, of examples of several lengths
    that are to be written by a decoder.
    """
    loaded = vocabularies.load(vocabulary)
    made = functools.cache(make)
    output = {feature: seqio.Feature(loaded, add_eos=ends and feature == "targets") for feature in features}
    return seqio.TaskRegistry.add(
        name, source=ArraySource(name, made, splits, loaded),
        preprocessors=[seqio.preprocessors.append_eos_after_trim] if ends else [],
        output_features=output, metric_fns=list(metric_fns), postprocess_fn=postprocess_fn)
