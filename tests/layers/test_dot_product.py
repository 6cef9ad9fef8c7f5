"""Attention by chunks and by the fused kernels equals the plain one, values and gradients."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.layers import attention, attention_implementations, dot_product
from t5x_lite.layers.config import PositionConfig
from t5x_lite.layers.masks import Masking, Terms
from t5x_lite.layers.position import PositionBias, Relative, alibi_values, skew, t5_values
from t5x_lite.parallel import products, sharding


def inputs(length, keys, heads, kv_heads, head_dim=4, batch=2, seed=0):
    """(q, k, v) drawn at random."""
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (
        (batch, heads, length, head_dim), (batch, kv_heads, keys, head_dim),
        (batch, kv_heads, keys, head_dim)))


def masking(length, keys, *, causal=False, window=0, segments=None, prefix=None):
    """Rows that agree on positions; segments and prefix as [B, S] lists."""
    q, k = jnp.arange(length)[None], jnp.arange(keys)[None]
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    return Masking(q, k, None if ids is None else ids[:, :length], ids,
                   None if prefix is None else jnp.asarray(prefix, bool), causal, window)


def both(implementation, arrays, weights):
    """(output and gradients of `plain`, the same of `implementation`), both of a random sum."""
    def run(attend):
        def scalar(arrays):
            y = attend(*arrays)
            return jnp.sum(jnp.sin(y) * weights), y
        return jax.jit(jax.value_and_grad(scalar, has_aux=True))(arrays)
    return run(implementation[0]), run(implementation[1])


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-30)


def bias_of(kind, heads, keys, causal, rng):
    """(learned arrays, Terms of them)."""
    if kind == "t5_bias":
        config = PositionConfig(num_buckets=8, max_distance=16)
        table = jnp.asarray(rng.normal(size=(1, 8, heads)), jnp.float32)
        return table, lambda t: Terms(PositionBias(t, t5_values, config, not causal))
    if kind == "alibi":
        config = PositionConfig("alibi")
        table = jnp.asarray(rng.uniform(size=(1, 1, heads)), jnp.float32)
        return table, lambda t: Terms(PositionBias(t, alibi_values, config, False))
    if kind == "transformer_xl":
        pair = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32)
                     for shape in ((2, heads, keys, 4), (heads, 2 * keys, 4)))
        return pair, lambda t: Terms(relative=Relative(*t))
    return jnp.zeros(()), lambda t: Terms(softcap=5.0 if kind == "softcap" else 0.0)


TWO_EXAMPLES = [[1, 1, 1, 1, 2, 2, 2, 2, 2, 0], [1, 1, 2, 2, 2, 2, 0, 0, 0, 0]]
CASES = {
    "T5 bias, grouped heads, segments": ("t5_bias", 4, 2, 4, {"segments": TWO_EXAMPLES}),
    "causal T5 bias, window": ("t5_bias", 2, 2, 3, {"causal": True, "window": 4}),
    "ALiBi, one key head, segments": ("alibi", 2, 1, 4, {"causal": True, "segments": TWO_EXAMPLES}),
    "Transformer-XL, bidirectional window": ("transformer_xl", 2, 2, 3, {"window": 3}),
    "prefix and window": ("softcap", 2, 2, 3, {"causal": True, "window": 6, "prefix": [
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]}),
}


@pytest.mark.parametrize("case", CASES)
def test_chunked_equals_plain(case):
    kind, heads, kv_heads, chunk, mask = CASES[case]
    rng = np.random.default_rng(1)
    learned, terms = bias_of(kind, heads, 10, mask.get("causal", False), rng)
    arrays = (*inputs(10, 10, heads, kv_heads), learned)
    where = masking(10, 10, **mask)
    plain, chunked = both(
        [lambda q, k, v, t, f=f: f(q, k, v, terms(t), where) for f in (
            dot_product.plain, functools.partial(dot_product.chunked, chunk=chunk))],
        arrays, jnp.asarray(rng.normal(size=arrays[0].shape), jnp.float32))
    assert_close(chunked, plain)


def test_chunked_cross_attention_equals_plain():
    """Queries and keys of other lengths, padding among the keys."""
    segments = np.ones((2, 13), int)
    segments[1, 9:] = 0
    where = masking(7, 13, segments=segments)
    arrays = inputs(7, 13, 2, 2)
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    plain, chunked = both(
        [lambda q, k, v, f=f: f(q, k, v, Terms(), where) for f in (
            dot_product.plain, functools.partial(dot_product.chunked, chunk=4))], arrays, weights)
    assert_close(chunked, plain)


def test_hidden_chunks_are_not_computed():
    """Chunks of 2 over 8 tokens, by hand: what query chunk 2 (tokens 4 and 5) may see."""
    def visible(**kwargs):
        plan = dot_product.Plan(2, 2, 8, **{"causal": False, "window": 0, "prefix": False, **kwargs})
        return tuple(int(x) for x in plan.visible(jnp.arange(8)[None], jnp.int32(2)))

    assert visible() == (0, 4)
    assert visible(causal=True) == (0, 3)              # keys 0 to 5
    assert visible(causal=True, window=2) == (1, 3)    # keys 3 to 5
    assert visible(window=2) == (1, 4)                 # keys 3 to 6
    assert visible(causal=True, window=2, prefix=True) == (0, 4)


def test_skew_by_hand():
    """Two queries, three keys: column c is the distance (last query) - (first key) - c."""
    x = jnp.array([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    np.testing.assert_array_equal(skew(x, 3), [[11, 12, 13], [20, 21, 22]])


# --- the fused kernels, as far as they run without their hardware ---------------------------------

@pytest.mark.parametrize("mask", [
    {"causal": True}, {"causal": True, "window": 3}, {}, {"window": 3},
    {"causal": True, "segments": TWO_EXAMPLES},
    {"causal": True, "prefix": [[1, 1, 0, 0, 0, 0, 0, 0, 0, 0]] * 2}], ids=str)
def test_cudnn_is_asked_the_right_question(mask):
    """jax.nn.dot_product_attention's own XLA implementation, given cuDNN's arguments."""
    where = masking(10, 10, **mask)
    arrays = inputs(10, 10, 4, 2)
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    plain, found = both(
        [lambda q, k, v: dot_product.plain(q, k, v, Terms(), where),
         lambda q, k, v: attention_implementations.cudnn(q, k, v, where, implementation="xla")], arrays, weights)
    assert_close(found, plain)


@pytest.mark.parametrize("mask,softcap", [
    ({"causal": True}, 0.0), ({"causal": True, "window": 40}, 5.0),
    ({"segments": [[1] * 60 + [2] * 68] * 2}, 0.0)], ids=str)
def test_splash_equals_plain(mask, softcap):
    """The kernel's own program, interpreted on the CPU."""
    where = masking(128, 128, **mask)
    arrays = inputs(128, 128, 2, 1)
    weights = jnp.cos(jnp.arange(arrays[0].size, dtype=jnp.float32)).reshape(arrays[0].shape)
    plain, found = both(
        [lambda q, k, v: dot_product.plain(q, k, v, Terms(softcap=softcap), where),
         lambda q, k, v: attention_implementations.splash(q, k, v, where, softcap=softcap, interpret=True)],
        arrays, weights)
    assert_close(found, plain)


