"""A router and a kind of positions that nothing in t5x_lite knows: a row of one table each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from t5x_lite import build as build_lib
from t5x_lite.cost import flops
from t5x_lite.errors import UserError
from t5x_lite.formats.functions import differences
from t5x_lite.layers import moe, position, routing
from t5x_lite.layers.config import MLPConfig, MoEConfig, PositionConfig
from tests import tiny


def one_step(config):
    """(the loss before the first update, the parameters after it)."""
    program = build_lib.build(config, jax.devices()[:1])
    with program.activate():
        state, sums = program.jit_train_step()(program.init_state(), tiny.batch())
    total, count = sums["loss"]
    return float(total) / float(count), state["params"]


def with_stacks(config, **changes):
    model = dataclasses.replace(config.model, **{
        side: dataclasses.replace(getattr(config.model, side), **changes)
        for side in ("encoder", "decoder")})
    return dataclasses.replace(config, model=model)


def with_mixture(config, **fields):
    mixture = MoEConfig(num_experts=4, mlp=MLPConfig(mlp_dim=32), **fields)
    block = config.model.encoder.segments[0].blocks[0]
    segment = dataclasses.replace(config.model.encoder.segments[0],
                                  blocks=(dataclasses.replace(block, moe=mixture),))
    encoder = dataclasses.replace(config.model.encoder, segments=(segment,))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder))


# --- a router -------------------------------------------------------------------------------------

def round_robin(given):
    """Expert t mod E for the t-th token, and the next one, at equal weight: nothing is learned."""
    groups, tokens = given.tokens_GT.shape
    first = jnp.arange(tokens) % given.config.num_experts
    expert = jnp.stack([first, (first + 1) % given.config.num_experts], axis=-1)
    expert = jnp.broadcast_to(expert, (groups, tokens, 2)).astype(jnp.int32)
    wanted = jnp.ones(expert.shape, bool)
    slot, kept = routing.assign(expert, wanted, given.config.num_experts, given.capacity)
    return routing.Routing(expert, slot, jnp.where(kept, 0.5, 0.0), kept, wanted)


@pytest.fixture
def registered_router(monkeypatch):
    monkeypatch.setitem(routing.ROUTERS, "round_robin", routing.Router(
        round_robin, lambda config: 2, learned=False, by_token=True, causal=False))


def test_a_router_from_outside_is_one_row(registered_router):
    config = with_mixture(tiny.seq2seq(), router="round_robin", dropless=True)
    loss, params = one_step(config)
    assert np.isfinite(loss)
    assert not any("router" in path for path in nnx.traversals.flatten_mapping(params, sep="/"))
    mixture = config.model.encoder.segments[0].blocks[0].moe
    assert flops.experts_per_token(mixture, 12) == 2


def test_what_its_row_says_of_a_router_is_checked(registered_router):
    config = MoEConfig(num_experts=4, router="round_robin")
    with pytest.raises(UserError, match="round_robin.*not possible in a causal decoder"):
        moe.validate(config, "m", causal=True)
    with pytest.raises(UserError, match="round_robin.*has none; use 'zero'"):
        moe.validate(dataclasses.replace(config, overflow="identity"), "m", causal=False)
    with pytest.raises(UserError, match="uses 2 experts a token, but num_experts=1"):
        moe.validate(dataclasses.replace(config, num_experts=1), "m", causal=False)


def test_an_unregistered_router_is_refused():
    with pytest.raises(UserError, match="router='round_robin': must be one of switch"):
        moe.validate(MoEConfig(router="round_robin"), "m", causal=False)


# --- a kind of positions --------------------------------------------------------------------------

class Ramp(nnx.Module):
    """position / max_length, in every feature."""

    def __init__(self, key, features, config, init):
        self.features, self.length = features, config.max_length

    def __call__(self, positions):
        ramp = positions[..., None].astype(jnp.float32) / self.length
        return jnp.broadcast_to(ramp, (*positions.shape, self.features))


class Recency(nnx.Module):
    """A learned bias on the logits in proportion to the distance, one slope a head."""

    def __init__(self, key, num_heads, config, bidirectional, dtype=jnp.float32):
        self.slope = position.param(key, (1, num_heads), ("buckets", "heads"), std=1.0)
        self.config = config

    def __call__(self):
        return position.PositionBias(self.slope[...][None], position.alibi_values, self.config,
                                     True)


def flip(x, positions, config):
    """Queries and keys at odd positions change their sign."""
    return x * (1 - 2 * (positions % 2)[:, None, :, None]).astype(x.dtype)


KINDS = {"vectors": position.PositionKind(("max_length",), vectors=Ramp),
         "bias": position.PositionKind(bias=Recency),
         "turn": position.PositionKind(turn=flip)}


@pytest.mark.parametrize("part", KINDS)
def test_a_kind_of_positions_from_outside_is_one_row(monkeypatch, part):
    monkeypatch.setitem(position.POSITIONS, "mine", KINDS[part])
    plain, _ = one_step(with_stacks(tiny.seq2seq(), position=PositionConfig("none")))
    loss, params = one_step(with_stacks(tiny.seq2seq(), position=PositionConfig("mine")))
    assert np.isfinite(loss) and loss != plain
    assert ("relative_position" in params["encoder"]) == (part == "bias")


def test_its_row_says_which_settings_change_the_function(monkeypatch):
    monkeypatch.setitem(position.POSITIONS, "mine", KINDS["vectors"])
    one, other = (with_stacks(tiny.seq2seq(), position=PositionConfig(
        "mine", max_length=length, num_buckets=length)).model for length in (8, 16))
    assert differences(one, other) == ["decoder.position.max_length: 8, there 16",
                                       "encoder.position.max_length: 8, there 16"]
