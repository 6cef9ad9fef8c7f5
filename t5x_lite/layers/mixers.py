"""What a row of blocks.MIXERS holds, and what those beside attention keep, cost and refuse.

Shape letters: B batch, L length, D model, W inner features, N heads, K and V features of a key and a
value, T taps.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from t5x_lite.errors import UserError, one_of
from t5x_lite.layers.config import MixerConfig
from t5x_lite.layers.position import POSITIONS


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


def validate(where: str, stack, model, rows: Mapping[str, Mixer]) -> None:
    """Raises UserError for mixers of a stack that cannot be, naming the field.

    Args:
        where: the stack, such as "model.decoder".
        stack, model: their configs.
        rows: the whole table, blocks.MIXERS.
    """
    blocks = [(f"{where}.segments[{i}].blocks[{j}]", block) for i, segment in enumerate(stack.segments)
              for j, block in enumerate(segment.blocks)]
    for here, block in blocks:
        one_of(f"{here}.mixer.kind", block.mixer.kind, rows)
    others = [(here, block) for here, block in blocks if not rows[block.mixer.kind].attends]
    for here, block in others:
        _validate_one(block.mixer, f"{here}.mixer", model.embed_dim, rows, causal=stack.causal)
        if block.position is not None:
            raise UserError(f"{here}.position acts on queries and keys, and mixer.kind="
                            f"{block.mixer.kind!r} has none. Leave it at None.")
        if model.parametrization != "standard":
            raise UserError(f"{here}.mixer.kind={block.mixer.kind!r} has no maximal-update parametrisation "
                            "here: use model.parametrization=standard.")
    if len(others) == len(blocks):
        _validate_positions(stack.position.kind, f"{where}.position")


def _validate_one(config: MixerConfig, where: str, embed_dim: int, rows: Mapping[str, Mixer], *,
                  causal: bool) -> None:
    """causal: of the stack."""
    row = rows[config.kind]
    if row.causal and not causal:
        fit = [name for name, other in rows.items() if not other.causal]
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


def kept(entries: Callable[[MixerConfig, int], dict[str, Kept]]) -> Callable:
    """A row's cache of a state that does not grow with the length: (config, W) -> entries."""
    return lambda block, embed_dim, length: entries(block.mixer, inner(block.mixer, embed_dim))


def _state(features: tuple[int, ...], *axes: str | None) -> Kept:
    return Kept(features, axes, jnp.float32)


def _inputs(config: MixerConfig, features: int, axis: str | None) -> Kept:
    """Behind a convolution: [T - 1, features]."""
    return Kept((config.taps - 1, features), (None, axis))


def lstm_cache(config: MixerConfig, width: int) -> dict[str, Kept]:
    """h and c."""
    return {name: _state((width,), "act_mlp") for name in ("hidden", "cell")}


def rg_lru_cache(config: MixerConfig, width: int) -> dict[str, Kept]:
    """h, and the convolution's inputs."""
    return {"inputs": _inputs(config, width, "act_heads"), "state": _state((width,), "act_heads")}


def conv_cache(config: MixerConfig, width: int) -> dict[str, Kept]:
    """The convolution's inputs."""
    return {"inputs": _inputs(config, width, "act_mlp")}


def linear_cache(config: MixerConfig, width: int, more: int = 0) -> dict[str, Kept]:
    """S: [N, K, V + more]."""
    shape = (width // config.head_dim, config.state_dim, config.head_dim + more)
    return {"state": _state(shape, "act_heads", None, None)}


def ssd_cache(config: MixerConfig, width: int) -> dict[str, Kept]:
    """S, and the inputs of three convolutions."""
    return {**linear_cache(config, width), "value": _inputs(config, width, "act_heads"),
            **{name: _inputs(config, config.state_dim, None) for name in ("key", "query")}}


def gmlp_cache(block, embed_dim: int, length: int) -> dict[str, Kept]:
    """norm(v) of every token: this one grows."""
    return {"values": Kept((1, length, inner(block.mixer, embed_dim)), (None, "act_keys", "act_mlp"))}


def lstm_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    """The gates' kernels, and the output's."""
    width = inner(config, embed_dim)
    return 2.0 * rows * length * width * (4 * embed_dim + 4 * width + embed_dim), 0.0


def conv_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    """Kernels and taps."""
    return 2.0 * rows * length * inner(config, embed_dim) * (3 * embed_dim + config.taps), 0.0


def rg_lru_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    """Kernels, taps, and the blocks of two gates."""
    each = 3 * embed_dim + config.taps + 2 * config.head_dim
    return 2.0 * rows * length * inner(config, embed_dim) * each, 0.0


def gmlp_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    """All pairs of tokens, as for attention."""
    tokens, width = rows * length, inner(config, embed_dim)
    return 6.0 * tokens * width * embed_dim, 2.0 * tokens * width * length


def linear_flops(config: MixerConfig, embed_dim: int, rows: int, length: int, *, more: int = 0,
                 decay: bool = False, gate: bool = False) -> tuple[float, float]:
    """Of the recurrent form: each token writes the state and reads it. Pairs within chunks, which the
    parallel form computes as well, are its own choice."""
    tokens, width = rows * length, inner(config, embed_dim)
    heads = width // config.head_dim
    each = 2 * heads * config.state_dim + (2 + gate) * width + decay * heads
    numbers = heads * config.state_dim * (config.head_dim + more)   # of a row's state
    return 2.0 * tokens * embed_dim * each, 4.0 * tokens * numbers


def ssd_flops(config: MixerConfig, embed_dim: int, rows: int, length: int) -> tuple[float, float]:
    """Kernels and taps; by activations the recurrent form, as linear_flops."""
    tokens, width = rows * length, inner(config, embed_dim)
    each = 3 * width + 2 * config.state_dim + width // config.head_dim
    taps = config.taps * (width + 2 * config.state_dim)
    return 2.0 * tokens * (embed_dim * each + taps), 4.0 * tokens * width * config.state_dim
