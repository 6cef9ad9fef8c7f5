"""Every optimizer: per layer, on every sharding, under every precision policy; Adafactor
against T5X, the others against optax."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from t5x_lite import tree
from t5x_lite.errors import UserError
from t5x_lite.training import methods, optimizers, precision
from t5x_lite.training.methods import (
    AdafactorConfig,
    GroupConfig,
    MuonConfig,
    OptimizerConfig,
    SophiaConfig,
)
from t5x_lite.training.schedules import ScheduleConfig
from tests.helpers import golden

CONSTANT = ScheduleConfig(factors="constant", base_learning_rate=0.01)
SMALL_FACTORS = AdafactorConfig(min_dim_size_to_factor=4)
# Each optimizer with every part of it that keeps state or mixes values.
CONFIGS = {
    "adafactor": OptimizerConfig("adafactor", CONSTANT, adafactor=SMALL_FACTORS),
    "adafactor_momentum": OptimizerConfig(
        "adafactor", CONSTANT, momentum=0.9, weight_decay=0.1, adafactor=SMALL_FACTORS),
    "adafactor_unfactored": OptimizerConfig(
        "adafactor", CONSTANT, adafactor=AdafactorConfig(factored=False)),
    "adamw": OptimizerConfig("adamw", CONSTANT, weight_decay=0.1),
    "adam": OptimizerConfig("adam", CONSTANT, weight_decay=0.1),
    "lion": OptimizerConfig("lion", CONSTANT, weight_decay=0.1, beta2=0.99),
    "sgd": OptimizerConfig("sgd", CONSTANT),
    "sgd_momentum": OptimizerConfig("sgd", CONSTANT, momentum=0.9, weight_decay=0.1),
    "muon": OptimizerConfig("muon", CONSTANT, weight_decay=0.1),
    "lamb": OptimizerConfig("lamb", CONSTANT, weight_decay=0.1),
    "ademamix": OptimizerConfig("ademamix", CONSTANT, weight_decay=0.1),
    "sophia": OptimizerConfig("sophia", CONSTANT, beta1=0.965, beta2=0.99,
                              sophia=SophiaConfig(interval=2)),
}


@dataclasses.dataclass(frozen=True)
class Info:
    """What an optimizer reads of a models.ParamInfo."""

    shape: tuple[int, ...]
    logical_axes: tuple[str, ...]
    dtype: str = "float32"


TABLE = {  # more layers than some layer is wide, so that a stack's depth could be mistaken for it
    "experts/kernel": Info((2, 3, 8, 16), ("layers", "expert", "embed", "mlp")),
    "stack/bias": Info((20, 16), ("layers", "mlp")),
    "stack/kernel": Info((20, 8, 16), ("layers", "embed", "mlp")),
    "table/embedding": Info((32, 8), ("vocab", "embed")),
    "table/scale": Info((8,), ("norm",)),
}


def draw(seed):
    """Random leaves for TABLE; the members of a stack differ widely in size."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, info in TABLE.items():
        x = rng.normal(size=info.shape)
        if info.logical_axes[0] == "layers":
            x *= 10.0 ** (np.arange(info.shape[0]) % 3).reshape(-1, *[1] * (x.ndim - 1))
        flat[path] = jnp.asarray(x, jnp.float32)
    return tree.unflatten(flat)


def run(optimizer, params, grads_of, steps=3, state=None):
    """(params, state, info) after some updates with the gradients grads_of(step)."""
    state = jax.jit(optimizer.init)(params) if state is None else state
    update = jax.jit(optimizer.update)
    for step in range(steps):
        params, state, info = update(grads_of(step), state, params, jnp.int32(step))
    return params, state, info


def assert_close(found, expected, tolerance=1e-5):
    """max|a-b| / max|b| <= tolerance for every leaf."""
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert found.keys() == expected.keys()
    for path, want in expected.items():
        want, have = np.asarray(want, np.float64), np.asarray(found[path], np.float64)
        assert np.abs(have - want).max() <= tolerance * np.abs(want).max() + 1e-30, path


