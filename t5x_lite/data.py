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
    decoder_input_tokens                            seq2seq, lm, prefix_lm: targets shifted right
    decoder_target_tokens, decoder_loss_weights     all (mlm: [B, inputs_length])
    decoder_prefix                                  prefix_lm: 1 where attention looks both ways
    {side}_segment_ids, {side}_positions            with packing: ids from 1, positions from 0

Reading ahead happens in tf.data's own threads and is part of the saved place: a state
corresponds to the batches handed out, whatever was prepared beyond them.

This module imports without TensorFlow, which it needs only once data are read.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from t5x_lite.errors import UserError, nearest

if TYPE_CHECKING:
    import seqio
    from t5x_lite import data_pipeline

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes rows. Lists are comma-separated strings, because a
    command line cannot give tuples safely; in Python, tuples are joined for you."""

    # What to train on: names of seqio tasks or mixtures, each with its share of the examples,
    # "a=1,b=3"; without shares, in proportion to their numbers of examples.
    train: str = ""
    # Tasks or mixtures whose "validation" split is evaluated, each task on its own.
    validation: str = ""
    # Text files instead of `train` / `validation`: paths or globs of .txt or .jsonl, also .gz.
    train_files: str = ""
    validation_files: str = ""
    text_document: str = "line"         # a document of a .txt file: line, paragraph or file
    noise_density: float = 0.15         # span corruption of text files: share of tokens hidden …
    mean_span_length: float = 3.0       # … in spans of so many tokens; tasks bring their own
    task_modules: str = ""              # your Python modules that register seqio tasks
    # "": the task's own. Else python, byt5, t5 or the path of a SentencePiece .model file.
    vocabulary: str = ""
    inputs_length: int = 512            # tokens of the encoder's row, EOS included
    targets_length: int = 114           # tokens of the decoder's row, EOS included
    packing: bool = False               # several examples in a row where they fit
    # Mixing: shares or numbers of examples n_i become min(n_i, rate_cap)^(1/temperature).
    temperature: float = 1.0
    rate_cap: float = 0.0               # K of T5's examples-proportional mixing; 0: none
    # The order of the data is a function of these two alone. num_shards divides
    # train.global_batch_size; take a multiple of the largest process count you may use.
    num_shards: int = 8
    seed: int | None = None             # None: train.seed
    shuffle_buffer: int = 1000          # examples a shard holds to shuffle; saved in checkpoints
    cache_dir: str = ""                 # of gathered text; "": $T5X_LITE_CACHE or ~/.cache/t5x_lite

    def __post_init__(self):
        for name in ("train", "validation", "train_files", "validation_files", "task_modules"):
            value = getattr(self, name)
            if not isinstance(value, str):
                parts = (v if isinstance(v, str) else f"{v[0]}={v[1]}" for v in value)
                object.__setattr__(self, name, ",".join(parts))


# --- TensorFlow, late and quiet -------------------------------------------------------------

@functools.lru_cache(maxsize=None)
def _tensorflow_side():
    """data_pipeline, which needs TensorFlow: about 4 s on first use."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _captured_stderr():
        import tensorflow as tf
        import tensorflow_datasets as tfds
        import seqio
        from t5x_lite import data_pipeline
        # The accelerators belong to JAX; TensorFlow would take their memory.
        tf.config.set_visible_devices([], "GPU")
        with contextlib.suppress(ValueError):   # this TensorFlow knows no TPU
            tf.config.set_visible_devices([], "TPU")
        # TFDS keeps small data sets in memory, and thus in every saved iterator.
        seqio.set_tfds_read_config_override(tfds.ReadConfig(try_autocache=False))
    return data_pipeline


