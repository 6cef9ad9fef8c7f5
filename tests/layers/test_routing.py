"""Routers against Flaxformer's outputs and against cases drawn by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.layers import routing
from tests.helpers import golden


def logits_of(probabilities):
    """[T, E] probabilities -> logits_GTE of one group."""
    return jnp.log(jnp.asarray(probabilities, jnp.float32))[None]


def places(route):
    """[[(expert, slot) or None of each choice] of each token] of the only group."""
    expert, slot, kept = (np.asarray(a)[0] for a in (route.expert_index, route.slot, route.kept))
    return [[(int(e), int(s)) if k else None for e, s, k in zip(*row, strict=True)]
            for row in zip(expert, slot, kept, strict=True)]


# Four tokens, three experts. First choices: 0, 0, 0, 1; second choices: 1, 2, 1, 0.
TABLE = [[0.6, 0.3, 0.1],
         [0.7, 0.1, 0.2],
         [0.5, 0.4, 0.1],
         [0.2, 0.75, 0.05]]


@pytest.mark.parametrize("case,route", [
    ("switch_top1", lambda logits: routing.switch(logits, 5)),
    ("top2", lambda logits: routing.top_2(logits, 5, renormalize=False)),
])
def test_equal_to_flaxformer(case, route):
    arrays = np.load(golden("moe_router.npz"))
    key = f"{case}/capacity=5/ignore_padding=False"
    expected = json.loads(golden("moe_router.json").read_text())["results"][key]
    logits = jnp.asarray(arrays["inputs"]) @ arrays["kernel"] + arrays["bias"]
    result = route(logits)
    dispatch, combine = routing.dense_masks(result, 4, 5)
    np.testing.assert_array_equal(dispatch, arrays[f"{key}/dispatch_mask"])
    np.testing.assert_allclose(combine, arrays[f"{key}/combine_array"], atol=1e-5)
    balance, groups = routing.load_balancing_loss(
        routing.probabilities(logits), result.expert_index)
    assert balance / groups == pytest.approx(expected["auxiliary_loss"], abs=1e-5)
    z_loss, groups = routing.router_z_loss(logits)
    assert z_loss / groups == pytest.approx(expected["router_z_loss"], abs=1e-5)
    assert int(result.kept.sum()) == expected["tokens_dispatched"]


def test_switch_serves_in_token_order_and_drops_the_overflow():
    route = routing.switch(logits_of(TABLE), 2)
    assert places(route) == [[(0, 0)], [(0, 1)], [None], [(1, 0)]]
    np.testing.assert_allclose(route.gate[0, :, 0], [0.6, 0.7, 0.0, 0.75], rtol=1e-6)


def test_padding_takes_no_room():
    mask = jnp.asarray([[False, True, True, True]])
    route = routing.switch(logits_of(TABLE), 2, mask)
    assert places(route) == [[None], [(0, 0)], [(0, 1)], [(1, 0)]]
    assert float(route.gate[0, 0, 0]) == 0.0


def test_batch_prioritised_routing_drops_the_least_probable():
    # By probability the order is 3, 1, 0, 2: token 2 is the third at expert 0.
    route = routing.switch(logits_of(TABLE), 1, prioritized=True)
    assert places(route) == [[None], [(0, 0)], [None], [(1, 0)]]
    route = routing.switch(logits_of(TABLE), 2, prioritized=True)
    assert places(route) == [[(0, 1)], [(0, 0)], [None], [(1, 0)]]


def test_batch_prioritised_routing_serves_padding_last():
    mask = jnp.asarray([[True, False, True, True]])
    route = routing.switch(logits_of(TABLE), 1, mask, prioritized=True)
    assert places(route) == [[(0, 0)], [None], [None], [(1, 0)]]


def test_second_choices_queue_behind_all_first_choices():
    route = routing.top_2(logits_of(TABLE), 3)
    assert places(route) == [[(0, 0), (1, 1)], [(0, 1), (2, 0)], [(0, 2), (1, 2)], [(1, 0), None]]
    # Token 3's second choice overflows: its first keeps the share it had.
    np.testing.assert_allclose(route.gate[0, 3], [0.75 / 0.95, 0.0], rtol=1e-6)
    np.testing.assert_allclose(route.gate[0, 0], [0.6 / 0.9, 0.3 / 0.9], rtol=1e-6)


@pytest.mark.parametrize("policy,threshold,uniform,used", [
    ("all", 0.5, None, [True, True, True, True]),
    ("none", 0.5, None, [False, False, False, False]),
    # Second shares: 1/3, 2/9, 4/9, 4/19.
    ("threshold", 0.25, None, [True, False, True, False]),
    # With threshold 1/2 the probability is twice the share: 2/3, 4/9, 8/9, 8/19.
    ("random", 0.5, [0.6, 0.5, 0.9, 0.4], [True, False, False, True]),
])
def test_second_expert_policies(policy, threshold, uniform, used):
    uniform = None if uniform is None else jnp.asarray([uniform])
    route = routing.top_2(logits_of(TABLE), 4, second_policy=policy,
                          second_threshold=threshold, uniform_GT=uniform)
    assert route.kept[0, :, 1].tolist() == used
    assert bool(route.kept[0, :, 0].all())
    # A declined second expert leaves the first one's gate, and takes no room.
    np.testing.assert_allclose(route.gate[0, :, 0], [2 / 3, 7 / 9, 5 / 9, 15 / 19], rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(route.gate[0, :, 1]) > 0, used)


def test_unknown_second_policy_is_refused_by_name():
    with pytest.raises(UserError, match="second_policy='threshhold'.*'threshold'"):
        routing.top_2(logits_of(TABLE), 2, second_policy="threshhold")


def test_top_k_gates_are_the_softmax_over_the_largest_logits():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 6))
    route = routing.top_k(logits, 3, None)
    largest = jnp.sort(logits, axis=-1)[..., ::-1][..., :3]
    np.testing.assert_allclose(route.gate, jax.nn.softmax(largest, axis=-1), rtol=1e-5)
    assert bool(route.kept.all())


def test_two_ways_to_route_to_the_best_expert_agree():
    logits = jax.random.normal(jax.random.key(1), (2, 8, 4))
    one, two = routing.switch(logits, 3), routing.top_2(
        logits, 3, second_policy="none", renormalize=False)
    np.testing.assert_array_equal(one.kept[..., 0], two.kept[..., 0])
    np.testing.assert_array_equal(one.gate[..., 0], two.gate[..., 0])


def test_groups_do_not_compete():
    logits = jax.random.normal(jax.random.key(2), (3, 8, 4))
    together = routing.top_2(logits, 2)
    alone = [routing.top_2(logits[i:i + 1], 2) for i in range(3)]
    for field in ("expert_index", "slot", "gate", "kept"):
        np.testing.assert_array_equal(
            getattr(together, field), np.concatenate([getattr(a, field) for a in alone]))


def test_expert_choice_takes_each_experts_best_tokens():
    route = routing.expert_choice(logits_of(TABLE), 2, causal=False)
    assert route.token_index[0].tolist() == [[1, 0], [3, 2], [1, 0]]
    np.testing.assert_allclose(route.gate[0], [[0.7, 0.6], [0.75, 0.4], [0.2, 0.1]], rtol=1e-6)
    mask = jnp.asarray([[True, False, False, False]])
    route = routing.expert_choice(logits_of(TABLE), 2, mask, causal=False)
    assert route.token_index[0, :, 0].tolist() == [0, 0, 0]
    assert route.kept[0].tolist() == [[True, False]] * 3
    assert route.gate[0, :, 1].tolist() == [0.0] * 3


def test_expert_choice_is_refused_where_it_leaks_the_future():
    with pytest.raises(UserError, match="causal"):
        routing.expert_choice(logits_of(TABLE), 2, causal=True)


def test_hash_routing_is_fixed_by_token_and_spread_evenly():
    ids = jnp.arange(32000).reshape(1, -1)
    expert = routing.hash_experts(ids, 16, None).expert_index
    load = np.bincount(np.asarray(expert).ravel(), minlength=16) / 2000
    assert 0.9 < load.min() and load.max() < 1.1
    again = routing.hash_experts(ids[:, ::-1], 16, None).expert_index[:, ::-1]
    np.testing.assert_array_equal(expert, again)
    other = routing.hash_experts(ids, 16, None, seed=1).expert_index
    assert 0.03 < float((other == expert).mean()) < 0.1  # 1/16 by chance
    route = routing.hash_experts(jnp.asarray([[7, 7, 7]]), 4, 2)
    assert route.kept[0, :, 0].tolist() == [True, True, False]
    assert route.gate[0, :, 0].tolist() == [1.0, 1.0, 0.0]


def test_jitter_stays_in_its_interval():
    x = jnp.asarray([2.0, 2.0, 2.0])
    np.testing.assert_allclose(
        routing.jitter(x, jnp.asarray([0.0, 0.5, 1.0]), 0.01), [1.98, 2.0, 2.02], rtol=1e-6)


def test_limited_groups_keep_the_groups_of_the_best_experts():
    p = [[0.10, 0.20, 0.30, 0.00, 0.15, 0.25]]  # groups of two: best 0.2, 0.3, 0.25
    limited = routing.limit_groups(jnp.asarray([p]), 3, 2)[0, 0]
    assert jnp.isneginf(limited).tolist() == [True, True, False, False, False, False]
    route = routing.top_k(logits_of(p), 3, None, renormalize=False, expert_groups=(3, 2))
    assert route.expert_index[0, 0].tolist() == [2, 5, 4]  # not expert 1
    np.testing.assert_allclose(route.gate[0, 0], [0.3, 0.25, 0.15], rtol=1e-6)


@pytest.mark.parametrize("num_groups,most", [(4, 1), (4, 2), (2, 1), (8, 3), (3, 2)])
def test_limited_groups_equal_a_search_token_by_token(num_groups, most):
    experts = 24
    logits = np.random.default_rng(0).normal(size=(2, 40, experts)).astype(np.float32)
    per_group = experts // num_groups
    k = min(3, most * per_group)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    routes = {
        "top_k": routing.top_k(jnp.asarray(logits), k, None, expert_groups=(num_groups, most)),
        "top_2": routing.top_2(jnp.asarray(logits), None, expert_groups=(num_groups, most)),
        "switch": routing.switch(jnp.asarray(logits), None, expert_groups=(num_groups, most))}
    for name, route in routes.items():
        index, gate = np.asarray(route.expert_index), np.asarray(route.gate)
        choices = index.shape[-1]
        assert np.asarray(route.kept).all()
        for g, t in np.ndindex(2, 40):
            groups = sorted(range(num_groups), reverse=True, key=lambda i: max(
                p[g, t, i * per_group:(i + 1) * per_group]))[:most]
            allowed = [e for i in groups for e in range(i * per_group, (i + 1) * per_group)]
            best = sorted(allowed, key=lambda e: -p[g, t, e])[:choices]
            assert index[g, t].tolist() == best
            shares = p[g, t, best] / (1.0 if name == "switch" else p[g, t, best].sum())
            np.testing.assert_allclose(gate[g, t], shares, rtol=1e-5)


def test_load_balancing_loss_by_hand():
    # Fractions 3/4, 1/4, 0; mean probabilities 2/4, 1.55/4, 0.45/4.
    p = routing.probabilities(logits_of(TABLE))
    first = jnp.asarray([[[0], [0], [0], [1]]])
    loss, groups = routing.load_balancing_loss(p, first)
    assert groups == 1
    assert float(loss) == pytest.approx(3 * (3 * 2.0 + 1 * 1.55) / 16, rel=1e-6)
    # Without token 0: fractions 2/3, 1/3; means 1.4/3, 1.25/3. Two such groups add up.
    mask = jnp.asarray([[False, True, True, True]])
    loss, groups = routing.load_balancing_loss(
        *(jnp.concatenate([a, a]) for a in (p, first, mask)))
    assert groups == 2
    assert float(loss) == pytest.approx(2 * 3 * (2 * 1.4 + 1 * 1.25) / 9, rel=1e-6)


def test_losses_of_a_group_without_real_tokens_are_zero():
    p, mask = routing.probabilities(logits_of(TABLE)), jnp.zeros((1, 4), bool)
    first = jnp.zeros((1, 4, 1), jnp.int32)
    assert float(routing.load_balancing_loss(p, first, mask)[0]) == 0.0
    assert float(routing.router_z_loss(logits_of(TABLE), mask)[0]) == 0.0


def test_router_z_loss_by_hand():
    # log sum exp: log 2, and 3 + log 2.
    logits = jnp.asarray([[[0.0, 0.0], [3.0, 3.0]]])
    loss, _ = routing.router_z_loss(logits)
    assert float(loss) == pytest.approx((np.log(2) ** 2 + (3 + np.log(2)) ** 2) / 2, rel=1e-6)
    loss, _ = routing.router_z_loss(logits, jnp.asarray([[True, False]]))
    assert float(loss) == pytest.approx(np.log(2) ** 2, rel=1e-6)


def test_metrics_by_hand():
    p = routing.probabilities(logits_of(TABLE))
    mask = jnp.asarray([[True, True, True, False]])
    route = routing.switch(logits_of(TABLE), 2, mask)
    metrics = jax.tree.map(float, routing.router_metrics(route, p, mask))
    assert metrics["dropped_fraction"] == (1.0, 3.0)
    assert metrics["router_confidence"] == (pytest.approx(0.6 + 0.7 + 0.5), 3.0)
    load = routing.expert_load(route, 3, mask)
    assert load.tolist() == [2.0, 0.0, 0.0]
    assert jax.tree.map(float, routing.load_metrics(load)) == {
        "load_max_over_mean": (3.0, 1.0), "load_entropy": (0.0, 1.0),
        "dead_experts": (pytest.approx(2 / 3), 1.0)}
    even = jax.tree.map(float, routing.load_metrics(jnp.asarray([5.0, 5.0])))
    assert even["load_entropy"] == (pytest.approx(1.0), 1.0)
    chosen = routing.expert_choice(logits_of(TABLE), 1, causal=False)  # tokens 1, 3, 1
    metrics = routing.router_metrics(chosen, p, jnp.ones((1, 4), bool))
    assert jax.tree.map(float, metrics["dropped_fraction"]) == (2.0, 4.0)
    assert routing.expert_load(chosen, 3, jnp.ones((1, 4), bool)).tolist() == [1.0, 1.0, 1.0]
    assert routing.expert_load(chosen, 3, mask).tolist() == [1.0, 0.0, 1.0]


def test_losses_over_all_tokens_are_flaxformers():
    """Half of the group is padding: by hand, a quarter of the balance and half of the z-loss."""
    p = jnp.asarray([[[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]])
    index = jnp.asarray([[[0], [1], [0], [0]]])
    mask = jnp.asarray([[True, True, False, False]])
    real, groups = routing.load_balancing_loss(p, index, mask)
    over_all, _ = routing.load_balancing_loss(p, index, mask, True)
    assert (float(real), float(over_all), groups) == (1.0, 0.25, 1)
    logits = jnp.full((1, 4, 2), 3.0)
    z = (3.0 + np.log(2.0)) ** 2
    np.testing.assert_allclose(routing.router_z_loss(logits, mask)[0], z, rtol=1e-6)
    np.testing.assert_allclose(routing.router_z_loss(logits, mask, True)[0], z / 2, rtol=1e-6)