def test_adafactor_equals_t5x():
    arrays = np.load(golden("adafactor_default.npz"))
    names = ("w", "emb", "scale", "small")
    params = {name: jnp.asarray(arrays[f"p0/{name}"]) for name in names}
    table = {name: Info(p.shape, ("embed", "mlp")[:p.ndim]) for name, p in params.items()}
    optimizer = optimizers.make_optimizer(OptimizerConfig("adafactor", CONSTANT), table)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(20):
        grads = {name: jnp.asarray(arrays[f"g{step:02d}/{name}"], jnp.float32) for name in names}
        params, state, _ = update(grads, state, params, jnp.int32(step))
        if step + 1 in (1, 2, 5, 20):
            corner = {**params, "w": params["w"][:4, :8]}
            assert_close(corner, {name: arrays[f"default/step{step + 1}/{name}"]
                                  for name in names})
    assert int(state["count"]) == 20
    assert set(tree.flatten(state)) == {"count", "v_row/w", "v_col/w", "v/emb", "v/scale",
                                        "v/small"}


def unstacked(nested):
    """Every layer and expert as a parameter of its own."""
    flat = {}
    for path, x in tree.flatten(nested).items():
        lead = methods.stacked_dims(TABLE[path].logical_axes)
        for index in np.ndindex(x.shape[:lead]):
            flat["/".join([path, *map(str, index), "member"])] = x[index]
    return tree.unflatten(flat)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_stack_is_updated_as_its_members_alone(name):
    alone = {}
    for path, x in tree.flatten(unstacked(draw(0))).items():
        whole = next(p for p in TABLE if path.startswith(p))
        axes = TABLE[whole].logical_axes
        alone[path] = Info(x.shape, axes[methods.stacked_dims(axes):])
    config = dataclasses.replace(CONFIGS[name], clip_norm=5.0)
    together, _, info = run(optimizers.make_optimizer(config, TABLE), draw(0), draw)
    apart, _, other = run(optimizers.make_optimizer(config, alone), unstacked(draw(0)),
                          lambda step: unstacked(draw(step)))
    assert_close(unstacked(together), apart, 1e-6)
    assert_close(info, other, 1e-6)


def specs(embed):
    """PartitionSpecs of TABLE with the embed dim split over these mesh axes."""
    return {"experts/kernel": P(None, None, embed, "tensor"),
            "stack/bias": P(None, "tensor"),
            "stack/kernel": P(None, embed, "tensor"),
            "table/embedding": P("tensor", embed),
            "table/scale": P(None)}


# The optimizer state is always split over data and fsdp; the parameters alike (ZeRO-3), less
# finely, or not at all (ZeRO-1).
STATE_SPECS = specs(("data", "fsdp"))
PARAM_SPECS = {"alike": STATE_SPECS, "coarser": specs("fsdp"), "whole": specs(None)}


def make_mesh():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)


def on_mesh(nested, specs):
    """Parameters or gradients placed by their path's spec."""
    return tree.map_with_path(lambda path, x: jax.device_put(x, specs[path]), nested)


