"""Sparse mixture of experts: an MLP of which every token uses a few of many.

    x -> router -> dispatch -> [all-to-all ->] experts [-> all-to-all] -> combine -> y

A MoE takes the place of the dense MLP in a block and nothing else changes. Expert weights are
stacked, [experts, embed, mlp]. On a mesh with an `expert` axis each device holds its share of
the experts and never sees the others': tokens travel instead, by all-to-all along that axis
only (GShard, Lepikhin et al. 2020). The whole layer runs in one jax.shard_map, manual over
every mesh axis; what happens in it is in mixture.py, routers are in routing.py.

Shape letters: B batch, L length, D model, F hidden, E experts.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from t5x_lite.errors import UserError, at_least, between, one_of
from t5x_lite.layers import routing
from t5x_lite.layers.config import InitConfig, MoEConfig
from t5x_lite.layers.linear import Dense, RowKey, kernel_std, param
from t5x_lite.layers.mixture import Placement, Run, mixture, placement, weight_spec
from t5x_lite.layers.mlp import ACTIVATIONS, MLP
from t5x_lite.parallel import sharding


def validate(config: MoEConfig, where: str, *, causal: bool, length: int = 0,
             split: bool = False) -> None:
    """Raises UserError for a mixture that cannot be built, or run on the active mesh.

    Args:
        where: dotted path of the config, for messages.
        causal: whether the layer stands in a causal decoder.
        length: tokens of a training sequence, 0 where unknown.
        split: whether the batch is split into micro-batches, by accumulation or a pipeline.
    """
    router = _validate_fields(config, where)
    if causal and not router.causal:
        raise UserError(f"{where}: {routing.leak(config.router)}")
    _validate_choices(config, router, where)
    ways = _ways(sharding.active_rules().mesh_axes("expert"), sharding.mesh_sizes())
    if config.num_experts % ways:
        raise UserError(f"{where}.num_experts={config.num_experts} cannot be split {ways} ways over "
                        f"the mesh axis 'expert'; choose a mesh.expert that divides "
                        f"{config.num_experts}.")
    if length:
        _validate_groups(config, where, length, split)


def _validate_choices(config: MoEConfig, router: routing.Router, where: str) -> None:
    """Checks what a token may choose from against what the router can do."""
    experts, choices = config.num_experts, router.choices(config)
    if choices > experts:
        field = f"top_k={config.top_k}" if "top_k" in router.settings else f"router={config.router!r}"
        raise UserError(f"{where}.{field} uses {choices} experts a token, but num_experts="
                        f"{experts}; use at most {experts}, or more experts.")
    if not choices and (config.dropless or config.overflow != "zero" or config.expert_groups != 1):
        raise UserError(f"{where}: router={config.router!r} fills every expert to its capacity; "
                        "dropless, overflow and expert_groups do not apply to it.")
    if config.overflow == "identity" and not router.learned:
        raise UserError(f"{where}.overflow='identity' weighs a dropped token by the router's "
                        f"probability, and router={config.router!r} has none; use 'zero'.")
    if experts % config.expert_groups:
        raise UserError(f"{where}.expert_groups={config.expert_groups} must divide num_experts="
                        f"{experts}.")
    eligible = config.max_groups * experts // config.expert_groups
    if not 1 <= config.max_groups <= config.expert_groups or choices > eligible:
        raise UserError(f"{where}.max_groups={config.max_groups}: must be between 1 and "
                        f"expert_groups={config.expert_groups}, and leave at least "
                        f"{choices} experts eligible.")


def _validate_groups(config: MoEConfig, where: str, length: int, split: bool) -> None:
    """Checks the groups that are routed together, and what they leave of an expert's capacity."""
    tokens = group_tokens(config, length, where)
    if split and tokens > length:
        raise UserError(
            f"{where}.group_size={tokens} makes groups of {tokens // length} sequences, but "
            f"micro-batches (train.accumulation, a pipeline's) take sequences that are not "
            f"neighbours: other groups, other drops. Use at most the length, {length}.")
    for train in (True, False):
        capacity(config, tokens, train, where)


def _validate_fields(config: MoEConfig, where: str) -> routing.Router:
    """Checks each field alone; the router that the config names."""
    one_of(f"{where}.router", config.router, routing.ROUTERS)
    one_of(f"{where}.second_policy", config.second_policy, routing.SECOND_POLICIES)
    one_of(f"{where}.eval_second_policy", config.eval_second_policy,
           [p for p in routing.SECOND_POLICIES if p != "random"])
    one_of(f"{where}.overflow", config.overflow, ("zero", "identity"))
    one_of(f"{where}.balance_choices", config.balance_choices, ("all", "first"))
    one_of(f"{where}.loss_mean", config.loss_mean, ("real", "all"))
    for field, least in (("num_experts", 1), ("expert_groups", 1), ("max_groups", 1),
                         ("expert_capacity", 0), ("shared_experts", 0), ("balance_weight", 0),
                         ("z_weight", 0), ("second_threshold", 0)):
        at_least(f"{where}.{field}", getattr(config, field), least)
    between(f"{where}.jitter", config.jitter, 0, 1, "Beyond it the router's inputs change their sign; "
            "Switch uses 0.01.", open_above=True)
    router = routing.ROUTERS[config.router]
    if "top_k" in router.settings:
        at_least(f"{where}.top_k", config.top_k, 1)
    return router


