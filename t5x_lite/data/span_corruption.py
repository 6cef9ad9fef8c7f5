"""Span corruption: T5's denoising objective (Raffel et al. 2020, arXiv:1910.10683, §3.1.4).

Spans of the text are cut out of the inputs and each is replaced by its own sentinel; the
targets are the sentinels, each followed by what it hides:

    text     Thank you for inviting me to your party last week
    inputs   Thank you <X> me to your party <Y> week </s>
    targets  <X> for inviting <Y> last </s>

The masks come from stateless seeds that seqio draws from the data seed, so a pipeline
gives the same examples again, and saving its iterator saves the state of its randomness.

Shape legend: T tokens of one window, S noise spans.
"""

import functools
from collections.abc import Sequence

import seqio
import tensorflow as tf

from t5x_lite.data import preprocessors, vocabularies
from t5x_lite.errors import UserError


def random_spans_helper(inputs_length: int, noise_density: float, mean_span_length: float
                        ) -> tuple[int, int]:
    """(tokens_length, targets_length): T5's estimate of how much text fills `inputs_length`.

    inputs_length: tokens of the corrupted inputs, sentinels and EOS included.
    Returns the number of raw tokens, and the length of their targets (sentinels and EOS
    included). Spans of a single token, and very short inputs, come out one too long:
    `window_lengths` is exact.
    """
    def lengths(tokens: int) -> tuple[int, int]:
        noise = int(round(tokens * noise_density))
        spans = int(round(noise / mean_span_length))
        return tokens - noise + spans + 1, noise + spans + 1

    tokens_length = inputs_length
    while lengths(tokens_length + 1)[0] <= inputs_length:
        tokens_length += 1
    targets_length = lengths(tokens_length)[1]
    # T5 rounds so that half noise gives inputs and targets of one length.
    if noise_density == 0.5 and targets_length > inputs_length:
        return tokens_length - 1, targets_length - 1
    return tokens_length, targets_length


def window_lengths(inputs_length: int, noise_density: float, mean_span_length: float,
                   most_spans: int | None = None) -> tuple[int, int, int]:
    """(tokens_length, targets_length, spans) of the window that really fits inputs_length.

    random_spans_helper's window, shortened where the mask's own rounding (float32, at
    least one span) makes the inputs longer than that estimate, or spans more than most_spans.
    """
    tokens, _ = random_spans_helper(inputs_length, noise_density, mean_span_length)
    while tokens > 1:
        noise, spans = (int(n) for n in _noise_counts(tokens, noise_density, mean_span_length))
        if tokens - noise + spans + 1 <= inputs_length and spans <= (most_spans or spans):
            return tokens, noise + spans + 1, spans
        tokens -= 1
    raise UserError(f"data.inputs_length={inputs_length} holds no corrupted span; take at least 4")


def random_spans_noise_mask(length, noise_density: float, mean_span_length: float, seeds):
    """Which tokens are noise: bool[T], alternating kept and noise spans, noise last.

    length: int32 scalar T. seeds: two stateless seeds (int[2] each), of the lengths of the
    noise spans and of the kept spans. Equal to T5's function of the same name where that
    one is defined; high densities with short spans, where it fails, get as many spans as
    there are kept tokens.
    """
    total = tf.maximum(length, 2)   # one span of each kind; cut back at the end
    num_noise, num_spans = _noise_counts(total, noise_density, mean_span_length)
    noise_ends_S = _random_partition_ends(num_noise, num_spans, seeds[0])
    kept_ends_S = _random_partition_ends(total - num_noise, num_spans, seeds[1])
    starts_S = kept_ends_S + tf.concat([[0], noise_ends_S[:-1]], 0)
    stops_S = kept_ends_S + noise_ends_S
    position_T = tf.range(total)
    begun_T = tf.searchsorted(starts_S, position_T, side="right")
    ended_T = tf.searchsorted(stops_S, position_T, side="right")
    return (begun_T > ended_T)[:length]


def _noise_counts(total, noise_density: float, mean_span_length: float):
    """(noise tokens, spans) among `total` >= 2 tokens, rounded half to even as T5 does."""
    num_noise = tf.cast(tf.round(tf.cast(total, tf.float32) * noise_density), tf.int32)
    num_noise = tf.clip_by_value(num_noise, 1, total - 1)
    num_spans = tf.cast(tf.round(tf.cast(num_noise, tf.float32) / mean_span_length), tf.int32)
    return num_noise, tf.clip_by_value(num_spans, 1, tf.minimum(num_noise, total - num_noise))


