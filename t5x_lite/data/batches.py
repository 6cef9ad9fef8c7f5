"""From seqio tasks to global batches of jax.Arrays whose order belongs to the run.

The training stream is `data.num_shards` virtual shards. Each is an endless tf.data pipeline
over its share of the examples, with its own seed and its own place. With B rows in a global
batch and V shards, rows [s * B/V, (s + 1) * B/V) come from shard s. A process reads the
shards that its devices' rows come from, so that one process or eight see the same batches
row for row, and a run may resume on another number of them. Two processes that need the
same rows (tensor parallelism across hosts) both read that shard; the one with the lower
index owns it, and its state in a checkpoint.

    iterator = TrainIterator(config.data, objective="seq2seq", global_batch_size=128,
                             sharding=batch_sharding, seed=config.train.seed)
    batch = next(iterator)              # {feature: jax.Array [B, L]}
    states = iterator.state()           # {shard: bytes} of the shards this process owns
    iterator.restore(all_states)        # {shard: bytes} of at least the shards it reads
    for batch in eval_batches(...): ... # finite, in order, the same on any process count

Features of a batch, int32 [B, L] but for the float32 weights. L is inputs_length on the
encoder's side and targets_length on the decoder's. Padding is 0, with weight 0.

    encoder_input_tokens                            seq2seq, mlm
    encoder_mask                                    the same, unpacked: 1 on tokens, 0 on padding
    decoder_input_tokens                            seq2seq, lm, prefix_lm: targets shifted right
    decoder_target_tokens, decoder_loss_weights     all (mlm: [B, inputs_length])
    decoder_segment_ids, decoder_positions          choices: the number of each choice from 1
    decoder_prefix                                  prefix_lm: 1 where attention looks both ways
    {side}_segment_ids, {side}_positions            with packing: ids from 1, positions from 0

Reading ahead happens in tf.data's own threads and is part of the saved place: a state
corresponds to the batches handed out, whatever was prepared beyond them.

This module imports without TensorFlow, which it needs only once data are read.
"""