@contextlib.contextmanager
def _captured_stderr():
    """Holds back what TensorFlow's C++ prints on import; shows it if the import fails."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            file.seek(0)
            os.write(2, file.read())
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)


# --- which tasks ----------------------------------------------------------------------------

def _registered(config: DataConfig) -> dict[str, "seqio.Task | seqio.Mixture"]:
    """All registered tasks and mixtures by name, those of data.task_modules included."""
    _tensorflow_side()
    import seqio
    import tasks
    from tasks import document_cache
    document_cache.set_root(config.cache_dir)
    for module in ("", *filter(None, config.task_modules.split(","))):
        try:
            tasks.register_all([module] if module else [])
        except ModuleNotFoundError as error:
            if not module or not module.startswith(str(error.name)):
                raise
            raise UserError(f"data.task_modules={config.task_modules!r}: no module named "
                            f"{error.name!r} on PYTHONPATH") from error
    registries = (seqio.MixtureRegistry, seqio.TaskRegistry)
    return {name: registry.get(name) for registry in registries for name in registry.names()}


def _find(name: str, field: str, config: DataConfig):
    registered = _registered(config)
    if name not in registered:
        raise UserError(f"{field}: no task or mixture is called {name!r};"
                        f"{nearest(name, registered)} Known: {', '.join(sorted(registered))}. Your "
                        "own are found when data.task_modules names the module that registers them")
    return registered[name]


def _subtasks(provider) -> dict["seqio.Task", float]:
    """The tasks of a task or mixture with their shares, which sum to one."""
    import seqio
    if isinstance(provider, seqio.Task):
        return {provider: 1.0}
    rates = {task: provider.get_rate(task) for task in provider.tasks}
    return {task: rate / sum(rates.values()) for task, rate in rates.items()}


def mixing_rates(sizes: Sequence[float], temperature: float, cap: float) -> list[float]:
    """Shares proportional to min(n_i, cap)^(1/temperature), summing to one; cap 0 is none.

    Temperature 1 mixes in proportion to size, infinity equally (Raffel et al. 2020, §3.5.2).
    """
    scaled = [(min(n, cap) if cap else n) ** (1 / temperature) for n in sizes]
    return [s / sum(scaled) for s in scaled]


def train_mixture(config: DataConfig, objective: str) -> tuple["data_pipeline.Weighted", ...]:
    """What data.train or data.train_files means: tasks and their shares, summing to one."""
    pipeline = _tensorflow_side()
    if config.train_files:
        return (pipeline.Weighted(_text_task(config, "train", objective), 1.0),)
    if not config.train:
        raise UserError("nothing to train on: set data.train to a task or mixture, or "
                        "data.train_files to text files")
    entries = [part.strip().partition("=") for part in config.train.split(",")]
    providers = [_find(name, "data.train", config) for name, _, _ in entries]
    if config.temperature <= 0 or config.rate_cap < 0:
        raise UserError(f"data.temperature={config.temperature} must be positive and "
                        f"data.rate_cap={config.rate_cap} not negative")
    if len(entries) == 1:
        if config.temperature != 1 or config.rate_cap:
            raise UserError(f"data.temperature={config.temperature} and data.rate_cap="
                            f"{config.rate_cap} mix the entries of data.train, which has only "
                            f"{config.train!r}; list the tasks, or leave them at 1.0 and 0.0")
        shares = [1.0]
    else:
        sizes = [_size(entry, provider) for entry, provider in zip(entries, providers)]
        shares = mixing_rates(sizes, config.temperature, config.rate_cap)
    weights: dict = {}
    for provider, share in zip(providers, shares):
        for task, part in _subtasks(provider).items():
            weights[task] = weights.get(task, 0.0) + share * part
    mixture = tuple(pipeline.Weighted(_with_vocabulary(task, config), weight)
                    for task, weight in weights.items() if weight)
    features = pipeline.converter_of(objective).features
    for task, _ in mixture:
        pipeline.check_task(task, "train", features, "data.train")
        for name in features:
            if task.output_features[name].vocabulary != (
                    mixture[0].task.output_features[name].vocabulary):
                raise UserError(f"data.train mixes vocabularies: {task.name!r} and "
                                f"{mixture[0].task.name!r} differ; set data.vocabulary")
    return mixture


def _size(entry: tuple[str, str, str], provider) -> float:
    """The share written behind "=", else the number of training examples."""
    name, equals, text = entry
    if equals:
        try:
            share = float(text)
        except ValueError:
            share = -1.0
        if not 0 < share < math.inf:
            raise UserError(f"data.train: {name}={text} must be a positive share")
        return share
    examples = [task.num_input_examples("train") for task in _subtasks(provider)]
    if any(n is None or not 0 < n < math.inf for n in examples):
        raise UserError(f"data.train: {name!r} does not know its number of examples; give every "
                        f"entry a share, as in {name}=1")
    return sum(examples)


def validation_tasks(config: DataConfig) -> tuple[str, ...]:
    """Names to hand to eval_batches, a mixture taken apart into its tasks."""
    if config.validation_files:
        return ("validation_files",)
    names: dict[str, None] = {}
    for part in filter(None, config.validation.split(",")):
        for task in _subtasks(_find(part.strip(), "data.validation", config)):
            names[task.name] = None
    return tuple(names)


def _text_task(config: DataConfig, split: str, objective: str) -> "seqio.Task":
    """data.train_files or data.validation_files as a task with the objective's features."""
    _registered(config)
    from tasks import preprocessors, span_corruption, text_files
    field = f"data.{split}_files"
    makers = {"lm": (preprocessors.causal_lm, ("targets",)),
              "seq2seq": (functools.partial(
                  span_corruption.span_corruption, noise_density=config.noise_density,
                  mean_span_length=config.mean_span_length), ("inputs", "targets"))}
    if objective not in makers:
        raise UserError(f"{field}: text files make examples for the objectives "
                        f"{', '.join(makers)}, not {objective!r}; register a task instead")
    preprocessor, features = makers[objective]
    files = text_files.find_files(getattr(config, f"{split}_files"), field)
    return text_files.task(f"{split}_files", files, split, config.text_document,
                           vocabulary_of(config), features, preprocessor)


