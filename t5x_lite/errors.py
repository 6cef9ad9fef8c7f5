"""Errors that a user can act on, and the checks that raise most of them.

A UserError says which value is wrong, what is allowed and how to mend it; the mains print
it without a traceback and exit with status 2 (TryAgain: 75). Anything else that escapes is our bug
and keeps its traceback.

The checks return the value that they let pass, and word their messages alike:

    field=value: must be what is allowed.

Which numbers a config's field may hold stands beside the field, and is checked at the door:

    vocab_size: Count = 32128        # at least 1
    dropout_rate: Rate = 0.0         # 0 to below 1
    clip_norm: float = 0.0           # no bound of its own: finite and at least 0

The bounds are a part of the type, as typing.Annotated has it, and change nothing for who reads or
writes the field. `check` walks a config and names the first number out of bounds; config.from_mapping
calls it for what a command line or a file gave, and build for what Python made.
"""

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

Number = TypeVar("Number", int, float)


class UserError(ValueError):
    """Bad input: the message names the value, what is allowed and the fix."""


class TryAgain(UserError):
    """What failed may work later, with nothing changed: a bucket is out of reach for the moment. The
    mains exit with status 75, after which launchers start them again."""


def nearest(name: object, names: Iterable[object]) -> str:
    """' did you mean X?' for the closest of `names`, or '' where none is close. Capitals count as small
    letters, unless two names differ in them alone."""
    known = [str(n) for n in names]
    small = {text.lower(): text for text in known}
    if len(small) == len(known):
        close = difflib.get_close_matches(str(name).lower(), small, n=1, cutoff=0.6)
        return f" did you mean {small[close[0]]!r}?" if close else ""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f" did you mean {close[0]!r}?" if close else ""


def refuse(field: str, value: Any, allowed: str) -> UserError:
    """The error (not raised) of a field whose value is not what is allowed, "must be …"."""
    shown = repr(value)
    shown = shown if len(shown) < 200 else f"{shown[:200]}…"
    return UserError(f"{field}={shown}: must be {allowed}.")


def one_of(field: str, value: Any, allowed: Iterable[Any],
           elsewhere: Mapping[Any, Any] | None = None) -> Any:
    """The value, one of `allowed`. Raises UserError that lists them and the nearest.

    elsewhere: names that others give to what is allowed, {theirs: ours}.
    """
    allowed = list(allowed)
    if value not in allowed:
        ours = elsewhere.get(value) if elsewhere else None
        hint = f" did you mean {ours!r}?" if ours else nearest(value, allowed)
        raise UserError(f"{refuse(field, value, 'one of ' + ', '.join(map(str, allowed)))}{hint}")
    return value


def known(where: str, what: str, name: Any, names: Iterable[Any]) -> Any:
    """The name, one of `names`, for what a user names inside a longer value.

    Args:
        where: the field or file that holds it.
        what: the kind of thing, such as "mesh axis".
    Raises:
        UserError: lists the names, the nearest first.
    """
    names = list(names)
    if name not in names:
        shown = repr(name) if len(repr(name)) < 100 else f"{repr(name)[:100]}…"
        raise UserError(f"{where}: no {what} is called {shown}.{nearest(name, names)} "
                        f"Known: {', '.join(map(str, names))}.")
    return name


def at_least(field: str, value: Number, lowest: float, fix: str = "") -> Number:
    """The value, a finite number of at least `lowest`. fix: what to do, a sentence."""
    return between(field, value, lowest, math.inf, fix)


def positive(field: str, value: Number, fix: str = "") -> Number:
    """The value, a finite number above 0. fix: what to do, a sentence."""
    return between(field, value, 0, math.inf, fix, open_below=True)


def between(field: str, value: Number, lowest: float, highest: float, fix: str = "", *,
            open_below: bool = False, open_above: bool = False) -> Number:
    """The value, a finite number from `lowest` to `highest` (open: without that end).

    Args:
        fix: what to do, a sentence.
    Raises:
        UserError: a value beyond, NaN or an infinity.
    """
    above = value > lowest if open_below else value >= lowest
    below = value < highest if open_above else value <= highest
    is_finite = isinstance(value, int) or math.isfinite(value)   # an int may be too long for isfinite
    if above and below and is_finite:
        return value
    allowed = _interval(lowest, highest, open_below, open_above)
    if not is_finite:
        allowed = f"a finite number {allowed}"
    raise UserError(f"{refuse(field, value, allowed)}{' ' if fix else ''}{fix}")


def _interval(lowest: float, highest: float, open_below: bool, open_above: bool) -> str:
    """"at least 1", "above 0" or "in [0, 1)"."""
    low, high = (f"{n:,}" if isinstance(n, int) else repr(n) for n in (lowest, highest))
    if math.isinf(highest):
        return f"above {low}" if open_below else f"at least {low}"
    return f"in {'(' if open_below else '['}{low}, {high}{')' if open_above else ']'}"


def multiple_of(field: str, value: int, unit: int, why: str) -> int:
    """The value, a multiple of `unit`. why: where the unit comes from. Names what is near."""
    if value % unit == 0:
        return value
    near = [f"{n * unit:,}" for n in (value // unit, value // unit + 1) if n > 0]
    raise UserError(f"{field}={value} must be a multiple of {unit}: {why}; "
                    f"{' or '.join(near)} would do.")


# --- bounds of a config's numbers -----------------------------------------------------------------

# The largest integer and float: what counts steps, rows or ids is an int32 on the devices, and a
# number beyond float32's is an infinity there.
LARGEST = 2**31 - 1
LARGEST_FLOAT = 3.4e38


@dataclasses.dataclass(frozen=True)
class Bounds:
    """An interval. Integers end at LARGEST, floats at LARGEST_FLOAT; NaN and infinities are in none."""

    lowest: float = 0
    highest: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def check(self, field: str, value: float) -> None:
        """Raises UserError for a number outside, naming the field, the value and the interval."""
        if isinstance(value, int) and value > LARGEST:
            raise refuse(field, value, f"at most {LARGEST:,}")
        if isinstance(value, float) and LARGEST_FLOAT < abs(value) < math.inf:
            raise refuse(field, value, f"at most {LARGEST_FLOAT:g}, as float32 has it")
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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
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