import concurrent.futures
import functools
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5x_lite import log
from t5x_lite.data import (
    rows as data_rows,
    tasks as data_tasks,
    views,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.config import DataConfig
from t5x_lite.data.tasks import train_mixture
from t5x_lite.errors import UserError

Batch = dict[str, jax.Array]


# --- training batches -----------------------------------------------------------------------

def shards_of_processes(sharding: jax.sharding.Sharding, shape: tuple[int, int],
                        num_shards: int) -> dict[int, set[int]]:
    """{process index: virtual shards that rows on its devices come from}."""
    share = shape[0] // num_shards
    columns: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(shape[0])
        columns.setdefault(device.process_index, set()).update(
            range(start // share, -(-stop // share)))
    return columns


def owned_shards(readers: Mapping[int, set[int]], process: int) -> list[int]:
    """The shards whose places a process saves: those that no process before it reads."""
    before = set().union(*(shards for other, shards in readers.items() if other < process))
    return sorted(readers[process] - before)


def check_same_data(digests: Sequence[int]) -> None:
    """Raises UserError where processes would read other data, given a digest of each one's."""
    others = [process for process, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise UserError(f"processes {others} see other data than process 0: the same files, the "
                        "same tasks and, for the python_ tasks, the same Python version must be "
                        "on every machine")


def _check_shards(config: DataConfig, global_batch_size: int) -> None:
    shards = config.num_shards
    if shards < 1 or global_batch_size % shards:
        divisors = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        raise UserError(f"train.global_batch_size={global_batch_size} must be a multiple of "
                        f"data.num_shards={shards}; shards could be "
                        f"{min(divisors, key=lambda n: abs(n - shards))}")


# (config, key of rows.ROWS) -> (tasks and their shares, kind of rows, lengths of the rows)
Stream = Callable[[DataConfig, str], tuple[Sequence, data_rows.Rows, DataConfig]]


def labelled(config: DataConfig, objective: str) -> tuple[Sequence, data_rows.Rows, DataConfig]:
    """The stream of data.train or data.train_files."""
    mixture = train_mixture(config, objective)
    _say_unread([task for task, _ in mixture], objective)
    return mixture, data_rows.of(objective), config


class ShardedRows:
    """The rows of some virtual shards, on the host: {shard: {feature: array [B/V, L]}}.

    shards: which ones to read; reading fewer or more never changes what each holds.
    stream: what to read, `labelled` or tasks.unlabelled.
    identity: what the rows are a function of, as JSON values.
    """

    def __init__(self, config: DataConfig, *, objective: str, global_batch_size: int, seed: int,
                 shards: Sequence[int], stream: Stream = labelled):
        _check_shards(config, global_batch_size)
        pipeline = data_tasks.tensorflow_side()
        mixture, kind, config = stream(config, objective)
        seed = seed if config.seed is None else config.seed
        make = functools.partial(pipeline.rows_dataset, mixture, "train", kind, config, seed)
        pipeline.check_documents(mixture, "train", config.num_shards)
        pipeline.check_not_empty(make(training=False), ", ".join(task.name for task, _ in mixture))
        vocabulary = mixture[0].task.output_features["targets"].vocabulary
        identity = {
            "tasks": {task.name: round(weight, 6) for task, weight in mixture},
            "preprocessors": {task.name: pipeline.description(task) for task, _ in mixture},
            "objective": objective, "packing": config.packing, "seed": seed,
            "inputs_length": config.inputs_length, "targets_length": config.targets_length,
            "num_shards": config.num_shards, "shuffle_buffer": config.shuffle_buffer,
            "vocabulary": data_vocabulary.vocabulary_identity(vocabulary),
            "source files": pipeline.files_digest(mixture, "train")}
        cores = os.cpu_count() or 1
        threads = max(1, cores // len(shards))
        self._share = global_batch_size // config.num_shards
        documents = [pipeline.blocks.documents_of(task, "train") for task, _ in mixture]

        def stream(shard: int, documents: Sequence[int]):
            return make(shard, config.num_shards, training=True, threads=threads,
                        shuffle_buffer=config.shuffle_buffer, read_ahead=2 * self._share,
                        documents=documents)
        self._readers = {
            shard: pipeline.ShardReader(
                functools.partial(stream, shard),
                {**identity, "shard": shard}, documents if any(documents) else ())
            for shard in sorted(shards)}
        self.identity = identity
        self._kind = kind
        self._batch_size, self._num_shards = global_batch_size, config.num_shards
        # tf.data works outside Python's lock: the first batch fills every shard's buffer.
        self._pool = concurrent.futures.ThreadPoolExecutor(min(cores, len(shards)))

    def __next__(self) -> dict[int, dict[str, np.ndarray]]:
        return self.take(self._batch_size)

    def take(self, rows: int) -> dict[int, dict[str, np.ndarray]]:
        """The next `rows` of the stream, a multiple of V: rows / V of every shard."""
        share = rows // self._num_shards
        parts = self._pool.map(lambda reader: self._kind.masked(reader.take(share)),
                               self._readers.values())
        return dict(zip(self._readers, parts, strict=True))

    def submit(self, rows: int) -> concurrent.futures.Future:
        """What `take` gives, as a promise of it."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def read() -> None:
            try:
                future.set_result(self.take(rows))
            except BaseException as error:
                future.set_exception(error)
        threading.Thread(target=read, name="first batch", daemon=True).start()
        return future

    def state(self, shards: Sequence[int]) -> dict[int, bytes]:
        """The places of some of the shards after the rows handed out."""
        states = self._pool.map(lambda s: self._readers[s].state(), shards)
        return dict(zip(shards, states, strict=True))

    def restore(self, states: Mapping[int, bytes]) -> None:
        """Puts every shard at its place; UserError where one is missing or of other data."""
        missing = sorted(self._readers.keys() - states.keys())
        if missing:
            raise UserError(f"the checkpoint has no place in the data for virtual shards {missing} "
                            f"(it has {sorted(states)}); data.num_shards must stay what it was")
        list(self._pool.map(lambda shard: self._readers[shard].restore(states[shard]),
                            self._readers))


def _say_unread(tasks: Sequence, objective: str) -> None:
    """Says which parts of the examples the objective does not read (a rejected answer, say)."""
    kind = data_rows.of(objective)
    read = {*kind.features, *kind.optional}
    for task in tasks:
        unread = sorted(set(task.output_features) - read)
        if unread:
            log.say(f"warning: {task.name} also gives {' and '.join(unread)}, which rows of "
                    f"{objective} leave out")


class _Beside(NamedTuple):
    """A stream of a TrainIterator."""

    rows: ShardedRows
    ratio: int    # its rows for each row of the batch
    first: int    # the number that its shard 0 has in a checkpoint


class TrainIterator:
    """Endless global batches {feature: jax.Array [B, L]}; see the head of this module.

    With data.unlabelled the batch also has data.unlabelled_ratio * B rows of that stream, whose
    shards go the same way: {view/feature: jax.Array [ratio * B, L]}, as views.py names them.

    Args:
        config: what to read.
        objective: a key of rows.ROWS, the kind of rows; decides the features of a batch.
        global_batch_size: B, rows over all processes; a multiple of config.num_shards.
        sharding: of a [B, L] array; decides which rows this process reads.
        seed: used where config.seed is None.
    Raises:
        UserError: unknown or empty tasks, unreadable files, sizes that do not divide, labels that
            data.classes does not list.
    """

    def __init__(self, config: DataConfig, *, objective: str, global_batch_size: int,
                 sharding: jax.sharding.Sharding, seed: int):
        self._sharding = sharding
        self._ahead: tuple[int, list[concurrent.futures.Future]] | None = None   # rows, and their arrays
        self._batch_size, self._num_shards = global_batch_size, config.num_shards
        _check_shards(config, global_batch_size)
        length = max(config.inputs_length, config.targets_length)
        readers = shards_of_processes(sharding, (global_batch_size, length), config.num_shards)
        self._owned = owned_shards(readers, jax.process_index())
        made = functools.partial(ShardedRows, config, objective=objective, seed=seed,
                                 shards=sorted(readers[jax.process_index()]))
        self._streams = [_Beside(made(global_batch_size=global_batch_size), 1, 0)]
        if config.classes:
            data_tasks.check_labels(config, objective)
        if config.unlabelled:
            ratio = config.unlabelled_ratio
            rows = made(global_batch_size=ratio * global_batch_size, stream=data_tasks.unlabelled)
            self._streams.append(_Beside(rows, ratio, config.num_shards))
        if jax.process_count() > 1:
            identities = [stream.rows.identity for stream in self._streams]
            digest = zlib.crc32(json.dumps(identities).encode())
            check_same_data(multihost_utils.process_allgather(np.uint32(digest)).tolist())

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        return self.take(self._batch_size)

    def take(self, batch_size: int) -> Batch:
        """The next global batch, of this many rows: a multiple of num_shards and of the ways
        that the mesh splits a batch."""
        (rows_ahead, ahead), self._ahead = self._ahead or (0, None), None
        assert ahead is None or rows_ahead == batch_size, "another batch was read ahead"
        taken = [stream.rows.take(batch_size * stream.ratio) for stream in self._streams] \
            if ahead is None else [future.result() for future in ahead]
        batch = {}
        for stream, by_shard in zip(self._streams, taken, strict=True):
            batch |= self._arrays(by_shard, batch_size * stream.ratio)
        return batch

    def _arrays(self, by_shard: Mapping[int, Mapping[str, np.ndarray]], num_rows: int) -> Batch:
        """Global arrays of so many rows of a stream, given the rows of this process's shards."""
        share = num_rows // self._num_shards

        def rows(name: str, start: int, stop: int) -> np.ndarray:
            parts = []
            for shard in range(start // share, -(-stop // share)):
                first = shard * share
                parts.append(by_shard[shard][name][max(0, start - first):stop - first])
            return np.concatenate(parts) if len(parts) > 1 else parts[0]

        features = next(iter(by_shard.values()))
        return {name: _global_array(functools.partial(rows, name),
                                    (num_rows, *features[name].shape[1:]), self._sharding)
                for name in features}

    def read_ahead(self, batch_size: int) -> None:
        """Begins to read the first batch, which fills every shard's buffer, in threads of its own. It
        must be the next that is taken."""
        self._ahead = batch_size, [stream.rows.submit(batch_size * stream.ratio)
                                   for stream in self._streams]

    def state(self) -> dict[int, bytes]:
        """{shard: bytes} of the shards that this process owns, after the last batch given; those of
        unlabelled text are counted on from num_shards.

        Over all processes, every virtual shard occurs exactly once.
        """
        assert self._ahead is None, "a batch was read that is not handed out yet"
        return {stream.first + shard: place for stream in self._streams
                for shard, place in stream.rows.state(self._owned).items()}

    def restore(self, states: Mapping[int, bytes]) -> None:
        """Continues after the batch at which `states` were taken, on any process count.

        states: those of all processes together (others' shards may be left out).
        Raises UserError where they belong to other data, seeds or lengths.
        """
        assert self._ahead is None, "a batch of another place was read ahead"
        for stream in self._streams:
            own = {shard - stream.first: place for shard, place in states.items()
                   if 0 <= shard - stream.first < self._num_shards}
            if stream.first and not own:
                raise _other_streams("has none", "reads some")
            stream.rows.restore(own)
        if max(states) >= self._num_shards * len(self._streams):
            raise _other_streams("has one", "reads none")


def _other_streams(theirs: str, ours: str) -> UserError:
    """The error (not raised) of a run that begins or ceases to read unlabelled text on its way."""
    return UserError(f"of a place in data.unlabelled the checkpoint {theirs}, and this run {ours}: "
                     "data.unlabelled must stay what it was. To go on from the parameters alone, start "
                     "a new workdir with init_from.")


def _global_array(rows, shape: tuple[int, ...], sharding) -> jax.Array:
    """A global array from rows(start, stop), called for the rows on this process's devices."""
    def block(index):
        start, stop, _ = index[0].indices(shape[0])
        return rows(start, stop)[(slice(None), *index[1:])]
    return jax.make_array_from_callback(shape, sharding, block)


# --- evaluation batches ---------------------------------------------------------------------

def eval_batches(config: DataConfig, task: str, *, objective: str, batch_size: int,
                 sharding: jax.sharding.Sharding, split: str = "validation",
                 max_batches: int | None = None, max_rows: int | None = None) -> Iterator[Batch]:
    """The split once, in the source's order, the same on every process count and every call.

    Every process reads all of it and keeps its devices' rows. The last batch is filled up
    with rows of zeros, whose weights are 0. Random preprocessors use a fixed seed, so all
    runs and steps are measured on the same targets.

    task: one of validation_tasks(config), or any registered task.
    max_batches, max_rows: how much of the split; the last batch of max_rows is filled up as well.
    Raises UserError (on the first batch) for an unknown task or an empty split.
    """
    seqio_task = data_tasks.validation_task(config, task, objective)
    return _once(seqio_task, data_rows.of(objective), config, split, batch_size, sharding,
                 max_batches, max_rows)


def graded_batches(config: DataConfig, task: str, *, objective: str, batch_size: int,
                   sharding: jax.sharding.Sharding, split: str = "validation",
                   max_rows: int | None = None) -> Iterator[Batch]:
    """The texts of the split beside all of data.classes, as `eval_batches` gives its rows: the arrays
    of views.py's first view, with views.RIGHT."""
    plain = data_tasks.validation_task(config, task, objective)
    seqio_task, kind, row_config = data_tasks.graded(config, plain, objective)
    check = functools.partial(views.check_graded, config=config, task=task)
    return _once(seqio_task, kind, row_config, split, batch_size, sharding, None, max_rows, check)


def _once(task, kind: data_rows.Rows, config: DataConfig, split: str, batch_size: int,
          sharding: jax.sharding.Sharding, max_batches: int | None, max_rows: int | None,
          check: Callable[[Mapping[str, np.ndarray]], None] = lambda rows: None) -> Iterator[Batch]:
    """The rows of a task's split in order. check: is shown the arrays of each batch."""
    pipeline = data_tasks.tensorflow_side()
    pipeline.check_task(task, split, kind.features, "data.validation")
    mixture = [pipeline.Weighted(task, 1.0)]
    pipeline.check_documents(mixture, split, 1)
    dataset = pipeline.rows_dataset(
        mixture, split, kind, config, pipeline.EVAL_SEED, training=False)
    blocks = pipeline.finite_batches(dataset, batch_size, max_rows)
    count = 0
    for count, batch in enumerate(map(kind.masked, blocks), 1):
        check(batch)
        yield {name: _global_array(lambda a, b, v=value: v[a:b], value.shape, sharding)
               for name, value in batch.items()}
        if count == max_batches:
            return
    if not count:
        raise UserError(f"the split {split!r} of {task.name!r} holds no examples")


def unigram_entropy(batches: Sequence[Mapping]) -> float:
    """Nats a target token of the best predictor that knows token frequencies only.

    batches: as eval_batches gives them (global arrays). The entropy of the empirical
    distribution of the weighted targets, sentinels and EOS included: what a model must
    beat to have learned anything from context.
    """
    targets, weights = (
        np.concatenate([whole(batch[name]).ravel() for batch in batches])
        for name in ("decoder_target_tokens", "decoder_loss_weights"))
    counts = np.bincount(targets, weights)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def whole(array: jax.Array | np.ndarray) -> np.ndarray:
    """All of a global array, also where other processes hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
