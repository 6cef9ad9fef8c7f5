"""Which expert computes which token: the routers, as pure float32 functions.

ROUTERS says what each router needs and may do; a row of it is all that a new router needs.

A router turns logits_GTE into a `Routing`: for each token its K experts, its position in
each expert's buffer, and the weight of the expert's output. Tokens compete for room within
their *group* only, so what is dropped depends on the group and on nothing else: not on the
mesh, the process count or gradient accumulation. Everything is kept in this index form; a
[tokens, experts, capacity] one-hot would cost more than the experts themselves
(`dense_masks` builds it for the tests).

Losses and metrics are (sum, count) pairs, so that they add over layers, groups, devices and
micro-batches before anything is divided. The count of a loss is the number of groups, which
is known before the batch is: accumulated micro-batches therefore weigh as the full batch.

Randomness is drawn by the caller (`uniform_…` arguments), because a draw must not depend on
how the groups are laid out over devices.

Shape letters: G groups, T tokens of a group, E experts, K choices of a token, C capacity (the
tokens one expert takes from one group), J = K * T choices in order of priority.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from t5x_lite.errors import UserError, one_of
from t5x_lite.layers.config import MoEConfig
from t5x_lite.layers.dispatch import ExpertChoice, Routing

SECOND_POLICIES = ("all", "none", "threshold", "random")


# ---------------------------------------------------------------------------------------
# Helpers of the routers
# ---------------------------------------------------------------------------------------


def probabilities(logits_GTE: jax.Array) -> jax.Array:
    """p_e(x) = softmax(logits)_e in float32 (Shazeer et al. 2017; Switch eq. 1).

    A small error in a logit is an exponentially larger one in its probability, so routers
    are float32 whatever the compute dtype (Switch section 2.4, "selective precision").
    """
    return jax.nn.softmax(logits_GTE.astype(jnp.float32), axis=-1)


def jitter(x: jax.Array, uniform: jax.Array, epsilon: float) -> jax.Array:
    """Router input times noise in [1 - epsilon, 1 + epsilon) (Switch section 2.2). Train only.

    Args:
        x: float32, any shape.
        uniform: float32 in [0, 1), of x's shape.
    """
    return x * (1.0 - epsilon + 2.0 * epsilon * uniform)


def limit_groups(p_GTE: jax.Array, num_groups: int, max_groups: int) -> jax.Array:
    """Device-limited routing (DeepSeek-V2 2024, section 2.2.2): of `num_groups` equal groups of
    experts, a token's `max_groups` with the highest best probability stay eligible.

    With a group per slice (or host), that bounds to how many of them a token travels.

    Returns:
        p_GTE with the experts of all other groups at -inf.
    """
    if max_groups == num_groups:
        return p_GTE
    *lead, num_experts = p_GTE.shape
    best = p_GTE.reshape(*lead, num_groups, num_experts // num_groups).max(-1)
    _, chosen = jax.lax.top_k(best, max_groups)
    eligible = (chosen[..., None] == jnp.arange(num_groups)).any(-2)
    eligible = jnp.repeat(eligible, num_experts // num_groups, axis=-1)
    return jnp.where(eligible, p_GTE, -jnp.inf)


def assign(expert_index_GTK: jax.Array, wanted_GTK: jax.Array, num_experts: int,
           capacity: int | None, first_GT: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Hands out buffer positions: all first choices in token order, then all second ones, …

    Args:
        wanted_GTK: bool; a choice that is not wanted takes no room.
        capacity: positions of one expert for one group; None: no bound.
        first_GT: batch-prioritised routing (V-MoE, Riquelme et al. 2021, section 4): tokens
            are served by descending `first_GT` instead of in order, so that under pressure the
            least important ones are dropped. (Dropping then depends on later tokens.)
    Returns:
        slot_GTK int32, kept_GTK bool.
    """
    groups, tokens, choices = expert_index_GTK.shape
    order = None
    if first_GT is not None:
        order = jnp.argsort(-first_GT, axis=1, stable=True)[:, :, None]
        expert_index_GTK, wanted_GTK = (
            jnp.take_along_axis(a, order, axis=1) for a in (expert_index_GTK, wanted_GTK))
    expert_GJ = expert_index_GTK.swapaxes(1, 2).reshape(groups, choices * tokens)
    wanted_GJ = wanted_GTK.swapaxes(1, 2).reshape(groups, choices * tokens)
    asks_GJE = (expert_GJ[..., None] == jnp.arange(num_experts)) & wanted_GJ[..., None]
    place_GJE = jnp.cumsum(asks_GJE, axis=1, dtype=jnp.int32)
    slot_GJ = jnp.sum(jnp.where(asks_GJE, place_GJE, 0), axis=-1) - wanted_GJ.astype(jnp.int32)
    slot_GTK = slot_GJ.reshape(groups, choices, tokens).swapaxes(1, 2)
    if order is not None:
        inverse = jnp.argsort(order, axis=1)
        slot_GTK, wanted_GTK = (
            jnp.take_along_axis(a, inverse, axis=1) for a in (slot_GTK, wanted_GTK))
    kept_GTK = wanted_GTK if capacity is None else wanted_GTK & (slot_GTK < capacity)
    return slot_GTK, kept_GTK


