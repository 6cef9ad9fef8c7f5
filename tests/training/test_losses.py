"""Cross-entropy against T5X, against autodiff of the definition, chunked against whole."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from t5x_lite.errors import UserError
from t5x_lite.training import losses
from tests.helpers import golden

B, L, D, V = 8, 12, 16, 64
KWARGS = {"z_loss": 1e-2, "label_smoothing": 0.1}


def inputs():
    """(head parameters, hidden_BLD, targets_BL, weights_BL) with some zero weights."""
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(D, V)).astype(np.float32),
            "bias": rng.normal(size=(V,)).astype(np.float32)}
    return (head, rng.normal(size=(B, L, D)).astype(np.float32),
            rng.integers(0, V, (B, L)).astype(np.int32),
            rng.integers(0, 2, (B, L)).astype(np.float32))


def head_fn(head, hidden_BCD):
    return jnp.einsum("BCD,DV->BCV", hidden_BCD, head["kernel"]) + head["bias"]


def worst(found, expected):
    """Largest max|a-b|/max|b| over the leaves."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())
               for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))


def whole(head, hidden, targets, weights):
    return losses.cross_entropy(head_fn(head, hidden), targets, weights, **KWARGS)


def chunked(chunk, head_fn=head_fn):
    return lambda *args: losses.chunked_cross_entropy(head_fn, *args, chunk=chunk, **KWARGS)


def differentiated(fn):
    """((loss, sums), (head gradient, hidden gradient))"""
    return jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))


def test_equals_t5x():
    arrays = np.load(golden("cross_entropy.npz"))
    cases = json.loads(golden("cross_entropy.json").read_text())
    assert len(cases) == 8
    for case, expected in cases.items():
        options = dict(item.split("=") for item in case.split(","))
        factor = options["loss_normalizing_factor"]
        divisor = 1.0 if factor == "None" else float(factor)
        loss_sum, sums = losses.cross_entropy(
            jnp.asarray(arrays["logits"]), jnp.asarray(arrays["targets"]),
            jnp.asarray(arrays["weights"]), z_loss=float(options["z_loss"]),
            label_smoothing=float(options["label_smoothing"]))
        found = [loss_sum / divisor, sums["z_loss_sum"] / divisor, sums["weight_sum"]]
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=case)


def test_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 1.0, 2.0]]]))
    targets, weights = jnp.array([[0, 0, 2]]), jnp.array([[1.0, 2.0, 0.0]])
    loss_sum, sums = losses.cross_entropy(logits, targets, weights)
    assert np.isclose(loss_sum, math.log(2) + 2 * math.log(4))
    assert {k: float(x) for k, x in sums.items() if k != "loss_sum"} == {
        "z_loss_sum": 0.0, "weight_sum": 3.0, "correct_sum": 1.0}


def test_a_perfect_smoothed_prediction_costs_nothing():
    q = jnp.array([0.05, 0.9, 0.05])
    loss, _ = losses.token_cross_entropy(jnp.log(q)[None, None], jnp.array([[1]]), 0.0, 0.1)
    assert abs(float(loss[0, 0])) < 1e-6


def test_gradient_is_that_of_the_definition():
    head, hidden, targets, weights = inputs()

    def definition(head, hidden):
        logits = head_fn(head, hidden)
        log_p, log_z = jax.nn.log_softmax(logits), jax.nn.logsumexp(logits, axis=-1)
        q = jnp.where(jnp.arange(V) == targets[..., None], 0.9, 0.1 / (V - 1))
        loss = -jnp.sum(q * (log_p - jnp.log(q)), axis=-1) + KWARGS["z_loss"] * log_z**2
        return jnp.sum(loss * weights)

    expected = jax.value_and_grad(definition, argnums=(0, 1))(head, hidden)
    (loss, _), grads = differentiated(whole)(head, hidden, targets, weights)
    assert worst((loss, grads), expected) < 2e-6


@pytest.mark.parametrize("chunk", [1, 5, 6, 12, 0])
def test_chunked_equals_whole(chunk):
    args = inputs()
    expected = differentiated(whole)(*args)
    assert worst(differentiated(chunked(chunk))(*args), expected) < 2e-6
    assert worst(jax.jit(chunked(chunk))(*args), expected[0]) < 2e-6
    log_probs = losses.target_log_probs(head_fn, *args[:3], chunk=chunk)
    expected = -losses.token_cross_entropy(head_fn(*args[:2]), args[2])[0]
    assert log_probs.shape == (B, L) and worst(log_probs, expected) < 1e-6


def test_the_incoming_cotangent_scales_the_gradient():
    args = inputs()
    fn = lambda *args: jnp.sin(chunked(5)(*args)[0] * 1e-3)
    other = lambda *args: jnp.sin(whole(*args)[0] * 1e-3)
    assert worst(jax.grad(fn, (0, 1))(*args), jax.grad(other, (0, 1))(*args)) < 2e-6


