"""A drawing of how the rules of a config split parameters over a mesh that need not exist."""

import itertools
from collections.abc import Mapping, Sequence

from t5x_lite import packages
from t5x_lite.errors import known
from t5x_lite.models.params import ParamInfo
from t5x_lite.parallel.sharding import Rules, mesh_axes_of

COLUMNS = 3   # of drawings
Block = tuple[int, int]   # row and column of a block in the grid of blocks


def blocks(info: ParamInfo, rules: Rules, mesh: Mapping[str, int]
           ) -> tuple[tuple[int, int], dict[Block, list[int]]]:
    """How many blocks the last two dims of a parameter fall into, and the devices that hold each.

    mesh: axis -> size; devices are numbered with the last axis fastest. A vector has one row.
    """
    rules.check(info.path, info.logical_axes, info.units, mesh)
    dims = [mesh_axes_of(dim) for dim in rules.spec(info.logical_axes, mesh)][-2:]
    rows, columns = [()] * (2 - len(dims)) + dims
    places = itertools.product(*(range(size) for size in mesh.values()))
    held: dict[Block, list[int]] = {}
    for device, place in enumerate(places):
        at = dict(zip(mesh, place, strict=True))
        held.setdefault((_index(rows, at, mesh), _index(columns, at, mesh)), []).append(device)
    return (_count(rows, mesh), _count(columns, mesh)), held


def _index(axes: Sequence[str], at: Mapping[str, int], mesh: Mapping[str, int]) -> int:
    """The number of a device's block in a dim that these mesh axes split, the last one fastest."""
    index = 0
    for axis in axes:
        index = index * mesh[axis] + at[axis]
    return index


def _count(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    return _index(axes, {axis: mesh[axis] - 1 for axis in axes}, mesh) + 1


def drawn(table: Mapping[str, ParamInfo], rules: Rules, mesh: Mapping[str, int], names: Sequence[str]):
    """A matplotlib figure: a parameter a panel, its blocks with the devices that hold them.

    table, rules: of a Program. mesh: axis -> size, {"fsdp": 4, "tensor": 2}. names: paths of the table.

    Raises:
        UserError: an unknown parameter, or a mesh that does not divide one.
    """
    Figure = packages.needed("matplotlib.figure", "plots", "drawings").Figure
    for name in names:
        known("parameters", "name", name, table)
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        _draw(axes, table[name], *blocks(table[name], rules, mesh))
    for axes in grid[len(names):]:
        axes.set_axis_off()
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.items())
    figure.suptitle(f"which devices of {sizes} hold which block", fontsize=10)
    return figure


def _draw(axes, info: ParamInfo, shape: tuple[int, int], held: Mapping[Block, Sequence[int]]) -> None:
    from matplotlib.patches import Rectangle
    colors = {devices: f"C{number % 10}" for number, devices in enumerate(
        sorted({tuple(devices) for devices in held.values()}))}
    for (row, column), devices in held.items():
        place = (column / shape[1], 1 - (row + 1) / shape[0])
        axes.add_patch(Rectangle(place, 1 / shape[1], 1 / shape[0], facecolor=colors[tuple(devices)],
                                 alpha=0.35, edgecolor="black", linewidth=0.8))
        axes.text(place[0] + 0.5 / shape[1], place[1] + 0.5 / shape[0], _listed(devices),
                  ha="center", va="center", fontsize=8)
    sides = [f"{axis or ''} {size}".strip() for axis, size in zip(info.logical_axes, info.shape, strict=True)]
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], xlabel=sides[-1],
             ylabel=sides[-2] if len(sides) > 1 else "")
    axes.set_title(_title(info.path), fontsize=9)


def _title(path: str) -> str:
    """The last three parts of a path."""
    return "/".join(path.split("/")[-3:])


def _listed(devices: Sequence[int]) -> str:
    """"0", "0, 4", or "0 … 7" for a run of more than three."""
    whole = list(range(devices[0], devices[-1] + 1))
    if len(devices) > 3 and list(devices) == whole:
        return f"{devices[0]} … {devices[-1]}"
    return ", ".join(map(str, devices))
