"""What the backward pass keeps of the forward one, and where."""

from collections.abc import Callable

import jax

from t5x_lite.errors import UserError, nearest

POLICIES = {
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
    elif policy in POLICIES:
        chosen = POLICIES[policy]
    else:
        raise UserError(f"remat={policy!r}: must be none, full, dots or save:name,name…"
                        f"{nearest(policy, ('none', *POLICIES))}")
    return jax.checkpoint(fn, policy=chosen, prevent_cse=not in_scan)
