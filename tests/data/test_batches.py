"""The order of the data belongs to the run: process counts, resumption, mixtures, packing."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5x_lite.data import (
    batches as data_batches,
    rows as data_rows,
    tasks as data_tasks,
    vocabulary as data_vocabulary,
)
from t5x_lite.data.batches import ShardedRows, TrainIterator
from t5x_lite.data.config import DataConfig
from t5x_lite.errors import UserError
from t5x_lite.evaluation import evaluator

TASK = "data_test_count"
SMALL = DataConfig(train=TASK, validation=TASK, inputs_length=8, targets_length=8, num_shards=4,
                   shuffle_buffer=16)
NUM_EXAMPLES = 200


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Tasks over numbered examples: inputs [n, n], targets [n, …, n] of growing length."""
    data_tasks.tensorflow_side()
    import seqio
    import tensorflow as tf

    from t5x_lite.data import vocabularies
    features = {name: seqio.Feature(vocabularies.load("byt5"), add_eos=False)
                for name in ("inputs", "targets")}

    def numbers(first, count):
        def dataset_fn(split, shuffle_files, seed=None):
            return tf.data.Dataset.range(first, first + count).map(lambda n: {
                "inputs": tf.fill([2], tf.cast(n, tf.int32)),
                "targets": tf.fill([1 + tf.cast(n % 3, tf.int32)], tf.cast(n, tf.int32))})
        return seqio.FunctionDataSource(dataset_fn, splits=("train", "validation"),
                                        num_input_examples={"train": count, "validation": count})

    def noisy(dataset):
        @seqio.map_over_dataset(num_seeds=1)
        def add_noise(example, seed):
            noise = tf.random.stateless_uniform([1], seed, 1, 1000, dtype=tf.int32)
            return {**example, "targets": tf.concat([example["targets"], noise], 0)}
        return add_noise(dataset)

    def map_targets(function):
        return lambda ds: ds.map(lambda x: {**x, "targets": function(x["targets"])})

    same = lambda x: tf.ensure_shape(tf.numpy_function(lambda v: v, [x], tf.int32), [None])
    preprocessors = {
        TASK: (numbers(1, NUM_EXAMPLES), []),
        "data_test_noise": (numbers(1, NUM_EXAMPLES), [noisy]),
        "data_test_b": (numbers(1001, 400), []),
        "data_test_c": (numbers(2001, 25), []),
        "data_test_nothing": (numbers(1, 50), [lambda ds: ds.filter(lambda x: False)]),
        "data_test_numpy": (numbers(1, 50), [map_targets(same)]),
        "data_test_stateful": (numbers(1, 50), [map_targets(
            lambda x: x + tf.random.uniform([], 1, 3, dtype=tf.int32))]),
        "data_test_generator": (numbers(1, 50), [lambda ds: tf.data.Dataset.from_generator(
            lambda: iter([]), output_signature=ds.element_spec)]),
    }
    for name, (source, steps) in preprocessors.items():
        seqio.TaskRegistry.add(name, source=source, preprocessors=steps, output_features=features)
    seqio.TaskRegistry.add("data_test_targets", source=numbers(1, 50), preprocessors=[],
                           output_features={"targets": features["targets"]})
    seqio.MixtureRegistry.add("data_test_mix", [(TASK, 1.0), ("data_test_b", 3.0)])
    yield
    for name in (*preprocessors, "data_test_targets"):
        seqio.TaskRegistry.remove(name)
    seqio.MixtureRegistry.remove("data_test_mix")


def batch_sharding(devices=8):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return NamedSharding(mesh, PartitionSpec("data"))


def make_rows(config=SMALL, shards=None, batch=16, seed=0, objective="seq2seq"):
    return ShardedRows(config, objective=objective, global_batch_size=batch, seed=seed,
                       shards=range(config.num_shards) if shards is None else shards)


def take(rows, count):
    return [next(rows) for _ in range(count)]


