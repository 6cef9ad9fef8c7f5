"""What the backward pass keeps of the forward one, where, and what it computes again.

A policy is a string:

    none                      keep everything
    full                      keep each layer's input only (Chen et al. 2016)
    dots                      keep the products of weights, the dearest to compute again
    save:NAMES                keep these tensors, compute the rest again
    offload:NAMES             move these to the host's memory, compute the rest again
    save:NAMES;offload:NAMES  both
    recompute:NAMES           keep everything but these

with NAMES separated by commas, from

    layer_input               a layer's input, which every policy but recompute keeps somewhere
    query key value           projections of attention, heads apart
    latent                    what latent attention makes keys and values of
    context                   what attention reads, before its output projection
    attention_output          self- and cross-attention's result, before the residual
    mlp_hidden                the MLP's hidden activations, after the nonlinearity
    mlp_output                the MLP's (or the mixture's) result, before the residual
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from t5x_lite.errors import UserError, known, nearest

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIONS = ("save", "offload", "recompute")
NAMES = ("layer_input", "query", "key", "value", "latent", "context", "attention_output",
         "mlp_hidden", "mlp_output")


def tag(x: jax.Array, name: str) -> jax.Array:
    """x, which policies know by this name of NAMES."""
    assert name in NAMES, name
    return checkpoint_name(x, name)


def parse(policy: str, where: str = "remat") -> dict[str, tuple[str, ...]]:
    """{action: names} of a policy that has any, else {}.

    Raises:
        UserError: a policy, an action or a name that does not exist.
    """
    if policy == "none" or policy in POLICIES:
        return {}
    actions: dict[str, tuple[str, ...]] = {}
    for part in policy.split(";"):
        action, _, names = part.partition(":")
        actions[action.strip()] = tuple(name.strip() for name in names.split(",") if name.strip())
    for action, chosen in actions.items():
        if action not in ACTIONS or not chosen or ("recompute" in actions and len(actions) > 1):
            raise UserError(
                f"{where}={policy!r}: must be none, full, dots, recompute:NAMES, or save:NAMES "
                f"and offload:NAMES joined by ';'.{nearest(action, (*ACTIONS, 'none', *POLICIES))}")
        for name in chosen:
            known(f"{where}={policy!r}", "tensor", name, NAMES)
    return actions


def remat(fn: Callable, policy: str, *, in_scan: bool) -> Callable:
    """`fn` with its intermediates treated as the policy says.

    Args:
        in_scan: the scan already keeps common subexpressions apart, which saves a barrier.
    Raises:
        UserError: see `parse`.
    """
    actions = parse(policy)
    if policy == "none":
        return fn
    if "recompute" in actions:
        chosen = jax.checkpoint_policies.save_anything_except_these_names(*actions["recompute"])
    elif "offload" in actions:
        chosen = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(actions.get("save", ())),
            names_which_can_be_offloaded=list(actions["offload"]),
            offload_src="device", offload_dst="pinned_host")
    elif "save" in actions:
        chosen = jax.checkpoint_policies.save_only_these_names(*actions["save"])
    else:
        chosen = POLICIES[policy]
    return jax.checkpoint(fn, policy=chosen, prevent_cse=not in_scan)
