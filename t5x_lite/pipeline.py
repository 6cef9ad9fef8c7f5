"""Running a stack of equal layers: scanned or unrolled, with rematerialisation.

`run_layers` is the one place that decides how stacked parameters become a sequence of layer
applications, so that memory policy and schedule are config values and the layers know
nothing of them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from t5x_lite.errors import UserError, nearest

REMAT_POLICIES = {
    # What the backward pass keeps; the rest of a layer is computed again.
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def remat(fn: Callable, policy: str, *, in_scan: bool) -> Callable:
    """`fn` with its intermediates recomputed in the backward pass as `policy` says.

    Args:
        policy: none (keep all), full (keep the layer's input only), dots (keep the products
            of weights), or save:name,name… (keep what checkpoint_name tagged so).
        in_scan: the scan already keeps common subexpressions apart, which saves a barrier.
    Raises:
        UserError: unknown policy.
    """
    if policy == "none":
        return fn
    if policy.startswith("save:"):
        chosen = jax.checkpoint_policies.save_only_these_names(*policy[5:].split(","))
    elif policy in REMAT_POLICIES:
        chosen = REMAT_POLICIES[policy]
    else:
        raise UserError(f"remat={policy!r}: must be none, full, dots or save:name,name…"
                        f"{nearest(policy, ('none', *REMAT_POLICIES))}")
    return jax.checkpoint(fn, policy=chosen, prevent_cse=not in_scan)


def run_layers(layer_fn: Callable, stacked: Any, x: jax.Array, xs: Any, *, repeats: int,
               scan: bool, remat_policy: str) -> tuple[jax.Array, Any]:
    """Applies `repeats` layers one after another.

    Args:
        layer_fn: (x, layer parameters, slice of xs) -> (x, outputs).
        stacked: the layers' parameters; every leaf has a leading dim of size `repeats`.
        x: the carried activations.
        xs: per-layer inputs (layer indices, caches), leading dim `repeats` too.
        scan: True compiles one layer and loops (short compiles, needed for large models);
            False unrolls, which XLA's CPU backend runs faster.
        remat_policy: see `remat`.
    Returns:
        The last x, and the layers' outputs stacked on a leading dim.
    """
    fn = remat(layer_fn, remat_policy, in_scan=scan)
    if scan:
        return jax.lax.scan(lambda carry, layer: fn(carry, *layer), x, (stacked, xs))
    # unstack's transpose is one stack; slicing layer by layer would add up padded gradients.
    layers = jax.tree.map(functools.partial(jnp.unstack, axis=0), (stacked, xs))
    outputs = []
    for i in range(repeats):
        layer, inputs = jax.tree.map(lambda leaf: leaf[i], layers,
                                     is_leaf=lambda node: isinstance(node, tuple)
                                     and bool(node) and isinstance(node[0], jax.Array))
        x, out = fn(x, layer, inputs)
        outputs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)
