"""Text-to-text tasks: a source, a format that makes "inputs" and "targets", metrics.

A format is a function on a tf.data.Dataset that gives examples with the strings "inputs" and
"targets"; what else it leaves ("answers", "label", "idx") reaches the postprocessor. Everything
is graph operations on strings, without Python functions: iterators over it can be saved.

    register("trec", TfdsSource("trec:1.0.0", ("train", "test")), format_fn,
             metric_fns=[metrics.accuracy])
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from t5x_lite.data import vocabularies
from t5x_lite.data.preprocessors import Format
from t5x_lite.errors import UserError


class TfdsSource(seqio.TfdsDataSource):
    """A TFDS data set, downloaded and prepared on first use.

    splits: names, or {name: TFDS split such as "train[:90%]"}.
    """

    def __init__(self, name: str, splits: Sequence[str] | Mapping[str, str]):
        super().__init__(name, splits=dict(splits) if isinstance(splits, Mapping) else splits)
        self._prepared = False

    @property
    def tfds_dataset(self):
        if not self._prepared:
            try:
                self._tfds_dataset.builder.download_and_prepare()
            except (OSError, AssertionError, ImportError, ValueError, tf.errors.OpError,
                    tfds.core.DatasetNotFoundError) as error:
                raise UserError(
                    f"the TFDS data set {self._tfds_dataset.name} is not prepared and could not "
                    f"be made ({type(error).__name__}: {_first_line(error)}); set "
                    "TFDS_DATA_DIR to a folder that holds it") from error
            self._prepared = True
        return self._tfds_dataset


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0][:300]


def features(vocabulary: str = "t5") -> dict[str, seqio.Feature]:
    """The output features inputs and targets, with EOS."""
    return {name: seqio.Feature(vocabularies.load(vocabulary), add_eos=True)
            for name in ("inputs", "targets")}


def preprocessors(format_fn: Format) -> list:
    """The format, tokens beside the texts (…_pretokenized), EOS after trimming.

    What stands before the placeholder can be cached (cached.py).
    """
    return [format_fn, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim]


class Kind(NamedTuple):
    """What makes a task of files (records.RecordSource): how they are read, and what follows."""
    read: Callable           # path -> records
    format_fn: Format        # records -> "inputs" and "targets"
    postprocess_fn: Callable | None
    metric_fns: tuple[Callable, ...]
    preprocessors: Callable[[Format], list] = preprocessors
    features: Callable[[], dict[str, seqio.Feature]] = features
    source: Callable[..., seqio.DataSource] | None = None   # None: records.RecordSource


def register(name: str, source: seqio.DataSource, format_fn: Format, *,
             metric_fns: Sequence[Callable] = (), postprocess_fn: Callable | None = None,
             vocabulary: str = "t5") -> seqio.Task:
    """Adds the task to seqio's registry; data.vocabulary replaces its vocabulary in a run."""
    return seqio.TaskRegistry.add(
        name, source=source, preprocessors=preprocessors(format_fn),
        output_features=features(vocabulary), metric_fns=list(metric_fns),
        postprocess_fn=postprocess_fn)


def example_text(example: Mapping, key: str) -> str:
    """A string of an example as evaluation sees it: bytes, numpy or text."""
    value = example[key]
    value = value.item() if hasattr(value, "item") else value
    return value.decode() if isinstance(value, bytes) else str(value)


# --- postprocessors: (text, example=…, is_target=…) -> what the metrics compare ---------------

def answers(text: str, example=None, is_target: bool = False):
    """All allowed answers for a target, the text for a prediction (T5's "qa")."""
    if not is_target:
        return text
    return [a.decode() if isinstance(a, bytes) else str(a) for a in example["answers"]]


def class_number(label_names: Sequence[str]) -> Callable[..., int]:
    """A postprocessor: the label's place in label_names, -1 for any other text."""
    def number(text: str, **_) -> int:
        return label_names.index(text) if text in label_names else -1
    return number


def number(text: str, **_) -> float:
    """The text as a float, -1 where it is none."""
    try:
        return float(text)
    except ValueError:
        return -1.0