def group_tokens(config: MoEConfig, length: int, where: str = "moe") -> int:
    """Tokens of a routing group for sequences of `length`. Raises UserError, see group_size."""
    size = config.group_size or length
    if size < 0 or (length % size and size % length):
        raise UserError(f"{where}.group_size={size}: must be 0 (a sequence), or divide the "
                        f"sequence length {length}, or be a multiple of it.")
    return size


def capacity(config: MoEConfig, tokens: int, train: bool, where: str = "moe") -> int | None:
    """Tokens that an expert takes from a group of `tokens`; None: all that come.

    Raises:
        UserError: less than one token.
    """
    if config.dropless:
        return None
    if config.expert_capacity:
        return min(config.expert_capacity, tokens)
    field = "capacity_factor" if train else "eval_capacity_factor"
    factor = getattr(config, field)
    room = factor * tokens / config.num_experts
    if room < 1.0:
        raise UserError(
            f"{where}.{field}={factor}: {factor} * {tokens} tokens of a group / "
            f"{config.num_experts} experts leaves an expert room for {room:.2g} tokens, less than "
            f"one; use a factor of at least {config.num_experts / tokens:.3g}, a larger "
            "group_size, or dropless=True.")
    return min(round(room), tokens)


def _ways(axes: tuple[str, ...], sizes: Mapping[str, int]) -> int:
    ways = 1
    for axis in axes:
        ways *= sizes.get(axis, 1)
    return ways


# ---------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------


class ExpertDense(nnx.Module):
    """The kernels of one projection of all experts: kernel_EDF (and bias_EF)."""

    def __init__(self, key: jax.Array, num_experts: int, d_in: int, d_out: int,
                 axes: tuple[str, str], *, std: float, use_bias: bool):
        self.kernel = param(key, (num_experts, d_in, d_out), ("expert", *axes), std=std,
                            fan_in=d_in)
        if use_bias:
            bias_axis = "norm" if axes[1] == "embed" else axes[1]
            self.bias = param(key, (num_experts, d_out), ("expert", bias_axis))


class Experts(nnx.Module):
    """The weights of all experts: wi (or wi_0, wi_1) and wo, as the dense MLP names them."""

    def __init__(self, key: jax.Array, embed_dim: int, config: MoEConfig, init: InitConfig):
        mlp, keys = config.mlp, jax.random.split(key, 3)
        std_in = kernel_std(init, embed_dim) * init.value_factor
        std_out = kernel_std(init, mlp.mlp_dim) * init.output_factor * init.value_factor
        wi = functools.partial(ExpertDense, num_experts=config.num_experts, d_in=embed_dim,
                               d_out=mlp.mlp_dim, axes=("embed", "mlp"), std=std_in,
                               use_bias=mlp.use_bias)
        if mlp.gated:
            self.wi_0, self.wi_1 = wi(keys[0]), wi(keys[1])
        else:
            self.wi = wi(keys[0])
        self.wo = ExpertDense(keys[2], config.num_experts, mlp.mlp_dim, embed_dim,
                              ("mlp", "embed"), std=std_out, use_bias=mlp.use_bias)
        self.names = ("wi_0", "wi_1", "wo") if mlp.gated else ("wi", "wo")

    def weights(self, dtype: jnp.dtype) -> dict[str, tuple[jax.Array, sharding.Axes]]:
        """{"wi.kernel": (array in the compute dtype, logical axes), …}."""
        arrays = {}
        for name in self.names:
            for kind in ("kernel", "bias"):
                variable = getattr(getattr(self, name), kind, None)
                if variable is not None:
                    axes = variable.get_metadata()["logical_axes"]
                    arrays[f"{name}.{kind}"] = (variable[...].astype(dtype), axes)
        return arrays


# ---------------------------------------------------------------------------------------
# The layer
# ---------------------------------------------------------------------------------------


