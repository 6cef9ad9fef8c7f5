"""The mixture of experts: equal to the dense MLP, to one-hot dispatch, and to itself on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite.cost import hlo
from t5x_lite.errors import UserError
from t5x_lite.layers import dispatch, grouped, routing
from t5x_lite.layers.config import InitConfig, MLPConfig, MoEConfig
from t5x_lite.layers.linear import RowKey
from t5x_lite.layers.mlp import ACTIVATIONS, MLP
from t5x_lite.layers.moe import MoE, capacity, group_tokens, validate
from t5x_lite.parallel import sharding

B, L, D, F, E = 8, 12, 8, 16, 4
MLP_CONFIG = MLPConfig(mlp_dim=F, activation="gelu_tanh", gated=True)
SWITCH = MoEConfig(num_experts=E, mlp=MLP_CONFIG)
TOP_2 = dataclasses.replace(SWITCH, router="top_2", z_weight=1e-3)
LENGTHS = np.asarray([12, 7, 12, 1, 9, 12, 12, 5])
MASK = np.arange(L) < LENGTHS[:, None]
TOKENS = np.arange(B * L).reshape(B, L) * 7 % 50


def layer(config, **kwargs):
    """(graphdef, parameters) with a router that has clear preferences, and biases that matter."""
    graphdef, params = nnx.split(MoE(jax.random.key(0), D, config, InitConfig(), **kwargs))
    return graphdef, jax.tree.map(
        lambda w: w * 20 if w.shape == (D, config.num_experts)
        else jax.random.normal(jax.random.key(1), w.shape) if not w.any() else w, params)


def inputs(batch=B):
    """x_BLD."""
    return jax.random.normal(jax.random.key(2), (batch, L, D))


def apply(graphdef, params):
    """(x, key, **kwargs) -> (y, aux), compiled."""
    @functools.partial(jax.jit, static_argnames="decoding")
    def call(x, key=None, **kwargs):
        return nnx.merge(graphdef, params)(x, key, **kwargs)
    return call


def mean_loss(aux):
    """A layer's weighted losses; outside training they are a sum over groups."""
    total, count = aux["aux_loss"]
    return total / count


def value_and_grad(graphdef, params, x, key=None, **kwargs):
    """((loss, (y, aux)), gradients of parameters and x); the loss touches y and the aux loss."""
    def loss(params, x, key):
        y, aux = nnx.merge(graphdef, params)(x, key, **kwargs)
        return jnp.sum(jnp.sin(y)) + 10 * mean_loss(aux), (y, aux)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x, key)


