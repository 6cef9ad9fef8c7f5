"""Nested dicts of arrays as slash paths: the one naming scheme of parameters everywhere.

"encoder/segment_0/block_0/mlp/wi/kernel" names a parameter in regex groups, assignment
maps, checkpoints, conversion tables and error messages alike.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from t5x_lite.errors import nearest


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": x}} -> {"a/b": x}, in sorted order. Empty dicts vanish."""
    flat = {}
    for key in sorted(tree):
        path = f"{prefix}{key}"
        if isinstance(tree[key], Mapping):
            flat.update(flatten(tree[key], path + "/"))
        else:
            flat[path] = tree[key]
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict:
    """{"a/b": x} -> {"a": {"b": x}}, what `flatten` takes apart."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        assert last not in node, f"{path!r} is both a leaf and a branch"
        node[last] = leaf
    return tree


def map_with_path(fn: Callable, tree: Mapping, *rest: Mapping) -> dict:
    """fn(path, leaf, *leaves of rest at the same path) over a nested dict.

    `rest` may hold any value (not only arrays) at the leaves of `tree`.
    """
    flat, others = flatten(tree), [flatten(r) for r in rest]
    for other in others:
        assert flat.keys() == other.keys(), diff(flat, other)
    return unflatten({p: fn(p, leaf, *(o[p] for o in others)) for p, leaf in flat.items()})


def first_match(rules: Sequence[tuple[str, Any]], path: str) -> tuple[int, Any] | None:
    """(index, value) of the first rule whose regex matches the whole path, else None."""
    for index, (pattern, value) in enumerate(rules):
        if re.fullmatch(pattern, path):
            return index, value
    return None


@dataclasses.dataclass(frozen=True)
class TreeDiff:
    """What two flat trees do not share: paths, and (path, expected, given) of mismatches."""

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[tuple[str, Any, Any], ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.mismatched)

    def __str__(self) -> str:
        lines = []
        for path in self.missing:
            lines.append(f"  missing   {path}{nearest(path, self.extra)}")
        lines += [f"  extra     {path}" for path in self.extra]
        lines += [f"  mismatch  {p}: expected {e}, found {f}" for p, e, f in self.mismatched]
        shown = lines[:15]   # a screen
        return "\n".join(shown + ([f"  … {len(lines) - 15} more"] if len(lines) > 15 else []))


def diff(expected: Mapping[str, Any], given: Mapping[str, Any],
         same: Callable[[Any, Any], bool] = lambda a, b: True) -> TreeDiff:
    """Compares two flat trees by path, and by `same(expected, given)` where both hold it."""
    return TreeDiff(
        missing=tuple(p for p in expected if p not in given),
        extra=tuple(p for p in given if p not in expected),
        mismatched=tuple((p, expected[p], given[p]) for p in expected
                         if p in given and not same(expected[p], given[p])))


def shapes(tree: Mapping) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every leaf."""
    return {p: tuple(x.shape) for p, x in flatten(tree).items()}


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ; sections and equally long lists are read into.

    Args:
        where: the dotted name of both.
    Yields:
        (dotted field, old value, new value); None for a field that one side lacks.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        dot = "." if where else ""
        pairs = [(f"{where}{dot}{n}", old.get(n), new.get(n)) for n in dict.fromkeys([*old, *new])]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    elif old == new or _both_nan(old, new):
        return
    else:
        yield where, old, new
        return
    for pair in pairs:
        yield from differences(pair[1], pair[2], pair[0])


def _both_nan(old: Any, new: Any) -> bool:
    return old != old and new != new

