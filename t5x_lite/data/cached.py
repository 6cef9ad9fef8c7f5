"""Tasks that seqio and Beam tokenised ahead, on one machine or on a cluster.

    python3.11 -m venv beam    # of its own: Beam needs older releases of five packages
    grep -vE '^(pillow|protobuf|pyarrow|python-dateutil|sentencepiece)==' constraints.txt > beam.txt
    beam/bin/pip install -c beam.txt '.[cpu,beam]'
    beam/bin/seqio_cache_tasks --module_import=tasks.c4 --tasks=c4_span_corruption \\
        --output_cache_dir=DIR --tfds_data_dir=TFDS_DIR --pipeline_options=--runner=DirectRunner
    python -m t5x_lite.train --config=… --config.data.train=c4_span_corruption \\
        --config.data.cached_tasks=DIR

What stands before a task's seqio.CacheDatasetPlaceholder has then run: formats and tokenisation
of the text-to-text tasks (text_to_text.py), tokenisation of C4; what is random comes later.
Reading the cache needs no Beam. DIR may be a gs:// path.
"""

import logging
from collections.abc import Mapping

import seqio
import tensorflow as tf
from seqio import dataset_providers

from t5x_lite.errors import UserError

_log = logging.getLogger(f"t5x_lite.{__name__}")   # shown by commands, as its own lines are


def read_from(task: seqio.Task, folders: str, vocabulary: seqio.Vocabulary | None = None
              ) -> seqio.Task:
    """The task over what a folder holds of it; as it is, and logged, where it has nothing to cache.

    folders: what --output_cache_dir was, comma-separated. vocabulary: the run's, None: the task's
    own, which the tokens are of. Raises UserError where no folder holds the task, or where its
    tokens are of another vocabulary.
    """
    if not task.supports_caching:
        _log.warning("%s has no seqio.CacheDatasetPlaceholder: it is read from its source, not "
                     "from data.cached_tasks=%s", task.name, folders)
        return task
    name = seqio.get_task_dir_from_name(task.name)
    places = [f"{folder.strip().rstrip('/')}/{name}" for folder in folders.split(",")]
    complete = [place for place in places if tf.io.gfile.exists(f"{place}/COMPLETED")]
    source = CachedSource(complete[0], task.splits) if complete else None
    if source is None or not source.splits:
        raise UserError(f"data.cached_tasks={folders!r} holds no finished cache of {task.name!r}; "
                        f"make one with seqio_cache_tasks --tasks={task.name} (cached.py)")
    _check_tokens(task, source, complete[0], vocabulary)
    steps = task.preprocessors
    place = next(i for i, s in enumerate(steps) if isinstance(s, seqio.CacheDatasetPlaceholder))
    return task.replace(source=source, preprocessors=steps[place + 1:])


class CachedSource(seqio.DataSource):
    """The splits of a folder that seqio_cache_tasks wrote.

    seqio's own reader is one a split, and is shown only through Task.get_dataset, which repeats
    and shuffles in ways whose place tf.data cannot save.
    """

    def __init__(self, folder: str, splits):
        self._readers: Mapping[str, seqio.FileDataSource] = {
            split: dataset_providers._CachedDataSource(folder, split) for split in splits
            if tf.io.gfile.exists(seqio.get_cached_info_path(folder, split))}
        super().__init__(splits=tuple(self._readers))

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split):
        return self._readers[split].list_shards(split)

    def num_input_examples(self, split):
        return self._readers[split].num_input_examples(split)

    def get_dataset(self, split="train", shuffle=True, seed=None, shard_info=None, **_):
        return self._readers[split].get_dataset(split, shuffle, seed, shard_info)


def _check_tokens(task: seqio.Task, source: CachedSource, folder: str,
                  vocabulary: seqio.Vocabulary | None) -> None:
    """Raises UserError where the first example's text gives other tokens than the cached ones."""
    features = task.output_features.items()
    right = vocabulary is None or all(f.vocabulary == vocabulary for _, f in features)
    for split in source.splits:
        for example in source.get_dataset(split, shuffle=False).take(1).as_numpy_iterator():
            for name, feature in features:
                text = example.get(f"{name}_pretokenized")
                if isinstance(text, bytes):
                    tokens = feature.vocabulary.encode_tf(text).numpy()
                    right = right and tokens.tolist() == example[name].tolist()
    if not right:
        raise UserError(f"{folder} was tokenised with another vocabulary than this run's: leave "
                        f"data.vocabulary empty, or cache {task.name!r} again with a task of that "
                        "vocabulary")