def _routing(expert_GTK, gate_GTK, wanted_GTK, num_experts, capacity, prioritized) -> Routing:
    slot, kept = assign(expert_GTK, wanted_GTK, num_experts, capacity,
                        jnp.where(wanted_GTK, gate_GTK, 0.0)[..., 0] if prioritized else None)
    return Routing(expert_GTK, slot, jnp.where(kept, gate_GTK, 0.0), kept, wanted_GTK)


def _real(mask_GT: jax.Array | None, like_GTK: jax.Array) -> jax.Array:
    return jnp.broadcast_to(True if mask_GT is None else mask_GT[..., None], like_GTK.shape)


# ---------------------------------------------------------------------------------------
# The routers
# ---------------------------------------------------------------------------------------


def top_k(logits_GTE: jax.Array, k: int, capacity: int | None, mask_GT: jax.Array | None = None,
          *, renormalize: bool = True, prioritized: bool = False,
          expert_groups: tuple[int, int] = (1, 1)) -> Routing:
    """The k most probable experts of each token (Shazeer et al. 2017; Mixtral, Jiang et al. 2024).

    gate_i = p_i, or with `renormalize` p_i / sum_{j in top k} p_j, which is the softmax over
    the k largest logits. Equal probabilities go to the expert of lower index.

    Args:
        capacity: None drops nothing.
        mask_GT: bool, False where padding; padding takes no room. None: all tokens are real.
        prioritized: batch-prioritised routing, see `assign`.
        expert_groups: (equal groups of experts, groups a token may use), see `limit_groups`.
    """
    p_GTE = probabilities(logits_GTE)
    gate, expert = jax.lax.top_k(limit_groups(p_GTE, *expert_groups), k)
    if renormalize:
        gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    return _routing(expert, gate, _real(mask_GT, expert), p_GTE.shape[-1], capacity, prioritized)


def switch(logits_GTE: jax.Array, capacity: int | None, mask_GT: jax.Array | None = None,
           *, prioritized: bool = False, expert_groups: tuple[int, int] = (1, 1)) -> Routing:
    """Top-1 routing of the Switch Transformer (Fedus et al. 2021, section 2.1).

    y = p_i(x) E_i(x) for i = argmax p (eq. 2), with room for
    capacity = tokens of the group / experts * capacity factor (eq. 3); the tokens beyond it
    skip the layer. The gate stays the raw probability: renormalised it would be 1 and the
    router would have no gradient.
    """
    return top_k(logits_GTE, 1, capacity, mask_GT, renormalize=False, prioritized=prioritized,
                 expert_groups=expert_groups)


def top_2(logits_GTE: jax.Array, capacity: int | None, mask_GT: jax.Array | None = None, *,
          second_policy: str = "all", second_threshold: float = 0.5,
          uniform_GT: jax.Array | None = None, renormalize: bool = True,
          prioritized: bool = False, expert_groups: tuple[int, int] = (1, 1)) -> Routing:
    """Top-2 routing of GShard (Lepikhin et al. 2020, algorithm 1) and ST-MoE (Zoph et al. 2022).

    Gates are g_i = p_i / (p_1 + p_2), or p_i without `renormalize`. A second expert of little
    weight is not worth its room:
        all: always used.
        none: never used (the first keeps its share g_1).
        threshold: used where g_2 > second_threshold.
        random: used with probability g_2 / second_threshold (GShard: 0.5, so 2 g_2; ST-MoE: 0.2).

    Args:
        uniform_GT: float32 draws in [0, 1), for second_policy="random".
    """
    one_of("second_policy", second_policy, SECOND_POLICIES)
    p_GTE = probabilities(logits_GTE)
    gate, expert = jax.lax.top_k(limit_groups(p_GTE, *expert_groups), 2)
    if renormalize:
        gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    wanted = _real(mask_GT, expert)
    second = gate[..., 1]
    if second_policy == "none":
        use = jnp.zeros_like(second, jnp.bool_)
    elif second_policy == "threshold":
        use = second > second_threshold
    elif second_policy == "random":
        use = uniform_GT < second / max(second_threshold, 1e-9)
    else:
        use = jnp.ones_like(second, jnp.bool_)
    wanted = wanted & jnp.stack([jnp.ones_like(use), use], axis=-1)
    return _routing(expert, gate, wanted, p_GTE.shape[-1], capacity, prioritized)


