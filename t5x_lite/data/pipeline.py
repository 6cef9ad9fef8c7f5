"""The TensorFlow side of batches.py: one virtual shard as one saveable tf.data pipeline.

    files or examples of the shard -> repeat for ever -> the task's preprocessors, seeded
    -> trim -> shuffle -> mixture of tasks -> model features -> pack or pad -> blocks of rows

batches.py imports this module lazily, because it imports TensorFlow.

Shape legend: L positions of one side (encoder or decoder) of a row.
"""

import contextlib
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import seqio
import tensorflow as tf

from t5x_lite.data import blocks, vocabulary as data_vocabulary
from t5x_lite.data.config import DataConfig
from t5x_lite.data.rows import FIXES, Rows
from t5x_lite.errors import UserError

BLOCK_ROWS = 8   # rows a pipeline yields at once; states do not depend on the batch size
EVAL_SEED = 0    # evaluation masks the same tokens in every run and at every step
UNCUT = 1 << 16  # tokens: no example of a text-to-text task is longer

# Calls into Python (from_generator is a GeneratorDataset over PyFunc) and random kernels
# whose state lives outside the iterator: a restored iterator would go on differently.
_UNSAVEABLE_OPS = frozenset({
    "PyFunc", "PyFuncStateless", "EagerPyFunc", "GeneratorDataset",
    "RandomUniform", "RandomUniformInt", "RandomStandardNormal", "TruncatedNormal",
    "ParameterizedTruncatedNormal", "RandomShuffle", "Multinomial", "RandomGamma",
    "RandomPoissonV2"})

_plain = tf.autograph.experimental.do_not_convert   # no Python control flow in the graphs below


class Weighted(NamedTuple):
    """A task and its share of a mixture; shares need not sum to one."""
    task: seqio.Task
    weight: float


# --- rows ---------------------------------------------------------------------------------

def _finish_row(sides: dict[str, dict], lengths: dict[str, int], start: int = 0,
                marked: bool = False) -> dict:
    """Flat, zero-padded model features [L], with what rows.py says that sides gain.

    start: what a decoder reads first. marked: whether id 0 stands in texts, so that only the mask made
    here tells padding. Elsewhere Rows.masked adds it: saved places hold rows that tf.data has ahead, and
    what those hold stays as it was in runs that began before rows had masks.
    """
    row = {}
    for side, features in sides.items():
        read = features.get(f"{side}_input_tokens")
        masked = marked and read is not None and f"{side}_segment_ids" not in features
        made = {f"{side}_mask": tf.ones_like(read, tf.int32)} if masked else {}
        for name, value in (features | made).items():
            value = value[:lengths[side]]
            row[name] = tf.ensure_shape(
                tf.pad(value, [[0, lengths[side] - tf.size(value)]]), [lengths[side]])
    for side in sides:
        # A masked LM's targets stand on the encoder's side, and are shifted for nobody.
        if f"{side}_target_tokens" not in row:
            continue
        shifted = tf.concat([[start], row[f"{side}_target_tokens"][:-1]], 0)
        if f"{side}_positions" in row:   # packed: nothing leaks from one example to the next
            shifted = tf.where(row[f"{side}_positions"] == 0, start, shifted)
        row[f"{side}_input_tokens"] = shifted
    return row


