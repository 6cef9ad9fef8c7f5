"""Text read in blocks: documents tokenised, cut, corrupted and laid in rows many at a time.

tf.data takes 10 to 200 us for every element of every step, whatever it holds: of documents of 100 bytes
that was nine tenths of the time. Denoisers join documents end to end (preprocessors.concat_and_split), so
that a block of documents is to them what a long document is; and windows of one size can be corrupted and
laid in rows by one call for many.

A training stream in blocks has the rows of one without, bit for bit. What tf.data holds ahead differs: a
saved place says how many documents its blocks have, and one that says nothing is read without blocks
(pipeline.ShardReader). Evaluation, which ends with the split's last document, reads without.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import seqio
import tensorflow as tf

from t5x_lite.data import preprocessors
from t5x_lite.data.rows import Sides

BYTES = 1 << 17   # of a block: tokenising gains nothing from more, and a saved place holds it
MOST = 256        # documents of a block
_LOOKED_AT = 64   # documents whose mean size decides

_plain = tf.autograph.experimental.do_not_convert


# --- documents ------------------------------------------------------------------------------

class Joining(NamedTuple):
    """What a denoiser does with blocks of documents."""

    blocks: Callable   # the preprocessor that gives the same examples of an endless stream of them
    ends: bool         # whether each document of a block ends with EOS


JOINING: dict[Callable, Joining] = {}   # by the denoiser's preprocessor; denoising.py fills it


def _joined(task: seqio.Task) -> tuple[int, Joining] | None:
    """(the place of the step that tokenises, -1 where tokens are read; what the last step does with blocks)
    of a task whose documents are tokenised, joined and corrupted, with nothing between; None for another."""
    steps = [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]
    functions = [getattr(step, "func", step) for step in steps]
    if not steps or functions[-1] not in JOINING:
        return None
    if len(steps) == 1:
        return -1, JOINING[functions[-1]]
    if functions[-2] is not preprocessors.tokenize:
        return None
    return task.preprocessors.index(steps[-2]), JOINING[functions[-1]]


def documents_of(task: seqio.Task, split: str) -> int:
    """How many documents make a block of the task's, by the mean of its first ones; 0: the task's examples
    are not made of joined documents."""
    if _joined(task) is None:
        return 0
    source = task.source.get_dataset(split, shuffle=False)
    key = "text" if "text" in source.element_spec else "targets"
    if key not in source.element_spec:
        return 0
    sizes = [len(value) if isinstance(value, bytes) else 4 * len(value) for value in
             source.map(_plain(lambda x: x[key])).take(_LOOKED_AT).as_numpy_iterator()]
    mean = sum(sizes) // max(1, len(sizes))
    return min(MOST, 1 << (BYTES // max(1, mean)).bit_length() >> 1) or 1


def in_blocks(task: seqio.Task, documents: int) -> seqio.Task:
    """The task with steps that take so many documents at a time; 0: the task itself."""
    if not documents:
        return task
    place, joining = _joined(task)
    steps = list(task.preprocessors)
    read = steps[place] if place >= 0 else _as_read
    steps[-1] = functools.partial(joining.blocks, **getattr(steps[-1], "keywords", {}))
    gathered = functools.partial(tokens, documents=documents, read=read, ends=joining.ends)
    if place >= 0:
        steps[place] = gathered
    else:
        steps.insert(-1, gathered)
    return task.replace(preprocessors=steps)


def _as_read(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
    """{"targets": tokens} -> the same as int32, other fields dropped."""
    return dataset.map(_plain(lambda x: {"targets": tf.cast(x["targets"], tf.int32)}))


def tokens(dataset: tf.data.Dataset, output_features, documents: int, read: Callable, ends: bool
           ) -> tf.data.Dataset:
    """Documents -> {"targets": int32 tokens of so many of them, end to end}.

    read: the step that makes tokens of one. ends: whether each document's tokens end with EOS.
    """
    vocabulary = output_features["targets"].vocabulary
    key = getattr(read, "keywords", {}).get("key", "text")
    if read is not _as_read and isinstance(vocabulary, seqio.SentencePieceVocabulary):
        blocks = dataset.map(_plain(lambda x: x[key])).batch(documents).map(
            _plain(lambda texts: tf.cast(vocabulary.encode_tf(texts), tf.int32)))
    else:
        blocks = read(dataset, output_features=output_features).map(
            _plain(lambda x: x["targets"])).ragged_batch(documents)

    def joined(block):
        if ends:
            eos = tf.fill([block.nrows(), 1], tf.constant(vocabulary.eos_id, tf.int32))
            block = tf.concat([block, eos], 1)
        return {"targets": block.flat_values}

    return blocks.map(_plain(joined))


# --- rows -----------------------------------------------------------------------------------

def fit(examples: tf.data.Dataset, lengths: Mapping[str, int]) -> bool:
    """Whether all examples have one shape, within their lengths, and nothing is left to trim."""
    spec = examples.element_spec
    sizes = {name: x.shape[0] if x.shape.rank == 1 and x.dtype == tf.int32 else None
             for name, x in spec.items()}
    if None in sizes.values() or sizes.keys() != lengths.keys() - {"row"}:
        return False
    return all(sizes[name] <= lengths[name] for name in sizes) and (
        sum(sizes.values()) <= lengths.get("row", sum(sizes.values())))


def _marked(sides: Sides, sizes: Mapping[str, int], examples: int) -> Sides:
    """The sides of a packed row with the segment and the position of each token."""
    return {side: {**features,
                   f"{side}_segment_ids": tf.repeat(tf.range(1, examples + 1), sizes[side]),
                   f"{side}_positions": tf.tile(tf.range(sizes[side]), [examples])}
            for side, features in sides.items()}


def rows(examples: tf.data.Dataset, convert: Callable[[dict], Sides], lengths: Mapping[str, int],
         packing: bool, finish: Callable[[Sides], dict], block_rows: int) -> tf.data.Dataset | None:
    """Blocks of rows of endless examples that have one shape; None where their sides have not.

    convert: an example -> its sides. finish: the sides of a row -> the row, flat and padded.
    With packing a row holds as many examples as all of its sides have room for, as pipeline.pack lays them.
    """
    sides = examples.map(_plain(convert)).element_spec
    sizes = {side: next(iter(features.values())).shape[0] for side, features in sides.items()}
    if not all(sizes.values()):
        return None
    in_row = max(1, min(lengths[side] // size for side, size in sizes.items())) if packing else 1

    def row(taken: dict) -> dict:
        found = [convert({name: x[i] for name, x in taken.items()}) for i in range(in_row)]
        joined = {side: {name: tf.concat([other[side][name] for other in found], 0) for name in features}
                  for side, features in sides.items()}
        return finish(_marked(joined, sizes, in_row) if packing else joined)

    def block(batch: dict) -> dict:
        return tf.vectorized_map(row, {name: tf.reshape(x, [block_rows, in_row, x.shape[1]])
                                       for name, x in batch.items()})

    return examples.batch(block_rows * in_row, drop_remainder=True).map(_plain(block))