def expert_choice(logits_GTE: jax.Array, capacity: int, mask_GT: jax.Array | None = None,
                  *, causal: bool) -> ExpertChoice:
    """Each expert takes the `capacity` tokens it scores highest (Zhou et al. 2022, section 3.2).

    S = softmax over experts; G, I = TopK(S^T, capacity): perfectly balanced by construction.

    Args:
        causal: whether the layer stands in a causal decoder.
    Raises:
        UserError: in a causal decoder, where whether a token is chosen depends on later
            tokens, which the model cannot have when it generates.
    """
    if causal:
        raise leak("expert_choice")
    p_GTE = probabilities(logits_GTE)
    if mask_GT is not None:
        p_GTE = jnp.where(mask_GT[..., None], p_GTE, -1.0)  # after every real token
    gate, token = jax.lax.top_k(p_GTE.swapaxes(1, 2), capacity)
    kept = gate >= 0.0
    return ExpertChoice(token, jnp.where(kept, gate, 0.0), kept)


def hash_experts(tokens_GT: jax.Array, num_experts: int, capacity: int | None,
                 mask_GT: jax.Array | None = None, *, seed: int = 0) -> Routing:
    """A fixed pseudo-random expert per vocabulary id (Hash Layers, Roller et al. 2021).

    Nothing is learned and gates are 1: the baseline that a learned router has to beat.

    Args:
        tokens_GT: int32 token ids.
        seed: another seed is another assignment of ids to experts.
    """
    # The finaliser of MurmurHash3: every input bit flips every output bit with chance a half.
    h = tokens_GT.astype(jnp.uint32) ^ jnp.uint32((seed * 0x9E3779B9 + 0x7F4A7C15) % 2**32)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    h = h ^ (h >> 16)
    expert = (h % jnp.uint32(num_experts)).astype(jnp.int32)[..., None]
    gate = jnp.ones(expert.shape, jnp.float32)
    return _routing(expert, gate, _real(mask_GT, expert), num_experts, capacity, False)


# ---------------------------------------------------------------------------------------
# The table of routers
# ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RouterInput:
    """What a router may go by: the groups that one device holds."""

    config: MoEConfig
    capacity: int | None            # of an expert for a group; None: all that come
    mask_GT: jax.Array | None       # bool, False where padding; None: all tokens are real
    logits_GTE: jax.Array | None    # float32, of routers that are `learned`
    tokens_GT: jax.Array | None     # int32 ids, for routers that go `by_token`
    train: bool
    draw: Callable[[], jax.Array]   # -> float32 [G, T] in [0, 1), equal on any mesh; in training


@dataclasses.dataclass(frozen=True)
class Router:
    """A row of ROUTERS."""

    route: Callable[[RouterInput], Routing | ExpertChoice]
    choices: Callable[[MoEConfig], int]        # experts a token uses; 0 where experts choose
    # Of these choices, how many no policy declines; None: all.
    certain: Callable[[MoEConfig], int] | None = None
    learned: bool = True                       # a kernel of its own gives it logits
    by_token: bool = False                     # it goes by the tokens' ids
    causal: bool = True                        # later tokens do not matter to earlier ones
    settings: tuple[str, ...] = ()             # fields of MoEConfig that it alone reads


def leak(name: str) -> UserError:
    """The error (not raised) of a router that a causal decoder cannot have."""
    fit = [repr(other) for other, router in ROUTERS.items() if router.causal]
    return UserError(f"router={name!r} is not possible in a causal decoder: which tokens an expert "
                     f"takes depends on later tokens, so training would leak the future. Use "
                     f"{', '.join(fit[:-1])} or {fit[-1]} there; encoders may use {name!r}.")


