"""Which numbers a config's field may hold, written beside the field and checked at the door.

    vocab_size: Count = 32128        # at least 1
    dropout_rate: Rate = 0.0         # 0 to below 1
    clip_norm: float = 0.0           # no bound of its own: finite and at least 0

The bounds are a part of the type, as typing.Annotated has it, and change nothing for who reads or
writes the field. `check` walks a config and names the first number out of bounds; config.from_mapping
calls it for what a command line or a file gave, and build for what Python made.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from t5x_lite.errors import between, refuse

# The largest integer: what counts steps, rows or ids is an int32 on the devices.
LARGEST = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval. Integers end at LARGEST, and NaN and infinities are in none."""

    lowest: float = 0
    highest: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def check(self, field: str, value: float) -> None:
        """Raises UserError for a number outside, naming the field, the value and the interval."""
        if isinstance(value, int) and value > LARGEST:
            raise refuse(field, value, f"at most {LARGEST:,}")
        between(field, value, self.lowest, self.highest, open_below=self.open_below,
                open_above=self.open_above)


Count = Annotated[int, Bounds(1)]                               # of things that must be there
Axis = Annotated[int, Bounds(-1)]                               # -1: what is left over
Seed = Annotated[int, Bounds(0, LARGEST)]
Positive = Annotated[float, Bounds(0, open_below=True)]
Rate = Annotated[float, Bounds(0, 1, open_above=True)]          # of dropout, of an average's decay
Share = Annotated[float, Bounds(0, 1)]
Signed = Annotated[float, Bounds(-math.inf)]

DEFAULT = Bounds()


def check(value: Any, where: str = "", hint: Any = None) -> None:
    """Raises UserError for the first number of a config, or of a part of it, that is out of bounds.

    Args:
        value: a dataclass, a tuple, a dict, or a number; others hold none.
        where: the dotted name of value.
        hint: the annotation that value's own bounds stand in.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bounds_of(hint).check(where, value)
    for part, name, part_hint in _parts(value, where, hint):
        check(part, name, part_hint)


def _parts(value: Any, where: str, hint: Any) -> list[tuple[Any, str, Any]]:
    """(part, its dotted name, its annotation) of what holds parts."""
    if dataclasses.is_dataclass(value):
        before = f"{where}." if where else ""
        return [(getattr(value, name), before + name, own)
                for name, own in hints_of(type(value)).items()]
    if isinstance(value, (tuple, list)):
        return [(item, f"{where}[{i}]", hint) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return [(item, f"{where}.{key}", hint) for key, item in value.items()]
    return []


def bounds_of(hint: Any) -> Bounds:
    """The bounds in an annotation, also in that of a tuple's items or of what may be None."""
    if isinstance(hint, Bounds):
        return hint
    inner = [*getattr(hint, "__metadata__", ()), *typing.get_args(hint)]
    return next((b for b in map(bounds_of, inner) if b is not DEFAULT), DEFAULT)


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """{field: annotation} of a dataclass, bounds included."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
