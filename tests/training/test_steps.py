"""Gradients and updates: the same over every mesh and every split into micro-batches."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import build as build_lib, tree
from t5x_lite.decoding.decode import DecodeConfig
from t5x_lite.models.config import SegmentConfig
from t5x_lite.models.language_model import Model
from t5x_lite.parallel import sharding
from t5x_lite.training import steps
from tests import tiny

# Every way to make 8 of data, fsdp and tensor (4 heads cannot be split 8 ways), and others.
MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4},
    {"data": 4, "expert": 2}, {"slice": 2, "fsdp": 4},
    *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in (
        {"data": 8}, {"fsdp": 8}, {"data": 4, "fsdp": 2}, {"data": 4, "tensor": 2},
        {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 4})),
]


def one_step(config, batch, devices):
    """(gradients, parameters after one update, metrics) as numpy."""
    program = build_lib.build(config, devices)
    start = tiny.place(tiny.params(config), program)
    placed = {k: jax.device_put(v, program.batch_sharding) for k, v in batch.items()}
    def both(start, placed):
        """One backward pass: the gradients as the optimizer is given them, and the update."""
        optimizer, given = program.optimizer, []

        def update(grads, *rest):
            given.append(grads)
            return optimizer.update(grads, *rest)

        recording = types.SimpleNamespace(loss_scale=optimizer.loss_scale, update=update)
        step = steps.make_train_step(program.differentiated, recording, config.train.seed)
        new, sums = step(start, placed)
        return given[0], new, sums

    with program.activate():
        grads, new, sums = jax.jit(both)(start, placed)
    assert (jax.tree.map(lambda x: x.sharding.spec, grads)
            == jax.tree.map(lambda x: x.sharding.spec, program.abstract_state["params"]))
    return jax.tree.map(np.asarray, (grads, new["params"], sums))


@pytest.fixture(scope="module")
def reference():
    """One device, the whole batch, with dropout."""
    return one_step(tiny.seq2seq(dropout=0.1), tiny.batch(), jax.devices()[:1])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_gives_the_gradients_of_one_device(reference, mesh):
    config = dataclasses.replace(tiny.seq2seq(dropout=0.1),
                                 mesh=sharding.MeshConfig(**{"data": 1, **mesh}))
    grads, params, sums = one_step(config, tiny.batch(), jax.devices())
    tiny.assert_close(grads, reference[0])
    tiny.assert_close(params, reference[1])
    for name in ("loss", "accuracy", "z_loss"):
        np.testing.assert_allclose(sums[name][0], reference[2][name][0], rtol=1e-5)


def test_accumulated_gradients_equal_the_whole_batch():
    config = tiny.seq2seq()
    whole = one_step(config, tiny.batch(), jax.devices()[:1])
    split = dataclasses.replace(
        config, train=dataclasses.replace(config.train, accumulation=4))
    for mesh, devices in (({"data": 1}, 1), ({"data": 2, "fsdp": 2}, 4)):
        parts = one_step(dataclasses.replace(split, mesh=sharding.MeshConfig(**mesh)),
                         tiny.batch(), jax.devices()[:devices])
        tiny.assert_close(parts[0], whole[0])
        tiny.assert_close(parts[1], whole[1])
        np.testing.assert_allclose(parts[2]["loss"][0], whole[2]["loss"][0], rtol=1e-5)


@pytest.mark.slow
def test_unrolled_and_rematerialised_stacks_drop_the_same_units(reference):
    for changes in ({"scan": False}, {"remat": "full"}, {"scan": False, "remat": "dots"}):
        config = tiny.seq2seq(dropout=0.1, **changes)
        grads, params, _ = one_step(config, tiny.batch(), jax.devices()[:1])
        tiny.assert_close(grads, reference[0])
        tiny.assert_close(params, reference[1])


def test_micro_batches_are_strided_rows():
    rows = {"x": jnp.arange(6)[:, None]}
    assert steps.split_batch(rows, 2)["x"][..., 0].tolist() == [[0, 2, 4], [1, 3, 5]]


def test_frozen_parameters_get_no_gradient():
    config = tiny.seq2seq()
    program = build_lib.build(config, jax.devices()[:1])
    frozen = frozenset(p for p in program.table if p.startswith("encoder/"))
    with program.activate():
        of = dataclasses.replace(program.differentiated, frozen=frozen)
        grads, _ = jax.jit(lambda p, b: steps.gradients(of, p, b, None))(
            tiny.params(config), tiny.batch())
    assert set(tree.flatten(grads)) == set(program.table) - frozen


def test_an_unrolled_decoder_decodes_what_a_scanned_one_does():
    found = []
    for scan in (True, False):
        program = build_lib.build(dataclasses.replace(
            tiny.seq2seq(scan=scan), mesh=sharding.MeshConfig(data=2, fsdp=2, tensor=2)))
        with program.activate():
            params = tiny.place(tiny.params(program.config), program)["params"]
            step = steps.make_decode_step(program.model, DecodeConfig(
                method="beam", beam_size=2, max_length=5))
            decoded = jax.jit(step)(params, {"encoder_input_tokens": jax.device_put(
                tiny.batch()["encoder_input_tokens"], program.batch_sharding)})
        found.append(jax.device_get(decoded))
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-5)


def test_layers_apart_are_cut_from_their_stacks():
    base = tiny.seq2seq().model
    (block,) = base.decoder.segments[0].blocks
    model = Model(dataclasses.replace(base, decoder=dataclasses.replace(base.decoder, segments=(
        SegmentConfig((block,), 1), SegmentConfig((block, block), 2)))))
    flat = {path: np.arange(info.size).reshape(info.shape) for path, info in model.table.items()}
    apart, cut = model.with_layers_apart(tree.unflatten(flat))
    cut = tree.flatten(cut)
    assert {p: x.shape for p, x in cut.items()} == {p: i.shape for p, i in apart.table.items()}
    name = "mlp/wo/kernel"
    np.testing.assert_array_equal(cut[f"decoder/segment_2/block_1/{name}"],
                                  flat[f"decoder/segment_1/block_1/{name}"][1:])
    np.testing.assert_array_equal(cut["encoder/final_norm/scale"], flat["encoder/final_norm/scale"])
