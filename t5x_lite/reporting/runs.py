"""Runs as a reader of their folders sees them: config.json, metrics.jsonl and what lies beside.

Nothing here needs the run's code, its devices or TensorFlow.
"""

import dataclasses
import fnmatch
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5x_lite import files
from t5x_lite.errors import UserError

# The x axes of every curve: name -> (field of a line of metrics.jsonl, unit).
AXES = {"step": ("step", ""), "tokens": ("tokens_seen", ""), "FLOPs": ("flops", ""),
        "parameters": ("params_no_embed_head", "without embeddings, with the head"),
        "hours": ("hours", "h")}
SIZES = ("parameters",)   # axes on which a run is one point: its last value
_SEED = re.compile(r"seed_(\d+)")
# Fields of a config in which runs of one arm differ: their seeds, and where they lie.
_NOT_SETTINGS = ("train.seed", "data.seed", "name", "data.cache_dir", "init_from",
                 "branch_from")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder, read."""

    folder: files.Path
    arm: str                          # what it is grouped by: the experiment's arm, or its settings
    seed: int
    settings: Mapping[str, Any]       # config.json, flat: "train.num_steps" -> 400
    lines: Sequence[Mapping[str, Any]]   # of metrics.jsonl, each with "hours" where they are known
    texts: Mapping[str, str]          # file name -> content, of what a run writes for people
    unreadable: int = 0               # lines of metrics.jsonl that are none

    @property
    def name(self) -> str:
        """Arm and seed, which tell it from others on a page."""
        return f"{self.arm}, seed {self.seed}"

    def last(self, metric: str) -> float | None:
        """The last finite value of a metric."""
        values = (line.get(metric) for line in reversed(self.lines))
        return next((v for v in values if is_number(v)), None)

    def not_finite_since(self, metric: str) -> int | None:
        """The step from which on each value of a metric is NaN, infinite or null; None where the last one
        is a number."""
        since = None
        for line in reversed(self.lines):
            if is_number(line.get(metric)):
                break
            if metric in line:
                since = int(line["step"])
        return since


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float holds."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max   # NaN is not


def value(values: Mapping[str, Any], metric: str) -> float | None:
    """The first finite number of this name, in which "*" stands for anything: "*/metric/em"; of several
    tasks' that of all together comes first, "all/loss" for "*/loss"."""
    names = sorted(fnmatch.filter(values, metric), key=lambda name: "all" not in name.split("/"))
    return next((values[name] for name in names if is_number(values[name])), None)


def curve(run: Run, metric: str, axis: str = "step") -> dict[float, float]:
    """{place on the axis: value} of one metric of a run; of an axis of SIZES its last value alone.

    axis: a key of AXES.
    """
    field, _ = AXES[axis]
    points = ((line.get(field), value(line, metric)) for line in run.lines)
    return {place: number for place, number in points if is_number(place) and number is not None}


def find(paths: Sequence[str]) -> list[Run]:
    """The runs of folders: a run's own, or one that holds runs at any depth.

    Raises:
        UserError: a path that is no folder, or holds no metrics.jsonl with a line in it.
    """
    return find_with_empty(paths)[0]


