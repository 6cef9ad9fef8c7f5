"""Nothing that is not finite is ever saved, and a run always has something good to go on from."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from t5x_lite import config as configs, train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.errors import UserError
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel.pipeline_schedules import PipelineConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import metrics, steps
from t5x_lite.training.steps import FINITE
from tests import tiny_config
from tests.faults import mini

RATE = "optimizer.schedule.base_learning_rate"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    run = dataclasses.replace(mini.run(text), mesh=MeshConfig(data=8))
    for path, value in (("eval.every", 100), ("checkpoint.every", 1), ("checkpoint.keep_last", 2)):
        run = configs.replace(run, path, value)
    return run


def with_(config, **fields):
    for path, value in fields.items():
        config = configs.replace(config, path.replace("__", "."), value)
    return config


def finite(workdir, config) -> dict[int, bool]:
    """{saved step: whether its parameters are finite}."""
    wanted = build(config).abstract_state["params"]
    found = {}
    for step in manager.all_steps(workdir):
        params, _ = manager.restore_params(workdir, wanted, step)
        found[step] = all(np.isfinite(x).all() for x in tree.flatten(params).values())
    return found


def test_the_advised_remedy_works_after_a_learning_rate_of_1e30(config, tmp_path):
    broken = with_(config, train__num_steps=8, **{RATE: 1e30})
    with pytest.raises(UserError, match="suspect") as error:
        train.run(broken, tmp_path)
    assert "learning_rate" in str(error.value)
    assert all(finite(tmp_path, config).values())
    train.run(with_(config, train__num_steps=8, **{RATE: 1e-3}), tmp_path)
    assert manager.all_steps(tmp_path)[-1] == 8


def test_good_checkpoints_outlive_a_bad_update(config, tmp_path):
    train.run(with_(config, train__num_steps=4), tmp_path)
    with pytest.raises(UserError, match="the last good checkpoint is of step 4"):
        train.run(with_(config, train__num_steps=8, **{RATE: 1e30}), tmp_path)
    assert manager.all_steps(tmp_path)[-1] == 4 and all(finite(tmp_path, config).values())
    train.run(with_(config, train__num_steps=8, **{RATE: 1e-3}), tmp_path)
    assert manager.all_steps(tmp_path)[-1] == 8
    history = sorted(int(p.stem) for p in (tmp_path / "configs").iterdir())
    assert history == [0, 4]
    saved = json.loads((tmp_path / "configs" / "4.json").read_text())
    assert saved["optimizer"]["schedule"]["base_learning_rate"] == 1e-3


def test_retention_keeps_the_newest_verified_one_while_steps_are_skipped(config, tmp_path):
    train.run(with_(config, train__num_steps=4), tmp_path)
    broken = with_(config, train__num_steps=20, train__bad_steps="skip", train__max_bad_steps=6,
                   **{RATE: 1e30})
    with pytest.raises(UserError, match="6 bad steps in a row"):
        train.run(broken, tmp_path)
    steps = manager.all_steps(tmp_path)
    assert steps[-1] in (4, 5) and all(finite(tmp_path, config).values())
    train.run(with_(config, train__num_steps=8, **{RATE: 1e-3}), tmp_path)
    assert manager.all_steps(tmp_path)[-1] == 8


def one_batch(program):
    return {name: jax.device_put(np.ones(x.shape, x.dtype), x.sharding)
            for name, x in program.abstract_batch().items()}


def layers(config, number, **stack):
    """The run with so many layers, scanned."""
    decoder = config.model.decoder
    segment = dataclasses.replace(decoder.segments[0], repeats=number)
    return dataclasses.replace(config, model=dataclasses.replace(
        config.model, decoder=dataclasses.replace(decoder, segments=(segment,), scan=True, **stack)))


# What makes a step of parts: {field: value}, and what the run is like.
KINDS = {
    "plain": lambda run: run,
    "accumulated": lambda run: with_(run, train__accumulation=2, train__global_batch_size=16),
    "pipelined": lambda run: dataclasses.replace(
        with_(layers(run, 2, pipeline=PipelineConfig("1f1b", 4)), train__global_batch_size=16),
        mesh=MeshConfig(stage=2, data=4)),
    "split over slices": lambda run: dataclasses.replace(
        with_(run, train__accumulation=2, train__global_batch_size=16),
        mesh=MeshConfig(slice=2, fsdp=4)),
    "LoRA with an average": lambda run: dataclasses.replace(
        with_(run, optimizer__name="adamw", train__ema_decay=0.9),
        peft=PeftConfig("lora", rank=2, alpha=4.0)),
    "fp16": lambda run: with_(run, precision="fp16"),
    "master copies": lambda run: with_(run, precision="bf16_sr_forward", optimizer__name="muon"),
}
SLOW = {"split over slices", "LoRA with an average", "fp16", "master copies"}


@pytest.mark.parametrize("kind", [
    pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS])
def test_a_skipped_step_leaves_parameters_and_moments_as_they_were(config, kind):
    program = build(with_(KINDS[kind](config), train__bad_steps="skip"))
    step = program.jit_train_step()
    state, batch = program.init_state(), one_batch(program)
    before = jax.tree.map(np.asarray, state)
    with program.activate():
        state, sums = step(state, batch, np.float32(1e-3))   # no loss is that low
        assert float(sums["skipped"][0]) == 1 and float(sums[FINITE][0]) == 1
        for part in ("params", "opt_state"):
            for a, b in zip(jax.tree.leaves(state[part]), jax.tree.leaves(before[part]),
                            strict=True):
                assert np.asarray(a).tobytes() == b.tobytes()
        assert int(state["step"]) == 1
        state, sums = step(state, batch, np.float32(np.inf))
    assert float(sums["skipped"][0]) == 0
    moved = [not np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(state["params"]), jax.tree.leaves(before["params"]), strict=True)]
    assert any(moved)


def test_gradients_whose_norm_overflows_are_skipped(config):
    """Clipped they are zeros, so that loss and state stay finite."""
    run = with_(config, train__bad_steps="skip", optimizer__clip_norm=1.0, optimizer__name="adamw")
    program = build(run)
    state = program.init_state()
    before = jax.tree.map(np.asarray, state["params"])
    steep = dataclasses.replace(program.differentiated, objective=dataclasses.replace(
        run.objective, z_loss=1e30))
    step = jax.jit(steps.make_train_step(steep, program.optimizer, 0, skip_bad=True))
    with program.activate():
        state, sums = step(state, one_batch(program))
    assert np.isfinite(float(sums["loss"][0])) and not np.isfinite(float(sums["grad_norm"][0]))
    assert float(sums["skipped"][0]) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state["params"]), before)


def test_a_checkpoint_with_nan_is_not_gone_on_from(config, tmp_path, monkeypatch, caplog):
    """As an older version of this program could leave one."""
    train.run(with_(config, train__num_steps=2), tmp_path)
    program = build(config)
    wanted = program.abstract_state
    with manager.Checkpointer(tmp_path, config.checkpoint) as checkpointer:
        state, states, record, _ = manager.restore_or_init(
            checkpointer, wanted, lambda: None)
        path = next(iter(tree.flatten(state["params"])))
        flat = tree.flatten(state["params"])
        flat[path] = flat[path] * np.nan
        checkpointer.save(3, {**state, "params": tree.unflatten(flat)}, states,
                          json.dumps(record.config))
    train.run(with_(config, train__num_steps=4), tmp_path)
    assert f"params/{path} hold numbers that are not finite" in caplog.text
    assert (tmp_path / "checkpoints" / "3.unreadable").exists()
    assert all(finite(tmp_path, config).values())


def test_float16_that_skips_every_step_says_so(config, tmp_path, capsys):
    run = with_(config, train__num_steps=3, precision="fp16", loss_scale__initial=2.0**24,
                loss_scale__minimum=2.0**24)
    with pytest.raises(UserError, match="all 3 steps were skipped, and nothing was learned"):
        train.run(run, tmp_path)
    assert "overflow float16 at a loss scale of 1.67772e+07" in capsys.readouterr().out


@pytest.mark.parametrize(("policy", "ends"), [("stop", False), ("skip", True)])
def test_a_spike_is_bad_where_a_bound_is_set(config, tmp_path, policy, ends, monkeypatch, capsys):
    from t5x_lite.running import health
    monkeypatch.setattr(health, "SPIKE_FEWEST", 3)
    run = with_(config, train__num_steps=8, train__bad_steps=policy, train__spike_bound=1e-6)
    monkeypatch.setattr(health, "spike_bound",
                        lambda losses, factor: 1e-3 if len(losses) == 4 else np.inf)
    if not ends:
        with pytest.raises(UserError, match="is above the 0.001 that train.spike_bound allows"):
            train.run(run, tmp_path)
        assert max(manager.all_steps(tmp_path)) == 5
        return
    train.run(with_(run, train__max_bad_steps=3, train__num_steps=6), tmp_path)
    assert "the step is skipped (1 of 6 so far)" in capsys.readouterr().out
    lines = {x["step"]: x for x in metrics.read_metrics(tmp_path / "metrics.jsonl")
             if "train/skipped" in x}
    assert lines[6]["train/skipped"] == 1 and "train/loss" not in lines[6]
    assert lines[5]["train/skipped"] == 0
