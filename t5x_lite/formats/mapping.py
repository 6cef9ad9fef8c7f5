"""Where each of our parameters stands among the tensors of another library.

A family's mapping is a table of Rules, ours <-> theirs, which both directions use: a Layout
gives the part of one of their tensors that holds one of ours as a numpy *view*. Import copies
from the view and export assigns to it, so that one undoes the other bit for bit.

    Rule("decoder/*/self_attention/query/kernel", "h.{n}.attn.c_attn.weight", column_block(0, 3))

"*" stands for segment_i/block_j. Our parameters are stacked over the repeats of a segment;
theirs are one a layer, {n}, and perhaps one an expert, {e}.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from t5x_lite import tree
from t5x_lite.errors import UserError
from t5x_lite.models.config import ModelConfig, SegmentConfig, StackConfig
from t5x_lite.models.params import ParamInfo

Shape = tuple[int, ...]
ReadTensor = Callable[[str], np.ndarray]

_LAYER_PATH = re.compile(r"(encoder|decoder)/segment_(\d+)/block_(\d+)/(.*)")


# --- tables ---------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Layout:
    """How one of our parameters, unstacked, lies in one of their tensors."""

    shape: Callable[[Shape], Shape]            # ours -> that of the whole tensor
    view: Callable[[np.ndarray], np.ndarray]   # the tensor -> a view of our elements in our order


SAME = Layout(lambda shape: shape, lambda tensor: tensor)
TRANSPOSED = Layout(lambda shape: shape[::-1], lambda tensor: tensor.T)


def column_block(i: int, of: int) -> Layout:
    """Block i of `of` equal ones along the last dim (GPT-2's fused query, key and value)."""
    def view(tensor):
        width = tensor.shape[-1] // of
        return tensor[..., i * width:(i + 1) * width]
    return Layout(lambda shape: (*shape[:-1], of * shape[-1]), view)


def head_block(i: int, of: int, num_heads: int) -> Layout:
    """Transposed, and block i of `of` within the rows of each head (NeoX's fused query, key and
    value: rows run over head, then which of the three, then feature)."""
    def view(tensor):
        block = tensor.reshape(num_heads, of, -1, *tensor.shape[1:])[:, i]
        return np.moveaxis(block, -1, 0) if tensor.ndim == 2 else block
    return Layout(lambda shape: (of * shape[-1], *shape[:-1]), view)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row of a mapping."""

    ours: str              # path, "*" for segment_i/block_j
    theirs: str            # name, with {n} for the layer and {e} for the expert
    layout: Layout = SAME


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one layer's (and one expert's) share of a parameter stands."""

    name: str              # of their tensor
    shape: Shape           # of their tensor
    layout: Layout


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where one of our parameters stands."""

    lead: Shape                # its stacked dims: layers, experts; () where it is not stacked
    inner: Shape               # the others
    slots: tuple[Slot, ...]    # one for each index of `lead`, in C order


def layer_numbers(stack: StackConfig, segment: int, block: int) -> list[int]:
    """The layers of the stack that repeats of this block are."""
    first = sum(len(s.blocks) * s.repeats for s in stack.segments[:segment])
    per_repeat = len(stack.segments[segment].blocks)
    return [first + r * per_repeat + block for r in range(stack.segments[segment].repeats)]


def parse(config: ModelConfig, path: str) -> tuple[str, list[int] | None]:
    """A path with "*" for its segment and block, and the layers it is stacked over, or None."""
    match = _LAYER_PATH.fullmatch(path)
    if match is None:
        return path, None
    side, segment, block, rest = match.groups()
    return f"{side}/*/{rest}", layer_numbers(getattr(config, side), int(segment), int(block))


def place(rules: Iterable[Rule], config: ModelConfig, table: Mapping[str, ParamInfo], family: str
          ) -> dict[str, Placed]:
    """{our path: where it stands} for every parameter of a model.

    Raises:
        UserError: the family has no place for a parameter.
    """
    by_path = {rule.ours: rule for rule in rules}
    placed, homeless = {}, []
    for path, info in table.items():
        generic, layers = parse(config, path)
        rule = by_path.get(generic)
        if rule is None:
            homeless.append(path)
            continue
        ranges: list[Sequence[int]] = [] if layers is None else [layers]
        if "{e}" in rule.theirs:
            ranges.append(range(info.shape[len(ranges)]))
        inner = info.shape[len(ranges):]
        numbers = itertools.product(*ranges)
        names = [rule.theirs.format(**dict(zip("ne" if layers is not None else "e", at,
                                               strict=False))) for at in numbers]
        placed[path] = Placed(
            info.shape[:len(ranges)], inner,
            tuple(Slot(name, tuple(rule.layout.shape(inner)), rule.layout) for name in names))
    if homeless:
        raise UserError(f"{family} has no place for these parameters of the model:\n"
                        + "\n".join(f"  {path}" for path in homeless))
    return placed


def read_parameter(placed: Placed, read: ReadTensor, dtype: Any = None,
                   index: tuple[slice, ...] | None = None) -> np.ndarray:
    """One of our parameters, or the part of it at `index`, tensor by tensor.

    Args:
        dtype: of the result; None: as stored.
        index: a slice for every dim, as shardings give them.
    """
    index = index or (slice(None),) * (len(placed.lead) + len(placed.inner))
    lead, inner = index[:len(placed.lead)], index[len(placed.lead):]
    chosen = np.arange(len(placed.slots)).reshape(placed.lead)[lead]
    result = None
    for at, number in np.ndenumerate(chosen):
        slot = placed.slots[number]
        part = slot.layout.view(read(slot.name)).reshape(placed.inner)[inner]
        if result is None:
            result = np.empty((*chosen.shape, *part.shape), dtype or part.dtype)
        result[at] = part
    assert result is not None, "no slot of this parameter was chosen"
    return result


def write_parameter(placed: Placed, value: np.ndarray, tensor: ReadTensor) -> None:
    """Writes one of our parameters where read_parameter reads it.

    Args:
        tensor: gives their tensors to write into, by name.
    """
    parts = value.reshape(len(placed.slots), *placed.inner)
    for part, slot in zip(parts, placed.slots, strict=True):
        view = slot.layout.view(tensor(slot.name))
        view[...] = part.reshape(view.shape)


# --- models ---------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Tensors:
    """The named tensors of a checkpoint, whatever it is stored as."""

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, np.dtype]
    read: ReadTensor                     # lazily where the format allows
    collective: bool = False             # all processes must read the same tensors together


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """A checkpoint of another library, read through our paths."""

    where: str                            # as the user wrote it
    config: ModelConfig
    knows_function: bool                  # `config` was stored, not inferred from shapes
    table: Mapping[str, ParamInfo]
    placed: Mapping[str, Placed]
    tensors: Tensors
    unused: tuple[str, ...] = ()          # their tensors that a model of ours has no use for
    step: int = 0

    @property
    def shapes(self) -> dict[str, Shape]:
        """{our path: shape}."""
        return {path: info.shape for path, info in self.table.items()}

    def dtype(self, path: str) -> np.dtype:
        """What a parameter is stored as."""
        return np.dtype(self.tensors.dtypes[self.placed[path].slots[0].name])

    def read(self, path: str, dtype: Any = None, index: tuple[slice, ...] | None = None
             ) -> np.ndarray:
        """One parameter, or a part of it; see read_parameter."""
        return read_parameter(self.placed[path], self.tensors.read, dtype, index)


def foreign_model(where: str, config: ModelConfig, table: Mapping[str, ParamInfo],
                  rules: Iterable[Rule], tensors: Tensors, *, family: str,
                  unused: Iterable[str] = (), knows_function: bool = True,
                  step: int = 0, partial: bool = False) -> ForeignModel:
    """Checks that the tensors are those of the model, all of them and no others.

    Args:
        table: the model's parameters, Model(config).table.
        unused: regexes of names that may be there though a model of ours has no use for them.
        partial: the caller takes what it needs: parameters whose tensors are not all there
            are left out of the table, and further tensors count as unused.

    Raises:
        UserError: a tensor is missing, extra or misshapen; lists all of them.
    """
    placed = place(rules, config, table, family)
    expected = {slot.name: slot.shape for p in placed.values() for slot in p.slots}
    ignored = _ignored(tensors, expected, unused)
    held = {name: shape for name, shape in tensors.shapes.items() if name not in ignored}
    difference = tree.diff(expected, held, same=lambda a, b: a == b)
    if difference and not partial:
        raise UserError(f"{where} does not hold the tensors of the {family} model that its "
                        f"config describes:\n{difference}")
    if partial:
        ignored += difference.extra
        bad = {*difference.missing, *(name for name, _, _ in difference.mismatched)}
        placed = {path: p for path, p in placed.items() if not any(s.name in bad for s in p.slots)}
        table = {path: table[path] for path in placed}
    _check_are_numbers(where, placed, tensors)
    return ForeignModel(where, config, knows_function, table, placed, tensors, tuple(ignored), step)


def _ignored(tensors: Tensors, expected: Mapping[str, Shape], unused: Iterable[str]) -> list[str]:
    """Names of tensors that are not expected and match one of the `unused` regexes."""
    patterns = [re.compile(pattern) for pattern in unused]
    return [name for name in tensors.shapes if name not in expected
            and any(pattern.fullmatch(name) for pattern in patterns)]


def _check_are_numbers(where: str, placed: Mapping[str, Placed], tensors: Tensors) -> None:
    """Raises UserError for parameters stored as integers, which quantisation leaves."""
    for p in placed.values():
        for slot in p.slots:
            dtype = np.dtype(tensors.dtypes[slot.name])
            if not jnp.issubdtype(dtype, jnp.floating):
                raise UserError(f"{where}: {slot.name} is stored as {dtype}, not as numbers of a "
                                "model: a quantised checkpoint? Take the unquantised one.")


def like_segments(config: ModelConfig, like: ModelConfig | None) -> ModelConfig:
    """The config with its layers grouped into segments as those of `like` are.

    Only stacks of equally many equal layers are regrouped, which changes no function.
    """
    if like is None:
        return config
    changes = {}
    for side in ("encoder", "decoder"):
        own, other = getattr(config, side), getattr(like, side)
        if own is None or other is None or own.num_layers != other.num_layers:
            continue
        blocks = {block for segment in own.segments for block in segment.blocks}
        if len(blocks) == 1:
            (block,) = blocks
            changes[side] = dataclasses.replace(own, segments=tuple(
                SegmentConfig((block,) * len(s.blocks), s.repeats) for s in other.segments))
    return dataclasses.replace(config, **changes)


def num_bytes(shapes: Mapping[str, Shape], dtypes: Mapping[str, Any]) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(s) * np.dtype(dtypes[n]).itemsize for n, s in shapes.items())
