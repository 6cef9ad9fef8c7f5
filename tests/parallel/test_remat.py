"""Policies keep what they say and change no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from t5x_lite.errors import UserError
from t5x_lite.parallel import remat

POLICIES = ("none", "full", "dots", "save:mlp_hidden", "save:query,key;offload:mlp_hidden",
            "offload:layer_input", "recompute:mlp_hidden,query")


def layer(x, w):
    x = remat.tag(x, "layer_input")
    q = remat.tag(jnp.sin(x @ w[0]), "query")
    h = remat.tag(jnp.cos(q @ w[1]), "mlp_hidden")
    return x + jnp.sin(h)


def loss(w, x, policy):
    step = remat.remat(layer, policy, in_scan=True)
    return jnp.sum(jax.lax.scan(lambda x, w: (step(x, w), None), x, w)[0] ** 2)


W = 0.3 * jax.random.normal(jax.random.key(0), (3, 2, 8, 8))
X = jax.random.normal(jax.random.key(1), (4, 8))


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_the_gradient(policy):
    want = jax.grad(loss)(W, X, "none")
    found = jax.jit(jax.grad(loss), static_argnums=2)(W, X, policy)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy, kept", [
    ("full", []), ("save:mlp_hidden", ["mlp_hidden"]), ("save:query,mlp_hidden",
                                                       ["query", "mlp_hidden"]),
])
def test_named_tensors_are_kept_and_nothing_else(policy, kept, capsys):
    print_saved_residuals(remat.remat(layer, policy, in_scan=True), X, W[0])
    lines = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    assert len(lines) == len(kept)
    for line, name in zip(lines, kept, strict=True):
        assert f"named '{name}'" in line


def test_recompute_keeps_all_but_these(capsys):
    print_saved_residuals(remat.remat(layer, "recompute:mlp_hidden", in_scan=True), X, W[0])
    out = capsys.readouterr().out
    assert "'mlp_hidden'" not in out and "'query'" in out


@pytest.mark.parametrize("policy, message", [
    ("ful", "remat='ful': must be none, full, dots.*did you mean 'full'"),
    ("save:", "must be none"),
    ("keep:query", "must be none, full, dots"),
    ("save:mlp_hiden", "no tensor is called 'mlp_hiden'. did you mean 'mlp_hidden'"),
    ("recompute:query;save:key", "must be none"),
])
def test_unknown_policies_are_refused(policy, message):
    with pytest.raises(UserError, match=message):
        remat.parse(policy)