def choice(monkeypatch, backend, implementation="auto", length=4096, dtype=jnp.bfloat16,
           lacks="", **kwargs):
    """What runs on a backend, from shapes alone."""
    monkeypatch.setattr(products, "platform", lambda: backend)
    monkeypatch.setattr(attention_implementations, "cudnn_lacks", lambda: lacks)
    q, k = (jax.ShapeDtypeStruct((2, 8, length, 64), dtype) for _ in range(2))
    settings = {"bias": False, "softcap": 0.0, **{k: v for k, v in kwargs.items() if k != "prefix"}}
    prefix = [[1] * length] * 2 if kwargs.get("prefix") else None
    return attention_implementations.choose(implementation, q, k, **settings,
                          masking=masking(length, length, causal=True, prefix=prefix))


@pytest.mark.parametrize("backend,expected,kwargs", [
    ("gpu", "cudnn", {}), ("tpu", "splash", {}), ("cpu", "chunked", {}),
    ("gpu", "chunked", {"bias": True}), ("tpu", "chunked", {"bias": True}),
    ("gpu", "chunked", {"lacks": "cuDNN is not detected."}),
    ("gpu", "chunked", {"dtype": jnp.float32}), ("gpu", "chunked", {"softcap": 5.0}),
    ("tpu", "splash", {"softcap": 5.0}), ("tpu", "chunked", {"prefix": True}),
    ("tpu", "chunked", {"length": 4100}), ("gpu", "plain", {"length": 512}),
    ("cpu", "plain", {"length": 2048})])
def test_auto_chooses_by_backend_length_and_bias(monkeypatch, backend, expected, kwargs):
    assert choice(monkeypatch, backend, **kwargs) == expected


def test_rows_at_different_positions_are_plain(monkeypatch):
    """Cached decoding, whatever the config asks for."""
    q = jax.ShapeDtypeStruct((2, 8, 1, 64), jnp.bfloat16)
    where = Masking(jnp.array([[3], [7]]), jnp.arange(4096)[None], causal=True)
    assert attention_implementations.choose("splash", q, q, bias=False, softcap=0.0, masking=where) == "plain"