def assert_same(found, expected):
    """Equality of lists of {shard: {feature: array}}, or of anything nested like it."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- order ----------------------------------------------------------------------------------

@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_see_the_same_rows(processes):
    expected = take(make_rows(), 5)
    share = SMALL.num_shards // processes
    parts = [take(make_rows(shards=range(p * share, (p + 1) * share)), 5)
             for p in range(processes)]
    found = [dict(itertools.chain.from_iterable(part[step].items() for part in parts))
             for step in range(5)]
    assert_same(found, expected)


def test_resume_on_another_process_count():
    whole = make_rows(dataclasses.replace(SMALL, train="data_test_noise"))
    take(whole, 7)
    states = whole.state(range(4))
    expected = take(whole, 20)   # well into the second epoch
    for processes in (1, 2, 4):
        share = 4 // processes
        for p in range(processes):
            shards = range(p * share, (p + 1) * share)
            rows = make_rows(dataclasses.replace(SMALL, train="data_test_noise"), shards)
            rows.restore(states)
            assert_same(take(rows, 20), [{s: e[s] for s in shards} for e in expected])


def test_global_batches_are_the_shards_rows_in_order():
    iterator = TrainIterator(SMALL, objective="seq2seq", global_batch_size=16,
                             sharding=batch_sharding(), seed=0)
    for expected in take(make_rows(), 3):
        batch = next(iterator)
        for name, value in batch.items():
            assert value.shape == (16, 8) and value.sharding == batch_sharding()
            np.testing.assert_array_equal(
                value, np.concatenate([expected[shard][name] for shard in range(4)]))


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data"),
                                  PartitionSpec(("data", "tensor")),
                                  PartitionSpec("data", "tensor")])
def test_any_sharding_gives_the_same_values(spec):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    iterator = TrainIterator(SMALL, objective="seq2seq", global_batch_size=16,
                             sharding=NamedSharding(mesh, spec), seed=0)
    rows = next(make_rows())
    batch = next(iterator)
    expected = np.concatenate([rows[s]["decoder_target_tokens"] for s in range(4)])
    np.testing.assert_array_equal(batch["decoder_target_tokens"], expected)


def test_state_and_restore_of_global_batches():
    make = lambda: TrainIterator(SMALL, objective="seq2seq", global_batch_size=8,
                                 sharding=batch_sharding(), seed=3)
    iterator = make()
    for _ in range(11):
        next(iterator)
    states = iterator.state()
    assert sorted(states) == [0, 1, 2, 3] and all(isinstance(s, bytes) for s in states.values())
    expected = take(iterator, 10)
    again = make()
    next(again)   # wherever it stood before
    again.restore(states)
    assert_same(take(again, 10), expected)


def test_a_first_batch_that_is_read_ahead_is_the_first_batch():
    make = lambda: TrainIterator(SMALL, objective="seq2seq", global_batch_size=8,
                                 sharding=batch_sharding(), seed=3)
    plain, ahead = make(), make()
    expected = take(plain, 3)
    ahead.read_ahead(8)
    with pytest.raises(AssertionError, match="not handed out"):
        ahead.state()
    assert_same(take(ahead, 3), expected)
    other = make()
    other.restore(ahead.state())
    assert_same(take(other, 2), take(plain, 2))


def test_shards_of_processes_and_owners():
    class Device:
        def __init__(self, process_index):
            self.process_index = process_index

    class Sharding:   # two processes; the second device of each row block is a tensor partner
        def __init__(self, blocks):
            self.blocks = blocks

        def devices_indices_map(self, shape):
            return {Device(p): (slice(a, b), slice(None)) for p, a, b in self.blocks}

    split = Sharding([(0, 0, 4), (0, 4, 8), (1, 8, 12), (1, 12, None)])
    assert data_batches.shards_of_processes(split, (16, 8), 4) == {0: {0, 1}, 1: {2, 3}}
    assert data_batches.shards_of_processes(split, (16, 8), 2) == {0: {0}, 1: {1}}
    shared = Sharding([(0, 0, 8), (1, 0, 8), (1, 8, 16)])
    assert data_batches.shards_of_processes(shared, (16, 8), 4) == {0: {0, 1}, 1: {0, 1, 2, 3}}
    assert data_batches.owned_shards({0: {0, 1}, 1: {0, 1, 2, 3}}, 0) == [0, 1]
    assert data_batches.owned_shards({0: {0, 1}, 1: {0, 1, 2, 3}}, 1) == [2, 3]


def test_resume_with_another_batch_size():
    rows = make_rows(batch=4, shards=[2])
    take(rows, 13)   # in the middle of a block
    states = rows.state([2])
    expected = np.concatenate([r[2]["decoder_target_tokens"] for r in take(rows, 80)])
    for batch in (16, 160):
        again = make_rows(batch=batch, shards=[2])
        again.restore(states)
        found = [r[2]["decoder_target_tokens"] for r in take(again, 320 // batch)]
        np.testing.assert_array_equal(np.concatenate(found), expected)


def test_processes_with_other_data_are_refused():
    data_batches.check_same_data([7, 7, 7])
    with pytest.raises(UserError, match=r"processes \[1, 3\] see other data"):
        data_batches.check_same_data([7, 8, 7, 9])


def test_order_depends_on_seed_and_shards_but_not_on_batch_size():
    def stream(batch, steps, **kwargs):
        parts = take(make_rows(batch=batch, **kwargs), steps)
        return [np.concatenate([p[s]["encoder_input_tokens"] for p in parts]) for s in range(4)]

    assert_same(stream(4, 12), stream(12, 4))
    assert not np.array_equal(stream(4, 12)[0], stream(4, 12, seed=1)[0])
    config = dataclasses.replace(SMALL, seed=1)   # data.seed wins over train.seed
    assert_same(stream(4, 12, config=config), stream(4, 12, seed=1))


def test_every_epoch_has_each_example_once_in_a_new_order():
    share = NUM_EXAMPLES // 4
    rows = make_rows(batch=4, shards=[1])
    epochs = [[int(next(rows)[1]["encoder_input_tokens"][0, 0]) for _ in range(share)]
              for _ in range(3)]
    # The buffer reaches 16 examples into the next epoch, so count over the three.
    counts = np.bincount(sum(epochs, []))
    assert counts.max() <= 4 and (counts > 0).sum() == share
    assert epochs[0] != epochs[1] != epochs[2]


def test_shards_are_disjoint_and_complete():
    rows = take(make_rows(dataclasses.replace(SMALL, shuffle_buffer=0), batch=4), 50)
    seen = [{int(r[s]["encoder_input_tokens"][0, 0]) for r in rows} for s in range(4)]
    assert set.union(*seen) == set(range(1, NUM_EXAMPLES + 1))
    assert sum(len(s) for s in seen) == NUM_EXAMPLES


def test_few_files_are_shared_out_by_example(tmp_path):
    """Files are shuffled each epoch, in one order for all shards, so none reads another's lines."""
    import seqio

    from t5x_lite.data import preprocessors, vocabularies
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(f"{chr(97 + i)}{n}\n" for n in range(19 + i)))
    source = seqio.TextLineDataSource({"train": str(tmp_path / "*.txt")}, cycle_length=1)
    vocabulary = vocabularies.load("byt5")
    seqio.TaskRegistry.add(
        "data_test_lines", source=source,
        preprocessors=[lambda ds: ds.map(lambda x: {"text": x}), preprocessors.tokenize],
        output_features={"targets": seqio.Feature(vocabulary)})
    try:
        rows = make_rows(dataclasses.replace(SMALL, train="data_test_lines", shuffle_buffer=0),
                         batch=4, objective="lm")
        for _ in range(3):   # epochs
            lines = [vocabulary.decode(row["decoder_target_tokens"][0].tolist())
                     for step in take(rows, 15) for row in step.values()]
            assert len(set(lines)) == 60
    finally:
        seqio.TaskRegistry.remove("data_test_lines")


