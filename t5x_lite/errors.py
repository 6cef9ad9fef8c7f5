"""Errors that a user can act on, and the checks that raise most of them.

A UserError says which value is wrong, what is allowed and how to mend it; the mains print
it without a traceback and exit with status 2. Anything else that escapes is our bug and
keeps its traceback.

The checks return the value that they let pass, and word their messages alike:

    field=value: must be what is allowed.
"""

import difflib
import math
from collections.abc import Iterable
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)


class UserError(ValueError):
    """Bad input: the message names the value, what is allowed and the fix."""


def nearest(name: object, names: Iterable[object]) -> str:
    """' did you mean X?' for the closest of `names`, or '' where none is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=1, cutoff=0.6)
    return f" did you mean {close[0]!r}?" if close else ""


def refuse(field: str, value: Any, allowed: str) -> UserError:
    """The error (not raised) of a field whose value is not what is allowed, "must be …"."""
    shown = repr(value)
    shown = shown if len(shown) < 200 else f"{shown[:200]}…"
    return UserError(f"{field}={shown}: must be {allowed}.")


def one_of(field: str, value: Any, allowed: Iterable[Any]) -> Any:
    """The value, one of `allowed`. Raises UserError that lists them and the nearest."""
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(f"{refuse(field, value, 'one of ' + ', '.join(map(str, allowed)))}"
                        f"{nearest(value, allowed)}")
    return value


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
