"""Tokenisation ahead of tf.data, for vocabularies that are Python (python_vocabulary.py).

tf.data cannot save iterators that call Python. `ahead` therefore splits a task behind its last
tokenising step: what stands before runs once, and its examples are kept in the document cache;
the rest reads them natively. Random steps before it draw once and for all, with seed 0.

The cache is made anew when the files of the source, the steps' names or settings, or the
vocabulary change; give a task over a Python function another name when the function changes.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Callable, Iterator

import seqio
import tensorflow as tf

from t5x_lite.data import preprocessors
from t5x_lite.data.document_cache import DocumentSource
from t5x_lite.data.python_vocabulary import PythonVocabulary
from t5x_lite.errors import UserError

_TOKENISERS = (preprocessors.tokenize, preprocessors.tokenize_choices, seqio.preprocessors.tokenize,
               seqio.preprocessors.tokenize_and_append_eos)
_VERSION = 1   # raise it whenever records look different

_log = logging.getLogger(f"t5x_lite.{__name__}")   # shown by commands, as its own lines are


def ahead(task: seqio.Task) -> seqio.Task:
    """The task over examples that were tokenised before, where its vocabulary or its source (a
    chats.ChatSource) needs that."""
    if hasattr(task.source, "of"):
        return task.replace(source=task.source.of(task.output_features["targets"].vocabulary))
    vocabularies = [f.vocabulary for f in task.output_features.values()]
    steps = [n for n, step in enumerate(task.preprocessors, 1)
             if getattr(step, "func", step) in _TOKENISERS]
    if not steps or not any(isinstance(v, PythonVocabulary) for v in vocabularies):
        return task
    first, rest = task.preprocessors[:steps[-1]], task.preprocessors[steps[-1]:]
    return task.replace(source=TokenizedSource(task, first), preprocessors=list(rest))


def tokenising_step(task: seqio.Task) -> int | None:
    """The place of the task's first tokenising step."""
    return next((n for n, step in enumerate(task.preprocessors)
                 if getattr(step, "func", step) in _TOKENISERS), None)


class TokenizedSource(seqio.DataSource):
    """The examples that the steps make of a task's source, cached split by split."""

    def __init__(self, task: seqio.Task, steps: list[Callable]):
        self._task, self._steps = task, steps
        self._caches = {split: DocumentSource(functools.partial(self._key, split), (split,),
                                              functools.partial(self._records, split))
                        for split in task.splits}
        self._specs: dict[str, dict[str, tf.TensorSpec]] = {}
        super().__init__(splits=tuple(task.splits))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> list[str]:
        return self._caches[split].list_shards(split)

    def num_input_examples(self, split: str) -> int:
        return self._caches[split].num_input_examples(split)

    def get_dataset(self, split: str = "train", shuffle: bool = True, seed: int | None = None,
                    shard_info: seqio.ShardInfo | None = None, **unused) -> tf.data.Dataset:
        """Tokenised examples of the split or of a shard's files, files shuffled anew each epoch."""
        if split not in self._specs:
            self._specs[split] = self._examples(split).element_spec
        spec = self._specs[split]

        @tf.autograph.experimental.do_not_convert
        def parse(record):
            fields = tf.io.parse_single_example(
                record["text"], {name: tf.io.FixedLenFeature([], tf.string) for name in spec})
            return {name: tf.ensure_shape(tf.io.parse_tensor(fields[name], s.dtype), s.shape)
                    for name, s in spec.items()}

        return self._caches[split].get_dataset(split, shuffle, seed, shard_info).map(parse)

    def _examples(self, split: str) -> tf.data.Dataset:
        task = self._task.replace(
            preprocessors=[*self._steps, seqio.CacheDatasetPlaceholder()])
        dataset = task.source.get_dataset(split=split, shuffle=False)
        dataset = task.preprocess_precache(dataset, seed=0)
        other = [n for n, s in dataset.element_spec.items() if not isinstance(s, tf.TensorSpec)]
        if other:
            raise UserError(f"{task.name!r} has fields that are no plain tensors ({other}) and "
                            "cannot be tokenised ahead; drop them before its tokenising step")
        return dataset

    def _records(self, split: str) -> Iterator[tuple[str, bytes]]:
        _log.info("tokenising %s of %s, once", split, self._task.name)
        dataset = self._examples(split).map(tf.autograph.experimental.do_not_convert(
            lambda x: {name: tf.io.serialize_tensor(value) for name, value in x.items()}))
        for fields in dataset.as_numpy_iterator():
            features = {name: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                        for name, value in fields.items()}
            yield split, tf.train.Example(
                features=tf.train.Features(feature=features)).SerializeToString(deterministic=True)

    def _key(self, split: str) -> str:
        files = [(os.path.basename(str(f)), _stat(str(f)))
                 for f in self._task.source.list_shards(split)]
        steps = [(getattr(step, "func", step).__qualname__, repr(getattr(step, "keywords", "")))
                 for step in self._steps]
        contents = [(name, getattr(f.vocabulary, "content", getattr(f.vocabulary, "path", b"")))
                    for name, f in sorted(self._task.output_features.items())]
        prompts = getattr(self._task.source, "identity", "")   # demonstrations.py
        what = repr((_VERSION, self._task.name, split, files, steps, contents, prompts))
        return f"tokenized-{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def _stat(path: str) -> tuple[int, int] | None:
    """Size and time of a local file."""
    return (os.path.getsize(path), os.stat(path).st_mtime_ns) if os.path.isfile(path) else None