# --- rows -----------------------------------------------------------------------------------

def _pack(examples, lengths, objective):
    import tensorflow as tf
    pipeline = data_tasks.tensorflow_side()
    spec = {name: tf.TensorSpec([None], tf.int32) for name in examples[0]}
    dataset = tf.data.Dataset.from_generator(lambda: iter(examples), output_signature=spec)
    convert = data_rows.of(objective).convert
    dataset = pipeline.pack(dataset.map(lambda example: convert(example, 1)), lengths)
    return [{k: v.numpy().tolist() for k, v in pipeline._finish_row(row, lengths).items()}
            for row in dataset]


def test_packing_drawn_by_hand():
    examples = [{"inputs": [11, 12], "targets": [21]},
                {"inputs": [13], "targets": [22, 23]},
                {"inputs": [14], "targets": [24]},           # targets are full: a new row
                {"inputs": [16, 17, 18, 19], "targets": [25]},   # inputs are full: a new row
                {"inputs": [], "targets": [26, 27]}]
    rows = _pack(examples, {"encoder": 4, "decoder": 3}, "seq2seq")
    assert rows == [
        {"encoder_input_tokens": [11, 12, 13, 0], "encoder_segment_ids": [1, 1, 2, 0],
         "encoder_positions": [0, 1, 0, 0],
         "decoder_target_tokens": [21, 22, 23], "decoder_segment_ids": [1, 2, 2],
         "decoder_positions": [0, 0, 1], "decoder_loss_weights": [1, 1, 1],
         "decoder_input_tokens": [0, 0, 22]},
        {"encoder_input_tokens": [14, 0, 0, 0], "encoder_segment_ids": [1, 0, 0, 0],
         "encoder_positions": [0, 0, 0, 0],
         "decoder_target_tokens": [24, 0, 0], "decoder_segment_ids": [1, 0, 0],
         "decoder_positions": [0, 0, 0], "decoder_loss_weights": [1, 0, 0],
         "decoder_input_tokens": [0, 0, 0]},
        {"encoder_input_tokens": [16, 17, 18, 19], "encoder_segment_ids": [1, 1, 1, 1],
         "encoder_positions": [0, 1, 2, 3],
         "decoder_target_tokens": [25, 26, 27], "decoder_segment_ids": [1, 2, 2],
         "decoder_positions": [0, 0, 1], "decoder_loss_weights": [1, 1, 1],
         "decoder_input_tokens": [0, 0, 26]}]


