"""Span corruption of whole words: what is hidden and filled in is words, as a reader sees them.

T5's spans (span_corruption.py) begin and end at any token, within words as well; here they are runs of
whole words, as in the whole-word masking of BERT's second release (Devlin et al. 2019) and SpanBERT's
spans (Joshi et al. 2020, arXiv:1907.10529, section 3.1). Inputs and targets look as T5's:

    text     The capital of Norway is Oslo.
    inputs   The capital of <X> is <Y>. </s>
    targets  <X> Norway <Y> Oslo <Z> </s>

A word is what stands between spaces; punctuation at its end stays in the inputs. The words at both
edges of a window, which may be cut, are never hidden.

Shape legend: T tokens of one window, W words, V vocabulary.
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import preprocessors, vocabularies, vocabulary as data_vocabulary
from t5x_lite.data.span_corruption import random_spans_noise_mask, spans_to_sentinels
from t5x_lite.errors import UserError

_SPACES = ("\u2581", "\u0120")   # how SentencePiece and byte-level BPE write the space before a word


def word_marks(vocabulary: seqio.Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """(begins a word, is punctuation alone), bool [V] each.

    Raises:
        UserError: a vocabulary whose pieces do not say where words begin, such as bytes.
    """
    pieces = data_vocabulary.pieces_of(vocabulary)
    begins = [piece.startswith(_SPACES) for piece in pieces]
    if not any(begins):
        raise UserError(f"data.denoising='word_spans' hides whole words, and the pieces of "
                        f"{type(vocabulary).__name__} do not say where words begin: take "
                        "span_corruption, or a SentencePiece vocabulary")
    rest = vocabulary.vocab_size - len(pieces)
    texts = [piece.lstrip("".join(_SPACES)) for piece in pieces]
    marks = [bool(text) and not any(map(str.isalnum, text)) for text in texts]
    return np.pad(begins, (0, rest)), np.pad(marks, (0, rest))


def word_mask(begins_T, marks_T, room: int, noise_density: float, mean_span_length: float, seeds):
    """Which tokens are hidden: bool [T], whole words, at most `room` target tokens.

    begins_T, marks_T: bool, tokens that begin a word, and that are punctuation.
    room: tokens that the spans and their sentinels may take; later spans stay in the text.
    """
    word_T = tf.cumsum(tf.cast(begins_T, tf.int32))   # 0: the rest of a word that was cut
    count = word_T[-1]
    inner = random_spans_noise_mask(tf.maximum(count - 1, 0), noise_density, mean_span_length, seeds)
    mask_W = tf.concat([[False], inner, [False]], 0)[:count + 1]
    mask_T = tf.gather(mask_W, word_T)
    for _ in range(2):   # punctuation at the end of a span stays, two signs of it
        mask_T &= ~(marks_T & ~tf.concat([mask_T[1:], [False]], 0))
    starts_T = mask_T & ~tf.concat([[False], mask_T[:-1]], 0)
    taken_T = tf.cumsum(tf.cast(mask_T, tf.int32) + tf.cast(starts_T, tf.int32))
    span_T = tf.cumsum(tf.cast(starts_T, tf.int32))
    ends_at_T = tf.gather(tf.math.segment_max(taken_T, span_T), span_T)
    return mask_T & (ends_at_T <= room)


def word_spans(dataset: tf.data.Dataset, sequence_length, output_features,
               noise_density: float = 0.15, mean_span_length: float = 1.5) -> tf.data.Dataset:
    """{"targets": tokens of a document} -> {"inputs", "targets"} with EOS, no longer than asked.

    Documents are joined end to end and cut into windows. noise_density is the share of the words that
    is hidden, mean_span_length counts words.

    Raises UserError where the vocabulary's pieces do not tell words apart, or has too few sentinels.
    """
    if not 0 < noise_density < 1 or mean_span_length <= 0:
        raise UserError(f"word spans with noise_density={noise_density}, mean_span_length="
                        f"{mean_span_length}: the density lies between 0 and 1, spans are positive")
    vocabulary = output_features["inputs"].vocabulary
    # Besides EOS, the targets end with the sentinel of the text behind the last span.
    length, room = sequence_length["inputs"] - 1, sequence_length["targets"] - 2
    if length < 4 or room < 2:
        raise UserError(f"data.inputs_length={length + 1}, data.targets_length={room + 2} hold no "
                        "hidden word; take at least 5 and 4")
    sentinels = vocabularies.num_sentinels(vocabulary)
    most = min(round(length * noise_density / mean_span_length), room // 2)
    if most > sentinels:
        raise UserError(
            f"word spans of {length} tokens with density {noise_density} and mean span "
            f"{mean_span_length} need {most} sentinels, the vocabulary has {sentinels}; take longer "
            "spans or a shorter data.inputs_length")
    windows = preprocessors.concat_and_split(dataset, "targets", length)
    eos_ids = tuple(output_features[name].vocabulary.eos_id for name in ("inputs", "targets"))
    return seqio.map_over_dataset(num_seeds=2)(_hide_fn(
        preprocessors.ById(vocabulary), noise_density, mean_span_length, room, eos_ids))(windows)


@functools.cache
def _hide_fn(vocabulary: preprocessors.ById, noise_density: float, mean_span_length: float, room: int,
             eos_ids: tuple[int, int]):
    """(example, seeds) -> example; one graph for all the shards of a run."""
    begins_V, marks_V = word_marks(vocabulary.value)
    first_sentinel = vocabulary.value.vocab_size - 1

    @tf.function(autograph=False)
    def graph(tokens_T, seeds):
        mask_T = word_mask(tf.gather(begins_V, tokens_T), tf.gather(marks_V, tokens_T), room,
                           noise_density, mean_span_length, seeds)
        return {name: tf.concat([spans_to_sentinels(tokens_T, masked_T, first_sentinel), [eos]], 0)
                for name, masked_T, eos in zip(("inputs", "targets"), (mask_T, ~mask_T), eos_ids,
                                               strict=True)}

    @tf.autograph.experimental.do_not_convert
    def hide(example, seeds):
        return graph(example["targets"], seeds)

    return hide