def pack(dataset: tf.data.Dataset, lengths: dict[str, int]) -> tf.data.Dataset:
    """Lays examples side by side in rows, in order, and adds segment ids and positions.

    A row takes examples as long as every side has room for the next one (next fit); then
    it is closed. The open row is the state of a tf.data scan, so it is saved with the
    iterator. seqio instead packs groups of as many examples as the longest side has
    tokens, and closes a row at each group's end.

    dataset: {side: {feature: 1-D array}}, as rows.Rows.convert gives them. Each side gains
    {side}_segment_ids, 1, 2, … along a row, and {side}_positions, counted from 0 in each
    segment; both are 0 on padding.
    """
    spec = {side: {name: tensor.dtype for name, tensor in features.items()}
            for side, features in dataset.element_spec.items()}
    nothing = {side: {name: tf.zeros([0], dtype) for name, dtype in features.items()}
               for side, features in spec.items()}
    empty_row = {side: {**features, f"{side}_segment_ids": tf.zeros([0], tf.int32),
                        f"{side}_positions": tf.zeros([0], tf.int32)}
                 for side, features in nothing.items()}

    def add(row, element):
        example, is_last = element
        used = {side: tf.size(row[side][f"{side}_segment_ids"]) for side in lengths}
        sizes = {side: tf.size(next(iter(example[side].values()))) for side in lengths}
        fits = ~is_last
        for side, length in lengths.items():
            fits &= used[side] + sizes[side] <= length
        last_segment = tf.reduce_max(tf.concat(
            [[0], *(row[side][f"{side}_segment_ids"] for side in lengths)], 0))
        segment = tf.where(fits, last_segment, 0) + 1
        next_row = {}
        for side in lengths:
            added = {**example[side],
                     f"{side}_segment_ids": tf.fill([sizes[side]], segment),
                     f"{side}_positions": tf.range(sizes[side])}
            kept = tf.where(fits, used[side], 0)
            next_row[side] = {name: tf.concat([row[side][name][:kept], added[name]], 0)
                              for name in row[side]}
        return next_row, (row, ~fits & (last_segment > 0))

    flush = tf.data.Dataset.from_tensors((nothing, True))
    return (dataset.map(_plain(lambda example: (example, False))).concatenate(flush)
            .scan(empty_row, _plain(add))
            .filter(_plain(lambda row, closed: closed)).map(_plain(lambda row, closed: row)))


# --- one task, one shard --------------------------------------------------------------------