def _shared(given: RouterInput) -> dict:
    """What the routers by probability have in common."""
    config = given.config
    return {"prioritized": config.prioritized,
            "expert_groups": (config.expert_groups, config.max_groups)}


def _route_switch(given: RouterInput) -> Routing:
    return switch(given.logits_GTE, given.capacity, given.mask_GT, **_shared(given))


def _route_top_k(given: RouterInput) -> Routing:
    config = given.config
    routing = top_k(given.logits_GTE, config.top_k, given.capacity, given.mask_GT,
                    renormalize=config.renormalize, **_shared(given))
    return dataclasses.replace(routing, gate=config.gate_scale * routing.gate)


def _route_top_2(given: RouterInput) -> Routing:
    config = given.config
    policy = config.second_policy if given.train else config.eval_second_policy
    return top_2(given.logits_GTE, given.capacity, given.mask_GT, second_policy=policy,
                 uniform_GT=given.draw() if policy == "random" else None,
                 second_threshold=config.second_threshold, renormalize=config.renormalize,
                 **_shared(given))


def _route_expert_choice(given: RouterInput) -> ExpertChoice:
    # Causal decoders are refused when the layer is built.
    return expert_choice(given.logits_GTE, given.capacity, given.mask_GT, causal=False)


def _route_hash(given: RouterInput) -> Routing:
    return hash_experts(given.tokens_GT, given.config.num_experts, given.capacity, given.mask_GT,
                        seed=given.config.hash_seed)


ROUTERS = {
    "switch": Router(_route_switch, lambda config: 1),
    "top_2": Router(_route_top_2, lambda config: 2,
                    certain=lambda config: 2 if config.second_policy == "all" else 1,
                    settings=("renormalize", "eval_second_policy")),
    "top_k": Router(_route_top_k, lambda config: config.top_k, settings=("top_k", "renormalize", "gate_scale")),
    "expert_choice": Router(_route_expert_choice, lambda config: 0, causal=False),
    "hash": Router(_route_hash, lambda config: 1, learned=False, by_token=True,
                   settings=("hash_seed",)),
}


# ---------------------------------------------------------------------------------------
# Auxiliary losses and metrics
# ---------------------------------------------------------------------------------------


def load_balancing_loss(p_GTE: jax.Array, expert_index_GTK: jax.Array,
                        mask_GT: jax.Array | None = None, over_all: bool = False
                        ) -> tuple[jax.Array, int]:
    """E * sum_e f_e P_e, summed over groups, and the number of groups (Switch eq. 4-6).

    f_e is the fraction of the group's real tokens that chose expert e (before capacity), P_e
    the mean probability of e. It is K where both are uniform. Gradients flow through P only.

    Args:
        p_GTE: probabilities.
        expert_index_GTK: the choices that count: all of them, or the first only (GShard:
            expert_index_GTK[..., :1]).
        over_all: divide by all tokens of a group, padding included, as Flaxformer does: a group
            that is half padding then has a quarter of the loss.
    """
    num_experts = p_GTE.shape[-1]
    real_GT = _mask(mask_GT, p_GTE)
    tokens_G = _divisor(real_GT, over_all)
    chose_GTE = (expert_index_GTK[..., None] == jnp.arange(num_experts)).any(axis=2)
    f_GE = jnp.sum(jnp.where(chose_GTE, real_GT[..., None], 0.0), axis=1)
    p_GE = jnp.sum(p_GTE * real_GT[..., None], axis=1)
    loss_G = num_experts * jnp.sum(f_GE * p_GE, axis=-1) / jnp.square(tokens_G)
    return jnp.sum(loss_G), p_GTE.shape[0]


def _divisor(real_GT: jax.Array, over_all: bool) -> jax.Array:
    """[G]: the tokens of each group that a mean divides by, at least 1."""
    if over_all:
        return jnp.full(real_GT.shape[:1], float(real_GT.shape[1]))
    return jnp.maximum(jnp.sum(real_GT, axis=1), 1.0)