def test_packed_stream_restores_with_its_open_row():
    config = dataclasses.replace(SMALL, packing=True, num_shards=1)
    rows = make_rows(config, batch=3)
    take(rows, 4)
    states = rows.state([0])
    expected = take(rows, 30)
    assert expected[0][0]["decoder_segment_ids"].max() >= 2
    again = make_rows(config, batch=3)
    again.restore(states)
    assert_same(take(again, 30), expected)


def _row(objective, example, inputs_length, targets_length, marked=False):
    import tensorflow as tf
    kind = data_rows.of(objective)
    sides = kind.convert({k: tf.constant(v) for k, v in example.items()}, 1)
    row = data_tasks.tensorflow_side()._finish_row(
        sides, kind.lengths(DataConfig(inputs_length=inputs_length, targets_length=targets_length)),
        marked=marked)
    rows = kind.masked({k: v.numpy() for k, v in row.items()})
    return {k: v.tolist() for k, v in rows.items()}


def test_rows_of_each_objective_by_hand():
    example = {"inputs": [5, 6], "targets": [7, 8, 1]}
    assert _row("seq2seq", example, 3, 4) == {
        "encoder_input_tokens": [5, 6, 0], "encoder_mask": [1, 1, 0],
        "decoder_target_tokens": [7, 8, 1, 0],
        "decoder_input_tokens": [0, 7, 8, 1], "decoder_loss_weights": [1, 1, 1, 0]}
    zero_is_text = _row("seq2seq", {"inputs": [0, 6], "targets": [7, 0, 1]}, 3, 4, marked=True)
    assert zero_is_text["encoder_mask"] == [1, 1, 0]
    assert _row("lm", {"targets": [7, 8, 1]}, 3, 4) == {
        "decoder_target_tokens": [7, 8, 1, 0], "decoder_input_tokens": [0, 7, 8, 1],
        "decoder_loss_weights": [1, 1, 1, 0]}
    assert _row("lm", example, 3, 7) == {   # inputs are read and not asked for
        "decoder_target_tokens": [5, 6, 7, 8, 1, 0, 0],
        "decoder_input_tokens": [0, 5, 6, 7, 8, 1, 0],
        "decoder_loss_weights": [0, 0, 1, 1, 1, 0, 0]}
    assert _row("prefix_lm", example, 3, 7) == {
        "decoder_target_tokens": [5, 6, 7, 8, 1, 0, 0],
        "decoder_input_tokens": [0, 5, 6, 7, 8, 1, 0],
        "decoder_loss_weights": [0, 0, 1, 1, 1, 0, 0], "decoder_prefix": [1, 1, 1, 0, 0, 0, 0]}
    assert _row("mlm", {"inputs": [5, 3, 7], "targets": [0, 6, 0]}, 4, 9) == {
        "encoder_input_tokens": [5, 3, 7, 0], "encoder_mask": [1, 1, 1, 0],
        "decoder_target_tokens": [0, 6, 0, 0],
        "decoder_loss_weights": [0, 1, 0, 0]}


