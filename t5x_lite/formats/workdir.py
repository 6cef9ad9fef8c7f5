"""A checkpoint of ours as a model of others is: its layers regrouped as another config has them.

Scanned, unrolled and differently grouped stacks hold the same layers, so that a run may start from a
workdir that stacked them otherwise.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from t5x_lite.formats.mapping import (
    ForeignModel,
    Layout,
    Placed,
    ReadTensor,
    Slot,
    Tensors,
    like_segments,
    parse,
)
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.language_model import Model


def model_of(where: str, stored: ModelConfig, arrays: Mapping[str, Any], read: ReadTensor, *,
             like: ModelConfig | None, step: int, collective: bool) -> ForeignModel:
    """The model whose parameters are `arrays`, its layers regrouped as those of `like`.

    Args:
        where: the workdir, for messages.
        stored: the config that the checkpoint was written under.
        arrays: {path: what has a shape and a dtype}.
        read: path -> the whole array.
        collective: every process must read, and all of them at once.
    """
    config = like_segments(stored, like)
    held = _layers(stored, arrays)
    table = Model(config).table
    placed = {}
    for path, info in table.items():
        generic, layers = parse(config, path)
        numbers: Sequence[int | None] = layers or [None]
        wanted = [(generic, number) for number in numbers]
        if all(key in held for key in wanted):
            stacked = int(layers is not None)
            placed[path] = Placed(info.shape[:stacked], info.shape[stacked:],
                                  tuple(held[key] for key in wanted))
    tensors = Tensors({p: tuple(x.shape) for p, x in arrays.items()},
                      {p: jnp.dtype(x.dtype) for p, x in arrays.items()}, read,
                      collective=collective)
    return ForeignModel(where, config, True, {p: table[p] for p in placed}, placed, tensors,
                        step=step)


def _layers(stored: ModelConfig, arrays: Mapping[str, Any]) -> dict[tuple[str, int | None], Slot]:
    """{(path with "*" for a layer's number, the number or None): where that layer stands}."""
    held: dict[tuple[str, int | None], Slot] = {}
    for path, array in arrays.items():
        generic, layers = parse(stored, path)
        if layers is None:
            held[generic, None] = Slot(path, array.shape, Layout(lambda s: s, lambda t: t))
            continue
        for i, layer in enumerate(layers):
            held[generic, layer] = Slot(path, array.shape,
                                        Layout(lambda s: s, operator.itemgetter(i)))
    return held