@pytest.mark.parametrize("head_dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_keeps_its_types_and_sums_in_float32(head_dtype):
    head, hidden, targets, weights = inputs()
    head = jax.tree.map(lambda w: jnp.asarray(w, head_dtype), head)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    cast = lambda head, x: head_fn(head, x).astype(jnp.float32)
    (_, sums), grads = differentiated(chunked(3, cast))(head, hidden, targets, weights)
    assert {x.dtype for x in sums.values()} == {jnp.dtype("float32")}
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(grads) == dtypes((head, hidden))
    expected = differentiated(chunked(12, cast))(head, hidden, targets, weights)[1]
    assert worst(jax.tree.map(lambda g: g.astype(jnp.float32), grads),
                 jax.tree.map(lambda g: g.astype(jnp.float32), expected)) < 2e-2


MESHES = {  # mesh shape, axes, then the specs of hidden (batch, length), kernel and bias
    "data_tensor": ((4, 2), ("data", "tensor"), P("data", None), P(None, "tensor"), P("tensor")),
    "data": ((8,), ("data",), P("data", None), P(None, None), P(None)),
    "sequence": ((2, 2, 2), ("data", "sequence", "tensor"), P("data", "sequence"),
                 P(None, "tensor"), P("tensor")),
    "fsdp": ((4, 2), ("fsdp", "tensor"), P("fsdp", None), P("fsdp", "tensor"), P("tensor")),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("chunk", [2, 12])
def test_sharded_equals_one_device(name, chunk):
    """Batch, length and vocabulary may all be split; gradients keep their sharding."""
    args = inputs()
    expected = differentiated(whole)(*args)
    expected_log_probs = losses.target_log_probs(head_fn, *args[:3], chunk=chunk)
    shape, axes, hidden_spec, kernel_spec, bias_spec = MESHES[name]

    def gather_head(head, x):
        kernel = head["kernel"]
        if "fsdp" in axes:
            kernel = jax.sharding.reshard(kernel, P(None, "tensor"))
        return head_fn({**head, "kernel": kernel}, x)

    mesh = jax.make_mesh(shape, axes, axis_types=(AxisType.Explicit,) * len(axes))
    with jax.set_mesh(mesh):
        head = {"kernel": jax.device_put(args[0]["kernel"], kernel_spec),
                "bias": jax.device_put(args[0]["bias"], bias_spec)}
        placed = (head, *(jax.device_put(x, hidden_spec) for x in args[1:]))
        found = differentiated(chunked(chunk, gather_head))(*placed)
        log_probs = jax.jit(lambda *a: losses.target_log_probs(gather_head, *a, chunk=chunk))(
            *placed[:3])
    assert worst(found, expected) < 2e-6
    pairs = zip(jax.tree.leaves(found[1]), jax.tree.leaves(placed[:2]), strict=True)
    for gradient, primal in pairs:
        assert jax.typeof(gradient) == jax.typeof(primal)
    assert worst(log_probs, expected_log_probs) < 1e-6
    assert tuple(log_probs.sharding.spec) == tuple(hidden_spec)


def test_the_head_gradient_is_reduced_once_and_not_in_the_loop():
    """An all-reduce of the (D, V/2) kernel gradient stands in the entry computation only."""
    head, *rest = inputs()
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        head = {"kernel": jax.device_put(head["kernel"], P(None, "tensor")),
                "bias": jax.device_put(head["bias"], P("tensor"))}
        args = (head, *(jax.device_put(x, P("data", None)) for x in rest))
        text = differentiated(chunked(2)).lower(*args).compile().as_text()
    loops, entry = text.split("\nENTRY")
    pattern = rf"f32\[{D},{V // 2}\]\S* all-reduce\("
    assert len(re.findall(pattern, entry)) == 1
    assert not re.findall(pattern, loops)


def test_memory_is_a_chunk_of_the_logits():
    """32 MiB of logits whole; in chunks of 1/16 a small part of it, forward and backward."""
    batch, length, width, vocabulary = 4, 256, 8, 8192
    shapes = (jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
              jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
              jax.ShapeDtypeStruct((batch, length), jnp.int32),
              jax.ShapeDtypeStruct((batch, length), jnp.float32))

    def temporaries(chunk):
        fn = lambda w, *rest: losses.chunked_cross_entropy(
            lambda w, x: x @ w, w, *rest, chunk=chunk)[0]
        compiled = jax.jit(jax.value_and_grad(fn, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * batch * length * vocabulary
    assert temporaries(256) >= logits_bytes
    assert temporaries(16) < logits_bytes / 4


def test_automatic_chunks_follow_the_bytes(monkeypatch):
    head, hidden, _, _ = inputs()
    monkeypatch.setattr(losses, "AUTO_CHUNK_BYTES", 4 * B * V * 5)  # five positions
    assert losses._num_chunks(head_fn, head, hidden, 0) == 3
    monkeypatch.setattr(losses, "AUTO_CHUNK_BYTES", 4 * B * V * L)
    assert losses._num_chunks(head_fn, head, hidden, 0) == 1
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):  # an eighth of the logits on each device
        monkeypatch.setattr(losses, "AUTO_CHUNK_BYTES", 4 * B * V * L // 8)
        sharded = {"kernel": jax.device_put(head["kernel"], P(None, "tensor")),
                   "bias": jax.device_put(head["bias"], P("tensor"))}
        assert losses._num_chunks(head_fn, sharded, jax.device_put(hidden, P("data")), 0) == 1
    monkeypatch.setattr(losses, "AUTO_CHUNK_BYTES", 1)
    assert losses._num_chunks(head_fn, head, hidden, 0) == L
    with pytest.raises(UserError, match="chunk=-1"):
        losses.chunked_cross_entropy(head_fn, *inputs(), chunk=-1)


def test_ties_go_to_the_first_id_and_nan_is_wrong():
    logits = jnp.zeros((1, 2, 4))
    assert losses._is_correct(logits, jnp.array([[0, 1]])).tolist() == [[1.0, 0.0]]
    assert losses._is_correct(logits * jnp.nan, jnp.array([[0, 1]])).tolist() == [[0.0, 0.0]]
    random = jax.random.randint(jax.random.key(0), (5, 40, 8), 0, 4).astype(jnp.float32)
    argmax = jnp.argmax(random, axis=-1)
    assert float(losses._is_correct(random, argmax).min()) == 1.0
    assert float(losses._is_correct(random, (argmax + 1) % 8).max()) == 0.0
