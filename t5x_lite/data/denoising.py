"""Denoisers: what is hidden of a text, and what has to be said about it.

Each is a preprocessor of tokenised documents, {"targets": tokens} -> the features it names:

    causal_lm         the text itself, for objective lm
    prefix_lm         a window cut in two at a random place (Raffel et al. 2020, section 3.2.3)
    span_corruption   T5's spans behind sentinels (span_corruption.py)
    word_spans        the same of whole words (word_spans.py)
    bert              single tokens, to be named where they stand, for objective mlm
    bart              the whole text, out of permuted sentences with masks for spans
    ul2               span corruption of seven kinds, each named by a mode token

`register` makes a task of a source and each of them: c4_ul2, python_docs_bart. A user's own
text files take one by data.denoising.

Documents are joined end to end and cut into windows that fill a row (preprocessors). All
randomness is drawn from stateless seeds, so that a pipeline gives the same examples again.

Shape legend: T tokens of one window, S spans or sentences.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import (
    blocks,
    preprocessors,
    rows as data_rows,
    vocabularies,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.span_corruption import (
    corrupt,
    span_corruption,
    span_corruption_blocks,
    windows_of,
)
from t5x_lite.data.word_spans import word_spans
from t5x_lite.errors import UserError, between, nearest, refuse

_plain = tf.autograph.experimental.do_not_convert


# --- prefix LM ------------------------------------------------------------------------------

def prefix_lm(dataset: tf.data.Dataset, sequence_length, output_features) -> tf.data.Dataset:
    """{"targets": tokens of a document} -> {"inputs", "targets"}: a window's two parts, with EOS.

    The cut is uniform among the places where each part fits its length and has a token. A
    decoder-only model's row (sequence_length["row"]) is filled. An encoder-decoder's rows are
    filled by half, as each must hold nearly the whole window: packing puts no two in a row.
    """
    row = sequence_length.get("row")
    inputs_room, targets_room = (sequence_length[f] - 1 for f in ("inputs", "targets"))
    length = row - 2 if row else max(inputs_room, targets_room)
    if min(inputs_room, targets_room) < 1 or length < 2:
        raise UserError(f"prefix LM of data.inputs_length={inputs_room + 1} and "
                        f"{targets_room + 1} target tokens: take at least 3 of each")
    targets_room = length if row else targets_room
    eos = output_features["targets"].vocabulary.eos_id

    @_plain
    def split(example, seed):
        tokens = example["targets"]
        size = tf.size(tokens)
        low = tf.maximum(1, size - targets_room)
        high = tf.maximum(low, tf.minimum(size - 1, inputs_room))
        cut = tf.random.stateless_uniform([], seed, low, high + 1, tf.int32)
        return {"inputs": tf.concat([tokens[:cut], [eos]], 0),
                "targets": tf.concat([tokens[cut:], [eos]], 0)}

    windows = preprocessors.concat_and_split(dataset, "targets", length)
    return seqio.map_over_dataset(num_seeds=1)(split)(windows)


# --- BERT -----------------------------------------------------------------------------------

def mask_tokens(tokens_T, noise_density: float, mask_id: int, random_ids: tuple[int, int], seeds,
                unchosen: int = 0):
    """(inputs, targets), int32 [T]: BERT's masking (Devlin et al. 2019, arXiv:1810.04805, A.1).

    A share noise_density of the tokens is chosen, at least one. Of these 80 % become mask_id,
    10 % an id of the range random_ids, 10 % stay. Targets are the chosen tokens, elsewhere
    `unchosen`, an id that is never chosen: 0, or -1 where id 0 is a token like others.

    seeds: three stateless ones: of the choice, of what becomes of it, of the random ids.
    """
    size = tf.size(tokens_T)
    count = tf.maximum(1, tf.cast(tf.round(tf.cast(size, tf.float32) * noise_density), tf.int32))
    last_T = tf.cast(tokens_T == unchosen, tf.float32)
    rank_T = tf.argsort(tf.argsort(tf.random.stateless_uniform([size], seeds[0]) + last_T))
    chosen_T = (rank_T < count) & (tokens_T != unchosen)
    fate_T = tf.where(chosen_T, tf.random.stateless_uniform([size], seeds[1]), 1.0)
    random_T = tf.random.stateless_uniform([size], seeds[2], *random_ids, dtype=tf.int32)
    inputs_T = tf.where(fate_T < 0.8, mask_id, tf.where(fate_T < 0.9, random_T, tokens_T))
    return inputs_T, tf.where(chosen_T, tokens_T, unchosen)


def bert(dataset: tf.data.Dataset, sequence_length, output_features,
         noise_density: float = 0.15) -> tf.data.Dataset:
    """{"targets": tokens of a document} -> {"inputs": masked, "targets": the chosen tokens or 0}.

    Both have inputs_length positions, of which the last is EOS and never chosen. There is no
    next-sentence prediction, and hence no [CLS] and no pairs of segments.
    """
    _check_density("BERT masking", noise_density)
    vocabulary = output_features["inputs"].vocabulary
    mask_id, random_ids = vocabularies.mask_id(vocabulary), vocabularies.ordinary_ids(vocabulary)
    unchosen = -1 if data_vocabulary.zero_in_rows(vocabulary) else 0

    @_plain
    def mask(example, seeds):
        inputs, targets = mask_tokens(example["targets"], noise_density, mask_id, random_ids, seeds,
                                      unchosen)
        return {"inputs": tf.concat([inputs, [vocabulary.eos_id]], 0),
                "targets": tf.concat([targets, [unchosen]], 0)}

    windows = preprocessors.concat_and_split(dataset, "targets",
                                             max(1, sequence_length["inputs"] - 1))
    return seqio.map_over_dataset(num_seeds=3)(mask)(windows)


def _check_density(what: str, density: float) -> None:
    between(f"{what} with noise_density", density, 0, 1, open_below=True, open_above=True)


# --- BART -----------------------------------------------------------------------------------

def permute_sentences(tokens_T, ends_T, seed):
    """The sentences in a uniformly random order; ends_T: bool, the last tokens of sentences."""
    sentence_T = tf.cumsum(tf.cast(ends_T, tf.int32), exclusive=True)
    count = tf.reduce_max(tf.concat([sentence_T, [-1]], 0)) + 1
    rank_S = tf.argsort(tf.random.stateless_uniform([count], seed))
    return tf.gather(tokens_T, tf.argsort(tf.gather(rank_S, sentence_T), stable=True))


def draw_spans(size, noise_density: float, mean_span_length: float, seeds):
    """(lengths, gaps), int32 [S]: spans to hide of `size` tokens, and where.

    Lengths are Poisson, 0 among them, up to a share noise_density of the tokens; the last one
    drawn is cut so that the share is met. A span lies behind the first `gap` tokens that stay;
    gaps differ, so that spans do not touch.

    seeds: three stateless ones: of the lengths, of their order, of the gaps.
    """
    noise = tf.cast(tf.round(tf.cast(size, tf.float32) * noise_density), tf.int32)
    drawn = tf.random.stateless_poisson([noise], seeds[0], mean_span_length, dtype=tf.int32)
    count = tf.reduce_sum(tf.cast(tf.cumsum(drawn) < noise, tf.int32)) + 1
    count = tf.minimum(tf.minimum(count, noise), size - noise + 1)
    whole = drawn[:tf.maximum(count - 1, 0)]
    lengths_S = tf.concat([whole, [noise - tf.reduce_sum(whole)]], 0)[:count]
    order_S = tf.argsort(tf.random.stateless_uniform([count], seeds[1]))
    places = tf.random.stateless_uniform([size - noise + 1], seeds[2])
    gaps_S = tf.cast(tf.where(tf.argsort(tf.argsort(places)) < count)[:, 0], tf.int32)
    return tf.gather(lengths_S, order_S), gaps_S


def infill(tokens_T, lengths_S, gaps_S, mask_id: int):
    """The tokens with one mask_id for each span; a span of no token inserts one."""
    starts_S = gaps_S + tf.cumsum(lengths_S, exclusive=True)
    edges = tf.zeros([tf.size(tokens_T) + 1], tf.int32)
    edges = tf.tensor_scatter_nd_add(edges, starts_S[:, None], tf.ones_like(starts_S))
    edges = tf.tensor_scatter_nd_sub(edges, (starts_S + lengths_S)[:, None],
                                     tf.ones_like(starts_S))
    kept = tf.boolean_mask(tokens_T, tf.cumsum(edges)[:-1] == 0)
    order = tf.argsort(tf.concat([2 * tf.range(tf.size(kept)) + 1, 2 * gaps_S], 0))
    return tf.gather(tf.concat([kept, tf.fill(tf.shape(gaps_S), mask_id)], 0), order)


def bart(dataset: tf.data.Dataset, sequence_length, output_features, noise_density: float = 0.3,
         mean_span_length: float = 3.0) -> tf.data.Dataset:
    """{"targets": tokens of a document} -> {"inputs": noised, "targets": the window}, with EOS.

    BART's denoising (Lewis et al. 2020, arXiv:1910.13461, section 2.2): sentences are permuted,
    then spans with lengths of Poisson(mean_span_length), 30 % of the tokens in all, are replaced
    by one mask each. A sentence ends with a token that ends in a full stop, "!" or "?"; a window
    without one keeps its order. Spans begin at any token, not only where a word begins.
    """
    _check_density("BART's infilling", noise_density)
    if mean_span_length <= 0:
        raise UserError(f"BART's infilling with mean_span_length={mean_span_length}: it is positive")
    length = min(sequence_length["inputs"], sequence_length["targets"]) - 1
    windows = preprocessors.concat_and_split(dataset, "targets", max(1, length))
    vocabulary = output_features["inputs"].vocabulary
    return seqio.map_over_dataset(num_seeds=4)(_bart_fn(
        noise_density, mean_span_length, preprocessors.ById(vocabulary)))(windows)


@functools.cache
def _bart_fn(noise_density: float, mean_span_length: float, vocabulary: preprocessors.ById):
    """(example, seeds) -> example; one graph for all the shards of a run."""
    eos, mask_id = vocabulary.value.eos_id, vocabularies.mask_id(vocabulary.value)
    ends_V = sentence_ends(vocabulary.value)

    @tf.function(autograph=False)
    def graph(tokens, seeds):
        permuted = permute_sentences(tokens, tf.gather(ends_V, tokens), seeds[0])
        spans = draw_spans(tf.size(tokens), noise_density, mean_span_length, seeds[1:])
        return {"inputs": tf.concat([infill(permuted, *spans, mask_id), [eos]], 0),
                "targets": tf.concat([tokens, [eos]], 0)}

    return _plain(lambda example, seeds: graph(example["targets"], seeds))


def sentence_ends(vocabulary: seqio.Vocabulary) -> np.ndarray:
    """bool [vocab_size]: ids whose text ends a sentence."""
    texts = (vocabulary.decode([i]).rstrip("\"'”’)] \n") for i in range(vocabulary.vocab_size))
    return np.fromiter((t.endswith((".", "!", "?", "。", "！", "？", "।", "؟")) for t in texts), bool)


# --- UL2 ------------------------------------------------------------------------------------

# (mode, noise density, mean span length), each as likely as any other (Tay et al. 2022,
# arXiv:2205.05131, table 1). S hides the last quarter as one span.
UL2_DENOISERS = (
    ("R", 0.15, 3.0), ("R", 0.15, 8.0), ("S", 0.25, math.inf),
    ("X", 0.5, 3.0), ("X", 0.5, 8.0), ("X", 0.15, 64.0), ("X", 0.5, 64.0))
# The text before the inputs, as in the released checkpoints; the paper writes [R], [S], [X].
UL2_MODES = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}


def ul2(dataset: tf.data.Dataset, sequence_length, output_features,
        denoisers: Sequence[tuple[str, float, float]] = UL2_DENOISERS,
        modes: Mapping[str, str] = UL2_MODES) -> tf.data.Dataset:
    """{"targets": tokens of a document} -> {"inputs", "targets"} of one denoiser, with EOS.

    Every denoiser has windows of its own length, which fill data.inputs_length or use up the
    sentinels. One window of each, in random order, makes a round of the text.

    denoisers: (mode, noise density, mean span length). modes: the text that names each mode.
    """
    vocabulary = output_features["inputs"].vocabulary
    names = {mode: vocabulary.encode(text) for mode, text in modes.items()}
    settings = [(density, mean) for _, density, mean in denoisers]
    room = sequence_length["inputs"] - max(map(len, names.values()))
    lengths = windows_of(room, sequence_length["targets"], vocabulary, settings, shorten=True)

    @_plain
    def draw_order(example, seed):
        order = tf.argsort(tf.random.stateless_uniform([len(lengths)], seed))
        return {**example, "order": order}

    @_plain
    def windows(example):
        tokens, order = example["targets"], example["order"]
        ends = tf.minimum(tf.cumsum(tf.gather(lengths, order)), tf.size(tokens))
        starts = tf.concat([[0], ends[:-1]], 0)
        used = starts < ends   # the last round of a finite stream is shorter
        return tf.data.Dataset.from_tensor_slices(
            tuple(tf.boolean_mask(x, used) for x in (starts, ends, order))).map(
            _plain(lambda start, end, kind: {"targets": tokens[start:end], "kind": kind}))

    rounds = preprocessors.concat_and_split(dataset, "targets", sum(lengths))
    rounds = seqio.map_over_dataset(num_seeds=1)(draw_order)(rounds)
    return seqio.map_over_dataset(num_seeds=2)(_ul2_fn(
        tuple((tuple(names[mode]), density, mean) for mode, density, mean in denoisers),
        vocabulary.vocab_size - 1, vocabulary.eos_id))(rounds.flat_map(windows))


@functools.cache
def _ul2_fn(denoisers: tuple[tuple[tuple[int, ...], float, float], ...], first_sentinel: int,
            eos: int):
    """(example, seeds) -> example; one graph for all the shards of a run."""
    names, densities, means = zip(*denoisers, strict=True)
    width = max(map(len, names))
    table = np.array([(*name, *[0] * (width - len(name))) for name in names], np.int32)

    @tf.function(autograph=False)
    def graph(tokens, kind, seeds):
        density, mean, size, name = (tf.gather(values, kind) for values in (
            densities, means, list(map(len, names)), table))
        parts = corrupt(tokens, density, mean, first_sentinel, (eos, eos), seeds)
        return {**parts, "inputs": tf.concat([name[:size], parts["inputs"]], 0)}

    return _plain(lambda example, seeds: graph(example["targets"], example["kind"], seeds))


# --- by name --------------------------------------------------------------------------------

class Denoiser(NamedTuple):
    """A preprocessor and what goes with it."""

    preprocessor: Callable
    features: tuple[str, ...]      # that it makes
    makes: str                     # text, pairs or masked: what rows take (rows.Rows.takes)
    settings: tuple[str, ...] = ()   # fields of DataConfig that it takes
    sentinels: bool = False        # whether it needs them in the vocabulary
    # The same examples of an endless stream of blocks of documents (blocks.py); None: `preprocessor` is it.
    blocks: Callable | None = None
    ends: bool = False             # whether documents of such a block end with EOS


_PAIR = ("inputs", "targets")
DENOISERS = {
    "causal_lm": Denoiser(preprocessors.causal_lm, ("targets",), "text",
                          blocks=preprocessors.causal_lm_blocks, ends=True),
    "prefix_lm": Denoiser(prefix_lm, _PAIR, "pairs"),
    "span_corruption": Denoiser(span_corruption, _PAIR, "pairs",
                                ("noise_density", "mean_span_length"), sentinels=True,
                                blocks=span_corruption_blocks),
    "word_spans": Denoiser(word_spans, _PAIR, "pairs", ("noise_density", "mean_span_length"),
                           sentinels=True),
    "bert": Denoiser(bert, _PAIR, "masked", ("noise_density",)),
    "bart": Denoiser(bart, _PAIR, "pairs", ("noise_density", "mean_span_length")),
    "ul2": Denoiser(ul2, _PAIR, "pairs", sentinels=True),
}
blocks.JOINING.update({denoiser.preprocessor: blocks.Joining(
    denoiser.blocks or denoiser.preprocessor, denoiser.ends) for denoiser in DENOISERS.values()})


def steps(name: str, cached: bool = False, **settings: float) -> list[Callable]:
    """The preprocessors from {"text"} on. Raises UserError for a setting that it does not take.

    cached: whether the tokens may be gathered ahead (cached.py); it changes what is drawn.
    """
    denoiser = DENOISERS[name]
    for setting in settings:
        if setting not in denoiser.settings:
            takers = [n for n, d in DENOISERS.items() if setting in d.settings] or [
                "salient", "salient_kept", "salient_asked"]
            raise UserError(f"data.{setting}={settings[setting]} is no setting of data.denoising="
                            f"{name!r}; {', '.join(takers)} take it")
    return [preprocessors.tokenize, *([seqio.CacheDatasetPlaceholder()] if cached else []),
            functools.partial(denoiser.preprocessor, **settings)]


def register(prefix: str, source: seqio.DataSource, vocabulary: str, cached: bool = False) -> None:
    """Adds the task PREFIX_NAME over documents {"text"} for every denoiser.

    cached: see `steps`.
    """
    feature = seqio.Feature(vocabularies.load(vocabulary), add_eos=True)
    for name, denoiser in DENOISERS.items():
        seqio.TaskRegistry.add(
            f"{prefix}_{name}", source=source,
            preprocessors=steps(name, cached),
            output_features={f: feature for f in denoiser.features})


def of(task: seqio.Task) -> str | None:
    """The name of the denoiser among the task's preprocessors."""
    functions = {getattr(p, "func", p) for p in task.preprocessors}
    return next((n for n, d in DENOISERS.items() if d.preprocessor in functions), None)


def check_objective(name: str, objective: str, field: str) -> None:
    """Raises UserError where the objective cannot learn from the denoiser's examples."""
    made, takes = DENOISERS[name].makes, data_rows.of(objective).takes
    if made in takes:
        return
    fitting = [n for n, denoiser in DENOISERS.items() if denoiser.makes in takes]
    readers = [n for n, kind in data_rows.ROWS.items() if made in kind.takes]
    raise UserError(f"{field}: {name} is for objective.name={' or '.join(readers)}, not "
                    f"{objective!r}, which takes {', '.join(fitting) or 'no denoiser'}")


def find(name: str) -> Denoiser:
    """The denoiser that data.denoising names; UserError for an unknown one."""
    if name not in DENOISERS:
        raise UserError(f"{refuse('data.denoising', name, _allowed())}{nearest(name, (*DENOISERS, 'salient', 'salient_kept', 'salient_asked'))}")
    return DENOISERS[name]


def _allowed() -> str:
    return f"one of {', '.join(DENOISERS)}, or salient, salient_kept or salient_asked for pairs"