def seed_of(*parts) -> int:
    """A seed in [0, 2^31) from any printable parts: the same in every process and run."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def check_task(task: seqio.Task, split: str, features: Sequence[str], field: str) -> None:
    """Raises UserError where the task lacks the split or a feature."""
    if split not in task.splits:
        raise UserError(f"{field}={task.name!r} has no split {split!r}; it has "
                        f"{', '.join(sorted(task.splits))}")
    missing = [f for f in features if f not in task.output_features]
    if missing:
        raise UserError(f"{field}={task.name!r} gives {', '.join(task.output_features)}, but the "
                        f"objective needs {', '.join(features)}; "
                        f"{FIXES.get(missing[-1], 'take a task made for it')}")


def task_dataset(task: seqio.Task, split: str, lengths: dict[str, int], seed: int,
                 shard: int, num_shards: int, *, training: bool, shuffle_buffer: int,
                 documents: int = 0) -> tf.data.Dataset:
    """Examples {feature: int32 tokens, or floats} of one shard: endless and shuffled, or once in
    order.

    Sources of at least num_shards files are split by file; smaller ones by example, for
    which every shard must read them in the same order, hence with the same seed.

    documents: how many an endless stream reads at a time (blocks.py); 0: one, as before there were blocks.
    """
    task = blocks.in_blocks(task, documents)
    dataset = _preprocessed(task, split, lengths, seed, shard, num_shards, training)
    if not (documents and blocks.fit(dataset, lengths)):
        dataset = dataset.map(_plain(lambda x: {
            f: values if values.dtype.is_floating else tf.cast(values, tf.int32)
            for f, values in trimmed(x, lengths).items()}))
    if training and shuffle_buffer > 1:
        shard_seed = seed_of(seed, task.name, shard)
        dataset = dataset.shuffle(shuffle_buffer, seed=seed_of(shard_seed, "shuffle"))
    return dataset


def trimmed(example: dict, lengths: dict[str, int]) -> dict:
    """The features that have lengths, cut to them; targets to what inputs leave of a row."""
    features = {f: example[f][:length] for f, length in lengths.items() if f != "row"}
    if "row" in lengths:
        features["targets"] = example["targets"][:lengths["row"] - tf.size(features["inputs"])]
    return features


def _preprocessed(task: seqio.Task, split: str, lengths: dict[str, int], seed: int, shard: int,
                  num_shards: int, training: bool, records: int | None = None) -> tf.data.Dataset:
    """Examples of one shard with every field that the task's preprocessors keep.

    records: how many the source gives at most; None: all.
    """
    source = task.source
    info = seqio.ShardInfo(shard, num_shards)
    shard_seed = seed_of(seed, task.name, shard)
    if source.supports_arbitrary_sharding or len(source.list_shards(split)) >= num_shards:
        dataset = source.get_dataset(split=split, shuffle=training, seed=shard_seed,
                                     shard_info=info)
    else:
        dataset = source.get_dataset(split=split, shuffle=training, seed=seed_of(seed, task.name))
        dataset = dataset.shard(num_shards, shard)
    if records is not None:
        dataset = dataset.take(records)
    dataset = task.preprocess_precache(dataset, seed=shard_seed)
    if training:   # before the random preprocessors, so that every epoch draws anew
        dataset = dataset.repeat()
    return task.preprocess_postcache(dataset, sequence_length=lengths, seed=shard_seed)


def examples(task: seqio.Task, split: str, lengths: dict[str, int]) -> Iterator[dict]:
    """The examples that evaluation's rows are made of, as numpy, in their order, with all fields:
    what a postprocessor reads. Features are int32 tokens: whole those of pairs of texts; others,
    which fill whatever lengths they are given, have those."""
    dataset = _preprocessed(task, split, lengths, EVAL_SEED, 0, 1, False)
    if "targets_pretokenized" in dataset.element_spec:
        whole = dict.fromkeys(lengths, UNCUT)
        yield from _read(_preprocessed(task, split, whole, EVAL_SEED, 0, 1, False))
        return
    for example in _read(dataset):
        yield {**example, **trimmed(example, lengths)}


def first_examples(task: seqio.Task, split: str, lengths: dict[str, int], records: int
                   ) -> tf.data.Dataset:
    """What the preprocessors make of the first so many records, uncut, with all fields."""
    return _preprocessed(task, split, lengths, EVAL_SEED, 0, 1, False, records)


def rows_dataset(mixture: Sequence[Weighted], split: str, kind: Rows, config: DataConfig, seed: int,
                 shard: int = 0, num_shards: int = 1, *, training: bool, shuffle_buffer: int = 0,
                 read_ahead: int = 0, threads: int = 1, documents: Sequence[int] = ()
                 ) -> tf.data.Dataset:
    """Blocks of up to BLOCK_ROWS rows of this kind, of one shard.

    config: the lengths of a row, and whether it is packed.
    read_ahead: rows to prepare in the background; they are part of the saved place.
    documents: of each task, that a stream which is read in blocks takes at a time; (): no blocks.
    """
    vocabulary = mixture[0].task.output_features["targets"].vocabulary
    eos_id = vocabulary.eos_id
    row_lengths = kind.lengths(config)
    start = 0 if kind.has_encoder else getattr(vocabulary, "start_id", 0)
    read = mixture[0].task.output_features.get(
        "inputs", mixture[0].task.output_features["targets"]).vocabulary
    marked = data_vocabulary.zero_in_rows(read)

    def convert(example: dict) -> dict:
        return kind.weighted(kind.convert(example, eos_id), config.loss_on_inputs)

    def finish(sides: dict) -> dict:
        return _finish_row(sides, row_lengths, start, marked)

    examples = [task_dataset(
        task, split, kind.task_lengths(task, config.inputs_length, config.targets_length), seed,
        shard, num_shards, training=training, shuffle_buffer=shuffle_buffer, documents=number)
        for (task, _), number in zip(mixture, documents or [0] * len(mixture), strict=True)]
    dataset = None
    if any(documents) and len(examples) == 1:
        dataset = blocks.rows(examples[0], convert, row_lengths, config.packing, finish, BLOCK_ROWS)
    if dataset is None:
        dataset = _mixed([part.map(_plain(convert)) for part in examples],
                         [weight for _, weight in mixture], seed_of(seed, "mixture", shard))
        if config.packing:
            dataset = pack(dataset, row_lengths)
        dataset = dataset.map(_plain(finish)).batch(BLOCK_ROWS)
    dataset = dataset.prefetch(2 + read_ahead // BLOCK_ROWS)
    check_saveable(dataset, ", ".join(task.name for task, _ in mixture))
    options = tf.data.Options()
    options.deterministic = True
    # Tuning costs a quarter of the CPU time of these small functions, and gains nothing.
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)


def _mixed(parts: list[tf.data.Dataset], weights: Sequence[float], seed: int) -> tf.data.Dataset:
    """One stream of several, in proportion to their weights."""
    if len(parts) == 1:
        return parts[0]
    return tf.data.Dataset.sample_from_datasets(
        parts, [weight / sum(weights) for weight in weights], seed=seed)


def check_documents(mixture: Sequence[Weighted], split: str, num_shards: int) -> None:
    """Raises UserError where a shard would get no document of a source that counts its own."""
    for task, _ in mixture:
        documents = task.num_input_examples(split)
        if documents is not None and documents < num_shards:
            raise UserError(f"{task.name!r} has {documents} documents in {split!r}, too few for "
                            f"data.num_shards={num_shards}; lower it, give more text, or cut the "
                            "text into more documents (data.text_document)")


def check_not_empty(once: tf.data.Dataset, name: str) -> None:
    """Raises UserError where one epoch holds no row.

    A task that filters everything away would search its endless source for ever.
    """
    with _reading():
        first = next(iter(once.take(1)), None)
    if first is None:
        raise UserError(f"the training split of {name} holds no examples once preprocessed")


def check_saveable(dataset: tf.data.Dataset, name: str) -> None:
    """Raises UserError where the pipeline calls Python or stateful random ops."""
    ops = sorted(_ops(dataset) & _UNSAVEABLE_OPS)
    if ops:
        raise UserError(
            f"the pipeline of {name} contains {', '.join(ops)}: tf.data cannot save its place in "
            "it, and a resumed run would see other examples. Run Python code ahead of tf.data "
            "(document_cache.py) instead of py_function, numpy_function or from_generator; "
            "draw random numbers with tf.random.stateless_* and seqio.map_over_dataset(num_seeds=1)")


def _ops(dataset: tf.data.Dataset) -> set[str]:
    """Types of all ops in the graphs of the pipeline's functions, and of its datasets."""
    graph_def = tf.compat.v1.GraphDef.FromString(tf.raw_ops.DatasetToGraphV2(
        input_dataset=dataset._variant_tensor, external_state_policy=1).numpy())
    nodes = list(graph_def.node)
    for function in graph_def.library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