# --- vocabularies ---------------------------------------------------------------------------

def vocabulary_of(config: DataConfig) -> "seqio.Vocabulary":
    """The vocabulary of the run: data.vocabulary, else that of data.train's targets."""
    registered = _registered(config)
    from tasks import vocabularies
    if config.vocabulary:
        return vocabularies.load(config.vocabulary)
    if not config.train:
        raise UserError("which vocabulary? set data.vocabulary to python, byt5, t5 or the path of "
                        "a SentencePiece model (scripts/train_tokenizer.py makes one)")
    name = config.train.split(",")[0].partition("=")[0].strip()
    return _find(name, "data.train", config).output_features["targets"].vocabulary


def _with_vocabulary(task: "seqio.Task", config: DataConfig) -> "seqio.Task":
    if not config.vocabulary:
        return task
    vocabulary = vocabulary_of(config)
    return task.replace(output_features={
        name: dataclasses.replace(feature, vocabulary=vocabulary)
        for name, feature in task.output_features.items()})


def _identity(vocabulary: "seqio.Vocabulary") -> str:
    """A name that is the same in every process for the same vocabulary, wherever its file is."""
    content = getattr(vocabulary, "sp_model", None) or b""
    return (f"{type(vocabulary).__name__} of {vocabulary.vocab_size} ids, "
            f"crc32 {zlib.crc32(content):08x}")


def check_vocabulary(vocabulary: "seqio.Vocabulary", model_vocab_size: int) -> None:
    """Raises UserError where token ids would fall outside the model's embedding."""
    if vocabulary.vocab_size > model_vocab_size:
        raise UserError(
            f"model.vocab_size={model_vocab_size} is smaller than the vocabulary's "
            f"{vocabulary.vocab_size} ids; set model.vocab_size to {vocabulary.vocab_size} or more "
            f"(a multiple of 128 suits accelerators: {-(-vocabulary.vocab_size // 128) * 128})")


def bytes_of_tokens(vocabulary: "seqio.Vocabulary", model_vocab_size: int) -> np.ndarray:
    """int32 [model_vocab_size]: UTF-8 bytes of text each id stands for, for bits per byte.

    Padding, EOS, sentinels and ids beyond the vocabulary stand for none. ByT5's sentinels
    are byte ids as well and count as bytes.
    """
    import seqio
    table = np.zeros([model_vocab_size], np.int32)
    if isinstance(vocabulary, seqio.ByteVocabulary):
        table[3:259] = 1
    elif isinstance(vocabulary, seqio.SentencePieceVocabulary):
        pieces = vocabulary.tokenizer
        for i in range(pieces.GetPieceSize()):
            piece = pieces.IdToPiece(i)
            if pieces.IsByte(i):
                table[i] = 1
            elif not (pieces.IsControl(i) or pieces.IsUnknown(i) or "<extra_id_" in piece):
                table[i] = len(piece.replace("\u2581", " ").encode())
    else:
        for i in range(vocabulary.vocab_size - vocabulary.extra_ids):
            table[i] = len(vocabulary.decode([i]).encode())
    return table


