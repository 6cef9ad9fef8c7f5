"""A pipeline computes what the layers one after another compute, and idles as the formula says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.layers.linear import RowKey, dropout
from t5x_lite.parallel import pipeline, pipeline_schedules, sharding
from t5x_lite.parallel.pipeline_schedules import PipelineConfig, Plan
from t5x_lite.parallel.sharding import MeshConfig, Rules, make_mesh

ROWS, LENGTH, WIDTH, HIDDEN, LAYERS = 16, 2, 4, 8, 8
AXES = {"wi": ("layers", "embed", "mlp"), "wo": ("layers", "mlp", "embed")}


def layer(x, w, index, inputs):
    """An MLP with a bias all rows share, a side input of the rows, dropout, and an output."""
    bias_1LD, side_BL, key = inputs
    h = jnp.tanh(sharding.dense(x, sharding.weight(w["wi"], AXES["wi"][1:], jnp.float32),
                                ("act_batch", "act_length", "act_mlp")))
    h = dropout(h, 0.5, key.fold_in(index), "act_batch", None, "act_mlp")
    y = sharding.dense(h, sharding.weight(w["wo"], AXES["wo"][1:], jnp.float32),
                       ("act_batch", "act_length", "act_embed"))
    x = x + y + 0.1 * (1 + index) * bias_1LD + 0.1 * side_BL[:, :, None]
    return x, {"size": (jnp.mean(x ** 2), jnp.float32(1.0))}


@functools.cache
def operands():
    k = jax.random.split(jax.random.key(0), 5)
    weights = {"wi": 0.3 * jax.random.normal(k[0], (LAYERS, WIDTH, HIDDEN)),
               "wo": 0.3 * jax.random.normal(k[1], (LAYERS, HIDDEN, WIDTH))}
    return (weights, jax.random.normal(k[2], (ROWS, LENGTH, WIDTH)),
            jax.random.normal(k[3], (1, LENGTH, WIDTH)), jax.random.normal(k[4], (ROWS, LENGTH)))


def loss(weights, x, bias, side, config=None, remat="none"):
    inputs = (bias, side, RowKey.of(jax.random.key(3), ROWS))
    x, outputs, counts = pipeline.run_layers(
        layer, weights, x, jnp.arange(LAYERS), inputs, repeats=LAYERS, scan=True,
        remat_policy=remat, pipeline=config)
    return jnp.sum(jnp.sin(x)) + jnp.sum(outputs["size"][0]), counts


@functools.cache
def reference():
    """Loss and gradients of the scan without a mesh."""
    (value, _), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*operands())
    return value, grads


def on_mesh(sizes, fn):
    """fn(operands placed on the mesh), traced there."""
    weights, x, bias, side = operands()
    devices = jax.devices()[:int(np.prod(list(sizes.values())))]
    with sharding.activate(make_mesh(MeshConfig(**{"data": 1, **sizes}), devices), Rules()):
        weights = {n: jax.device_put(w, sharding.spec(*AXES[n])) for n, w in weights.items()}
        x, side = (jax.device_put(v, sharding.spec("act_batch")) for v in (x, side))
        return fn(weights, x, bias, side)


def assert_equal(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-5 * np.max(np.abs(b))


@pytest.mark.parametrize("sizes, config", [
    ({"stage": 2, "data": 2, "tensor": 2}, PipelineConfig("gpipe", 4)),
    ({"stage": 2, "fsdp": 2, "tensor": 2}, PipelineConfig("1f1b", 4)),
    ({"stage": 2, "fsdp": 2}, PipelineConfig("circular", 4, circular_repeats=4)),
    ({"stage": 4, "data": 2}, PipelineConfig("circular", 8, circular_repeats=2)),
    ({"stage": 4, "data": 2}, PipelineConfig("1f1b")),
    ({"stage": 8}, PipelineConfig("1f1b", 16)),
], ids=str)
def test_every_schedule_equals_the_scan(sizes, config):
    value, grads = reference()
    (found, counts), found_grads = on_mesh(sizes, jax.jit(jax.value_and_grad(
        functools.partial(loss, config=config, remat="full"), (0, 1, 2, 3), has_aux=True)))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert_equal(found_grads, grads)
    plan = config.plan(sizes["stage"])
    idle, ticks = counts["pipeline_bubble"]
    assert idle == plan.stages * (plan.stages - 1)
    np.testing.assert_allclose(
        idle / ticks, (plan.stages - 1) / (plan.microbatches * plan.rounds + plan.stages - 1))


def test_without_a_pipeline_layers_are_fetched_from_their_stages():
    value, _ = reference()
    found, counts = on_mesh({"stage": 4, "tensor": 2}, jax.jit(loss))
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert counts == {}


# --- 1F1B ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("stages", [2, 3, 4, 5, 8])
def test_rows_come_back_when_their_backward_pass_begins(stages):
    """_hold keeps S - 1 rows a stage and returns stage s's row of tick t at t + 2 (S - 1 - s)."""
    last, ticks = stages - 1, 4 * stages
    with sharding.activate(make_mesh(MeshConfig(data=1, stage=stages), jax.devices()[:stages]),
                           Rules()):
        ids = pipeline_schedules.stage_ids(stages)
        row = jnp.zeros_like(ids)
        ring = pipeline_schedules._empty_ring(row, stages)
        assert ring.shape == (stages, stages - 1)

        def step(ring, t):
            held, ring = pipeline_schedules._hold(ring, 100 * t + ids, t, stages)
            return ring, held

        held = np.asarray(jax.lax.scan(step, ring, jnp.arange(ticks))[1])
    for s in range(stages):
        lag = 2 * (last - s)
        assert held[lag:, s].tolist() == [100 * (t - lag) + s for t in range(lag, ticks)]