@pytest.mark.parametrize("split", PARAM_SPECS)
@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_equals_one_device_and_keeps_its_shardings(name, split):
    optimizer = optimizers.make_optimizer(dataclasses.replace(CONFIGS[name], clip_norm=5.0), TABLE)
    expected = run(optimizer, draw(0), draw, 2)
    param_specs = PARAM_SPECS[split]
    with jax.set_mesh(make_mesh()):
        state = jax.jit(optimizer.init)(on_mesh(draw(0), STATE_SPECS))
        before = jax.tree.map(jax.typeof, state)
        params = on_mesh(draw(0), param_specs)
        found = run(optimizer, params, lambda step: on_mesh(draw(step), param_specs), 2, state)
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])
    assert jax.tree.map(jax.typeof, found[0]) == jax.tree.map(jax.typeof, params)
    assert jax.tree.map(jax.typeof, found[1]) == before


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("policy", precision.POLICIES)
def test_state_is_plain_dicts_with_logical_axes(name, policy):
    """Also under every policy: as many axes as dims, and the parameter's own where whole."""
    optimizer = optimizers.make_optimizer(CONFIGS[name], TABLE, precision.policy(policy))
    state = jax.eval_shape(optimizer.init, draw(0))
    flat, axes = tree.flatten(state), tree.flatten(optimizer.state_logical_axes())
    assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(state)
    assert flat.keys() == axes.keys()
    for path, leaf in flat.items():
        assert len(axes[path]) == leaf.ndim, path
        info = TABLE.get(path.partition("/")[2])
        if info is not None:
            sizes = dict(zip(info.logical_axes, info.shape, strict=True))
            assert leaf.shape == tuple(sizes[axis] for axis in axes[path]), path


def test_factored_moments_drop_the_right_axes():
    axes = optimizers.make_optimizer(CONFIGS["adafactor"], TABLE).state_logical_axes()
    assert axes["v_row"]["table"] == {"embedding": ("embed",)}
    assert axes["v_col"]["table"] == {"embedding": ("vocab",)}
    assert axes["v_row"]["experts"] == {"kernel": ("layers", "expert", "embed")}
    assert axes["v_col"]["experts"] == {"kernel": ("layers", "expert", "mlp")}
    assert axes["v"] == {"stack": {"bias": ("layers", "mlp")}, "table": {"scale": ("norm",)}}