class MoE(nnx.Module):
    """A mixture of experts with the dense MLP's interface.

    Raises:
        UserError: see `validate`.
    """

    def __init__(self, key: jax.Array, embed_dim: int, config: MoEConfig, init: InitConfig,
                 dtype: jnp.dtype = jnp.float32, *, causal: bool = False):
        validate(config, "moe", causal=causal)
        keys = jax.random.split(key, 3)
        if routing.ROUTERS[config.router].learned:
            self.router = Dense(keys[0], embed_dim, config.num_experts, ("embed", "router"),
                                std=config.router_std, use_bias=config.router_bias)
        self.experts = Experts(keys[1], embed_dim, config, init)
        if config.shared_experts:
            wide = dataclasses.replace(
                config.mlp, mlp_dim=config.mlp.mlp_dim * config.shared_experts)
            self.shared = MLP(keys[2], embed_dim, wide, init, dtype)
        self.config = config
        self.dtype = dtype

    def __call__(self, x: jax.Array, key: RowKey | None = None, *,
                 mask: jax.Array | None = None, tokens: jax.Array | None = None,
                 decoding: bool = False, **_) -> tuple[jax.Array, dict]:
        """x_BLD -> (y_BLD, aux).

        Args:
            key: dropout key, None outside training (which also chooses the capacity).
            mask: bool [B, L], False where padding; None: all tokens are real.
            tokens: int32 [B, L] token ids, for routers that go by them.
            decoding: the sequence arrives in pieces, so nothing is dropped: a group would be
                whatever part of it is here.
        Returns:
            y in the compute dtype, and {name: (sum, count)} float32: "aux_loss", the weighted
            losses of this layer to add to the model's, and "moe/…" metrics over the batch.
        Raises:
            UserError: an expert's room is below one token, or the batch does not divide.
        """
        config, place = self.config, placement()
        train = key is not None
        size, room = self._groups(x.shape, place, train, decoding)
        arrays, specs = self._arrays(x, key, mask, tokens, place)
        run = Run(config, ACTIVATIONS[config.mlp.activation], place, specs, size, room, train)
        local = functools.partial(mixture, run=run)
        if sharding.mesh_sizes():
            # Explicit meshes do not reshard what enters a shard_map.
            arrays = {name: jax.sharding.reshard(a, specs[name]) for name, a in arrays.items()}
            y, aux = sharding.manual(
                local, in_specs=(specs,),
                out_specs=(specs["x"], PartitionSpec()))(arrays)
            y = sharding.shard(y, "act_batch", "act_length", "act_embed")
        else:
            y, aux = local(arrays)
        if config.shared_experts:
            y = y + self.shared(x, key.fold_in(1) if train else None)[0]
        return y, aux

    def _groups(self, shape: tuple[int, ...], place: Placement, train: bool, decoding: bool
                ) -> tuple[int, int | None]:
        """Tokens of a routing group, and of them the room that an expert has (None: for all)."""
        config, (batch, length, _) = self.config, shape
        experts_choose = not routing.ROUTERS[config.router].choices(config)
        size, room = length, None
        if experts_choose or not (decoding or length == 1):
            size = group_tokens(config, length)
            room = capacity(config, size, train)
        ways = _ways(place.group, sharding.mesh_sizes())
        rows = max(size // length, 1)  # sequences of a group
        if batch % (ways * rows):
            raise UserError(
                f"moe: a batch of {batch} sequences cannot be split into groups of {rows} over "
                f"{ways} devices (mesh axes {', '.join(place.group) or 'none'}); it must be a "
                f"multiple of {rows * ways}. Change the batch size, group_size or the mesh.")
        return size, room

    def _arrays(self, x: jax.Array, key: RowKey | None, mask: jax.Array | None,
                tokens: jax.Array | None, place: Placement
                ) -> tuple[dict[str, jax.Array], dict[str, PartitionSpec]]:
        """What `mixture` computes from, and where its parts lie."""
        config, router = self.config, routing.ROUTERS[self.config.router]
        arrays = {"x": x, "mask": jnp.ones(x.shape[:2], bool) if mask is None
                  else jnp.broadcast_to(mask, x.shape[:2])}
        if router.by_token:
            assert tokens is not None, f"router={config.router!r} needs the token ids"
            arrays["tokens"] = tokens
        if key is not None:
            arrays["rows"] = key.rows
        specs = dict.fromkeys(arrays, PartitionSpec(place.group or None))
        if router.learned:
            arrays["router"] = sharding.weight(self.router.kernel[...], self.router.axes,
                                               jnp.float32)
            if config.router_bias:
                arrays["router_bias"] = self.router.bias[...]
        if key is not None:
            arrays["seeds"] = jax.random.bits(key.fold_in(0).key, (3, 2), jnp.uint32)
        specs |= {name: PartitionSpec() for name in arrays if name not in specs}
        for name, (w, axes) in self.experts.weights(self.dtype).items():
            arrays[name] = w
            specs[name] = weight_spec(axes)
        return arrays, specs