def find_with_empty(paths: Sequence[str]) -> tuple[list[Run], list[files.Path]]:
    """(the runs of folders as `find` gives them, the folders of runs that have no line of metrics)."""
    folders: dict[files.Path, files.Path] = {}   # a run's folder -> the path that named it
    for path in map(files.path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is no folder: name workdirs, or a folder that holds some.")
        found = files.find(path, "metrics.jsonl")
        if not found:
            raise UserError(f"{path} holds no metrics.jsonl: is it the workdir of a run?")
        folders |= {file.parent: path for file in found}
    runs = [_read(folder, path) for folder, path in folders.items()]
    kept = [run for run in runs if run.lines]
    if not kept:
        raise UserError(f"{', '.join(map(str, folders))}: no line of metrics yet; train.log_every "
                        "says how often one is written.")
    return _with_arms(_told_apart(kept, folders)), [run.folder for run in runs if not run.lines]


def _told_apart(runs: Sequence[Run], named_by: Mapping[files.Path, files.Path]) -> list[Run]:
    """The runs, with the path that named them before an arm that two paths have and that is not one
    arm: a seed twice, or other settings."""
    names = shortest_names(list(dict.fromkeys(named_by.values())))
    result = []
    members = by_arm(runs)
    for run in runs:
        others = members[run.arm]
        same = len({named_by[other.folder] for other in others}) == 1 or (
            len({other.seed for other in others}) == len(others)
            and len({_settings_key(other) for other in others}) == 1)
        arm = run.arm if same or not run.arm else f"{names[named_by[run.folder]]}/{run.arm}"
        result.append(dataclasses.replace(run, arm=arm))
    return result


def shortest_names(paths: Sequence[files.Path]) -> dict[files.Path, str]:
    """{path: as many of its last folders as tell it from the others}."""
    parts = {path: files.path(files.absolute(str(path))).parts for path in paths}
    depths = range(1, max(map(len, parts.values()), default=0) + 1)
    depth = next((n for n in depths if len({p[-n:] for p in parts.values()}) == len(parts)), 1)
    return {path: "/".join(p[-depth:]) for path, p in parts.items()}


def _read(folder: files.Path, path: files.Path) -> Run:
    lines, unreadable = _lines(folder / "metrics.jsonl")
    config = _json(folder / "config.json")
    settings = dict(flatten(config))
    texts = {name: files.read_text(folder / name)
             for name in ("samples.txt", "data.txt") if (folder / name).is_file()}
    seed = settings.get("train.seed", 0)
    return Run(folder, _arm(folder, path), seed if isinstance(seed, int) else 0, settings,
               [*_with_hours(lines)], texts, unreadable)


def _arm(folder: files.Path, path: files.Path) -> str:
    """The folders between the named path and the run, without the seed's; "" where there are none."""
    parts = [part for part in folder.relative_to(path).parts if not _SEED.fullmatch(part)]
    return "/".join(parts)


def _json(file: files.Path) -> dict:
    try:
        content = json.loads(files.read_text(file))
    except (OSError, ValueError, RecursionError):
        return {}   # a page can do without: the table of settings then has a gap
    return content if isinstance(content, dict) else {}


def _lines(file: files.Path) -> tuple[list[dict], int]:
    """(lines that are objects with a step, how many are none): a kill may leave half a line."""
    lines, unreadable = [], 0
    for text in files.read_text(file).splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and is_number(line.get("step")):
            lines.append(line)
        elif text.strip():
            unreadable += 1
    return lines, unreadable


def _with_hours(lines: Sequence[Mapping]) -> Iterator[dict]:
    """Each line with "hours": of the seconds that it says, else of chips; the last known ones where
    it says neither, as an evaluation's does not."""
    hours = 0.0
    for line in lines:
        if is_number(line.get("seconds")):
            hours = line["seconds"] / 3600
        elif is_number(line.get("chip_hours")):
            hours = line["chip_hours"]
        yield {**line, "hours": hours}


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("a.b[0].c", value) of every leaf of nested mappings and of lists that hold some."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            yield from flatten({f"{name}[{i}]": part for i, part in enumerate(value)}, prefix)
        else:
            yield path, value


def _with_arms(runs: Sequence[Run]) -> list[Run]:
    """The runs, each with an arm: the experiment's, or one for each setting of what is no seed. Runs
    of the same settings and seed are arms of their own, as who names them both compares them."""
    known: dict[tuple[str, int], str] = {}
    seen: dict[tuple[str, int], int] = {}   # how many runs had these settings and this seed
    named = []
    for run in runs:
        arm = run.arm
        if not arm:
            key = _settings_key(run)
            again = seen[key, run.seed] = seen.get((key, run.seed), -1) + 1
            arm = known.setdefault((key, again), _unused(_own_name(run.folder), known.values()))
        named.append(dataclasses.replace(run, arm=arm))
    return named


def _settings_key(run: Run) -> str:
    """What runs of one arm have in common."""
    return json.dumps({k: v for k, v in sorted(run.settings.items()) if k not in _NOT_SETTINGS},
                      default=str)


def _own_name(folder: files.Path) -> str:
    """The folder's name, or that of the first one around it that is not a seed's."""
    folder = folder.resolve()
    names = [part.name for part in (folder, *folder.parents)]
    return next((name for name in names if name and not _SEED.fullmatch(name)), folder.name)


def _unused(name: str, taken) -> str:
    """The name, numbered where it is taken."""
    names, number, chosen = set(taken), 1, name
    while chosen in names:
        number += 1
        chosen = f"{name} ({number})"
    return chosen


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """{arm: its runs}, in the order of the first of each."""
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """Names of what is measured: held-out before training's, of these losses, then what tasks' own
    metric functions give, accuracies and the rest; over all tasks before one's."""
    names: dict[str, None] = {}
    for run in runs:
        for line in run.lines:
            names |= dict.fromkeys(n for n, v in line.items() if "/" in n and is_number(v))
    kinds = ("*/loss", "*/metric/*", "*/accuracy", "*")
    return sorted(names, key=lambda n: (
        not n.startswith("eval/"), not n.startswith("train/"),
        next(i for i, kind in enumerate(kinds) if fnmatch.fnmatchcase(n, kind)),
        not n.startswith("eval/all/"), n))