def test_stacked_dims():
    assert [methods.stacked_dims(axes) for axes in (
        (), ("embed", "mlp"), ("layers",), ("layers", "embed"), ("expert", "embed", "mlp"),
        ("layers", "expert", "embed"), ("expert",), ("layers", "expert"), ("embed", "expert"),
    )] == [0, 0, 1, 1, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("name, reference", [
    ("adamw", lambda mask: optax.adamw(0.01, weight_decay=0.1, mask=mask)),
    ("lion", lambda mask: optax.lion(0.01, weight_decay=0.1, mask=mask)),
    ("adam", lambda mask: optax.chain(optax.add_decayed_weights(0.1, mask), optax.adam(0.01))),
    ("sgd_momentum", lambda mask: optax.chain(
        optax.add_decayed_weights(0.1, mask), optax.sgd(0.01, momentum=0.9))),
    ("sgd", lambda mask: optax.sgd(0.01)),
    ("ademamix", lambda mask: optax.contrib.ademamix(0.01, weight_decay=0.1, mask=mask)),
])
def test_equals_optax(name, reference):
    """Clipping first, then the optimizer; weight decay of matrices only, counted per layer."""
    matrices = tree.unflatten({path: not path.endswith(("bias", "scale")) for path in TABLE})
    chain = optax.chain(optax.clip_by_global_norm(5.0), reference(matrices))
    params, state = draw(0), chain.init(draw(0))
    for step in range(3):
        updates, state = chain.update(draw(step), state, params)
        params = optax.apply_updates(params, updates)
    config = dataclasses.replace(CONFIGS[name], clip_norm=5.0)
    found, _, info = run(optimizers.make_optimizer(config, TABLE), draw(0), draw)
    assert_close(found, params, 1e-6)
    assert np.isclose(info["grad_norm"], optax.tree.norm(draw(2)))
    assert np.isclose(info["learning_rate"], 0.01)


@pytest.mark.parametrize("settings", [
    {}, {"nesterov": False, "steps": 3}, {"consistent_rms": 0.2}], ids=str)
def test_muon_equals_optax_over_20_steps(settings):
    """Every matrix of a stack by itself; tables, biases and scales by AdamW."""
    dims = tree.unflatten({path: optax.contrib.MuonDimensionNumbers(-2, -1)
                           if path.endswith("kernel") else None for path in TABLE})
    ns_steps = settings.get("steps", 5)
    reference = optax.contrib.muon(
        0.01, ns_steps=ns_steps, nesterov=settings.get("nesterov", True), weight_decay=0.1,
        adam_weight_decay=0.0, muon_weight_dimension_numbers=dims,
        consistent_rms=settings.get("consistent_rms"))
    params, state = draw(0), reference.init(draw(0))
    step = jax.jit(reference.update)
    for n in range(20):
        updates, state = step(draw(n), state, params)
        params = optax.apply_updates(params, updates)
    config = dataclasses.replace(
        CONFIGS["muon"], muon=MuonConfig(**settings),
        groups=(GroupConfig("table/embedding", weight_decay=0.0),))
    found, state, _ = run(optimizers.make_optimizer(config, TABLE), draw(0), draw, 20)
    assert_close(found, params, 1e-5)
    assert set(tree.flatten(state)) == {"count", "count_2", *(f"mu/{p}" for p in TABLE), *(
        f"nu/{p}" for p in TABLE if not p.endswith("kernel"))}


def test_lamb_equals_optax_on_parameters_that_are_not_stacked():
    table = {path: TABLE[path] for path in ("table/embedding", "table/scale")}
    config = CONFIGS["lamb"]
    only = lambda seed: {"table": draw(seed)["table"]}
    mask = {"table": {"embedding": True, "scale": False}}
    reference = optax.lamb(0.01, eps=1e-8, weight_decay=0.1, mask=mask)
    params, state = only(0), reference.init(only(0))
    for n in range(3):
        updates, state = reference.update(only(n), state, params)
        params = optax.apply_updates(params, updates)
    found, _, _ = run(optimizers.make_optimizer(config, table), only(0), only)
    assert_close(found, params, 1e-6)


def test_sophia_steps_by_hand():
    """Momentum over gamma times the mean square, clipped to the learning rate; a step's own square
    counts from the next step on."""
    table = {"w": Info((2,), ("norm",))}
    config = OptimizerConfig("sophia", CONSTANT, beta1=0.5, beta2=0.75,
                             sophia=SophiaConfig(gamma=2.0, interval=2))
    grads = [jnp.array([1.0, 100.0]), jnp.array([3.0, 0.0])]
    found, state, _ = run(optimizers.make_optimizer(config, table), {"w": jnp.zeros(2)},
                          lambda n: {"w": grads[n]}, 2)
    squares = np.array([0.25, 2500.0])         # 0.25 g^2 of the first step
    momentum = np.array([1.75, 25.0]) / 0.75   # of the second, its bias corrected
    second = np.clip(momentum / (2.0 * squares), -1, 1)
    np.testing.assert_allclose(found["w"], -0.01 * (1 + second), rtol=1e-5)
    np.testing.assert_allclose(state["nu"]["w"], squares)   # the second step makes none


def test_an_optimizer_registered_from_outside_may_be_a_chain(monkeypatch):
    """Two traces of one name, a mask, and counts of their own, as docs/extending.md shows."""
    def chain(c, trained):
        matrices = lambda params: {p: trained.is_map(p) for p in params}
        return optax.chain(optax.trace(0.9), optax.masked(optax.trace(0.5), matrices),
                           optax.scale_by_schedule(lambda n: 1.0 / (1 + n)), optax.scale_by_adam())
    monkeypatch.setitem(methods.METHODS, "chain", methods.Method(chain))
    optimizer = optimizers.make_optimizer(OptimizerConfig("chain", CONSTANT), TABLE)
    found, state, _ = run(optimizer, draw(0), draw)
    assert {name: len(tree.flatten(x)) if isinstance(x, dict) else int(x)
            for name, x in state.items()} == {
        "trace": 5, "trace_2": 2, "mu": 5, "nu": 5, "count": 3, "count_2": 3}

    axes = {path: info.logical_axes for path, info in TABLE.items()}
    stacked = {path: methods.stacked_dims(a) for path, a in axes.items()}
    reference = optax.chain(chain(None, methods.Trained(axes, stacked, {})), optax.scale(-0.01))
    params = tree.flatten(draw(0))
    expected = reference.init(params)
    for n in range(3):
        updates, expected = reference.update(tree.flatten(draw(n)), expected, params)
        params = optax.apply_updates(params, updates)
    assert_close(found, tree.unflatten(params), 1e-6)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_weight_decay_exponent(exponent):
    """Zero gradients leave only the decay: (1 - weight_decay * rate**exponent) of a matrix."""
    for name in ("adafactor", "adamw"):
        config = OptimizerConfig(name, CONSTANT, weight_decay=0.5,
                                 weight_decay_lr_exponent=exponent)
        zeros = jax.tree.map(jnp.zeros_like, draw(0))
        no_gradients = lambda _, zeros=zeros: zeros
        params, _, _ = run(optimizers.make_optimizer(config, TABLE), draw(0), no_gradients, 1)
        left = 1 - 0.5 * 0.01**exponent
        expected = {path: x * (1 if path.endswith(("bias", "scale")) else left)
                    for path, x in tree.flatten(draw(0)).items()}
        assert_close(params, tree.unflatten(expected), 1e-6)


def test_groups():
    """Frozen, slower, on another schedule, and decayed though a vector; the first match wins."""
    config = OptimizerConfig("sgd", CONSTANT, groups=(
        GroupConfig("stack/.*", frozen=True),
        GroupConfig("experts/.*|stack/bias", learning_rate_multiplier=0.1),
        GroupConfig(".*/embedding", schedule=ScheduleConfig("constant", 0.5)),
        GroupConfig(".*/scale", weight_decay=0.3)))
    optimizer = optimizers.make_optimizer(config, TABLE)
    assert optimizer.frozen == {"stack/bias", "stack/kernel"}
    grads = tree.flatten(draw(1))
    trained = tree.unflatten({p: g for p, g in grads.items() if not p.startswith("stack")})
    params, state, info = run(optimizer, draw(0), lambda _: trained, 1)
    start, found = tree.flatten(draw(0)), tree.flatten(params)
    rates = {"experts/kernel": 0.001, "table/embedding": 0.5, "table/scale": 0.01}
    decay = {"table/scale": 0.3}
    for path, p in start.items():
        step = rates.get(path, 0.0) * (grads[path] + decay.get(path, 0.0) * p)
        np.testing.assert_allclose(found[path], p - step, rtol=1e-6)
    assert np.isclose(info["learning_rate"], 0.01)
    assert np.isclose(info["grad_norm"], optax.tree.norm(trained))
    adam = optimizers.make_optimizer(dataclasses.replace(config, name="adamw"), TABLE)
    assert not any("stack" in path for path in tree.flatten(jax.eval_shape(adam.init, draw(0))))


@pytest.mark.parametrize("change, message", [
    ({"name": "adamww"}, "'adamww': must be one of .* did you mean 'adamw'"),
    ({"groups": (GroupConfig("table/embeding"),)}, r"groups\[0\].*did you mean 'table/embedding'"),
    ({"groups": (GroupConfig("embedding"),)}, "must match a whole path"),
    ({"groups": (GroupConfig(".*"), GroupConfig("stack/.*"))}, r"groups\[1\].*already took"),
    ({"groups": (GroupConfig("(stack"),)}, "not a regular expression"),
    ({"groups": (GroupConfig(".*", frozen=True),)}, "freeze every parameter"),
    ({"groups": (GroupConfig(".*", schedule=ScheduleConfig("x")),)}, "no factor is called 'x'"),
    ({"schedule": ScheduleConfig("y")}, "no factor is called 'y'"),
    ({"beta1": 1.0}, "beta1=1.0"),
    ({"clip_norm": -1.0}, "clip_norm=-1.0"),
    ({"momentum_dtype": "float16"}, "momentum_dtype='float16'"),
])
def test_errors(change, message):
    with pytest.raises(UserError, match=message):
        optimizers.make_optimizer(OptimizerConfig(**change), TABLE)


def in_bf16(nested):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), nested)