def assert_close(found, expected, atol=2e-5):
    """Equal trees of arrays up to rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol),
                 found, expected)


def dense_experts(params, x):
    """[E, B, L, D]: every expert on every token."""
    w = params["experts"]
    act = ACTIVATIONS[MLP_CONFIG.activation]
    h = [jnp.einsum("BLD,EDF->EBLF", x, w[name]["kernel"][...]) for name in ("wi_0", "wi_1")]
    return jnp.einsum("EBLF,EFD->EBLD", act(h[0]) * h[1], w["wo"]["kernel"][...])


# --- on one device --------------------------------------------------------------------------------

@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("mlp", [
    MLP_CONFIG, MLPConfig(mlp_dim=F, activation="relu", gated=False, use_bias=True)])
def test_one_expert_is_the_dense_mlp(mlp, dropless):
    config = MoEConfig(num_experts=1, mlp=mlp, eval_capacity_factor=1.0, dropless=dropless)
    graphdef, params = layer(config)
    dense_graphdef, dense = nnx.split(MLP(jax.random.key(0), D, mlp, InitConfig()))
    dense = jax.tree.map(lambda w: w[0], nnx.to_pure_dict(params)["experts"])
    x = inputs()

    def loss(dense, x):
        state = nnx.state(nnx.merge(dense_graphdef, nnx.split(
            MLP(jax.random.key(0), D, mlp, InitConfig()))[1]))
        nnx.replace_by_pure_dict(state, dense)
        y, aux = nnx.merge(dense_graphdef, state)(x)
        assert aux == {}
        return jnp.sum(jnp.sin(y)), y

    (_, y), (dw, dx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(dense, x)
    (_, (found, _)), (found_dw, found_dx) = value_and_grad(graphdef, params, x)
    assert_close(found, y)
    assert_close(found_dx, dx)
    assert_close(jax.tree.map(lambda w: w[0], nnx.to_pure_dict(found_dw)["experts"]), dw)


@pytest.mark.parametrize("router,top_k,mask", [("switch", 0, None), ("top_2", 0, MASK),
                                               ("top_k", 3, MASK), ("hash", 0, MASK)])
def test_ample_capacity_is_dropless(router, top_k, mask):
    config = dataclasses.replace(SWITCH, router=router, top_k=top_k, eval_capacity_factor=E)
    graphdef, params = layer(config)
    free, _ = layer(dataclasses.replace(config, dropless=True))
    kwargs = {"mask": mask, "tokens": jnp.arange(B * L).reshape(B, L)}
    (_, (y, aux)), grads = value_and_grad(graphdef, params, inputs(), **kwargs)
    (_, (free_y, free_aux)), free_grads = value_and_grad(free, params, inputs(), **kwargs)
    assert_close((y, aux, grads), (free_y, free_aux, free_grads))
    assert float(aux["moe/dropped_fraction"][0]) == 0.0
    if mask is not None:
        assert not np.asarray(y)[~mask].any()  # padding is not computed


@pytest.mark.parametrize("router", ["switch", "top_2", "expert_choice"])
def test_equal_to_dense_one_hot_dispatch(router):
    """Gradients through gates and losses against dispatch and combine masks, written densely."""
    config = dataclasses.replace(SWITCH, router=router, eval_capacity_factor=1.0, z_weight=1e-2)
    graphdef, params = layer(config)
    x, mask, room = inputs(), jnp.asarray(MASK), 3

    def reference(params, x):
        logits = x @ params["router"]["kernel"][...]
        p = jax.nn.softmax(logits, axis=-1)
        real = jnp.where(mask[..., None], 1.0, 0.0)
        if router == "expert_choice":
            p_real = jnp.where(mask[..., None], p, -1.0)
            nth = -jnp.sort(-p_real, axis=1)[:, room - 1:room]
            combine = jnp.where((p_real >= nth) & mask[..., None], p, 0.0)
            balance = 0.0
        else:
            route = {"switch": routing.switch, "top_2": routing.top_2}[router](logits, room, mask)
            dispatch_GTEC, _ = routing.dense_masks(route, E, room)
            used = dispatch_GTEC.any(-1)
            chosen = jax.nn.one_hot(route.expert_index, E).sum(2)
            scale = jnp.sum(p * chosen, -1, keepdims=True) if router == "top_2" else 1.0
            combine = jnp.where(used, p, 0.0) / scale
            tokens = real.sum(1)
            balance = jnp.mean(E * jnp.sum(
                (chosen * real).sum(1) / tokens * (p * real).sum(1) / tokens, -1))
        z = jnp.square(jax.nn.logsumexp(logits, -1, keepdims=True)) * real
        z_loss = jnp.mean(z.sum((1, 2)) / real.sum((1, 2)))
        y = jnp.einsum("EBLD,BLE->BLD", dense_experts(params, x), combine)
        return jnp.sum(jnp.sin(y)) + 10 * (0.01 * balance + 0.01 * z_loss), y

    (value, y), expected = jax.jit(
        jax.value_and_grad(reference, argnums=(0, 1), has_aux=True))(params, x)
    (found_value, (found, aux)), grads = value_and_grad(graphdef, params, x, mask=mask)
    assert_close(found, y)
    assert_close(found_value, value)
    assert_close(grads, expected)
    assert float(aux["moe/dropped_fraction"][0]) > 0


ROOM = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}   # 3 tokens an expert: some drop


@pytest.mark.parametrize("options,route,train", [
    (ROOM | {"prioritized": True}, lambda l: routing.switch(l, 3, MASK, prioritized=True), False),
    (ROOM | {"mask_padding": False}, lambda l: routing.switch(l, 3), False),
    (ROOM | {"router_bias": True}, lambda l: routing.switch(l, 3, MASK), False),
    ({"capacity_factor": 2.0, "eval_capacity_factor": 1.0},
     lambda l: routing.switch(l, 6, MASK), True),
    (ROOM | {"router": "top_k", "top_k": 3, "renormalize": False},
     lambda l: routing.top_k(l, 3, 3, MASK, renormalize=False), False),
    (ROOM | {"router": "top_2", "renormalize": False, "balance_choices": "first"},
     lambda l: routing.top_2(l, 3, MASK, renormalize=False), False),
    (ROOM | {"router": "top_2", "expert_groups": 2},
     lambda l: routing.top_2(l, 3, MASK, expert_groups=(2, 1)), False),
    ({"router": "top_2", "second_policy": "none", "eval_second_policy": "threshold",
      "second_threshold": 0.2},
     lambda l: routing.top_2(l, 6, MASK, second_policy="threshold", second_threshold=0.2), False),
    ({"router": "top_2", "second_policy": "none", "capacity_factor": 2.0},
     lambda l: routing.top_2(l, 6, MASK, second_policy="none"), True),
    (ROOM | {"router": "hash", "hash_seed": 3},
     lambda _: routing.hash_experts(TOKENS, E, 3, MASK, seed=3), False),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_options_reach_the_router_and_the_losses(options, route, train):
    config = dataclasses.replace(SWITCH, balance_weight=0.1, z_weight=0.01, **options)
    graphdef, params = layer(config)
    x, key = inputs(), RowKey.of(jax.random.key(0), B) if train else None
    y, aux = apply(graphdef, params)(x, key, mask=MASK, tokens=TOKENS)
    logits = loss = None
    if config.router != "hash":
        logits = x @ params["router"]["kernel"][...] + (
            params["router"]["bias"][...] if config.router_bias else 0.0)
    choice = route(logits)
    combine = routing.dense_masks(choice, E, L)[1].sum(-1)
    np.testing.assert_allclose(
        y, jnp.einsum("EBLD,BLE->BLD", dense_experts(params, x), combine), atol=2e-5)
    if logits is not None:
        counted = MASK if config.mask_padding else np.ones_like(MASK)
        picked = choice.expert_index[..., :1 if config.balance_choices == "first" else None]
        loss = (0.1 * routing.load_balancing_loss(jax.nn.softmax(logits), picked, counted)[0]
                + 0.01 * routing.router_z_loss(logits, counted)[0]) / B
    np.testing.assert_allclose(mean_loss(aux), loss or 0.0, rtol=1e-5)


def test_dropped_tokens_give_nothing_or_themselves():
    config = dataclasses.replace(SWITCH, expert_capacity=1)
    graphdef, params = layer(config)
    x = inputs()
    y, _ = apply(graphdef, params)(x)
    p = jax.nn.softmax(x @ params["router"]["kernel"][...])
    route = routing.switch(jnp.log(p), 1)
    dropped = ~np.asarray(route.kept[..., 0])
    assert dropped.any() and not np.asarray(y)[dropped].any()
    passing, _ = layer(dataclasses.replace(config, overflow="identity"))
    found, _ = apply(passing, params)(x)
    expected = np.where(dropped[..., None], p.max(-1, keepdims=True) * x, y)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_shared_experts_are_added_for_every_token():
    config = dataclasses.replace(SWITCH, shared_experts=2)
    graphdef, params = layer(config)
    whole = nnx.merge(graphdef, params)
    assert whole.shared.wo.kernel.shape == (2 * F, D)
    alone = nnx.merge(*layer(SWITCH))
    alone.router, alone.experts = whole.router, whole.experts
    x = inputs()
    np.testing.assert_allclose(whole(x)[0], alone(x)[0] + whole.shared(x)[0], atol=1e-6)


def test_groups_decide_what_is_dropped_not_the_batch():
    for size, rows in ((0, 1), (6, 1), (24, 2)):
        graphdef, params = layer(dataclasses.replace(TOP_2, group_size=size,
                                                     eval_capacity_factor=1.0))
        module, x = apply(graphdef, params), inputs()
        y, aux = module(x, mask=MASK)
        parts = [module(x[i:i + rows], mask=MASK[i:i + rows]) for i in range(0, B, rows)]
        # Products over other numbers of rows differ in their last bits on some CPUs.
        np.testing.assert_allclose(np.asarray(y), np.concatenate([p for p, _ in parts]), rtol=1e-5,
                                   atol=1e-6)
        for name in ("dropped_fraction", "load_balancing_loss", "router_z_loss"):
            sums = np.sum([np.asarray(a[f"moe/{name}"]) for _, a in parts], axis=0)
            np.testing.assert_allclose(aux[f"moe/{name}"], sums, rtol=1e-5)
        assert aux["moe/dropped_fraction"][0] > 0


def test_decoding_drops_nothing():
    graphdef, params = layer(dataclasses.replace(SWITCH, expert_capacity=1))
    free, _ = layer(dataclasses.replace(SWITCH, dropless=True))
    x = inputs()
    whole, _ = apply(free, params)(x)
    module = apply(graphdef, params)
    np.testing.assert_allclose(module(x, decoding=True)[0], whole, atol=1e-6)
    steps = [module(x[:, i:i + 1])[0] for i in range(3)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole[:, :3], atol=1e-6)


def test_dropout_and_jitter_act_in_training_only():
    config = dataclasses.replace(
        SWITCH, dropless=True, jitter=0.5, mlp=dataclasses.replace(MLP_CONFIG, dropout_rate=0.5))
    module, x = apply(*layer(config)), inputs()
    assert_close(module(x)[0], apply(*layer(dataclasses.replace(SWITCH, dropless=True)))(x)[0])
    first, second = (module(x, RowKey.of(jax.random.key(i), B))[0] for i in range(2))
    assert np.abs(first - second).max() > 0.01
    # Two micro-batches draw what the whole batch draws.
    key = RowKey.of(jax.random.key(0), B)
    halves = [module(x[rows], RowKey(key.key, key.rows[rows]))[0]
              for rows in (slice(0, B // 2), slice(B // 2, B))]
    np.testing.assert_allclose(np.concatenate(halves), first, atol=1e-6)


def test_dropout_keeps_the_mean():
    module = apply(*layer(dataclasses.replace(
        SWITCH, mlp=MLPConfig(mlp_dim=F, activation="linear", gated=False, dropout_rate=0.25),
        capacity_factor=E, eval_capacity_factor=E)))
    x = jnp.broadcast_to(inputs(1)[:, :1], (512, L, D))
    y, expected = module(x, RowKey.of(jax.random.key(0), 512))[0], module(x[:1])[0][0, 0]
    np.testing.assert_allclose(np.mean(y, axis=(0, 1)), expected, rtol=0.1, atol=0.01)


def test_random_second_expert_is_drawn_for_training_only():
    config = dataclasses.replace(TOP_2, second_policy="random", dropless=True)
    module, x = apply(*layer(config)), inputs()
    used = [float(module(x, key)[1]["moe/dropped_fraction"][1])
            for key in (None, RowKey.of(jax.random.key(0), B))]
    assert used[0] == 2 * B * L and B * L < used[1] < 2 * B * L


# --- dispatch -------------------------------------------------------------------------------------

def test_layouts_by_hand():
    # One group of three tokens: experts 1, 0, 1; then a second group: 0, 1 (dropped), 1.
    expert = jnp.asarray([[1, 0, 1], [0, 1, 1]])[..., None]
    slot = jnp.asarray([[0, 0, 1], [0, 2, 0]])[..., None]
    kept = jnp.asarray([[1, 1, 1], [1, 0, 1]], bool)[..., None]
    route = routing.Routing(expert, slot, kept.astype(jnp.float32), kept, kept)
    slots, source = dispatch.capacity_layout(route, 2, 2)
    # Rows: expert 0 (group 0: 2, group 1: 2), expert 1 likewise; 8 is nowhere, 6 is nobody.
    assert slots[:, 0].tolist() == [4, 0, 5, 2, 8, 6]
    assert source.tolist() == [1, 6, 3, 6, 0, 2, 5, 6]
    slots, source, sizes = dispatch.sorted_layout(route, 2)
    assert sizes.tolist() == [2, 3]
    assert slots[:, 0].tolist() == [2, 0, 3, 1, len(source), 4]
    assert source[:6].tolist() == [1, 3, 0, 2, 5, 6]


def test_rows_go_and_come_back():
    x = jnp.arange(6.0).reshape(3, 2) + 1
    slot = jnp.asarray([[2, 4], [0, 9], [1, 3]])  # 9: dropped
    source = dispatch.invert(slot, 5)
    rows = dispatch.spread(x, slot, source)
    assert rows[:, 0].tolist() == [3, 5, 1, 5, 1]
    gate = jnp.asarray([[0.5, 0.5], [1.0, 7.0], [0.25, 0.5]])
    y = dispatch.combine(rows, gate, slot, source)
    np.testing.assert_allclose(y, x * jnp.asarray([[1.0], [1.0], [0.75]]))

    def plain(x, gate):
        rows = x[source // 2] * (source < 6)[:, None]
        return jnp.sum(jnp.where(slot < 5, gate, 0)[..., None] * rows[jnp.minimum(slot, 4)], 1)

    def moved(x, gate):
        return dispatch.combine(dispatch.spread(x, slot, source), gate, slot, source)

    for fn in (plain, moved):
        np.testing.assert_allclose(fn(x, gate), y)
    grads = [jax.grad(lambda *a, fn=fn: jnp.sum(jnp.sin(fn(*a))), (0, 1))(x, gate)
             for fn in (plain, moved)]
    assert_close(grads[1], grads[0], atol=1e-6)


def test_packed_buffers_hold_the_last_block():
    for rows in range(1, 1200):
        length = dispatch.packed_rows(rows)
        most = max(size for size in dispatch.BLOCK_ROWS if 2 * size <= length)
        assert rows - 1 + most <= length and length % 128 == 0


@pytest.mark.parametrize("run", [grouped._blocked, grouped._tiled])
@pytest.mark.parametrize("sizes", [
    [0, 1100, 1, 0, 65, 130, 64, 0], [0, 3, 0, 70, 0, 0, 57, 5], [0] * 8, [0, 0, 1, 0, 0, 0, 0, 0],
    [0] * 7 + [200], [64, 64, 64, 64, 0, 0, 0, 128]])
def test_blocked_rows_equal_ragged_dot(sizes, run):
    """The CPU's and the GPU's blocks of rows against jax.lax.ragged_dot, runs of all lengths, with
    gradients."""
    sizes = jnp.asarray(sizes, jnp.int32)
    rows, length = int(sizes.sum()), dispatch.packed_rows(int(sizes.sum()))
    keys = jax.random.split(jax.random.key(0), 5)
    x, g = (jnp.where(jnp.arange(length)[:, None] < rows, jax.random.normal(k, (length, D)), 0)
            for k in keys[:2])
    weights = {"wi.kernel": jax.random.normal(keys[2], (8, D, F)),
               "wi.bias": jax.random.normal(keys[3], (8, F)),
               "wo.kernel": jax.random.normal(keys[4], (8, F, D))}

    def first(dense, x):
        return (dense(x, "wi"),)

    def second(dense, pre, choice, shared):
        return dense(jnp.sin(pre[0] + shared[0] * (choice % 5)[:, None]), "wo")

    args = (weights, x, jnp.arange(length), (jnp.asarray(3),), sizes)
    y, pre = jax.jit(lambda *a: grouped._blocked_forward(first, second, *a, run=run))(*args)
    expected, expected_pre = grouped._ragged_forward(first, second, *args)
    assert_close((y[:rows], pre[0][:rows]), (expected[:rows], expected_pre[0][:rows]))
    dw, dx = jax.jit(lambda *a: grouped._blocked_backward(first, second, *a, run=run))(
        g, pre, *args)
    expected_dw, expected_dx = grouped._ragged_backward(first, second, g, expected_pre, *args)
    assert_close((dw, dx[:rows]), (expected_dw, expected_dx[:rows]), atol=1e-4)


@pytest.mark.parametrize("rows, experts", [(1, 1), (100, 8), (5000, 8), (70_000, 2), (9000, 300)])
def test_a_gpus_blocks_hold_every_load_and_little_else(rows, experts):
    length = dispatch.packed_rows(rows)
    size = grouped.tile_rows(length, experts)
    assert rows - 1 + size <= length
    computed = (length // size + experts) * size
    assert computed >= rows + experts * (size - 1)   # each run's last block may have one row
    assert computed <= length * 1.25 or size == min(grouped.TILE_ROWS)


# --- on a mesh ------------------------------------------------------------------------------------

TRAINED = dataclasses.replace(
    TOP_2, second_policy="random", jitter=0.1, shared_experts=1, capacity_factor=1.0,
    mlp=dataclasses.replace(MLP_CONFIG, dropout_rate=0.3, use_bias=True))
BOTH = (TRAINED, dataclasses.replace(TRAINED, dropless=True, expert_groups=2))


def both_ways(graphdefs, params, x, key):
    """The sum of losses of a capacity-bounded and a dropless layer, their aux, gradients."""
    def loss(params, x, key):
        total, seen = 0.0, []
        for graphdef in graphdefs:
            y, aux = nnx.merge(graphdef, params)(x, key, mask=MASK)
            total += jnp.mean(jnp.sin(y)) + 10 * mean_loss(aux)
            seen.append(aux)
        return total, seen
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x, key)


@pytest.fixture(scope="module")
def one_device():
    """(graphdefs, parameters, result) without a mesh, with every feature that draws or drops."""
    graphdefs = [layer(config)[0] for config in BOTH]
    params = layer(TRAINED)[1]
    return graphdefs, params, both_ways(
        graphdefs, params, inputs(), RowKey.of(jax.random.key(5), B))


# Every pair of data, fsdp, expert and tensor stands in the first five; `make test-all` runs the others, 7 s each.
@pytest.mark.parametrize("mesh", [
    {"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "expert": 2},
    {"data": 2, "expert": 2, "sequence": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
    pytest.param({"data": 2, "expert": 4}, marks=pytest.mark.slow),
    pytest.param({"expert": 2, "fsdp": 4}, marks=pytest.mark.slow),
    pytest.param({"expert": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"data": 2, "expert": 2, "tensor": 2}, marks=pytest.mark.slow)],
    ids=lambda mesh: "-".join(f"{axis}{n}" for axis, n in mesh.items()))
def test_eight_devices_compute_what_one_does(one_device, mesh):
    """Loss, drops, metrics and gradients, capacity-bounded and dropless."""
    graphdefs, params, ((loss, aux), grads) = one_device
    rules, mesh = sharding.Rules(), sharding.make_mesh(
        sharding.MeshConfig(**{"data": 1, **mesh}))

    def place(variable):
        axes = variable.get_metadata()["logical_axes"]
        return variable.replace(jax.device_put(
            variable[...], sharding.named_sharding(mesh, rules, axes)))

    is_variable = lambda node: isinstance(node, nnx.Variable)
    with sharding.activate(mesh, rules):
        placed = jax.tree.map(place, params, is_leaf=is_variable)
        x = sharding.shard(inputs(), "act_batch", "act_length", "act_embed")
        (found_loss, found_aux), found = both_ways(
            graphdefs, placed, x, RowKey.of(jax.random.key(5), B))
    assert_close(found_loss, loss)
    assert_close(found_aux, aux, atol=1e-6)
    for found_layer, expected_layer in zip(found_aux, aux, strict=True):
        name = "moe/dropped_fraction"
        assert list(map(float, found_layer[name])) == list(map(float, expected_layer[name]))
    assert_close(found, grads)
    expert_ways = mesh.shape["expert"]
    for gradient in jax.tree.leaves(found[0]["experts"]):
        assert gradient.sharding.shard_shape(gradient.shape)[0] == E // expert_ways


@pytest.mark.parametrize("dropless", [False, True])
def test_tokens_stay_on_their_slice(dropless):
    """Every slice has all experts, and of two groups of them a token uses one."""
    config = dataclasses.replace(TOP_2, expert_groups=2, dropless=dropless)
    graphdef, params = layer(config)
    mesh = sharding.make_mesh(sharding.MeshConfig(slice=2, data=1, expert=2, fsdp=2))
    with sharding.activate(mesh, sharding.Rules()):
        x = sharding.shard(inputs(), "act_batch", "act_length", "act_embed")
        run = jax.jit(jax.grad(lambda x: jnp.sum(nnx.merge(graphdef, params)(x)[0])))
        text = run.lower(x).compile().as_text()
    layout = hlo.MeshLayout(mesh.devices.shape, mesh.axis_names)
    assert {c.axes for c in hlo.find_collectives(text, layout) if "all-to-all" in c.kind} == {
        ("expert",)}


# --- bad input ------------------------------------------------------------------------------------

@pytest.mark.parametrize("config,message", [
    ({"router": "swich"}, "router='swich'.*did you mean 'switch'"),
    ({"router": "top_k", "top_k": 5}, r"top_k=5 uses 5 experts a token, but num_experts=4"),
    ({"router": "top_2", "num_experts": 1}, "router='top_2' uses 2 experts"),
    ({"router": "top_k", "top_k": 0}, "top_k=0"),
    ({"num_experts": 0}, "num_experts=0"),
    ({"router": "expert_choice", "dropless": True}, "dropless"),
    ({"eval_second_policy": "random"}, "eval_second_policy='random'"),
    ({"expert_groups": 0}, "expert_groups=0: must be at least 1"),
    ({"expert_capacity": -3}, "expert_capacity=-3: must be at least 0"),
    ({"balance_weight": float("nan")}, "balance_weight=nan: must be a finite number at least 0"),
    ({"jitter": 1.5}, r"jitter=1.5: must be in \[0, 1\)"),
    ({"expert_groups": 3}, "expert_groups=3 must divide num_experts=4"),
    ({"expert_groups": 4, "router": "top_2"}, "max_groups=1"),
    ({"capacity_factor": 0.3}, "capacity_factor=0.3: 0.3 . 12 tokens of a group / 4 experts.*"
                               "less than one"),
    ({"eval_capacity_factor": 0.1}, "eval_capacity_factor=0.1"),
    ({"group_size": 5}, "group_size=5.*divide the sequence length 12"),
])
def test_bad_configs_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=r"(?s)model.moe.*" + message):
        validate(dataclasses.replace(SWITCH, **config), "model.moe", causal=False, length=L)


def test_experts_must_divide_over_the_expert_axis():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, expert=4), jax.devices()[:4])
    with sharding.activate(mesh, sharding.Rules()):
        with pytest.raises(UserError, match="num_experts=6 cannot be split 4 ways.*'expert'"):
            validate(dataclasses.replace(SWITCH, num_experts=6), "model.moe", causal=False)


def test_bad_calls_are_refused_before_compiling():
    x = jax.ShapeDtypeStruct((B, L, D), jnp.float32)
    tiny = layer(dataclasses.replace(SWITCH, eval_capacity_factor=0.2))
    with pytest.raises(UserError, match="eval_capacity_factor=0.2"):
        jax.eval_shape(lambda x: nnx.merge(*tiny)(x), x)
    wide = layer(dataclasses.replace(SWITCH, group_size=5 * L))
    with pytest.raises(UserError, match="a batch of 8 sequences cannot be split into groups of 5"):
        jax.eval_shape(lambda x: nnx.merge(*wide)(x), x)
    with pytest.raises(UserError, match="causal"):
        MoE(jax.random.key(0), D, dataclasses.replace(SWITCH, router="expert_choice"),
            InitConfig(), causal=True)


def test_capacity_by_hand():
    assert group_tokens(SWITCH, 512) == 512
    assert group_tokens(dataclasses.replace(SWITCH, group_size=128), 512) == 128
    eight = dataclasses.replace(SWITCH, num_experts=8)
    assert capacity(eight, 512, train=True) == 80      # 1.25 * 512 / 8
    assert capacity(eight, 512, train=False) == 128    # 2 * 512 / 8
    assert capacity(dataclasses.replace(eight, expert_capacity=64), 512, train=True) == 64
    assert capacity(dataclasses.replace(eight, dropless=True), 512, train=True) is None
    assert capacity(dataclasses.replace(eight, capacity_factor=100.0), 512, train=True) == 512