def test_a_causal_lm_reads_inputs_without_their_eos(tmp_path):
    """Pairs of a file: what stands in front of the answer carries no loss; targets take the room
    that short inputs leave."""
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"inputs": "2+2=", "targets": "4"}\n{"inputs": "a", "targets": "bcdefghijk"}\n')
    config = DataConfig(validation=str(path), vocabulary="byt5", inputs_length=4, targets_length=9)
    task, = data_tasks.validation_tasks(config)
    batch = next(data_batches.eval_batches(config, task, objective="lm", batch_size=2,
                                   sharding=batch_sharding(1)))
    byte = lambda text: [ord(c) + 3 for c in text]
    np.testing.assert_array_equal(batch["decoder_target_tokens"], [
        [*byte("2+2=4"), 1, 0, 0, 0], [*byte("abcde"), 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch["decoder_loss_weights"], [
        [0, 0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0]])


def test_mixtures_of_pairs_and_plain_text():
    config = dataclasses.replace(SMALL, train=f"{TASK}=1,data_test_targets=1", inputs_length=3,
                                 num_shards=1)
    weights = next(make_rows(config, batch=40, objective="lm"))[0]["decoder_loss_weights"]
    assert set(weights[:, 0]) == {0, 1}   # begins with inputs, or with targets


# --- mixtures -------------------------------------------------------------------------------

def test_mixing_rates_by_hand():
    np.testing.assert_allclose(data_tasks.mixing_rates([100, 400], 1, 0), [0.2, 0.8])
    np.testing.assert_allclose(data_tasks.mixing_rates([100, 400], 2, 0), [1 / 3, 2 / 3])
    np.testing.assert_allclose(data_tasks.mixing_rates([100, 400, 10 ** 9], 1, 400), [1/9, 4/9, 4/9])
    np.testing.assert_allclose(data_tasks.mixing_rates([100, 400], 1e9, 0), [0.5, 0.5], atol=1e-6)
    for cold in (1e-3, 1e-300):
        np.testing.assert_allclose(data_tasks.mixing_rates([100, 400, 0], cold, 0), [0, 1, 0])


@pytest.mark.parametrize("changes,expected", [
    ({"train": f"{TASK}=1,data_test_b=2,data_test_c=1"}, (0.25, 0.5, 0.25)),
    ({"train": f"{TASK},data_test_b,data_test_c"}, (0.32, 0.64, 0.04)),
    ({"train": f"{TASK},data_test_b,data_test_c", "temperature": 2.0, "rate_cap": 100.0},
     (0.4, 0.4, 0.2)),
    ({"train": "data_test_mix=4,data_test_c=1"}, (0.2, 0.6, 0.2)),
    ({"train": ((TASK, 1), ("data_test_b", 1))}, (0.5, 0.5, 0.0)),
])
def test_mixture_rates_within_sampling_error(changes, expected):
    config = dataclasses.replace(SMALL, num_shards=2, **changes)
    rows = take(make_rows(config, batch=200), 10)
    first = np.concatenate([r[s]["encoder_input_tokens"][:, 0] for r in rows for s in (0, 1)])
    for group, rate in enumerate(expected):
        found = np.mean(first // 1000 == group)
        # Five standard deviations of a binomial proportion.
        assert abs(found - rate) <= 5 * math.sqrt(rate * (1 - rate) / len(first)), (found, rate)


def test_mixture_restores():
    config = dataclasses.replace(SMALL, train="data_test_noise,data_test_b", num_shards=1)
    rows = make_rows(config, batch=5)
    take(rows, 5)
    states = rows.state([0])
    expected = take(rows, 40)
    again = make_rows(config, batch=5)
    again.restore(states)
    assert_same(take(again, 40), expected)


# --- evaluation -----------------------------------------------------------------------------

def _evaluate(devices=8, task=TASK, batch_size=48, config=SMALL, **kwargs):
    return list(data_batches.eval_batches(config, task, objective="seq2seq", batch_size=batch_size,
                                  sharding=batch_sharding(devices), **kwargs))


def test_eval_batches_are_the_split_in_order_padded_with_weight_zero():
    batches = _evaluate()
    assert len(batches) == 5   # 4 * 48 < 200
    inputs = np.concatenate([b["encoder_input_tokens"] for b in batches])[:, 0]
    np.testing.assert_array_equal(inputs, [*range(1, 201), *[0] * 40])
    weights = np.concatenate([b["decoder_loss_weights"] for b in batches])
    assert weights[200:].sum() == 0 and (weights[:200, 0] == 1).all()
    assert len(_evaluate(max_batches=2)) == 2


@pytest.mark.parametrize("batch_size", [8, 24, 48, 240])
def test_so_many_rows_are_evaluated_whatever_the_batch(batch_size):
    for rows in (1, 50, 200, 1000):
        batches = _evaluate(batch_size=batch_size, max_rows=rows)
        inputs = np.concatenate([b["encoder_input_tokens"] for b in batches])[:, 0]
        assert inputs[inputs > 0].tolist() == list(range(1, min(rows, 200) + 1))
        assert len(batches) == -(-min(rows, 200) // batch_size)


def test_the_lesser_limit_of_examples_and_batches_holds():
    from tests import tiny
    run = tiny.seq2seq()   # 16 rows a batch
    for examples, batches, rows in ((0, 0, None), (40, 0, 40), (0, 2, 32), (40, 2, 32), (20, 2, 20)):
        config = dataclasses.replace(run, eval=dataclasses.replace(
            run.eval, num_examples=examples, num_batches=batches))
        assert evaluator.max_rows(config) == rows


def test_eval_batches_are_the_same_on_any_devices_and_every_time():
    noisy = _evaluate(task="data_test_noise")
    assert_same(_evaluate(task="data_test_noise"), noisy)
    assert_same(_evaluate(task="data_test_noise", devices=2), noisy)


def test_validation_tasks_takes_mixtures_apart():
    assert data_tasks.validation_tasks(SMALL) == (TASK,)
    mixed = dataclasses.replace(SMALL, validation=f"data_test_mix,{TASK},data_test_c")
    assert sorted(data_tasks.validation_tasks(mixed)) == ["data_test_b", "data_test_c", TASK]


def test_unigram_entropy_by_hand():
    batch = {"decoder_target_tokens": np.array([[5, 5, 7, 9]]),
             "decoder_loss_weights": np.array([[1, 1, 1, 0]], np.float32)}
    more = {"decoder_target_tokens": np.array([[11]]), "decoder_loss_weights": np.ones([1, 1])}
    assert math.isclose(data_batches.unigram_entropy([batch, more]),
                        0.5 * math.log(2) + 2 * 0.25 * math.log(4))


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("changes,message", [
    ({"train": ""}, "set data.train"),
    ({"train": "data_test_cuont"}, "did you mean 'data_test_count'"),
    ({"train": f"{TASK}=x,data_test_b=1"}, "positive share"),
    ({"train": f"{TASK}=0,data_test_b=1"}, "positive share"),
    ({"temperature": 2.0}, "which has only"),
    ({"train": f"{TASK},data_test_b", "temperature": 0.0}, "must be positive"),
    ({"num_shards": 3}, "shards could be 2"),
    ({"num_shards": 0}, "shards could be 1"),
    ({"train": "data_test_nothing"}, "holds no examples"),
    ({"train": "data_test_c", "num_shards": 32}, "25 documents in 'train', too few"),
    ({"train": "python_causal_lm"}, "causal_lm is for objective.name=lm, not 'seq2seq'"),
    ({"train": "data_test_targets"}, "the objective needs inputs, targets"),
    ({"train": f"{TASK},python_docs_span_corruption"}, "mixes vocabularies"),
    ({"vocabulary": "pyhton"}, "did you mean 'python'"),
    ({"vocabulary": "/nowhere/x.model"}, "no such file"),
    ({"task_modules": "no_such_module_here"}, "no module named 'no_such_module_here'"),
    ({"train": "data_test_numpy"}, "contains PyFunc"),
    ({"train": "data_test_generator"}, "GeneratorDataset"),
    ({"train": "data_test_stateful"}, "RandomUniformInt"),
    ({"train": "python_docs_span_corruption", "inputs_length": 128}, "gives 29; raise data.targets_length by 21"),
])
def test_bad_input_names_the_value_and_the_fix(changes, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make_rows(dataclasses.replace(SMALL, **changes), batch=32)


def test_unknown_objective():
    with pytest.raises(UserError, match="did you mean 'seq2seq'"):
        make_rows(objective="seq2sek")


def test_empty_validation_split_and_unknown_split():
    with pytest.raises(UserError, match="holds no examples"):
        _evaluate(task="data_test_nothing")
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        _evaluate(split="test")


@pytest.mark.parametrize("changes", [{"seed": 5}, {"num_shards": 8}, {"targets_length": 9},
                                     {"train": "data_test_b"}, {"packing": True}])
def test_a_place_in_other_data_is_refused(changes):
    rows = make_rows()
    states = rows.state(range(4))
    with pytest.raises(UserError, match="data.num_shards" if "num_shards" in changes
                       else "cannot be resumed"):
        make_rows(dataclasses.replace(SMALL, **changes)).restore(states)


def test_what_tf_data_holds_ahead_is_that_of_runs_before_rows_had_masks():
    """A place saved then is read on, since the mask of a vocabulary that pads with 0 is added after."""
    rows = make_rows(batch=12)
    made = next(rows)[0]
    assert rows._readers[0]._pending.keys() == made.keys() - {"encoder_mask"}
    np.testing.assert_array_equal(made["encoder_mask"], made["encoder_input_tokens"] != 0)


def test_a_place_of_another_version_is_refused():
    rows = make_rows(batch=12)   # 3 of a block of 8: rows wait to be handed out
    next(rows)
    reader = rows._readers[0]
    assert reader._pending.pop("encoder_input_tokens").size
    with pytest.raises(UserError, match="another version of t5x_lite wrote it"):
        make_rows(batch=12)._readers[0].restore(reader.state())


def test_vocabulary_larger_than_the_embedding():
    vocabulary = data_tasks.vocabulary_of(DataConfig(vocabulary="python"))
    data_vocabulary.check_vocabulary(vocabulary, 4096)
    with pytest.raises(UserError, match="set model.vocab_size to 4096"):
        data_vocabulary.check_vocabulary(vocabulary, 4000)


@pytest.mark.parametrize("name", ["python", "byt5"])
def test_bytes_of_tokens_count_the_text(name):
    vocabulary = data_tasks.vocabulary_of(DataConfig(vocabulary=name))
    table = data_vocabulary.bytes_of_tokens(vocabulary, 5000)
    for text in ("def f(x):\n    return x\n", "naïve 漢字 ½", "a  b\n\n"):
        tokens = vocabulary.encode(text)
        # SentencePiece puts one space in front of the text.
        assert table[tokens].sum() - (name == "python") == len(text.encode())
    assert table[[0, 1, 2]].sum() == 0
    if name == "python":
        assert table[vocabulary.vocab_size - 100:].sum() == 0   # sentinels
