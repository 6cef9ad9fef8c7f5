"""Token mixers against other programs' (scripts/make_mixer_vectors.py), and against sums by hand."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.layers import recurrences
from t5x_lite.layers.config import InitConfig, MixerConfig
from t5x_lite.layers.convolution import Convolution
from t5x_lite.layers.linear_attention import GatedLinearAttention, LinearAttention, constant_decays
from t5x_lite.layers.lstm import LSTM
from t5x_lite.layers.masks import Masking
from t5x_lite.layers.rg_lru import RGLRU
from t5x_lite.layers.spatial_gating import SpatialGating
from t5x_lite.layers.state_space import StateSpace

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "vectors" / "mixers"
SCRIPT = FOLDER.parents[2] / "scripts" / "make_mixer_vectors.py"
TORCH_LSTM = {"input": 0, "forget": 1, "cell": 2, "output": 3}   # torch's order of the gates


def read(name):
    return dict(np.load(FOLDER / f"{name}.npz"))


def masking(length, segments=None):
    index = jnp.arange(length)[None]
    return Masking(index, index, segments, segments, causal=True)


def run(module, x, segments=None):
    """y_BLD of a module."""
    segments = None if segments is None else jnp.asarray(segments)
    return jax.jit(lambda x: module(x, None, masking(9, segments), None)[0])(x)


def build(module, config, embed_dim=8, causal=True):
    return module(jax.random.key(0), embed_dim, config, causal, InitConfig())


def give(module, values):
    """Writes {path: array} over the parameters, every one of them."""
    given = set()
    for path, value in values.items():
        node = module
        for name in path.split("/"):
            node = getattr(node, name)
        assert node[...].shape == value.shape, (path, node[...].shape, value.shape)
        node[...] = jnp.asarray(value)
        given.add(path)
    every = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    assert given == every, given ^ every


def test_torch_lstm():
    data = read("lstm")
    module = build(LSTM, MixerConfig("lstm", expand=0.75))
    values = {"out/kernel": np.zeros((6, 8))}
    for gate, i in TORCH_LSTM.items():
        rows = slice(6 * i, 6 * i + 6)
        values[f"{gate}_gate/kernel"] = data["weight_ih_l0"][rows].T
        values[f"{gate}_recurrent/kernel"] = data["weight_hh_l0"][rows].T
        values[f"{gate}_gate/bias"] = data["bias_ih_l0"][rows] + data["bias_hh_l0"][rows]
    give(module, values)
    found = jax.jit(lambda x: module.hidden(x, masking(9))[0])(data["x"])
    np.testing.assert_allclose(found, data["y"], atol=1e-6)


def test_griffin_of_transformers():
    data = read("rg_lru")
    module = build(RGLRU, MixerConfig("rg_lru", expand=1.5, head_dim=4, taps=4, use_bias=True))
    values = {f"{ours}/{part}": data[f"{theirs}.{name}"].T
              for ours, theirs in (("gate", "linear_y"), ("input", "linear_x"), ("out", "linear_out"))
              for part, name in (("kernel", "weight"), ("bias", "bias"))}
    values |= {"conv/kernel": data["conv_1d.weight"][:, 0].T, "conv/bias": data["conv_1d.bias"],
               "decay": data["rg_lru.recurrent_param"]}
    for ours, theirs in (("input_gate", "input_gate"), ("decay_gate", "recurrent_gate")):
        values[f"{ours}/kernel"] = data[f"rg_lru.{theirs}_weight"]
        values[f"{ours}/bias"] = data[f"rg_lru.{theirs}_bias"].reshape(-1)
    give(module, values)
    found = run(module, data["x"])
    np.testing.assert_allclose(found, data["y"], atol=2e-5)


@pytest.mark.parametrize("chunk", [4, 64])
def test_mamba_2_of_transformers(chunk):
    data = read("ssd")
    module = build(StateSpace, MixerConfig("ssd", expand=2, head_dim=4, state_dim=6, taps=4, chunk=chunk))
    kernels = np.split(data["in_proj.weight"], np.cumsum([16, 16, 6, 6]))   # z, x, B, C, dt
    convs = [np.split(data[f"conv1d.{part}"], [16, 22]) for part in ("weight", "bias")]
    values = {f"{name}/kernel": kernel.T for name, kernel in zip(
        ("gate", "value", "key", "query", "step"), kernels, strict=True)}
    for name, weight, bias in zip(("value", "key", "query"), *convs, strict=True):
        values |= {f"{name}_conv/kernel": weight[:, 0].T, f"{name}_conv/bias": bias}
    values |= {"step_bias": data["dt_bias"], "log_decay": data["A_log"], "skip": data["D"],
               "norm/scale": data["norm.weight"], "out/kernel": data["out_proj.weight"].T}
    give(module, values)
    found = run(module, data["x"])
    np.testing.assert_allclose(found, data["y"], atol=5e-5)


@pytest.mark.slow
def test_the_script_makes_the_vectors():
    pytest.importorskip("transformers")
    made = runpy.run_path(str(SCRIPT))["MADE"]
    assert made.keys() == {file.stem for file in FOLDER.glob("*.npz")}
    for name, make in made.items():
        stored = read(name)
        for key, value in make().items():
            np.testing.assert_allclose(value, stored[key], rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}")


# --- sums by hand ---------------------------------------------------------------------------------

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])


def heads(x, kernel, count):
    x = np.asarray(x) @ np.asarray(kernel[...])
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def seen(causal):
    same = SEGMENTS[:, :, None] == SEGMENTS[:, None, :]
    order = np.tril(np.ones((9, 9), bool)) if causal else np.ones((9, 9), bool)
    return (same & order)[:, None]


def draw(seed=0, width=8):
    return np.random.default_rng(seed).normal(size=(2, 9, width)).astype(np.float32)


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_equals_its_quadratic_form(causal):
    module = build(LinearAttention, MixerConfig("linear", head_dim=4, state_dim=3, chunk=4), causal=causal)
    x = draw()
    q, k, v = (heads(x, f.kernel, 2) for f in (module.query, module.key, module.value))
    q, k = (np.where(a > 0, a + 1, np.exp(a)) for a in (q, k))
    weights = np.where(seen(causal), q @ k.transpose(0, 1, 3, 2), 0)
    y = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(2, 9, 8)
    found = run(module, x, SEGMENTS)
    np.testing.assert_allclose(found, y @ module.out.kernel[...], atol=1e-5)


@pytest.mark.parametrize("constant", [True, False])
def test_gated_linear_attention_equals_its_quadratic_form(constant):
    module = GatedLinearAttention(
        jax.random.key(0), 8, MixerConfig("retention", head_dim=4, state_dim=3, chunk=4), True, InitConfig(),
        decays=constant_decays if constant else None)
    x = draw()
    q, k, v = (heads(x, f.kernel, 2) for f in (module.query, module.key, module.value))
    if constant:
        log_decay = np.log([31 / 32, 63 / 64])[None, :, None] * np.ones((2, 1, 9))
    else:
        gates = (x @ np.asarray(module.decay.kernel[...])).transpose(0, 2, 1)
        log_decay = -np.log1p(np.exp(-gates)) / 16
    total = np.cumsum(log_decay, axis=2)
    decay = np.exp(np.minimum(total[..., :, None] - total[..., None, :], 0))
    y = np.where(seen(True), q @ k.transpose(0, 1, 3, 2) * 3 ** -0.5 * decay, 0) @ v
    y = y / np.sqrt((y ** 2).mean(-1, keepdims=True) + 1e-6)
    gate = x @ np.asarray(module.gate.kernel[...])
    y = y.transpose(0, 2, 1, 3).reshape(2, 9, 8) * gate / (1 + np.exp(-gate))
    found = run(module, x, SEGMENTS)
    np.testing.assert_allclose(found, y @ module.out.kernel[...], atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_convolution_by_hand(causal):
    module = build(Convolution, MixerConfig("conv", taps=3), causal=causal)
    module.conv.bias[...] = jnp.arange(8.0)
    x, kernel = draw(), np.asarray(module.conv.kernel[...])
    gate = x @ np.asarray(module.gate.kernel[...])
    h = x @ np.asarray(module.value.kernel[...]) / (1 + np.exp(-gate))
    y = np.tile(np.arange(8.0), (2, 9, 1))
    for row, t, i in np.ndindex(2, 9, 3):
        s = t - 2 + i + (0 if causal else 1)
        if 0 <= s < 9 and SEGMENTS[row, s] == SEGMENTS[row, t]:
            y[row, t] += kernel[i] * h[row, s]
    found = run(module, x, SEGMENTS)
    np.testing.assert_allclose(found, y @ module.out.kernel[...], atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_spatial_gating_by_hand(causal):
    module = build(SpatialGating, MixerConfig("gmlp", max_length=10), causal=causal)
    rng = np.random.default_rng(3)
    offsets, places = rng.normal(size=module.offsets.shape), rng.normal(size=10)
    module.offsets[...], module.places[...] = jnp.float32(offsets), jnp.float32(places)
    x = draw()
    u, v = (np.asarray(jax.nn.gelu(jnp.asarray(x @ np.asarray(f.kernel[...])))) for f in
            (module.gate, module.value))
    v = v / np.sqrt((v ** 2).mean(-1, keepdims=True) + 1e-6)
    y, middle = np.zeros_like(u), 0 if causal else 9
    for row, t in np.ndindex(2, 9):
        first = np.flatnonzero(SEGMENTS[row] == SEGMENTS[row, t])[0]
        mixed = sum((offsets[middle + t - s] * v[row, s] for s in range(9)
                     if seen(causal)[row, 0, t, s]), np.zeros(8))
        y[row, t] = u[row, t] * (mixed + places[t - first])
    found = run(module, x, SEGMENTS)
    np.testing.assert_allclose(found, y @ module.out.kernel[...], atol=1e-5)


def test_the_associative_scan_equals_the_loop():
    rng = np.random.default_rng(0)
    decay, x, state = rng.random((2, 7, 3)), rng.normal(size=(2, 7, 3)), rng.normal(size=(2, 3))
    decay[0, 4] = 0
    h, expected = state, []
    for t in range(7):
        h = decay[:, t] * h + x[:, t]
        expected.append(h)
    found = recurrences.diagonal_scan(*map(jnp.float32, (decay, x, state)))
    np.testing.assert_allclose(found, np.stack(expected, 1), rtol=1e-5)


def test_a_given_parameter_says_so():
    module = build(RGLRU, MixerConfig("rg_lru", head_dim=4))
    a = np.exp(-8 * np.log1p(np.exp(np.asarray(module.decay[...]))))
    assert module.decay.get_metadata()["init"] == "as its layer draws it"
    assert np.all((a > 0.9) & (a < 0.999))
