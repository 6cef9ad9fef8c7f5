"""A branch is the run that had its schedule from the start, bit for bit and line by line."""

import dataclasses

import jax
import numpy as np
import pytest

from t5x_lite import config as configs, experiment, train
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.data import batches
from t5x_lite.errors import UserError
from t5x_lite.parallel.sharding import MeshConfig
from tests import tiny_config
from tests.faults import mini


def cooled(config, steps: int, decay: int):
    """The run over so many steps whose last ones cool down."""
    schedule = dataclasses.replace(
        config.optimizer.schedule, factors="constant * linear_warmup * stable_then_decay",
        warmup_steps=2, total_steps=steps, decay_steps=decay)
    config = configs.replace(config, "optimizer.schedule", schedule)
    return configs.replace(config, "train.num_steps", steps)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """(its config, its workdir): 10 steps, cooling down from step 8 on, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("trunk")
    config = dataclasses.replace(mini.run(tiny_config.write_text(folder / "words.txt")),
                                 mesh=MeshConfig(data=8))
    for path, value in (("eval.every", 3), ("train.log_every", 2), ("checkpoint.keep_last", 9),
                        ("optimizer.name", "adamw")):
        config = configs.replace(config, path, value)
    config = cooled(config, 10, 2)
    train.run(config, folder / "run")
    return config, folder / "run"


def state_of(workdir, config):
    program = build(config)
    with manager.Checkpointer(workdir, config.checkpoint) as checkpointer:
        restored = checkpointer.restore(config.train.num_steps, program.abstract_state)
    return (jax.tree.leaves(restored.state), next_rows(restored.iterator_states, config),
            restored.record.progress)


def next_rows(places, config):
    """{shard: {feature: rows}} that follow the places. Their bytes say nothing: tf.data keeps in them
    how far its threads had read ahead."""
    data = config.data
    rows = batches.ShardedRows(data, objective=config.objective.name, seed=config.train.seed,
                               global_batch_size=config.train.global_batch_size,
                               shards=range(data.num_shards))
    rows.restore(places)
    return rows.take(3 * config.train.global_batch_size)


def test_it_equals_the_run_that_had_its_schedule_from_the_start(trunk, tmp_path, capsys):
    config, folder = trunk
    whole = cooled(config, 7, 3)
    train.run(whole, tmp_path / "whole")
    capsys.readouterr()
    branch = dataclasses.replace(whole, branch_from=f"{folder}/checkpoints/4")
    train.run(branch, tmp_path / "branch")
    out = capsys.readouterr().out
    assert "changed     train.num_steps: 10 -> 7 (since step 4)" in out
    found, wanted = (state_of(tmp_path / name, whole) for name in ("branch", "whole"))
    for a, b in zip(found[0], wanted[0], strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    jax.tree.map(np.testing.assert_array_equal, found[1], wanted[1])
    assert {k: found[2][k] for k in ("spent", "tokens")} == {
        k: wanted[2][k] for k in ("spent", "tokens")}
    assert mini.without_timings(tmp_path / "branch") == mini.without_timings(tmp_path / "whole")
    # The trunk was cooling down elsewhere: its own end is another one.
    assert mini.without_timings(folder)[-1] != mini.without_timings(tmp_path / "branch")[-1]
    # Started again it goes on from its own checkpoint, and nothing changes.
    before = (tmp_path / "branch/metrics.jsonl").read_bytes()
    train.run(branch, tmp_path / "branch")
    assert (tmp_path / "branch/metrics.jsonl").read_bytes() == before


def test_a_branch_of_nothing_is_refused_with_what_there_is(trunk, tmp_path):
    config, folder = trunk
    for source, message in ((f"{folder}/checkpoints/5", "no checkpoint of step 5: it has 2, 4, 6"),
                            (tmp_path / "none", "no checkpoint at")):
        with pytest.raises(UserError, match=message):
            train.run(dataclasses.replace(config, branch_from=str(source)), tmp_path / "out")
    with pytest.raises(UserError, match="another model"):
        train.run(dataclasses.replace(configs.replace(config, "model.embed_dim", 16),
                                      branch_from=str(folder)), tmp_path / "out")


def test_an_experiment_branches_at_a_step(trunk, tmp_path, monkeypatch):
    config, folder = trunk
    begun = []
    monkeypatch.setattr(experiment.train, "run", lambda config, _: begun.append(config))
    experiment.execute([experiment.Run("a", 0, config, "short", after="long", at=4)], tmp_path)
    assert begun[0].branch_from == f"{tmp_path}/a/seed_0/long/checkpoints/4"
    assert begun[0].init_from == ""