def unigram_entropy(batches) -> float:
    """Nats a target token of the best predictor that knows token frequencies only.

    batches: as eval_batches gives them (global arrays). The entropy of the empirical
    distribution of the weighted targets, sentinels and EOS included: what a model must
    beat to have learned anything from context.
    """
    counts = np.zeros([0])
    for batch in batches:
        targets, weights = (_whole(batch[name]) for name in
                            ("decoder_target_tokens", "decoder_loss_weights"))
        new = np.bincount(targets.ravel(), weights.ravel())
        counts, new = (np.pad(c, [0, max(0, max(len(counts), len(new)) - len(c))])
                       for c in (counts, new))
        counts = counts + new
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _whole(array) -> np.ndarray:
    """All of a global array, also where other processes hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


# --- training batches -----------------------------------------------------------------------

def shards_of_processes(sharding: jax.sharding.Sharding, shape: tuple[int, int],
                        num_shards: int) -> dict[int, set[int]]:
    """{process index: virtual shards that rows on its devices come from}."""
    share = shape[0] // num_shards
    found: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start, stop, _ = index[0].indices(shape[0])
        found.setdefault(device.process_index, set()).update(
            range(start // share, -(-stop // share)))
    return found


def owned_shards(readers: Mapping[int, set[int]], process: int) -> list[int]:
    """The shards whose places a process saves: those that no process before it reads."""
    before = set().union(*(shards for other, shards in readers.items() if other < process))
    return sorted(readers[process] - before)


def _check_shards(config: DataConfig, global_batch_size: int) -> None:
    shards = config.num_shards
    if shards < 1 or global_batch_size % shards:
        divisors = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        raise UserError(f"train.global_batch_size={global_batch_size} must be a multiple of "
                        f"data.num_shards={shards}; shards could be "
                        f"{min(divisors, key=lambda n: abs(n - shards))}")


class ShardedRows:
    """The rows of some virtual shards, on the host: {shard: {feature: array [B/V, L]}}.

    shards: which ones to read; reading fewer or more never changes what each holds.
    """

    def __init__(self, config: DataConfig, *, objective: str, global_batch_size: int, seed: int,
                 shards: Sequence[int]):
        _check_shards(config, global_batch_size)
        pipeline = _tensorflow_side()
        mixture = train_mixture(config, objective)
        converter = pipeline.converter_of(objective)
        seed = seed if config.seed is None else config.seed
        make = functools.partial(
            pipeline.rows_dataset, mixture, "train", converter, config.inputs_length,
            config.targets_length, config.packing, seed)
        pipeline.check_documents(mixture, "train", config.num_shards)
        pipeline.check_not_empty(make(training=False), config.train or "data.train_files")
        identity = {
            "tasks": {task.name: round(weight, 6) for task, weight in mixture},
            "objective": objective, "packing": config.packing, "seed": seed,
            "inputs_length": config.inputs_length, "targets_length": config.targets_length,
            "num_shards": config.num_shards, "shuffle_buffer": config.shuffle_buffer,
            "vocabulary": _identity(mixture[0].task.output_features["targets"].vocabulary),
            "files": pipeline.files_digest(mixture, "train")}
        cores = os.cpu_count() or 1
        threads = max(1, cores // len(shards))
        self._readers = {
            shard: pipeline.ShardReader(
                make(shard, config.num_shards, training=True, threads=threads,
                     shuffle_buffer=config.shuffle_buffer), {**identity, "shard": shard})
            for shard in sorted(shards)}
        self._share = global_batch_size // config.num_shards
        # tf.data works outside Python's lock: the first batch fills every shard's buffer.
        self._pool = concurrent.futures.ThreadPoolExecutor(min(cores, len(shards)))

    def __next__(self) -> dict[int, dict[str, np.ndarray]]:
        rows = self._pool.map(lambda reader: reader.take(self._share), self._readers.values())
        return dict(zip(self._readers, rows))

    def state(self, shards: Sequence[int]) -> dict[int, bytes]:
        """The places of some of the shards after the rows handed out."""
        return {shard: self._readers[shard].state() for shard in shards}

    def restore(self, states: Mapping[int, bytes]) -> None:
        """Puts every shard at its place; UserError where one is missing or of other data."""
        missing = sorted(self._readers.keys() - states.keys())
        if missing:
            raise UserError(f"the checkpoint has no place in the data for virtual shards {missing} "
                            f"(it has {sorted(states)}); data.num_shards must stay what it was")
        for shard, reader in self._readers.items():
            reader.restore(states[shard])


class TrainIterator:
    """Endless global batches {feature: jax.Array [B, L]}; see the head of this module.

    Args:
        config: what to read.
        objective: seq2seq, lm, prefix_lm or mlm; decides the features of a batch.
        global_batch_size: B, rows over all processes; a multiple of config.num_shards.
        sharding: of a [B, L] array; decides which rows this process reads.
        seed: used where config.seed is None.
    Raises:
        UserError: unknown or empty tasks, unreadable files, sizes that do not divide.
    """

    def __init__(self, config: DataConfig, *, objective: str, global_batch_size: int,
                 sharding: jax.sharding.Sharding, seed: int):
        self._sharding = sharding
        self._batch_size, self._num_shards = global_batch_size, config.num_shards
        _check_shards(config, global_batch_size)
        length = max(config.inputs_length, config.targets_length)
        readers = shards_of_processes(sharding, (global_batch_size, length), config.num_shards)
        self._owned = owned_shards(readers, jax.process_index())
        self._rows = ShardedRows(config, objective=objective, global_batch_size=global_batch_size,
                                 seed=seed, shards=sorted(readers[jax.process_index()]))

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        by_shard = next(self._rows)
        share = self._batch_size // self._num_shards

        def rows(name: str, start: int, stop: int) -> np.ndarray:
            parts = []
            for shard in range(start // share, -(-stop // share)):
                first = shard * share
                parts.append(by_shard[shard][name][max(0, start - first):stop - first])
            return np.concatenate(parts) if len(parts) > 1 else parts[0]

        features = next(iter(by_shard.values()))
        return {name: _global_array(functools.partial(rows, name),
                                    (self._batch_size, *features[name].shape[1:]), self._sharding)
                for name in features}

    def state(self) -> dict[int, bytes]:
        """{shard: bytes} of the shards that this process owns, after the last batch given.

        Over all processes, every virtual shard occurs exactly once.
        """
        return self._rows.state(self._owned)

    def restore(self, states: Mapping[int, bytes]) -> None:
        """Continues after the batch at which `states` were taken, on any process count.

        states: those of all processes together (others' shards may be left out).
        Raises UserError where they belong to other data, seeds or lengths.
        """
        self._rows.restore(states)


def _global_array(rows, shape: tuple[int, ...], sharding) -> jax.Array:
    """A global array from rows(start, stop), called for the rows on this process's devices."""
    def block(index):
        start, stop, _ = index[0].indices(shape[0])
        return rows(start, stop)[(slice(None), *index[1:])]
    return jax.make_array_from_callback(shape, sharding, block)


# --- evaluation batches ---------------------------------------------------------------------

def eval_batches(config: DataConfig, task: str, *, objective: str, batch_size: int,
                 sharding: jax.sharding.Sharding, split: str = "validation",
                 max_batches: int | None = None) -> Iterator[Batch]:
    """The split once, in the source's order, the same on every process count and every call.

    Every process reads all of it and keeps its devices' rows. The last batch is filled up
    with rows of zeros, whose weights are 0. Random preprocessors use a fixed seed, so all
    runs and steps are measured on the same targets.

    task: one of validation_tasks(config), or any registered task.
    Raises UserError (on the first batch) for an unknown task or an empty split.
    """
    pipeline = _tensorflow_side()
    if task == "validation_files":
        found = _text_task(config, "validation", objective)
    else:
        found = _with_vocabulary(_find(task, "data.validation", config), config)
    converter = pipeline.converter_of(objective)
    pipeline.check_task(found, split, converter.features, "data.validation")
    mixture = [pipeline.Weighted(found, 1.0)]
    pipeline.check_documents(mixture, split, 1)
    dataset = pipeline.rows_dataset(
        mixture, split, converter, config.inputs_length,
        config.targets_length, config.packing, pipeline.EVAL_SEED, training=False)
    blocks = pipeline.finite_batches(dataset, batch_size)
    count = 0
    for count, batch in enumerate(blocks, 1):
        yield {name: _global_array(lambda a, b, v=value: v[a:b], value.shape, sharding)
               for name, value in batch.items()}
        if count == max_batches:
            return
    if not count:
        raise UserError(f"the split {split!r} of {task!r} holds no examples")
