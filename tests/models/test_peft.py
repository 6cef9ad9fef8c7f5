"""Parameter-efficient fine-tuning: by hand, and on a tiny model, a mixture and a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

from t5x_lite import tree
from t5x_lite.errors import UserError
from t5x_lite.models import peft
from t5x_lite.models.language_model import Model
from t5x_lite.models.params import ParamInfo
from t5x_lite.models.peft import PeftConfig, Tuning
from t5x_lite.parallel import sharding
from tests import tiny

KEY = jax.random.key(0)


def info(path, shape, axes, dtype=jnp.float32):
    return ParamInfo(path, shape, jnp.dtype(dtype), axes, shape, shape[-2] if shape[1:] else 0,
                     "truncated_normal(0.1)")


BLOCK = "decoder/segment_0/block_0"
TABLE = {i.path: i for i in (
    info(f"{BLOCK}/cross_attention/key/kernel", (3, 8, 6), ("layers", "embed", "heads")),
    info(f"{BLOCK}/cross_attention/key/bias", (3, 6), ("layers", "heads")),
    info(f"{BLOCK}/cross_attention/query/kernel", (3, 8, 6), ("layers", "embed", "heads")),
    info(f"{BLOCK}/cross_attention/value/kernel", (3, 8, 6), ("layers", "embed", "heads")),
    info(f"{BLOCK}/mlp/experts/wo/kernel", (3, 4, 10, 8), ("layers", "expert", "mlp", "embed")),
    info(f"{BLOCK}/pre_mlp_norm/scale", (3, 8), ("layers", "norm")),
    info("token_embedding/embedding", (20, 8), ("vocab", "embed")))}
QUERY, KEYS, VALUE = (f"{BLOCK}/cross_attention/{n}" for n in ("query", "key", "value"))
WO = f"{BLOCK}/mlp/experts/wo"


def draw(table, seed=0):
    rng = np.random.default_rng(seed)
    return {p: jnp.asarray(rng.normal(size=i.shape), i.dtype) for p, i in table.items()}


PARAMS = draw(TABLE)
CONFIGS = [
    PeftConfig(), PeftConfig("lora", rank=2), PeftConfig("ia3"), PeftConfig("bitfit"),
    PeftConfig("regex", targets=(".*/scale", "token_embedding/.*")),
    PeftConfig("lora", targets=(".*/kernel", "token_embedding/embedding"), rank=3,
               also=(".*/scale",)),
    PeftConfig("ia3", targets=(".*/query/kernel",), input_targets=(".*/value/kernel",)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{len(c.targets)}")
def test_step_0_is_the_base_model_bit_for_bit(config):
    trainable, frozen = Tuning(TABLE, config).split(PARAMS, KEY)
    found = jax.jit(lambda t, f: Tuning(TABLE, config).combine(t, f))(trainable, frozen)
    assert found.keys() == PARAMS.keys() and not trainable.keys() & frozen.keys()
    for path in PARAMS:
        np.testing.assert_array_equal(found[path], PARAMS[path])


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{len(c.targets)}")
def test_the_table_describes_what_trains(config):
    trainable, _ = Tuning(TABLE, config).split(PARAMS, KEY)
    rows = Tuning(TABLE, config).trainable
    assert rows.keys() == trainable.keys()
    for path, row in rows.items():
        assert row.path == path and trainable[path].shape == row.shape == row.units
        assert trainable[path].dtype == row.dtype and len(row.logical_axes) == len(row.shape)


def test_what_trains():
    paths = lambda config: sorted(Tuning(TABLE, config).split(PARAMS, KEY)[0])
    assert paths(PeftConfig()) == sorted(TABLE)
    assert paths(PeftConfig("bitfit")) == [f"{KEYS}/bias"]
    assert paths(PeftConfig("lora", rank=2)) == [
        f"{QUERY}/lora_a", f"{QUERY}/lora_b", f"{VALUE}/lora_a", f"{VALUE}/lora_b"]
    assert paths(PeftConfig("ia3")) == [f"{KEYS}/ia3", f"{VALUE}/ia3", f"{WO}/ia3"]
    assert paths(PeftConfig("ia3", also=(".*/scale",)))[3] == f"{BLOCK}/pre_mlp_norm/scale"


def test_shapes_and_axes_beside_a_stacked_kernel():
    rows = Tuning(TABLE, PeftConfig("lora", targets=(".*/wo/kernel",), rank=2)).trainable
    assert rows[f"{WO}/lora_a"].shape == (3, 4, 10, 2)
    assert rows[f"{WO}/lora_a"].logical_axes == ("layers", "expert", "mlp", None)
    assert rows[f"{WO}/lora_b"].shape == (3, 4, 2, 8)
    assert rows[f"{WO}/lora_b"].logical_axes == ("layers", "expert", None, "embed")
    rows = Tuning(TABLE, PeftConfig("ia3")).trainable
    assert rows[f"{WO}/ia3"].shape == (3, 4, 10)
    assert rows[f"{WO}/ia3"].logical_axes == ("layers", "expert", "mlp")
    assert rows[f"{KEYS}/ia3"].logical_axes == ("layers", "heads")


@pytest.mark.parametrize("stabilized, scale", [(False, 4 / 2), (True, 4 / np.sqrt(2))])
def test_lora_by_hand(stabilized, scale):
    config = PeftConfig("lora", targets=(".*/wo/kernel",), rank=2, alpha=4,
                        rank_stabilized=stabilized)
    trainable, frozen = Tuning(TABLE, config).split(PARAMS, KEY)
    trainable = draw(Tuning(TABLE, config).trainable, seed=1)
    found = Tuning(TABLE, config).combine(trainable, frozen)
    for layer in range(3):
        for expert in range(4):
            expected = PARAMS[f"{WO}/kernel"][layer, expert] + scale * (
                trainable[f"{WO}/lora_a"][layer, expert] @ trainable[f"{WO}/lora_b"][layer, expert])
            np.testing.assert_allclose(found[f"{WO}/kernel"][layer, expert], expected, rtol=1e-5,
                                       atol=1e-5)
    for path in TABLE.keys() - {f"{WO}/kernel"}:
        np.testing.assert_array_equal(found[path], PARAMS[path])


def test_ia3_scales_activations():
    config = PeftConfig("ia3")
    _, frozen = Tuning(TABLE, config).split(PARAMS, KEY)
    trainable = draw(Tuning(TABLE, config).trainable, seed=1)
    found = Tuning(TABLE, config).combine(trainable, frozen)
    x, h = np.random.default_rng(2).normal(size=(2, 5, 10)).astype(np.float32)
    x = x[:, :8]
    # keys and values: the outputs, bias included
    plain = x @ PARAMS[f"{KEYS}/kernel"][1] + PARAMS[f"{KEYS}/bias"][1]
    np.testing.assert_allclose(x @ found[f"{KEYS}/kernel"][1] + found[f"{KEYS}/bias"][1],
                               plain * trainable[f"{KEYS}/ia3"][1], rtol=1e-4, atol=1e-5)
    # the mlp: the hidden activations
    np.testing.assert_allclose(h @ found[f"{WO}/kernel"][2, 3],
                               (h * trainable[f"{WO}/ia3"][2, 3]) @ PARAMS[f"{WO}/kernel"][2, 3],
                               rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found[f"{QUERY}/kernel"], PARAMS[f"{QUERY}/kernel"])


def test_gradients_reach_the_trainable_part_only():
    config = PeftConfig("lora", rank=2, also=(".*/scale",))
    trainable, frozen = Tuning(TABLE, config).split(PARAMS, KEY)
    trainable = {p: x + 0.1 for p, x in trainable.items()}
    loss = lambda t, f: sum(jnp.sum(x ** 3) for x in Tuning(TABLE, config).combine(t, f).values())
    grads = jax.grad(loss)(trainable, frozen)
    assert grads.keys() == trainable.keys()
    # d/dA of f(W + s A B) is s f'(W_eff) B^T
    effective = Tuning(TABLE, config).combine(trainable, frozen)[f"{QUERY}/kernel"]
    expected = config.lora_scale * jnp.einsum(
        "lio,lro->lir", 3 * effective ** 2, trainable[f"{QUERY}/lora_b"])
    np.testing.assert_allclose(grads[f"{QUERY}/lora_a"], expected, rtol=1e-4)


def test_fresh_lora_is_drawn_by_path():
    both = PeftConfig("lora", rank=2)
    one = PeftConfig("lora", rank=2, targets=(".*/value/kernel",))
    a, b = Tuning(TABLE, both).split(PARAMS, KEY)[0], Tuning(TABLE, one).split(PARAMS, KEY)[0]
    np.testing.assert_array_equal(a[f"{VALUE}/lora_a"], b[f"{VALUE}/lora_a"])
    assert (a[f"{VALUE}/lora_a"] != a[f"{QUERY}/lora_a"]).any()
    drawn = np.abs(a[f"{VALUE}/lora_a"])
    assert 0.8 / np.sqrt(8) < drawn.max() <= 1 / np.sqrt(8)
    assert not np.any(a[f"{VALUE}/lora_b"])


def test_a_bf16_base_keeps_its_dtype_and_trains_in_float32():
    table = {p: dataclasses.replace(i, dtype=jnp.dtype(jnp.bfloat16)) for p, i in TABLE.items()}
    params = draw(table)
    config = PeftConfig("lora", rank=2)
    trainable, frozen = Tuning(table, config).split(params, KEY)
    assert {x.dtype for x in trainable.values()} == {jnp.dtype(jnp.float32)}
    found = Tuning(table, config).combine(trainable, frozen)
    for path in table:
        assert found[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found[path], params[path])


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[5]], ids=["ia3", "lora"])
def test_a_mesh_gives_the_parameters_of_one_device(config):
    table = TABLE
    frozen = Tuning(table, config).split(PARAMS, KEY)[1]
    trainable = draw(Tuning(table, config).trainable, seed=1)
    expected = Tuning(table, config).combine(trainable, frozen)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    assert set(mesh.axis_types) == {AxisType.Explicit}
    rules = sharding.Rules()
    with sharding.activate(mesh, rules):
        place = lambda flat, rows: {
            p: jax.device_put(x, sharding.named_sharding(mesh, rules, rows[p].logical_axes))
            for p, x in flat.items()}
        args = place(trainable, Tuning(table, config).trainable), place(frozen, table)
        found = jax.jit(lambda t, f: Tuning(table, config).combine(t, f))(*args)
        for path in table:
            spec = rules.spec(table[path].logical_axes, dict(mesh.shape))
            assert found[path].sharding.is_equivalent_to(NamedSharding(mesh, spec),
                                                         found[path].ndim)
            np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-6)


def test_vocabulary_prompt_copies_common_rows():
    embedding = jnp.arange(20.0)[:, None] * jnp.ones(4)
    prompt = peft.vocabulary_prompt(embedding, 6, KEY, common=8)
    rows = np.asarray(prompt[:, 0])
    assert prompt.shape == (6, 4) and len(set(rows.tolist())) == 6 and rows.max() < 8
    with pytest.raises(UserError, match="a prompt of 9 tokens cannot start from 8 distinct ones"):
        peft.vocabulary_prompt(embedding, 9, KEY, common=8)


@pytest.mark.parametrize("fields, message", [
    (dict(method="lorra"), "peft.method='lorra': must be one of .* did you mean 'lora'"),
    (dict(method="lora", rank=0), "peft.rank=0: must be at least 1"),
    (dict(method="regex"), "peft.targets is empty"),
    (dict(method="regex", targets=("(",)), r"peft.targets: '\(' is no regex"),
    (dict(method="lora", input_targets=("x",)), "belongs to peft.method='ia3', not 'lora'"),
    (dict(method="lora", rank=2, targets=(f"{BLOCK}/cross_attention/quary/kernel",)),
     f"matches no parameter. did you mean '{QUERY}/kernel'"),
    (dict(method="lora", rank=2, targets=(".*/bias",)), r"wants kernels, but .*/bias has shape"),
    (dict(method="lora", rank=7), r"peft.rank=7 is above the smaller side of .* set at most 6"),
    (dict(method="prompt"), "this model has no prompt"),
    (dict(method="ia3", targets=(".*/wo/kernel",)), "which another of peft's regexes trains"),
])
def test_bad_configs_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Tuning(TABLE, PeftConfig(**fields)).split(PARAMS, KEY)


def test_bitfit_of_a_model_without_biases():
    table = {p: i for p, i in TABLE.items() if not p.endswith("bias")}
    with pytest.raises(UserError, match="this model has no biases; peft.method='regex'"):
        Tuning(table, PeftConfig("bitfit")).split(draw(table), KEY)


@pytest.mark.parametrize("method, count", [
    # 2 + 2 layers, 6 attentions with D 16, heads x head_dim 16, F 32; stacks of two layers
    ("lora", 3 * 2 * 2 * (16 * 2 + 2 * 16)), ("ia3", 3 * 2 * 2 * 16 + 2 * 2 * 32)])
def test_defaults_on_a_model(method, count):
    run = tiny.seq2seq()
    model = Model(run.model)
    params, config = tree.flatten(tiny.params(run)), PeftConfig(method, rank=2)
    trainable, frozen = Tuning(model.table, config).split(params, KEY)
    assert sum(x.size for x in trainable.values()) == count
    model.bind(tree.unflatten(Tuning(model.table, config).combine(trainable, frozen)))