# --- iterators ------------------------------------------------------------------------------

@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """UserError where the files of a cache or a data set turn out to be damaged or gone."""
    try:
        yield
    except (tf.errors.DataLossError, tf.errors.NotFoundError) as error:
        raise UserError(f"the data are damaged: {error.message[:300]}. Where that is a file of the "
                        "text cache (data.cache_dir, T5X_LITE_CACHE), remove its folder: it is made "
                        "anew.") from error


def _read(dataset: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    """The elements as numpy."""
    elements = dataset.as_numpy_iterator()
    while True:
        with _reading():
            element = next(elements, None)
        if element is None:
            return
        yield element


_DOCUMENTS = "documents read at a time"   # in a saved place, beside its rows


class ShardReader:
    """Rows of one virtual shard, with a place that can be saved.

    make: the documents that each task reads at a time (`rows_dataset`) -> endless blocks of rows, which
    are the same for all of them. documents: those of a stream that begins; one whose place is restored
    goes on with its own. identity: what the rows are a function of, checked when a place is restored.
    """

    def __init__(self, make: Callable[[Sequence[int]], tf.data.Dataset], identity: dict,
                 documents: Sequence[int] = ()):
        self._make, self._documents = make, tuple(documents)
        self._iterator = iter(make(self._documents))
        self._identity = identity
        self._pending: dict[str, np.ndarray] = {}   # rows read and not yet handed out

    def take(self, num_rows: int) -> dict[str, np.ndarray]:
        """The next rows: {feature: array [num_rows, L]}."""
        blocks, have = [], 0
        if self._pending:
            blocks, have = [self._pending], _num_rows(self._pending)
        while have < num_rows:
            try:
                with _reading():
                    block = next(self._iterator)
            except StopIteration:
                raise UserError(
                    f"shard {self._identity['shard']} of {self._identity['tasks']} holds no "
                    f"examples; lower data.num_shards={self._identity['num_shards']} or give more "
                    "text") from None
            blocks.append({name: value.numpy() for name, value in block.items()})
            have += _num_rows(blocks[-1])
        rows = {name: np.concatenate([b[name] for b in blocks]) if len(blocks) > 1
                else blocks[0][name] for name in blocks[0]}
        self._pending = {name: value[num_rows:] for name, value in rows.items()}
        return {name: value[:num_rows] for name, value in rows.items()}

    def state(self) -> bytes:
        """The place after the last row handed out: tf.data's own state and pending rows."""
        iterator = tf.io.serialize_tensor(tf.raw_ops.SerializeIterator(
            resource_handle=self._iterator._iterator_resource, external_state_policy=1)).numpy()
        file = io.BytesIO()
        # Places of before there were blocks do not say that they have none.
        read = {_DOCUMENTS: np.array(self._documents)} if any(self._documents) else {}
        np.savez(file, **read, identity=np.bytes_(json.dumps(self._identity).encode()),
                 iterator=np.frombuffer(iterator, np.uint8), **self._pending)
        return zlib.compress(file.getvalue(), 1)

    def restore(self, state: bytes) -> None:
        """Goes to a place that state() gave; UserError where it is of another pipeline."""
        with np.load(io.BytesIO(zlib.decompress(state))) as saved:
            arrays = dict(saved)
        identity = json.loads(arrays.pop("identity").item())
        changed = [f"{key}: {identity.get(key)!r} in the checkpoint, {self._identity.get(key)!r} now"
                   for key in sorted(identity.keys() | self._identity.keys())
                   if identity.get(key) != self._identity.get(key)]
        if changed:
            raise UserError("the checkpoint's place in the data cannot be resumed, because the "
                            "data are others:\n  " + "\n  ".join(changed) + "\nGo back to the "
                            "run's own data settings, or start a new workdir with init_from.")
        iterator = arrays.pop("iterator").tobytes()
        documents = tuple(arrays.pop(_DOCUMENTS, np.zeros(0, int)).tolist())
        if documents != self._documents:
            self._documents, self._iterator = documents, iter(self._make(documents))
        names = self._iterator.element_spec.keys()
        if arrays and arrays.keys() != names:
            raise UserError(
                f"the checkpoint's rows hold {', '.join(sorted(arrays))}, and those read now "
                f"{', '.join(sorted(names))}: another version of t5x_lite wrote it. Finish the run with "
                "that one, or start a new workdir with init_from.")
        try:
            tf.raw_ops.DeserializeIterator(
                resource_handle=self._iterator._iterator_resource,
                serialized=tf.io.parse_tensor(iterator, tf.variant))
        except tf.errors.OpError as error:
            raise UserError(
                f"TensorFlow {tf.__version__} cannot restore the checkpoint's place in the data "
                f"({error.message[:200]}). Use the version that the run was started with, or start a "
                "new workdir with init_from.") from error
        self._pending = arrays


def finite_batches(dataset: tf.data.Dataset, batch_size: int, max_rows: int | None = None
                   ) -> Iterator[dict[str, np.ndarray]]:
    """Batches of exactly batch_size rows, of the first max_rows; the last one filled up with rows
    of zeros."""
    pending: dict[str, np.ndarray] = {}
    for block in _first_rows(_read(dataset), max_rows):
        if pending:
            block = {name: np.concatenate([pending[name], block[name]]) for name in block}
        pending = block
        while _num_rows(pending) >= batch_size:
            yield {name: value[:batch_size] for name, value in pending.items()}
            pending = {name: value[batch_size:] for name, value in pending.items()}
    if pending and _num_rows(pending):
        missing = batch_size - _num_rows(pending)
        yield {name: np.pad(value, [(0, missing), (0, 0)]) for name, value in pending.items()}


def _first_rows(blocks: Iterator[dict[str, np.ndarray]], max_rows: int | None
                ) -> Iterator[dict[str, np.ndarray]]:
    """The blocks up to so many rows, the last of them cut; None: all."""
    left = max_rows
    for block in blocks:
        if left is not None:
            block = {name: value[:left] for name, value in block.items()}
            left -= _num_rows(block)
        yield block
        if left == 0:
            return


def _num_rows(block: dict[str, np.ndarray]) -> int:
    return len(next(iter(block.values())))


def description(task: seqio.Task) -> list[str]:
    """The task's preprocessors by name, with their plain settings."""
    names = []
    for step in task.preprocessors:
        settings = {n: v for n, v in getattr(step, "keywords", {}).items()
                    if isinstance(v, (bool, int, float, str))}
        name = getattr(getattr(step, "func", step), "__name__", type(step).__name__)
        names.append(name + str(settings or ""))
    return names


def files_digest(mixture: Sequence[Weighted], split: str) -> str:
    """Changes with the names of the source files; cached text is named by its content."""
    names = [os.path.basename(str(f)) for task, _ in mixture for f in task.source.list_shards(split)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