def small_updates(policy, steps):
    """Parameters of 1 after updates of exactly -1e-3 (SGD), each lost to rounding to nearest."""
    table = {"w": Info((64, 64), ("embed", "mlp"), "bfloat16")}
    config = OptimizerConfig("sgd", ScheduleConfig("constant", 1e-3))
    optimizer = optimizers.make_optimizer(config, table, precision.policy(policy))
    ones = {"w": jnp.ones((64, 64), jnp.bfloat16)}
    return run(optimizer, ones, lambda _: {"w": -ones["w"]}, steps)


def test_bf16_parameters_round_stochastically():
    lost, _, _ = small_updates("bf16_params", 30)
    kept, _, _ = small_updates("bf16_params_sr", 30)
    assert kept["w"].dtype == jnp.bfloat16 and float(lost["w"].min()) == 1.0
    assert abs(np.asarray(kept["w"]).astype(np.float64).mean() - 1.03) < 5e-4


def test_the_master_copy_is_exact_and_every_forward_pass_rounds_it():
    params, state, _ = small_updates("bf16_sr_forward", 30)
    np.testing.assert_allclose(state["master"]["w"], 1.03, rtol=1e-5)
    values = np.unique(np.asarray(params["w"]).astype(np.float64))
    np.testing.assert_array_equal(values, [1.0234375, 1.03125])  # the neighbours of 1.03
    assert abs(np.asarray(params["w"]).astype(np.float64).mean() - 1.03) < 5e-4