def router_z_loss(logits_GTE: jax.Array, mask_GT: jax.Array | None = None, over_all: bool = False
                  ) -> tuple[jax.Array, int]:
    """mean over a group's real tokens of (log sum_e exp logit_e)^2, summed over groups, and the
    number of groups (ST-MoE eq. 5): keeps logits small, where float32 exponentials are exact.

    Args:
        over_all: see load_balancing_loss.
    """
    z_GT = jnp.square(jax.nn.logsumexp(logits_GTE.astype(jnp.float32), axis=-1))
    real_GT = _mask(mask_GT, logits_GTE)
    mean_G = jnp.sum(z_GT * real_GT, axis=1) / _divisor(real_GT, over_all)
    return jnp.sum(mean_G), logits_GTE.shape[0]


# The metric that evaluation adds up in the place of load_metrics, which are no sums: what each
# expert computed.
EXPERT_LOAD = "moe/expert_load"


def router_metrics(routing: Routing | ExpertChoice, p_GTE: jax.Array | None,
                   mask_GT: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{name: (sum, count)} of what happened to the tokens of these groups.

    dropped_fraction: of the choices that asked for room, those that got none. For expert
        choice: of the real tokens, those that no expert took.
    router_confidence: probability of the most probable expert, over real tokens; absent
        without p_GTE, where nothing is learned.
    """
    real = jnp.sum(mask_GT, dtype=jnp.float32)
    if isinstance(routing, Routing):
        asked = jnp.sum(routing.wanted & mask_GT[..., None], dtype=jnp.float32)
        dropped = (asked - jnp.sum(routing.kept & mask_GT[..., None], dtype=jnp.float32), asked)
    else:
        group = jnp.arange(mask_GT.shape[0])[:, None, None]
        token = jnp.where(routing.kept, routing.token_index, mask_GT.shape[1])
        missed_GT = mask_GT.at[group, token].set(False, mode="drop")
        dropped = (jnp.sum(missed_GT, dtype=jnp.float32), real)
    metrics = {"dropped_fraction": dropped}
    if p_GTE is not None:
        confidence = jnp.sum(jnp.where(mask_GT, jnp.max(p_GTE, axis=-1), 0.0))
        metrics["router_confidence"] = (confidence, real)
    return metrics


def expert_load(routing: Routing | ExpertChoice, num_experts: int, mask_GT: jax.Array) -> jax.Array:
    """float32 [E]: how many tokens of mask_GT each expert computes, over all groups given."""
    if isinstance(routing, ExpertChoice):
        group = jnp.arange(mask_GT.shape[0])[:, None, None]
        return jnp.sum(routing.kept & mask_GT[group, routing.token_index], axis=(0, 2),
                       dtype=jnp.float32)
    kept_GTK = routing.kept & mask_GT[..., None]
    hits = (routing.expert_index[..., None] == jnp.arange(num_experts)) & kept_GTK[..., None]
    return jnp.sum(hits, axis=(0, 1, 2), dtype=jnp.float32)


def load_metrics(load_E: jax.Array | np.ndarray) -> dict[str, tuple]:
    """{name: (value, 1)} of the load over the whole batch, or on the host over many.

    load_max_over_mean: 1 when balanced, E when one expert has everything.
    load_entropy: of the load's distribution over log E: 1 when balanced, 0 when collapsed.
    dead_experts: fraction of the experts that compute nothing.
    """
    xp = load_E.__array_namespace__()   # jax.numpy or numpy
    num_experts, one = load_E.shape[0], xp.ones((), xp.float32)
    share_E = load_E / xp.maximum(xp.sum(load_E), 1.0)
    entropy = -xp.sum(share_E * xp.log(xp.where(share_E > 0, share_E, 1.0)))
    return {
        "load_max_over_mean": (xp.max(share_E) * num_experts, one),
        "load_entropy": (entropy / xp.log(num_experts) if num_experts > 1 else one, one),
        "dead_experts": (xp.mean(load_E == 0.0, dtype=xp.float32), one),
    }


def _mask(mask_GT: jax.Array | None, like_GTE: jax.Array) -> jax.Array:
    shape = like_GTE.shape[:2]
    return jnp.ones(shape, jnp.float32) if mask_GT is None else mask_GT.astype(jnp.float32)


def dense_masks(routing: Routing, num_experts: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """(dispatch bool, combine float32) [G, T, E, C], as the papers write them; for tests only."""
    at_GTKEC = ((routing.expert_index[..., None] == jnp.arange(num_experts))[..., None]
                & (routing.slot[..., None, None] == jnp.arange(capacity))
                & routing.kept[..., None, None])
    return at_GTKEC.any(axis=2), jnp.sum(at_GTKEC * routing.gate[..., None, None], axis=2)
