"""Batches that grow during a run (Gopher: 3M, then 6M tokens): what is counted, and resuming."""

import dataclasses

import numpy as np
import pytest

from t5x_lite import train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.config import replace
from t5x_lite.data import batches as data_batches
from t5x_lite.errors import UserError
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import metrics
from t5x_lite.training.batch_ramp import BatchRampConfig
from tests import tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """8 rows for two steps, 16 for one, then 24, on 8 devices."""
    text = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    run = tiny_config.run(text)
    ramp = BatchRampConfig(((8, 2), (16, 1)))
    return dataclasses.replace(
        run, mesh=MeshConfig(data=8), train=dataclasses.replace(
            run.train, num_steps=4, global_batch_size=24, batch_ramp=ramp),
        eval=dataclasses.replace(run.eval, num_batches=1),
        checkpoint=dataclasses.replace(run.checkpoint, every=4))


@pytest.mark.slow
def test_a_ramped_run_counts_its_tokens_and_resumes_bit_for_bit(config, tmp_path):
    train.run(config, tmp_path / "whole")
    # 36 tokens a row; 8, 8 and 16 rows before the first full batch.
    lines = metrics.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    seen = {line["step"]: line["tokens_seen"] for line in lines}
    assert seen == {1: 8 * 36, 2: 16 * 36, 3: 32 * 36, 4: 56 * 36}
    train.run(replace(config, "train.num_steps", 2), tmp_path / "halves")
    train.run(config, tmp_path / "halves")
    program = build(config)
    whole, halves = (tree.flatten(manager.restore_params(
        tmp_path / name, program.abstract_state["params"], 4)[0]) for name in ("whole", "halves"))
    for path in whole:
        assert np.asarray(whole[path]).tobytes() == np.asarray(halves[path]).tobytes(), path


def test_every_shard_gives_its_share_whatever_the_batch(config):
    """8 rows, then 16: each shard's next rows, in the order of a fixed batch."""
    program = build(config)
    make = lambda: data_batches.TrainIterator(
        config.data, objective="seq2seq", global_batch_size=24,
        sharding=program.batch_sharding, seed=0)

    def by_shard(batch):
        return np.asarray(batch["encoder_input_tokens"]).reshape(config.data.num_shards, -1, 24)

    ramped, fixed = make(), make()
    parts = np.concatenate([by_shard(ramped.take(rows)) for rows in (8, 16)], axis=1)
    np.testing.assert_array_equal(parts, by_shard(next(fixed)))


@pytest.mark.parametrize(("stages", "message"), [
    (((12, 2),), r"batch_ramp.stages\[0\]=12 must be a multiple of 8"),
    (((8, 2), (10, 1)), r"batch_ramp.stages\[1\]=10 must be a multiple of 4.*data.num_shards"),
])
def test_stages_that_do_not_divide_are_refused(config, stages, message):
    with pytest.raises(UserError, match=message):
        build(replace(config, "train.batch_ramp", BatchRampConfig(stages)))