def _random_partition_ends(num_items, num_parts, seed):
    """Ends int32[num_parts] of a uniformly random division into parts of at least one item.

    A division is a choice of num_parts - 1 of the num_items - 1 gaps between items.
    """
    noise = tf.random.stateless_uniform([num_items - 1], seed=seed)
    is_cut = tf.argsort(noise) < num_parts - 1
    return tf.concat([tf.cast(tf.where(is_cut)[:, 0], tf.int32) + 1, [num_items]], 0)


def spans_to_sentinels(tokens_T, mask_T, first_sentinel: int):
    """Replaces each masked span by one sentinel: first_sentinel, first_sentinel - 1, …

    With the noise mask this gives the inputs, with its complement the targets.
    """
    starts_T = mask_T & ~tf.concat([[False], mask_T[:-1]], 0)
    span_T = tf.cumsum(tf.cast(starts_T, tokens_T.dtype))
    return tf.boolean_mask(tf.where(starts_T, first_sentinel + 1 - span_T, tokens_T),
                           starts_T | ~mask_T)


def span_corruption(dataset: tf.data.Dataset, sequence_length, output_features,
                    noise_density: float = 0.15, mean_span_length: float = 3.0
                    ) -> tf.data.Dataset:
    """{"targets": tokens of a document} -> {"inputs", "targets"} with EOS, no longer than asked.

    Documents are joined end to end and cut into windows that fill inputs_length, in order
    (preprocessors.concat_and_split). T5 first takes one random chunk of 65,536 tokens of
    each document, which loses the rest of a long one; nothing is lost here.

    Raises UserError where the targets do not fit, or the spans outnumber the sentinels.
    """
    vocabulary = output_features["inputs"].vocabulary
    length, = windows_of(sequence_length["inputs"], sequence_length["targets"], vocabulary,
                         [(noise_density, mean_span_length)])
    windows = preprocessors.concat_and_split(dataset, "targets", length)
    eos_ids = tuple(output_features[name].vocabulary.eos_id for name in ("inputs", "targets"))
    return seqio.map_over_dataset(num_seeds=2)(_corrupt_fn(
        noise_density, mean_span_length, vocabulary.vocab_size - 1, eos_ids))(windows)


def windows_of(inputs_length: int, targets_length: int, vocabulary: seqio.Vocabulary,
               settings: Sequence[tuple[float, float]], shorten: bool = False) -> list[int]:
    """Tokens of the longest window that fits inputs_length, for each setting.

    settings: (noise density, mean span length). shorten: take shorter windows where there are
    more spans than sentinels. Raises UserError where one is impossible, its
    targets do not fit, or its spans outnumber the sentinels.
    """
    for density, mean in settings:
        if not 0 < density < 1 or mean <= 0:
            raise UserError(f"span corruption with noise_density={density}, mean_span_length={mean}"
                            ": the density lies between 0 and 1, spans are positive")
    sentinels = vocabularies.num_sentinels(vocabulary)
    most = sentinels if shorten else None
    lengths = [window_lengths(inputs_length, *setting, most) for setting in settings]
    pairs = list(zip(lengths, settings, strict=True))
    (tokens, needed, _), (density, mean) = max(pairs, key=lambda x: x[0][1])
    if targets_length < needed:
        raise UserError(
            f"data.targets_length leaves {targets_length} tokens to targets, which is too short: "
            f"span corruption of {tokens} tokens with density {density} and mean span {mean} gives "
            f"{needed}; raise data.targets_length by {needed - targets_length}, or lower "
            "data.inputs_length")
    (tokens, _, spans), (density, mean) = max(pairs, key=lambda x: x[0][2])
    if spans > sentinels:
        raise UserError(
            f"span corruption of {tokens} tokens with density {density} and mean span {mean} needs "
            f"{spans} sentinels, the vocabulary has {sentinels}; take longer spans or a shorter "
            "data.inputs_length")
    return [tokens for tokens, _, _ in lengths]


def corrupt(tokens_T, noise_density: float, mean_span_length: float, first_sentinel: int,
            eos_ids: tuple[int, int], seeds) -> dict[str, tf.Tensor]:
    """{"inputs", "targets"} of a window with random spans behind sentinels, each with EOS."""
    mask_T = random_spans_noise_mask(tf.size(tokens_T), noise_density, mean_span_length, seeds)
    features = zip(("inputs", "targets"), (mask_T, ~mask_T), eos_ids, strict=True)
    return {name: tf.concat([spans_to_sentinels(tokens_T, masked_T, first_sentinel), [eos]], 0)
            for name, masked_T, eos in features}


