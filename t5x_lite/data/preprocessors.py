"""Preprocessors that compose: text to tokens, tokens to windows, windows to LM examples.

All are tf.data graphs without Python functions, so that iterators over them can be saved.
"""

import dataclasses
from collections.abc import Callable

import seqio
import tensorflow as tf

Format = Callable[[tf.data.Dataset], tf.data.Dataset]   # records to examples

each = seqio.map_over_dataset   # a function of one example as a format

# AutoGraph only rewrites Python control flow, of which there is none here, and takes most of
# the time that building a pipeline takes.
_plain = tf.autograph.experimental.do_not_convert


@dataclasses.dataclass(frozen=True)
class ById:
    """A vocabulary as the key of a cache, which its own equality does not allow."""

    value: seqio.Vocabulary

    def __hash__(self):
        return id(self.value)


def tokenize(dataset: tf.data.Dataset, output_features, key: str = "text") -> tf.data.Dataset:
    """{key: document} -> {"targets": int32 tokens}, without EOS; other fields are dropped."""
    vocabulary = output_features["targets"].vocabulary
    return dataset.map(
        _plain(lambda x: {"targets": tf.cast(vocabulary.encode_tf(x[key]), tf.int32)}),
        num_parallel_calls=tf.data.AUTOTUNE)


def tokenize_choices(dataset: tf.data.Dataset, output_features) -> tf.data.Dataset:
    """{"inputs": string, "targets": strings [n]} -> int32 tokens, the texts as …_pretokenized.

    Each choice ends with its vocabulary's EOS but the last, to which append_eos_after_trim gives
    its own.
    """
    vocabulary = output_features["targets"].vocabulary

    def ended(text):
        return tf.concat([tf.cast(vocabulary.encode_tf(text), tf.int32), [vocabulary.eos_id]], 0)

    def example(x):
        tokens = tf.map_fn(_plain(ended), x["targets"],
                           fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, 0))
        return {"inputs": tf.cast(output_features["inputs"].vocabulary.encode_tf(x["inputs"]),
                                  tf.int32),
                "inputs_pretokenized": x["inputs"], "targets": tokens.flat_values[:-1],
                "targets_pretokenized": tf.strings.reduce_join(x["targets"], separator=" | ")}

    return dataset.map(_plain(example))


def concat_and_split(dataset: tf.data.Dataset, key: str, length: int) -> tf.data.Dataset:
    """Joins the token lists end to end and cuts windows of `length`, in order: {key: window}.

    Every token is used once: what is left of a document opens the next window, and only
    the last window of a finite stream may be shorter. T5 joins groups of 128 documents,
    which leaves a short window a group, and cuts them at random offsets; carrying the
    rest over needs no padding, holds one document in memory instead of 128, and leaves
    the only randomness, which epoch shows a token at which offset, to the shuffled order.
    """
    flush = tf.data.Dataset.from_tensors((tf.zeros([0], tf.int32), True))

    def cut(rest, element):
        tokens, last = element
        tokens = tf.concat([rest, tokens], 0)
        # The end of the stream takes the rest along as one ragged window.
        used = tf.where(last, tf.size(tokens), tf.size(tokens) // length * length)
        starts = tf.range(0, used, length)
        ends = tf.minimum(starts + length, used)
        return tokens[used:], (tokens[:used], starts, ends)

    def windows(tokens, starts, ends):
        return tf.data.Dataset.from_tensor_slices((starts, ends)).map(
            _plain(lambda start, end: {key: tokens[start:end]}))

    return (dataset.map(_plain(lambda x: (tf.cast(x[key], tf.int32), False)))
            .concatenate(flush)
            .scan(tf.zeros([0], tf.int32), _plain(cut))
            .flat_map(_plain(windows)))


def whole_windows(dataset: tf.data.Dataset, key: str, length: int) -> tf.data.Dataset:
    """The windows of `concat_and_split` of an endless stream, all of one shape: {key: int32 [length]}."""
    def cut(rest, example):
        tokens = tf.concat([rest, tf.cast(example[key], tf.int32)], 0)
        used = tf.size(tokens) // length * length
        return tokens[used:], tf.reshape(tokens[:used], [-1, length])

    windows = dataset.scan(tf.zeros([0], tf.int32), _plain(cut)).unbatch()
    return windows.map(_plain(lambda window: {key: window}))


def causal_lm(dataset: tf.data.Dataset, sequence_length, output_features) -> tf.data.Dataset:
    """{"targets": tokens of a document} -> {"targets": window of targets_length}.

    Documents end with EOS and are joined end to end, so windows hold no padding.
    """
    eos = output_features["targets"].vocabulary.eos_id
    ended = dataset.map(_plain(lambda x: {"targets": tf.concat([x["targets"], [eos]], 0)}))
    return concat_and_split(ended, "targets", sequence_length["targets"])


def causal_lm_blocks(dataset: tf.data.Dataset, sequence_length, output_features) -> tf.data.Dataset:
    """The examples of `causal_lm`, of an endless stream of documents that end with EOS (blocks.py)."""
    return whole_windows(dataset, "targets", sequence_length["targets"])
