"""Which array of a source becomes which parameter of a model: the map of `config.init_map`.

(regex, replacement) pairs over the model's paths say what comes from where; init_from.py tells the
user how they are written. Two shapes may differ: a vocabulary may be padded, and a dense MLP is
copied to every expert.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from t5x_lite import tree
from t5x_lite.errors import UserError, nearest
from t5x_lite.formats.functions import differences
from t5x_lite.formats.mapping import ForeignModel, Shape
from t5x_lite.models.config import ModelConfig
from t5x_lite.models.params import ParamInfo

InitMap = Sequence[tuple[str, str]]

_SHOWN = 40   # lines of each kind that `describe` gives


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where every parameter of a model comes from."""

    loaded: dict[str, str]         # our path -> the source's
    fresh: tuple[str, ...]         # left as they were initialised
    skipped: tuple[str, ...]       # held by the source and not asked for


def assign(table: Mapping[str, ParamInfo], held: Mapping[str, Shape], init_map: InitMap,
           where: str, added: frozenset[str] = frozenset()) -> Assignment:
    """Applies the map, or without one demands that both sides are the same.

    Args:
        held: {path: shape} of the source.
        where: what the source is called in messages.
        added: paths that no source need hold.

    Raises:
        UserError: a rule that is no regex or matches nothing; parameters that are missing,
            extra or misshapen, all of them.
    """
    sources, used = {}, set()
    for path in table:
        rule, sources[path] = _source_of(path, init_map)
        used.add(rule)
        if rule is None and path in added and path not in held:
            sources[path] = ""
    for i, (pattern, _) in enumerate(init_map):
        if i not in used:
            raise UserError(f"init_map[{i}]: {pattern!r} matches no parameter of the model that "
                            f"an earlier rule left over.{nearest(pattern, table)} "
                            "They are listed in a workdir's parameters.txt.")
    loaded = {path: source for path, source in sources.items() if source}
    wanted = {source: _Wanted(table[path]) for path, source in loaded.items()}
    difference = tree.diff(wanted, held, same=lambda one, shape: fit(one.info, shape) is not None)
    skipped = difference.extra
    if init_map:
        difference = dataclasses.replace(difference, extra=())
    if difference:
        raise UserError(
            f"{where} does not hold the parameters that the model needs (expected: the model's; "
            f"found: the source's):\n{difference}\n{fields_to_set(difference.mismatched)}Load a part of them with "
            "--config.init_map=\"((regex, source path or ''), …)\", where '' leaves fresh.")
    fresh = tuple(path for path, source in sources.items() if not source)
    return Assignment(loaded, fresh, skipped)


def _source_of(path: str, init_map: InitMap) -> tuple[int | None, str]:
    """(the number of the first rule that matches the path, what it says); (None, path) without."""
    for i, (pattern, replacement) in enumerate(init_map):
        try:
            match = re.fullmatch(pattern, path)
            if match:
                return i, match.expand(replacement)
        except (re.error, IndexError) as error:
            raise UserError(f"init_map[{i}]=({pattern!r}, {replacement!r}): {error}.") from error
    return None, path


# Which field of a config makes a dim of this logical axis so long.
_FIELD_OF = {"embed": "model.embed_dim", "vocab": "model.vocab_size", "mlp": "mlp_dim of mlp or moe",
             "heads": "num_heads of attention", "kv_heads": "num_kv_heads of attention",
             "head_dim": "head_dim of attention", "expert": "num_experts of moe",
             "layers": "repeats of segments", "position": "max_length of position",
             "buckets": "num_buckets of position", "lora": "peft.rank"}


def fields_to_set(mismatched: Iterable[tuple[str, "_Wanted", Shape]]) -> str:
    """"To take them as they are, set …" with each field and value that the found shapes ask for, and
    an end of line; "" where the shapes do not say."""
    asked: dict[str, None] = {}
    for path, wanted, found in mismatched:
        info, stack = wanted.info, path.partition("/")[0]
        if len(found) != len(info.shape):
            continue
        for axis, ours, theirs, unit in zip(info.logical_axes, info.shape, found, info.units,
                                            strict=True):
            if ours == theirs or axis not in _FIELD_OF:
                continue
            field, size = _FIELD_OF[axis], ours // unit   # of a head, where heads are merged
            where = "" if field.startswith(("model.", "peft.")) else f" in model.{stack}"
            count = theirs // size if theirs % size == 0 else f"{theirs} / head_dim"
            asked[f"{field}{where} to {count} (now {unit})"] = None
    return f"To take them as they are, set {'; '.join(asked)}.\n" if asked else ""


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A parameter that prints as its shape."""

    info: ParamInfo

    def __str__(self) -> str:
        return str(self.info.shape)


def fit(info: ParamInfo, shape: Shape) -> str | None:
    """How an array of this shape becomes the parameter: as is | padded | copied; None: not."""
    if info.shape == tuple(shape):
        return "as is"
    if len(info.shape) == len(shape):
        grown = [axis for axis, ours, theirs in zip(info.logical_axes, info.shape, shape,
                                                    strict=True) if ours != theirs]
        if grown == ["vocab"] and all(a >= b for a, b in zip(info.shape, shape, strict=True)):
            return "padded"
    if "expert" in info.logical_axes:
        at = info.logical_axes.index("expert")
        if info.shape[:at] + info.shape[at + 1:] == tuple(shape):
            return "copied"
    return None


def fitted(value: np.ndarray, info: ParamInfo) -> np.ndarray:
    """A whole array made to have the parameter's shape; see `fit`."""
    if fit(info, value.shape) == "copied":
        at = info.logical_axes.index("expert")
        return np.broadcast_to(np.expand_dims(value, at), info.shape)
    at = info.logical_axes.index("vocab")
    mean = value.mean(axis=at, keepdims=True, dtype=np.float32).astype(value.dtype)
    rows = info.shape[at] - value.shape[at]
    return np.concatenate([value, np.repeat(mean, rows, axis=at)], axis=at)


def describe(plan: Assignment, source: ForeignModel, table: Mapping[str, ParamInfo],
             config: ModelConfig) -> list[str]:
    """What was loaded, skipped and left fresh, in lines."""
    numbers = sum(table[path].size for path in plan.loaded)
    lines = [f"init_from {source.where}: {len(plan.loaded)} parameters loaded "
             f"({numbers:,} numbers), {len(plan.fresh)} left fresh, "
             f"{len(plan.skipped) + len(source.unused)} of the source skipped"]
    moved = [f"{path} from {other}" for path, other in plan.loaded.items() if path != other]
    changed = [f"{path}: {how}, {source.shapes[other]} to {table[path].shape}"
              for path, other in plan.loaded.items()
              if (how := fit(table[path], source.shapes[other])) != "as is"]
    differing = [d for d in (differences(config, source.config) if source.knows_function else [])
                 if not (changed and d.startswith("vocab_size:"))]
    for name, items in (("loaded", moved), ("fitted", changed), ("fresh", plan.fresh),
                        ("skipped", (*plan.skipped, *source.unused)),
                        ("differs", [f"model.{d}" for d in differing])):
        lines += [f"  {name:<8} {item}" for item in items[:_SHOWN]]
        if len(items) > _SHOWN:
            lines.append(f"  {name:<8} … {len(items) - _SHOWN} more")
    return lines
