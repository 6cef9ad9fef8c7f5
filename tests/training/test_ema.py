"""The moving average of parameters: equal to numpy's, split, offloaded, skipped, resumed, evaluated."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import convert, eval as eval_main, init_from, train, tree
from t5x_lite.build import build
from t5x_lite.checkpoints import manager
from t5x_lite.checkpoints.manager import CheckpointConfig, Checkpointer
from t5x_lite.config import replace, to_json
from t5x_lite.errors import UserError
from t5x_lite.models.peft import PeftConfig
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import metrics
from t5x_lite.training.methods import GroupConfig
from t5x_lite.training.precision import LossScaleConfig
from tests import tiny, tiny_config
from tests.training.test_optimizer_state import run_of, updates


def of(config, decay=0.9):
    return replace(config, "train.ema_decay", decay)


def numpy_tree(nested):
    return {p: np.asarray(x, np.float64) for p, x in tree.flatten(nested).items()}


def test_five_steps_average_as_numpy_does_what_is_not_frozen():
    config = of(run_of("adamw"))
    config = dataclasses.replace(config, optimizer=dataclasses.replace(
        config.optimizer, groups=(GroupConfig("token_embedding/.*", frozen=True),)))
    program = build(config, jax.devices()[:1])
    state, step = program.init_state(), program.jit_train_step()
    expected = numpy_tree(state["params"])
    frozen = expected.pop("token_embedding/embedding")
    with program.activate():
        for seed in range(5):
            state, _ = step(state, tiny.batch(seed=seed))
            new = numpy_tree(state["params"])
            expected = {p: 0.9 * x + 0.1 * new[p] for p, x in expected.items()}
    average = state["opt_state"]["ema"]
    assert {x.dtype for x in jax.tree.leaves(average)} == {jnp.dtype("float32")}
    tiny.assert_close(average, tree.unflatten(expected), 1e-6)
    evaluated = tree.flatten(program.evaluated_params(state))
    assert (np.asarray(evaluated["token_embedding/embedding"]) == frozen).all()
    path = next(iter(expected))
    assert (np.asarray(evaluated[path]) == np.asarray(tree.flatten(average)[path])).all()


@pytest.fixture(scope="module")
def reference():
    return updates(of(run_of("adafactor")), jax.devices()[:1])


@pytest.mark.parametrize("sharding", [{"zero": 1}, {"zero": 1, "offload_optimizer": True},
                                      {"zero": 3, "offload_optimizer": True}], ids=str)
def test_split_and_offloaded_equal_one_device(reference, sharding):
    config = of(run_of("adafactor", {"fsdp": 4, "tensor": 2}, **sharding))
    found = updates(config, jax.devices())
    tiny.assert_close(found[0], reference[0])
    tiny.assert_close(found[1]["ema"], reference[1]["ema"])
    program = build(config)
    placed = {p: x.sharding for p, x in tree.flatten(program.abstract_state["opt_state"]["ema"]).items()}
    kernel = placed["decoder/segment_0/block_0/mlp/wo/kernel"]
    assert "fsdp" in str(kernel.spec)
    assert (kernel.memory_kind == "pinned_host") == sharding.get("offload_optimizer", False)
    state = jax.tree.map(lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding),
                         program.abstract_state)
    for x, like in zip(jax.tree.leaves(program.evaluated_params(state)),
                       jax.tree.leaves(program.abstract_params), strict=True):
        assert x.sharding == like.sharding


@pytest.mark.parametrize("precision", ["float32", pytest.param("fp16", marks=pytest.mark.slow)])
def test_a_skipped_step_leaves_it_as_it_was(precision):
    config = of(replace(replace(run_of("adamw"), "train.bad_steps", "skip"), "precision", precision))
    config = dataclasses.replace(config, loss_scale=LossScaleConfig(   # overflows
        initial=2.0 ** 30, maximum=2.0 ** 30))
    program = build(config, jax.devices()[:1])
    state = program.init_state()
    before = numpy_tree(state["opt_state"]["ema"])
    bound = -1.0 if precision == "float32" else np.inf
    with program.activate():
        state, sums = program.jit_train_step()(state, tiny.batch(), jnp.float32(bound))
    assert float(sums["skipped"][0]) == 1.0
    after = numpy_tree(state["opt_state"]["ema"])
    assert all((after[p] == x).all() for p, x in before.items())


def test_peft_averages_what_trains():
    config = dataclasses.replace(of(run_of("adamw")), peft=PeftConfig("lora", rank=2))
    program = build(config, jax.devices()[:1])
    state = program.init_state()
    assert tree.flatten(state["opt_state"]["ema"]).keys() == program.trainable.keys()
    ones = tree.map_with_path(lambda path, x: jnp.ones_like(x), state["opt_state"]["ema"])
    state["opt_state"]["ema"] = ones
    found = tree.flatten(program.evaluated_params(state))
    expected = tree.flatten(program.whole_params({**state, "params": ones}))
    assert all((found[p] == x).all() for p, x in expected.items())


def test_without_it_nothing_is_there():
    program = build(run_of("adamw"), jax.devices()[:1])
    assert "ema" not in program.abstract_state["opt_state"]
    state = {"params": {"a": 1}, "opt_state": {}}
    assert program.evaluated_params(state) is state["params"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    text = tiny_config.write_text(tmp_path_factory.mktemp("text") / "words.txt")
    config = of(dataclasses.replace(tiny_config.run(text), mesh=MeshConfig(data=8)), 0.5)
    return replace(replace(config, "train.num_steps", 4), "eval.num_batches", 1)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    train.run(config, workdir)
    return workdir


def params_of(workdir, config, averaged=True):
    wanted = build(config).abstract_state["params"]
    params, _ = manager.restore_params(workdir, wanted, averaged=averaged)
    return {p: np.asarray(x) for p, x in tree.flatten(params).items()}


def same(a, b):
    return all((a[p] == x).all() for p, x in b.items())


@pytest.mark.slow
def test_resumed_is_uninterrupted_and_another_decay_of_none_is_refused(config, whole, tmp_path, capsys):
    train.run(replace(config, "train.num_steps", 2), tmp_path)
    assert re.search(r"average +of the parameters, decay 0.5 a step.* use it", capsys.readouterr().out)
    with pytest.raises(UserError, match=r"holds a moving average.*asks for none.*ema_decay=0.5"):
        train.run(of(config, 0.0), tmp_path)
    train.run(config, tmp_path)
    assert same(params_of(tmp_path, config), params_of(whole, config))
    assert same(params_of(tmp_path, config, False), params_of(whole, config, False))
    assert not same(params_of(whole, config, False), params_of(whole, config))


def test_a_run_without_it_cannot_go_on_with_it(config, tmp_path):
    plain, averaged = build(of(config, 0.0)), build(config)
    with Checkpointer(tmp_path, CheckpointConfig()) as checkpointer:
        checkpointer.save(1, plain.init_state(), {}, to_json(plain.config))
        with pytest.raises(UserError, match=r"holds no moving average.*asks for one.*ema_decay=0 "):
            checkpointer.restore_latest(averaged.abstract_state)


@pytest.mark.slow
def test_evaluation_conversion_and_init_from_use_it(config, whole, tmp_path, capsys):
    lines = metrics.read_metrics(whole / "metrics.jsonl")
    in_loop = [x["eval/validation_files/loss"] for x in lines if "eval/validation_files/loss" in x][-1]
    alone = eval_main.run(config, whole, ["last"])[4]["validation_files"]["loss"]
    assert alone == in_loop and "their moving average (eval.ema=False" in capsys.readouterr().out
    last = eval_main.run(replace(config, "eval.ema", False), whole, ["last"])
    assert last[4]["validation_files"]["loss"] != in_loop
    for flag in (True, False):
        target = tmp_path / str(flag)
        convert.run(str(whole), str(target), convert.Options(config=config, ema=flag))
        assert same(params_of(target, config), params_of(whole, config, flag))
    fresh = init_from.parameters(build(replace(config, "init_from", str(whole))))
    assert same({p: np.asarray(x) for p, x in tree.flatten(fresh).items()}, params_of(whole, config))