@pytest.mark.parametrize("backend,name", [("gpu", "cudnn"), ("tpu", "splash")])
@pytest.mark.parametrize("implementation", ["auto", "named"])
def test_one_row_behind_a_cache_takes_no_fused_kernel(monkeypatch, backend, name, implementation):
    """Their causal masks begin at the first key, where this query sees all."""
    monkeypatch.setattr(products, "platform", lambda: backend)
    q, k = (jax.ShapeDtypeStruct((1, 8, n, 64), jnp.bfloat16) for n in (128, 4096))
    where = Masking(jnp.arange(900, 1028)[None], jnp.arange(4096)[None], causal=True)
    assert attention_implementations.choose(name if implementation == "named" else "auto", q, k, bias=False,
                          softcap=0.0, masking=where) == "plain"


@pytest.mark.parametrize("backend,name,kwargs,message", [
    ("cpu", "cudnn", {}, "needs an NVIDIA GPU, and this is a cpu"),
    ("gpu", "splash", {}, "needs a TPU"),
    ("gpu", "cudnn", {"bias": True}, "takes no bias"),
    ("gpu", "cudnn", {"dtype": jnp.float32}, "16-bit compute type, not float32"),
    ("gpu", "cudnn", {"lacks": "JAX says: none"}, "JAX says: none"),
    ("tpu", "splash", {"length": 100}, "divide by 128, not 100 and 100")])
def test_what_cannot_run_is_refused(monkeypatch, backend, name, kwargs, message):
    with pytest.raises(UserError, match=f"implementation='{name}': .*{message}.*'chunked'"):
        choice(monkeypatch, backend, name, **kwargs)


def test_the_choice_is_logged_once(monkeypatch, caplog):
    attention_implementations.log_once.cache_clear()
    with caplog.at_level("INFO", logger="t5x_lite"):
        choice(monkeypatch, "cpu")
        choice(monkeypatch, "cpu")
    assert caplog.messages == ["attention: chunked for 4096 queries over 4096 keys on cpu"]


@pytest.mark.parametrize("window", [0, 9])
def test_a_split_length_leaves_every_device_the_same_work(monkeypatch, window):
    """Of 4 devices with 8 of 32 queries each, chunks of 4: 1 + 8 or 2 + 7, … key chunks visited."""
    visits = []
    visible = dot_product.Plan.visible

    def counted(self, positions, i):
        low, high = visible(self, positions, i)
        jax.debug.callback(lambda device, n: visits.append((int(device), int(n))),
                           jax.lax.axis_index("sequence"), jnp.asarray(high - low))
        return low, high

    monkeypatch.setattr(dot_product.Plan, "visible", counted)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 2, 32, 4)) for i in range(3))
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, sequence=4))
    where = dataclasses.replace(masking(32, 32, causal=True), window=window)
    with sharding.activate(mesh, sharding.Rules()):
        split = [sharding.shard(q, "act_batch", "act_heads", "act_length", None),
                 *(sharding.shard(x, "act_batch", "act_heads", "act_keys", None) for x in (k, v))]
        y = jax.jit(lambda *qkv: attention.attend("chunked", *qkv, Terms(), where, 4))(*split)
        jax.effects_barrier()
    np.testing.assert_allclose(y, dot_product.plain(q, k, v, Terms(), where), atol=1e-6)
    visited = [sum(n for device, n in visits if device == i) for i in range(4)]
    if not window:   # twice, for two data replicas: 1 + … + 8 chunks over 4 devices
        assert visited == [2 * 36 / 4] * 4


def test_in_bfloat16_one_copy_of_the_probabilities_is_kept_and_gradients_are_as_near():
    """To those of float32, as with what autodiff makes of the same products."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, dy = (jax.random.normal(key, (2, 4, 24, 8), jnp.bfloat16) for key in keys)
    k, v = k[:, :2], v[:, :2]
    where = Masking(jnp.arange(24)[None], jnp.arange(24)[None], causal=True)

    def plainly(q, k, v):
        return dot_product.plain(q, k, v, Terms(), where)

    def by_autodiff(q, k, v):
        return dot_product.mix(jax.nn.softmax(dot_product.logits(q, k, Terms(), where), axis=-1), v)

    def gradients(fn, *args):
        return jax.vjp(fn, *args)[1](dy.astype(args[2].dtype))

    exact = gradients(plainly, *(x.astype(jnp.float32) for x in (q, k, v)))
    for found, old, want in zip(gradients(plainly, q, k, v), gradients(by_autodiff, q, k, v), exact,
                                strict=True):
        error, before = (float(jnp.linalg.norm(x.astype(jnp.float32) - want)
                               / jnp.linalg.norm(want)) for x in (found, old))
        assert error < 0.005 and error < 2 * before
    np.testing.assert_array_equal(plainly(q, k, v), by_autodiff(q, k, v))

    def held(fn):   # a constant of the mask among them, which the compiler drops
        kept = (x for x in jax.tree.leaves(jax.vjp(fn, q, k, v)[1]) if x.shape == (2, 4, 24, 24))
        return collections.Counter(str(x.dtype) for x in kept)

    assert held(by_autodiff) - held(plainly) == {"float32": 1}
