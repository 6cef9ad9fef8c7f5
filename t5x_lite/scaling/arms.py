"""Arms of a comparison: read, tuned, and paired run by run at equal budgets.

An arm is the rows of a table with one word in a column (arm by default), or the runs in a folder.
At each budget the best of the settings that were tried stands for its arm (lowest mean loss over
seeds); how many each arm tried is said, for an arm that was tuned harder looks better than it is.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

import numpy as np

from t5x_lite import files
from t5x_lite.errors import UserError, nearest, positive
from t5x_lite.reporting import runs as reporting_runs
from t5x_lite.scaling import frontier, tables

_NOT_TUNED = ("train.seed", "data.seed", "name", "data.cache_dir", "init_from")
_MORE_BUDGETS = ("run both arms at four budgets or more over two decades of compute, each with two "
                 "seeds or more")


@dataclasses.dataclass(frozen=True)
class Runs:
    """One arm's runs [R]. settings: words that tell apart what was tried at one budget."""

    name: str
    x: np.ndarray               # compute, or what else it is compared over
    budget: np.ndarray
    loss: np.ndarray
    seeds: Sequence[str]
    settings: Sequence[Mapping[str, str]]

    def rows(self, chosen: Sequence[int]) -> "Runs":
        """The chosen runs (indices) alone."""
        return Runs(self.name, self.x[chosen], self.budget[chosen], self.loss[chosen],
                    [self.seeds[i] for i in chosen], [self.settings[i] for i in chosen])


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Runs of two arms, paired: the place in a row is a pair. budget: its number, from 0."""

    names: tuple[str, str]
    x: np.ndarray               # [2, P]
    loss: np.ndarray            # [2, P]
    budget: np.ndarray          # [P]
    tuning: dict
    warnings: list[str]


def from_table(table: str, names: Sequence[str], columns: Mapping[str, str], *, over: str,
               arm: str, seed: str, tuned: Sequence[str], where: Mapping[str, str],
               skip_bad: bool) -> list[Runs]:
    """The arms of a file, named by the words of its column `arm`.

    Raises:
        UserError: no such column or arm, cells that hold no positive number.
    """
    labels = [arm, *filter(None, [seed]), *tuned]
    found = tables.read(table, columns, where=where, skip_bad=skip_bad, labels=labels)
    found.require((over, "loss"), "compare")
    positive(f"the lowest {over} of {table}", float(found.columns[over].min()))
    budget = found.columns.get("budget", found.columns[over])
    words = found.labels[arm]
    arms = []
    for name in names:
        places = [i for i, word in enumerate(words) if word == name]
        if not places:
            raise UserError(f"--arms={name}: no row of {table} has that in its column {arm}; there "
                            f"are {', '.join(sorted(set(words))[:20])}.{nearest(name, words)}")
        tried = [_tried(found, i, tuned) for i in places]
        seeds = [found.labels[seed][i] if seed else "" for i in places]
        arms.append(Runs(name, found.columns[over][places], budget[places],
                         found.columns["loss"][places], seeds, tried))
    return arms


def _tried(table: tables.Table, row: int, tuned: Sequence[str]) -> dict[str, str]:
    """The settings of one row: the columns that were tuned, and its size."""
    size = {"params": f"{table.columns['params'][row]:.6g}"} if "params" in table.columns else {}
    return {**size, **{name: table.labels[name][row] for name in tuned}}


def from_folders(folders: Sequence[str], metric: str, *, over: str, skip_bad: bool) -> list[Runs]:
    """The arms of folders with workdirs at any depth: a run's last evaluation is its row. What was
    tried is every field of config.json that differs between an arm's runs of one budget.

    Raises:
        UserError: a folder without runs, or a run without a finite loss or compute.
    """
    names = reporting_runs.shortest_names(list(map(files.path, folders)))
    if len(names) < len(folders):
        raise UserError(f"--arms={','.join(folders)}: the same folder twice.")
    return [_from_folder(folder, name, metric, over, skip_bad)
            for folder, name in zip(folders, names.values(), strict=True)]


def _from_folder(folder: str, name: str, metric: str, over: str, skip_bad: bool) -> Runs:
    field = reporting_runs.AXES.get({"flops": "FLOPs"}.get(over, over), (over,))[0]
    kept, x, loss = [], [], []
    for run in reporting_runs.find([folder]):
        spent, reached = run.last(field), _last(run, metric)
        if spent is None or reached is None or spent <= 0 or reached <= 0:
            if skip_bad:
                continue
            lacking = f"finite {metric}" if spent else f"positive {field}"
            raise UserError(f"{run.folder} has no {lacking} in metrics.jsonl: let it finish, choose "
                            f"another --metric, or leave such runs out by --skip_bad.")
        kept.append(run)
        x.append(spent)
        loss.append(reached)
    if not kept:
        raise UserError(f"{folder}: no run with a finite {metric}.")
    settings = [{n: str(v) for n, v in run.settings.items() if n not in _NOT_TUNED}
                for run in kept]
    spent = np.array(x, float)
    return Runs(name, spent, spent, np.array(loss, float),
                [str(run.seed) for run in kept], settings)


def _last(run: reporting_runs.Run, metric: str) -> float | None:
    """The metric of the last line that holds it; None where that is not a number. A run of one task
    has no eval/all: its own stands for it."""
    one_task = metric.replace("eval/all/", "eval/*/")
    for name in dict.fromkeys((metric, one_task)):
        lines = [line for line in run.lines if fnmatch.filter(line, name)]
        if lines:
            value = lines[-1][fnmatch.filter(lines[-1], name)[0]]
            return value if reporting_runs.is_number(value) else None
    return None


def pair(one: Runs, other: Runs) -> Pairs:
    """The runs of both arms at each budget that both have, the best setting's, seed by seed; runs
    without a seed in common are paired in their order.

    Raises:
        UserError: one budget, no budgets in common, or no loss that both arms reached.
    """
    groups, warnings = _budgets(one, other)
    counts: dict[str, list[int]] = {one.name: [], other.name: []}
    edges: dict[str, int] = {one.name: 0, other.name: 0}
    x, loss, budget, left = [], [], [], 0
    for number, group in enumerate(groups):
        best = []
        for arm, places in zip((one, other), group, strict=True):
            chosen, tried, edge = _best(arm.rows(places))
            counts[arm.name].append(tried)
            edges[arm.name] += edge
            best.append(chosen)
        partners = _partners(best[0].seeds, best[1].seeds)
        left += len(best[0].seeds) + len(best[1].seeds) - 2 * len(partners)
        for i, j in partners:
            x.append([best[0].x[i], best[1].x[j]])
            loss.append([best[0].loss[i], best[1].loss[j]])
            budget.append(number)
    if left:
        warnings.append(f"{left} runs have no partner in the other arm at their budget and are left "
                        f"out: give both arms the same seeds")
    pairs = Pairs((one.name, other.name), np.array(x).T, np.array(loss).T, np.array(budget),
                  _tuning(counts, edges), warnings)
    _check_common(pairs)
    return pairs


def _budgets(one: Runs, other: Runs) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """(the runs of either arm at each budget that both have, what is left out)."""
    both = np.concatenate([one.budget, other.budget])
    clusters = frontier.budgets(tables.Table({"budget": both, "flops": both}))
    groups, alone = [], []
    for cluster in clusters:
        first = [int(i) for i in cluster if i < len(one.budget)]
        second = [int(i) - len(one.budget) for i in cluster if i >= len(one.budget)]
        if first and second:
            groups.append((first, second))
        else:
            alone.append(f"{both[cluster].mean():.3g} ({one.name if first else other.name} alone)")
    if not groups:
        raise UserError(f"{one.name} and {other.name} have no budget in common (within 15 per "
                        f"cent): {', '.join(alone[:8])}; {_MORE_BUDGETS}, or name a column of "
                        f"nominal budgets by --columns=budget=COL,….")
    if len(groups) == 1:
        raise UserError(f"{one.name} and {other.name} share one budget"
                        f"{'; left out: ' + ', '.join(alone[:8]) if alone else ''}: a difference of "
                        f"losses at one budget says nothing of compute; {_MORE_BUDGETS}.")
    return groups, [f"budgets left out: {', '.join(alone[:8])}"] if alone else []


def _best(runs: Runs) -> tuple[Runs, int, bool]:
    """(the runs of the setting with the lowest mean loss, how many settings there were, whether a
    number that was tried at three values or more is best at its end)."""
    differing = [n for n in runs.settings[0]
                 if len({setting.get(n) for setting in runs.settings}) > 1]
    groups: dict[tuple, list[int]] = {}
    for place, setting in enumerate(runs.settings):
        groups.setdefault(tuple(setting.get(n) for n in differing), []).append(place)
    best = min(groups, key=lambda key: runs.loss[groups[key]].mean())
    edge = any(_at_edge(best[i], {key[i] for key in groups}) for i in range(len(differing)))
    return runs.rows(groups[best]), len(groups), edge


def _at_edge(value: str, tried: set[str]) -> bool:
    try:
        numbers = sorted(map(float, tried))
    except (TypeError, ValueError):     # words have no ends
        return False
    return len(numbers) > 2 and float(value) in (numbers[0], numbers[-1])


def _partners(seeds: Sequence[str], others: Sequence[str]) -> list[tuple[int, int]]:
    """Places of partners: equal seeds first, then the rest in order."""
    found = []
    free = list(range(len(others)))
    for place, seed in enumerate(seeds):
        match = next((j for j in free if seed and others[j] == seed), None)
        if match is not None:
            found.append((place, match))
            free.remove(match)
    rest = [i for i in range(len(seeds)) if i not in {i for i, _ in found}]
    return found + list(zip(rest, free, strict=False))


def _tuning(counts: Mapping[str, list[int]], edges: Mapping[str, int]) -> dict:
    """Settings tried by either arm at each budget, and whether that is alike."""
    first, second = counts.values()
    alike = first == second
    if not alike:
        said = "tuned unlike: " + ", ".join(
            f"{name} tried {_range(tried)} settings a budget" for name, tried in counts.items()) + \
            "; the arm that tried more looks better than it is"
    elif max(first) == 1:
        said = "one setting a budget in both arms: what neither was tuned for does not show"
    else:
        said = f"tuned alike: {_range(first)} settings a budget in both arms"
    at_end = [f"{name} at {n} of {len(counts[name])} budgets" for name, n in edges.items() if n]
    if at_end:
        said += f"; the best setting lies at the end of what was tried: {', '.join(at_end)}"
    return {"alike": alike, "settings": dict(counts), "at_the_end": dict(edges), "said": said}


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _check_common(pairs: Pairs) -> None:
    """Raises UserError where no loss was reached by both arms."""
    low, high = pairs.loss.min(axis=1), pairs.loss.max(axis=1)
    for better, worse in ((0, 1), (1, 0)):
        if high[better] < low[worse]:
            span = pairs.x.max() / pairs.x.min()
            raise UserError(
                f"no loss was reached by both arms: {pairs.names[better]} is at "
                f"{low[better]:.4g} to {high[better]:.4g}, {pairs.names[worse]} at "
                f"{low[worse]:.4g} to {high[worse]:.4g}. The ratio of compute is above {span:.3g}, "
                f"the whole range of budgets; run {pairs.names[better]} at smaller budgets and "
                f"{pairs.names[worse]} at larger ones.")