def test_1f1b_idles_as_long_as_gpipe_and_counts_both_passes():
    plan = Plan(4, 8)

    def count(weights, x, bias, side):
        def stage_fn(weights, rows, _):
            return jnp.tanh(rows[0] * weights[0]), {}
        scale = pipeline._on_every_stage(bias[0, 0], 4)
        groups = pipeline._split_rows(x, plan)
        return pipeline_schedules.backward_1f1b(stage_fn, plan, [scale], (groups, []), groups, {})

    _, idle = on_mesh({"stage": 4, "data": 2}, jax.jit(count))
    # S - 1 half-ticks forward and as many backward, of (M + S - 1) each.
    assert idle.tolist() == [2 * 3] * 4
    assert sum(idle.tolist()) / (2 * 4 * plan.ticks) == plan.bubble == 3 / 11


def test_1f1b_memory_does_not_grow_with_the_micro_batches():
    """Micro-batches of one size, 4 and 16 of them: what the pass holds beyond its arguments
    and results grows with their number under GPipe and stays within S of them under 1F1B."""
    stages, rows, wide = 4, 8, 512

    def temporaries(schedule, microbatches):
        def objective(w, x):
            x, _, _ = pipeline.run_layers(
                lambda x, w, xs, inputs: (jnp.sin(x * w), None), w, x, jnp.arange(stages), (),
                repeats=stages, scan=True, remat_policy="full",
                pipeline=PipelineConfig(schedule, microbatches))
            return jnp.sum(x)
        w = jax.device_put(jnp.ones((stages, wide)), sharding.spec("layers", None))
        x = jax.ShapeDtypeStruct((microbatches * rows, wide), jnp.float32, sharding=(
            jax.sharding.NamedSharding(mesh, sharding.spec("act_batch", None))))
        compiled = jax.jit(jax.grad(objective)).lower(w, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (rows * wide * 4)

    mesh = make_mesh(MeshConfig(data=1, stage=stages), jax.devices()[:stages])
    with sharding.activate(mesh, Rules()):
        grown = {s: temporaries(s, 16) - temporaries(s, 4) for s in ("gpipe", "1f1b")}
    # Of 12 more micro-batches a stage owns 3: their inputs are arguments, their outputs and
    # the cotangents of both are temporaries of either schedule.
    assert grown["1f1b"] <= 3 * 3 + 1
    assert grown["gpipe"] >= 12


# --- layouts and errors ---------------------------------------------------------------------------

@pytest.mark.parametrize("stages, rounds", [(2, 2), (2, 3), (3, 2), (4, 2), (4, 6), (8, 4)])
def test_circular_layers_move_in_permutations(stages, rounds):
    moves = pipeline._exchanges(stages, rounds)
    assert len(moves) == rounds
    placed = {}
    for sends in moves:
        assert sorted(sends) == sorted(to for to, _, _ in sends.values()) == list(range(stages))
        for sender, (to, stored, round_) in sends.items():
            placed[to, round_] = sender * rounds + stored
    assert placed == {(c % stages, c // stages): c for c in range(stages * rounds)}


def test_micro_batches_are_made_of_the_rows_of_one_stage():
    def split(weights, x, bias, side):
        return pipeline._split_rows(jnp.arange(ROWS), Plan(2, 4))

    groups = on_mesh({"stage": 2, "data": 2}, jax.jit(split))
    assert groups.tolist() == [[[0, 2, 4, 6], [1, 3, 5, 7]], [[8, 10, 12, 14], [9, 11, 13, 15]]]


@pytest.mark.parametrize("config, repeats, rows, message", [
    (PipelineConfig("gpip"), [8], 16, "schedule='gpip': must be one of.*did you mean 'gpipe'"),
    (PipelineConfig(), [8, 7], 16, r"segments\[1\].repeats=7 cannot be divided among mesh.stage=2"),
    (PipelineConfig("circular"), [6], 16, r"repeats=6 .*mesh.stage=2 x 2 \(circular_repeats\)"),
    (PipelineConfig("circular", circular_repeats=0), [6], 16, "circular_repeats=0: must be"),
    (PipelineConfig("1f1b", 3), [8], 16, "num_microbatches=3 must be a multiple of mesh.stage=2"),
    (PipelineConfig("1f1b", 8), [8], 24, "24 rows cannot be split.*a multiple of 16"),
])
def test_impossible_pipelines_are_refused(config, repeats, rows, message):
    with pytest.raises(UserError, match=f"^model.decoder.*{message}"):
        pipeline.validate(config, "model.decoder", 2, repeats, rows, ways=4)
