"""Products in 8-bit floats: their numbers, their gradients, on meshes, and where they are refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite import build as build_lib, config as configs
from t5x_lite.errors import UserError
from t5x_lite.layers import fp8, linear
from t5x_lite.parallel.sharding import MeshConfig
from t5x_lite.planning import rehearse
from t5x_lite.training import precision
from tests import tiny


@pytest.mark.parametrize("dtype, largest, error", [
    (fp8.FORWARD, 448.0, 2**-4), (fp8.BACKWARD, 57344.0, 2**-3)])
def test_a_tensor_fills_the_range_of_its_format(dtype, largest, error):
    x = jnp.array([0.0, 1e-3, 0.02, -0.3, 7.0, -14.0])
    values, scale = fp8.quantize(x, dtype)
    assert values.dtype == dtype and float(values[-1]) == -largest and values[0] == 0
    np.testing.assert_allclose(values.astype(jnp.float32) * scale, x, rtol=error)


def test_zeros_stay_zeros():
    values, scale = fp8.quantize(jnp.zeros(3, jnp.bfloat16), fp8.FORWARD)
    assert float(scale) == 1.0 and not values.astype(jnp.float32).any()


def test_products_and_gradients_are_those_of_the_rounded_operands():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(k, s).astype(jnp.bfloat16)
               for k, s in zip(keys, ((4, 8, 32), (32, 16), (4, 8, 16)), strict=True))

    def rounded(a, dtype):
        values, scale = fp8.quantize(a, dtype)
        return np.asarray(values.astype(jnp.float32) * scale, np.float64)

    with fp8.matmuls(True):
        y, pull_back = jax.vjp(lambda x, w: linear.project(x, w, ("act_batch", None, None)), x, w)
    dx, dw = pull_back(g)
    x8, w8, g8 = rounded(x, fp8.FORWARD), rounded(w, fp8.FORWARD), rounded(g, fp8.BACKWARD)
    for found, expected in ((y, x8 @ w8), (dx, g8 @ w8.T), (dw, np.einsum("abd,abf->df", x8, g8))):
        assert found.dtype == jnp.bfloat16
        error = np.abs(np.asarray(found, np.float64) - expected).max()
        assert error < 0.02 * np.abs(expected).max()
    plain = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert 1e-3 < np.abs(x8 @ w8 - plain).max() / np.abs(plain).max() < 0.1


def test_float32_products_are_left_alone():
    x, w = jnp.full((2, 3), 1.1), jnp.full((3, 2), 1.1)
    with fp8.matmuls(True):
        np.testing.assert_array_equal(linear.project(x, w, (None, None)), x @ w)


def one_step(name, mesh, devices, **changes):
    """(loss, gradient norm, scale of the loss) of a step from the same parameters."""
    config = dataclasses.replace(tiny.seq2seq(), precision=name, mesh=MeshConfig(**mesh))
    for path, value in changes.items():
        config = configs.replace(config, path.replace("__", "."), value)
    program = build_lib.build(config, devices)
    rows = {k: jax.device_put(v, program.batch_sharding) for k, v in tiny.batch().items()}
    with program.activate():
        state, sums = program.jit_train_step()(tiny.place(tiny.params(config), program), rows)
    return {name: float(total) / float(count) for name, (total, count) in sums.items()}, state


def test_a_step_in_8_bits_is_near_the_float32_one_on_any_mesh():
    plain, _ = one_step("float32", {"data": 1}, jax.devices()[:1])
    alone, _ = one_step("fp8", {"data": 1}, jax.devices()[:1])
    split, _ = one_step("fp8", {"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    for metric in ("loss", "grad_norm"):
        assert alone[metric] == pytest.approx(plain[metric], rel=0.1)
        assert alone[metric] != pytest.approx(plain[metric], rel=1e-4)
        assert split[metric] == pytest.approx(alone[metric], rel=0.02)


def test_fp16_scales_the_loss_as_the_config_says():
    """Adafactor's zeroed state has scale 0, so a state of its own is made here."""
    config = dataclasses.replace(tiny.seq2seq(), precision="fp16", mesh=MeshConfig(data=1))
    config = configs.override(config, ["loss_scale.initial=1024", "loss_scale.growth_interval=1"])
    program = build_lib.build(config, jax.devices()[:1])
    state = program.init_state()
    assert float(state["opt_state"]["loss_scale"]["scale"]) == 1024
    with program.activate():
        state, sums = program.jit_train_step()(state, tiny.batch())
    assert (float(sums["loss_scale"][0]), float(sums["skipped"][0])) == (1024, 0)
    assert float(state["opt_state"]["loss_scale"]["scale"]) == 2048
    with pytest.raises(UserError, match="loss_scale.factor=0.5"):
        configs.override(config, ["loss_scale.factor=0.5"])


@pytest.mark.parametrize("name, refused", [("a100-40g:1", True), ("h100:1", False)])
def test_refused_where_there_are_no_8_bit_products(name, refused):
    config = dataclasses.replace(tiny.seq2seq(), precision="fp8")
    devices = rehearse.topology(name).devices
    if refused:
        with pytest.raises(UserError, match="precision=fp8: a 'NVIDIA A100.*h100"):
            build_lib.build(config, devices)
    else:
        program = build_lib.build(config, devices)
        assert program.policy == precision.POLICIES["fp8"]
        assert program.policy.matmul_dtype == "float8_e4m3fn"
