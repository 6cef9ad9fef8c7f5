"""An optax state as plain dicts, and back.

A checkpoint must not depend on optax's classes or on their order in a chain. So the arrays of a
state, which may nest chains, masks and partitions, are told apart by what they belong to:

    moments   {name: {path: array}}: what mirrors parameters, each under its parameter's path
    rest      {name: array}: counts and other numbers that belong to no parameter

A name is that of the innermost field that holds the array: "mu" for Adam's first moment, alone or
inside of a chain. Where the parts of a chain keep several arrays of one name for a parameter, the
second is NAME_2, and so on; parts that cover different parameters, as muon's two do, share a name.

The transformation must be of flat dicts {path: array}.
"""

import collections
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import optax

Moments = dict[str, dict[str, Any]]
Rest = dict[str, Any]


def apart(state: optax.OptState, paths: Collection[str]) -> tuple[Moments, Rest]:
    """(moments, rest) of a state of a transformation of the parameters at these paths."""
    moments: Moments = {}
    rest: Rest = {}
    for (name, path), array in _named(state, paths):
        if path is None:
            rest[name] = array
        else:
            moments.setdefault(name, {})[path] = array
    return moments, rest


def together(like: optax.OptState, moments: Mapping[str, Mapping[str, Any]],
             rest: Mapping[str, Any], paths: Collection[str]) -> optax.OptState:
    """A state of the structure of `like`, with the arrays that `apart` gave."""
    arrays = [rest[name] if path is None else moments[name][path]
              for (name, path), _ in _named(like, paths)]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


def _named(state: optax.OptState, paths: Collection[str]
           ) -> Iterator[tuple[tuple[str, str | None], Any]]:
    """((name, the parameter's path or None), array) of every array, in the state's order."""
    met: collections.Counter = collections.Counter()
    for keys, array in jax.tree_util.tree_leaves_with_path(state):
        fields = [key.name for key in keys if isinstance(key, jax.tree_util.GetAttrKey)]
        owners = [key.key for key in keys
                  if isinstance(key, jax.tree_util.DictKey) and key.key in paths]
        name, path = fields[-1] if fields else "state", owners[-1] if owners else None
        met[name, path] += 1
        number = met[name, path]
        yield (name if number == 1 else f"{name}_{number}", path), array
