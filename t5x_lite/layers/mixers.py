"""What mixes the tokens of a row in a block: attention, recurrences, convolutions and gates.

MIXERS, at the end, says what each kind is; a row of it is all that a new kind needs.

Shape letters: B batch, L length, D model, W inner features, N heads, K and V features of a key and a
value, T taps.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError, one_of
from t5x_lite.layers.attention import ATTENTIONS
from t5x_lite.layers.config import MixerConfig
from t5x_lite.layers.convolution import Convolution
from t5x_lite.layers.linear_attention import GatedLinearAttention, LinearAttention, constant_decays
from t5x_lite.layers.lstm import LSTM
from t5x_lite.layers.position import POSITIONS
from t5x_lite.layers.rg_lru import RGLRU
from t5x_lite.layers.spatial_gating import SpatialGating
from t5x_lite.layers.state_space import StateSpace


@dataclasses.dataclass(frozen=True)
class Kept:
    """An entry of a layer's cache."""

    shape: tuple[int, ...]               # behind the rows
    axes: tuple[str | None, ...]         # logical, one a dim of `shape`
    dtype: Any = None                    # None: what products read, see products.read_as


@dataclasses.dataclass(frozen=True)
class Mixer:
    """A row of the table."""

    # (key, embed_dim, block, stack, init, dtype) -> module with Attention's __call__; block and stack
    # are configs of the model.
    module: Callable[..., nnx.Module]
    # What the cache keeps of a row: (block, embed_dim, length) -> {entry: Kept}.
    cache: Callable[..., dict[str, Kept]]
    # Multiply-adds of a forward pass, two a piece: (config, embed_dim, rows, length) -> (by kernels, by
    # activations). None: cost/flops.py counts attention.
    flops: Callable[[MixerConfig, int, int, int], tuple[float, float]] | None
    name: str = "mixer"                  # of the module in its block
    settings: tuple[str, ...] = ()       # fields of MixerConfig that the function depends on
    causal: bool = True                  # only in decoders
    attends: bool = False                # positions act on its queries, keys or logits
    heads: bool = False                  # its inner features consist of heads of head_dim


def inner(config: MixerConfig, embed_dim: int) -> int:
    """W, the features between the projections."""
    return round(config.expand * embed_dim)


def validate(where: str, stack, model) -> None:
    """Raises UserError for mixers of a stack that cannot be, naming the field.

    Args:
        where: the stack, such as "model.decoder".
        stack, model: their configs.
    """
    blocks = [(f"{where}.segments[{i}].blocks[{j}]", block) for i, segment in enumerate(stack.segments)
              for j, block in enumerate(segment.blocks)]
    for here, block in blocks:
        one_of(f"{here}.mixer.kind", block.mixer.kind, MIXERS)
    others = [(here, block) for here, block in blocks if not MIXERS[block.mixer.kind].attends]
    for here, block in others:
        _validate_one(block.mixer, f"{here}.mixer", model.embed_dim, causal=stack.causal)
        if block.position is not None:
            raise UserError(f"{here}.position acts on queries and keys, and mixer.kind="
                            f"{block.mixer.kind!r} has none. Leave it at None.")
        if model.parametrization != "standard":
            raise UserError(f"{here}.mixer.kind={block.mixer.kind!r} has no maximal-update parametrisation "
                            "here: use model.parametrization=standard.")
    if len(others) == len(blocks):
        _validate_positions(stack.position.kind, f"{where}.position")


def _validate_one(config: MixerConfig, where: str, embed_dim: int, *, causal: bool) -> None:
    """causal: of the stack."""
    row = MIXERS[config.kind]
    if row.causal and not causal:
        fit = [name for name, other in MIXERS.items() if not other.causal]
        raise UserError(f"{where}.kind={config.kind!r} reads from left to right alone, and an encoder "
                        f"reads both ways. Use one of {', '.join(fit)} there.")
    width = config.expand * embed_dim
    if width != round(width) or (row.heads and round(width) % config.head_dim):
        whole = f"a multiple of {where}.head_dim={config.head_dim}" if row.heads else "a whole number"
        raise UserError(f"{where}.expand={config.expand:g}: {width:g} inner features (of "
                        f"embed_dim={embed_dim}) must be {whole}.")
    if "taps" in row.settings and not causal and config.taps % 2 == 0:
        raise UserError(f"{where}.taps={config.taps}: in an encoder a token stands in the middle of its "
                        f"taps. Use an odd number, such as {config.taps + 1}.")


def _validate_positions(kind: str, where: str) -> None:
    """Positions of a stack in which no layer attends."""
    fit = [name for name, row in POSITIONS.items() if not (row.bias or row.turn or row.parameters)]
    if kind not in fit:
        raise UserError(f"{where}.kind={kind!r} acts on queries, keys or logits of attention, which no "
                        f"layer of this stack has. Use one of {', '.join(fit)}.")


# --- attention ------------------------------------------------------------------------------------

def _attention(key, embed_dim, block, stack, init, dtype):
    return ATTENTIONS[block.self_attention.kind].module(
        key, embed_dim, block.self_attention, block.position or stack.position, init, dtype)


def _attention_cache(block, embed_dim: int, length: int) -> dict[str, Kept]:
    entries = ATTENTIONS[block.self_attention.kind].cache(block.self_attention)
    return {name: Kept((heads, length, features), (axis, "act_keys", None))
            for name, (heads, features, axis) in entries.items()}


