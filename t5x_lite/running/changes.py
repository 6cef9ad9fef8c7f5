"""Which fields of a config changed between a checkpoint and its resume."""

from typing import Any

from t5x_lite.tree import differences

_SHOWN = 12   # lines


def describe(old: Any, new: Any) -> list[str]:
    """"field: old -> new" lines, a dozen at most."""
    lines = [f"{field}: {_short(a)} -> {_short(b)}" for field, a, b in differences(old, new)]
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return lines[:_SHOWN] + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