@functools.cache
def _corrupt_fn(noise_density: float, mean_span_length: float, first_sentinel: int,
                eos_ids: tuple[int, int]):
    """(example, seeds) -> example; one graph for all the shards of a run."""
    @tf.function(autograph=False)
    def graph(tokens, seeds):
        return corrupt(tokens, noise_density, mean_span_length, first_sentinel, eos_ids, seeds)

    @tf.autograph.experimental.do_not_convert
    def corrupt_example(example, seeds):
        return graph(example["targets"], seeds)

    return corrupt_example


# --- many windows at a time ---------------------------------------------------------------------

WINDOWS = 16   # corrupted in one call


def span_corruption_blocks(dataset: tf.data.Dataset, sequence_length, output_features,
                           noise_density: float = 0.15, mean_span_length: float = 3.0
                           ) -> tf.data.Dataset:
    """The examples of `span_corruption` of an endless stream, which all have one shape (blocks.py)."""
    vocabulary = output_features["inputs"].vocabulary
    length, = windows_of(sequence_length["inputs"], sequence_length["targets"], vocabulary,
                         [(noise_density, mean_span_length)])
    if length < 2:   # the mask of a single token is that of two, cut
        return span_corruption(dataset, sequence_length, output_features, noise_density,
                               mean_span_length)
    seeded = seqio.map_over_dataset(num_seeds=2, num_parallel_calls=None)(
        tf.autograph.experimental.do_not_convert(lambda example, seeds: (example["targets"], seeds)))(
            preprocessors.whole_windows(dataset, "targets", length))
    eos_ids = tuple(output_features[name].vocabulary.eos_id for name in ("inputs", "targets"))
    return seeded.batch(WINDOWS, drop_remainder=True).map(_corrupt_block_fn(
        length, noise_density, mean_span_length, vocabulary.vocab_size - 1, eos_ids)).unbatch()


@functools.cache
def _corrupt_block_fn(length: int, noise_density: float, mean_span_length: float, first_sentinel: int,
                      eos_ids: tuple[int, int]):
    """(windows, their seeds) -> examples; one graph for all the shards of a run."""
    noise, spans = (int(n) for n in _noise_counts(length, noise_density, mean_span_length))

    @tf.function(autograph=False)
    def graph(tokens_WT, seeds):
        noise_ends_WS = _partitions(noise, spans, seeds[0])
        kept_ends_WS = _partitions(length - noise, spans, seeds[1])
        noise_starts_WS = kept_ends_WS + tf.pad(noise_ends_WS[:, :-1], [[0, 0], [1, 0]])
        edges = tf.stack([noise_starts_WS, kept_ends_WS + noise_ends_WS], 2)
        passed_WT = tf.searchsorted(tf.reshape(edges, [WINDOWS, -1]), tf.tile(
            tf.range(length)[None], [WINDOWS, 1]), side="right")
        mask_WT = passed_WT % 2 == 1
        sizes = length - noise + spans, noise + spans
        return {name: _sentinels(tokens_WT, masked_WT, first_sentinel, size, eos)
                for name, masked_WT, size, eos in zip(
                    ("inputs", "targets"), (mask_WT, ~mask_WT), sizes, eos_ids, strict=True)}

    return tf.autograph.experimental.do_not_convert(lambda windows, seeds: graph(windows, seeds))


def _partitions(num_items: int, num_parts: int, seeds):
    """`_random_partition_ends` for the seeds of many windows, ([W], [W]): int32 [W, num_parts]."""
    noise = [tf.random.stateless_uniform([num_items - 1], seed=tf.unstack(seed, num=2))
             for seed in tf.unstack(tf.stack(seeds, 1), num=WINDOWS)]
    is_cut = tf.argsort(tf.stack(noise)) < num_parts - 1
    ends = tf.reshape(tf.cast(tf.where(is_cut)[:, 1], tf.int32) + 1, [WINDOWS, num_parts - 1])
    return tf.pad(ends, [[0, 0], [0, 1]], constant_values=num_items)


def _sentinels(tokens_WT, mask_WT, first_sentinel: int, size: int, eos: int):
    """`spans_to_sentinels` of many windows that all keep `size` tokens, with EOS: [W, size + 1]."""
    starts_WT = mask_WT & ~tf.pad(mask_WT[:, :-1], [[0, 0], [1, 0]])
    span_WT = tf.cumsum(tf.cast(starts_WT, tokens_WT.dtype), axis=1)
    kept = tf.boolean_mask(tf.where(starts_WT, first_sentinel + 1 - span_WT, tokens_WT),
                           starts_WT | ~mask_WT)
    return tf.pad(tf.reshape(kept, [WINDOWS, size]), [[0, 0], [0, 1]], constant_values=eos)