# --- the others -----------------------------------------------------------------------------------

def _own(module: Callable) -> Callable:
    """The row's constructor of a module that MixerConfig describes."""
    return lambda key, embed_dim, block, stack, init, dtype: module(
        key, embed_dim, block.mixer, stack.causal, init, dtype)


def _cache(entries: Callable[[MixerConfig, int], dict[str, Kept]]) -> Callable:
    """The row's cache of a state that does not grow with the length: (config, W) -> entries."""
    return lambda block, embed_dim, length: entries(block.mixer, inner(block.mixer, embed_dim))


def _state(features: tuple[int, ...], *axes: str | None) -> Kept:
    return Kept(features, axes, jnp.float32)


def _inputs(config: MixerConfig, features: int, axis: str | None) -> Kept:
    return Kept((config.taps - 1, features), (None, axis))


def _matrix(config: MixerConfig, width: int, more: int = 0) -> Kept:
    """The state of linear attention: [N, K, V + more]."""
    return _state((width // config.head_dim, config.state_dim, config.head_dim + more),
                  "act_heads", None, None)


def _ssd_cache(config: MixerConfig, width: int) -> dict[str, Kept]:
    return {"state": _matrix(config, width), "value": _inputs(config, width, "act_heads"),
            "key": _inputs(config, config.state_dim, None), "query": _inputs(config, config.state_dim, None)}


def _gmlp_cache(block, embed_dim: int, length: int) -> dict[str, Kept]:
    return {"values": Kept((1, length, inner(block.mixer, embed_dim)), (None, "act_keys", "act_mlp"))}


def _lstm_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    width = inner(config, embed_dim)
    return 2.0 * rows * length * width * (4 * embed_dim + 4 * width + embed_dim), 0.0


def _conv_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    return 2.0 * rows * length * inner(config, embed_dim) * (3 * embed_dim + config.taps), 0.0


def _rg_lru_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    each = 3 * embed_dim + config.taps + 2 * config.head_dim
    return 2.0 * rows * length * inner(config, embed_dim) * each, 0.0


def _gmlp_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    """All pairs of tokens, as for attention."""
    tokens, width = rows * length, inner(config, embed_dim)
    return 6.0 * tokens * width * embed_dim, 2.0 * tokens * width * length


def _linear_flops(config: MixerConfig, embed_dim: int, rows: int, length: int, *, more: int = 0,
                  decay: bool = False, gate: bool = False) -> tuple[float, float]:
    """Of the recurrent form: each token writes the state and reads it. Pairs within chunks, which the
    parallel form computes as well, are its own choice."""
    tokens, width = rows * length, inner(config, embed_dim)
    heads = width // config.head_dim
    each = 2 * heads * config.state_dim + (2 + gate) * width + decay * heads
    state = heads * config.state_dim * (config.head_dim + more)
    return 2.0 * tokens * embed_dim * each, 4.0 * tokens * state


def _ssd_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    tokens, width = rows * length, inner(config, embed_dim)
    each = 3 * width + 2 * config.state_dim + width // config.head_dim
    taps = config.taps * (width + 2 * config.state_dim)
    return 2.0 * tokens * (embed_dim * each + taps), 4.0 * tokens * width * config.state_dim


_HEADS = ("expand", "head_dim", "state_dim", "use_bias")
_gated = functools.partial(_linear_flops, gate=True)

MIXERS = {
    "attention": Mixer(_attention, _attention_cache, None, name="self_attention", causal=False,
                       attends=True),
    "lstm": Mixer(
        _own(LSTM), _cache(lambda config, width: {
            name: _state((width,), "act_mlp") for name in ("hidden", "cell")}),
        _lstm_flops, settings=("expand", "use_bias")),
    "rg_lru": Mixer(
        _own(RGLRU), _cache(lambda config, width: {
            "inputs": _inputs(config, width, "act_heads"), "state": _state((width,), "act_heads")}),
        _rg_lru_flops, settings=("expand", "head_dim", "taps", "use_bias"), heads=True),
    "ssd": Mixer(_own(StateSpace), _cache(_ssd_cache), _ssd_flops, settings=(*_HEADS, "taps"), heads=True),
    "conv": Mixer(
        _own(Convolution), _cache(lambda config, width: {"inputs": _inputs(config, width, "act_mlp")}),
        _conv_flops, settings=("expand", "taps", "use_bias"), causal=False),
    "gmlp": Mixer(_own(SpatialGating), _gmlp_cache, _gmlp_flops,
                  settings=("expand", "max_length", "use_bias"), causal=False),
    "linear": Mixer(
        _own(LinearAttention), _cache(lambda config, width: {"state": _matrix(config, width, 1)}),
        functools.partial(_linear_flops, more=1), settings=_HEADS, causal=False, heads=True),
    "gated_linear": Mixer(
        _own(GatedLinearAttention), _cache(lambda config, width: {"state": _matrix(config, width)}),
        functools.partial(_gated, decay=True), settings=_HEADS, heads=True),
    "retention": Mixer(
        _own(functools.partial(GatedLinearAttention, decays=constant_decays)),
        _cache(lambda config, width: {"state": _matrix(config, width)}), _gated, settings=_HEADS,
        heads=True),
}
