"""Optimizers whose states are chains and partitions, split, offloaded, saved: as on one device."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from t5x_lite import build as build_lib, tree
from t5x_lite.config import ShardingConfig
from t5x_lite.errors import UserError
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.training import methods, optax_state
from tests import tiny


def run_of(name, mesh=None, **sharding):
    base = tiny.seq2seq()
    return dataclasses.replace(
        base, optimizer=dataclasses.replace(base.optimizer, name=name, weight_decay=0.1,
                                            clip_norm=1.0),
        mesh=MeshConfig(**{"data": 1, **(mesh or {})}), sharding=ShardingConfig(**sharding))


def updates(config, devices, steps=3):
    """(parameters, optimizer state) after updates with random gradients."""
    program = build_lib.build(config, devices)
    rng = np.random.default_rng(0)
    state = tiny.place(tiny.params(config), program)
    update = jax.jit(program.optimizer.update)
    params, opt_state = state["params"], state["opt_state"]
    with program.activate():
        for step in range(steps):
            grads = tree.map_with_path(lambda path, x: jax.device_put(
                rng.normal(size=x.shape).astype(np.float32), x.sharding), params)
            params, opt_state, _ = update(grads, opt_state, params, step)
        kinds = jax.tree.map(lambda x: x.sharding, (params, opt_state))
    assert kinds == jax.tree.map(
        lambda x: x.sharding, (program.abstract_state["params"],
                               program.abstract_state["opt_state"]))
    return jax.tree.map(np.asarray, (params, opt_state))


@pytest.fixture(scope="module", params=["muon", "lamb", "ademamix", "sophia"])
def reference(request):
    return request.param, updates(run_of(request.param), jax.devices()[:1])


@pytest.mark.parametrize("sharding", [
    {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 1, "offload_optimizer": True},
    {"zero": 3, "offload_optimizer": True}], ids=str)
def test_split_and_offloaded_updates_equal_one_device(reference, sharding):
    name, expected = reference
    found = updates(run_of(name, {"fsdp": 4, "tensor": 2}, **sharding), jax.devices())
    tiny.assert_close(found[0], expected[0])
    tiny.assert_close(found[1], expected[1])


def test_muon_shares_out_the_matrices_of_a_stack():
    """No device multiplies what another does: 8 matrices over 8 devices are one each."""
    from jax.sharding import PartitionSpec as P

    from t5x_lite.training import muon
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"),
                         axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(np.zeros((8, 16, 32), np.float32), P(None, "fsdp", "tensor"))
        assert jax.typeof(muon._whole_matrices(x, 1)).sharding.spec == P(
            ("fsdp", "tensor"), None, None)
        x = jax.device_put(np.zeros((6, 16, 32), np.float32), P(None, "fsdp", "tensor"))
        assert jax.typeof(muon._whole_matrices(x, 1)).sharding.spec == P("tensor", None, None)


def test_names_of_a_nested_state():
    params = {"a/kernel": np.zeros((2, 3)), "b/scale": np.zeros(3)}
    transformation = optax.chain(
        optax.scale_by_adam(), optax.trace(0.9), optax.trace(0.8),
        optax.partition({"x": optax.scale_by_rms(), "y": optax.identity()},
                        {"a/kernel": "x", "b/scale": "y"}))
    state = transformation.init(params)
    moments, rest = optax_state.apart(state, params)
    assert {name: sorted(x) for name, x in moments.items()} == {
        "mu": ["a/kernel", "b/scale"], "nu": ["a/kernel", "b/scale"], "nu_2": ["a/kernel"],
        "trace": ["a/kernel", "b/scale"], "trace_2": ["a/kernel", "b/scale"]}
    assert set(rest) == {"count"}
    again = optax_state.together(state, moments, rest, params)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_numbers_over_all_parameters_cannot_visit_layer_by_layer(monkeypatch):
    """Prodigy estimates one distance from all gradients: no layer may do so by itself."""
    monkeypatch.setitem(methods.METHODS, "prodigy", methods.Method(
        lambda c, trained: optax.contrib.prodigy(1.0)))
    build_lib.build(run_of("prodigy"), jax.devices()[:1])
    with pytest.raises(UserError, match="optimizer.name='prodigy'.*offload_optimizer=False"):
        build_lib.build(run_of("prodigy", offload_optimizer=True), jax.devices()[:1])
    for offload in ("optimizer_host", "params_host", "optimizer_disk"):
        with pytest.raises(UserError, match=f"sharding.offload={offload}. cannot make: set sharding.offload=none"):
            build_lib.build(run_of("prodigy", offload=offload), jax.devices()[:1])