@pytest.mark.parametrize("policy", ["bf16_params_sr", "bf16_sr_forward"])
def test_rounding_is_the_same_on_every_sharding(policy):
    config = OptimizerConfig("sgd", CONSTANT)
    optimizer = optimizers.make_optimizer(config, TABLE, precision.policy(policy), seed=7)
    expected, _, _ = run(optimizer, in_bf16(draw(0)), lambda s: in_bf16(draw(s)))
    with jax.set_mesh(make_mesh()):
        found, _, _ = run(optimizer, on_mesh(in_bf16(draw(0)), STATE_SPECS),
                          lambda s: on_mesh(in_bf16(draw(s)), STATE_SPECS))
    for path, x in tree.flatten(expected).items():
        np.testing.assert_array_equal(np.asarray(tree.flatten(found)[path]), np.asarray(x))


def test_loss_scaling_skips_overflows_and_changes_nothing_else():
    plain = optimizers.make_optimizer(CONFIGS["adamw"], TABLE)
    scaled = optimizers.make_optimizer(
        CONFIGS["adamw"], TABLE, precision.policy("fp16"),
        precision.LossScaleConfig(initial=1024.0, growth_interval=2))
    expected, _, _ = run(plain, draw(0), draw, 2)
    params, state, update = draw(0), scaled.init(draw(0)), jax.jit(scaled.update)
    seen = []
    for step, bad in enumerate((False, True, False)):
        scale = scaled.loss_scale(state)
        grads = jax.tree.map(lambda g, scale=scale: g * scale, draw(step // 2))
        if bad:
            grads["table"]["scale"] = grads["table"]["scale"].at[0].set(jnp.inf)
        params, state, info = update(grads, state, params, jnp.int32(step))
        seen.append((float(info["loss_scale"]), float(info["skipped"]), int(state["count"])))
    assert seen == [(1024.0, 0.0, 1), (1024.0, 1.0, 1), (512.0, 0.0, 2)]
    assert_close(params, expected, 1e-6)
    assert plain.loss_scale(plain.init(draw(0))) == 1.0
