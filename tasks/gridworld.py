"""Trajectories with their return in front, in a gridworld whose best policy is known.

Chen et al. 2021 (Decision Transformer, arXiv:2106.01345), in its shortest form: a model of random walks
that is told how good a walk is, and asked for the best one.

    gridworld          return, start -> action, cell, action, cell, … up to the goal, in the end token
    gridworld_blind    the same with one return in front of all walks: what imitation alone gives

A grid of 5 x 5 with walls (GRID); each step costs 1, so that the return is minus the number of steps. The
training walks choose actions at random and reach the goal within 20 steps. Held out are no walks but
questions: each of the free cells with the return of its shortest path, and a shortest path as targets.
Predictions are walked in the grid; `walks` says which share arrives, and which by a shortest path.

Codes: cells 0 to 24, actions 25 to 28 (up, down, left, right), a return of -n is 29 + n.
"""

import collections
import functools
from collections.abc import Sequence

import numpy as np

from t5x_lite.data import arrays
from t5x_lite.data.arrays import Example

GRID = (".....",
        ".##.#",
        "...#.",
        ".#...",
        "...#G")
SIDE, LONGEST = 5, 20
TRIED, KEPT = 4000, 200   # walks from each cell: of those that arrive the first 200 are learned
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
ACTION, RETURN = SIDE**2, SIDE**2 + len(MOVES)
CODES = RETURN + LONGEST + 1
GOAL = "".join(GRID).index("G")
FREE = [cell for cell in range(SIDE**2) if "".join(GRID)[cell] == "."]


def step(cell: int, action: int) -> int:
    """Where an action leads: nowhere at a wall or the edge."""
    row, column = cell // SIDE + MOVES[action][0], cell % SIDE + MOVES[action][1]
    inside = 0 <= row < SIDE and 0 <= column < SIDE
    return row * SIDE + column if inside and GRID[row][column] != "#" else cell


@functools.cache
def distances() -> dict[int, int]:
    """{cell: steps of its shortest path to the goal}, by breadth-first search."""
    found, waiting = {GOAL: 0}, collections.deque([GOAL])
    while waiting:
        cell = waiting.popleft()
        for action in range(len(MOVES)):   # moves can be undone
            other = step(cell, action)
            if other not in found:
                found[other] = found[cell] + 1
                waiting.append(other)
    return found


def arrives(start: int, actions: Sequence[int]) -> int | None:
    """The number of steps after which the actions reach the goal; None: they do not."""
    cell = start
    for count, action in enumerate(actions, 1):
        cell = step(cell, action)
        if cell == GOAL:
            return count
    return None


def random_walks(seed: int = 0) -> list[tuple[int, list[int]]]:
    """(start, actions) of walks that reach the goal in time, KEPT or fewer from each cell."""
    rng = np.random.default_rng(seed)
    table = np.array([[step(cell, action) for action in range(len(MOVES))] for cell in range(SIDE**2)])
    found = []
    for start in FREE:
        actions = rng.integers(len(MOVES), size=(TRIED, LONGEST))
        cells, lengths = np.full(TRIED, start), np.zeros(TRIED, int)
        for count in range(LONGEST):
            cells = table[cells, actions[:, count]]
            lengths[(cells == GOAL) & (lengths == 0)] = count + 1
        arrived = np.flatnonzero(lengths)[:KEPT]
        found += [(start, actions[walk, :lengths[walk]].tolist()) for walk in arrived]
    return found


def shortest(start: int) -> list[int]:
    """A shortest path's actions: the first of those that come nearer."""
    cell, actions = start, []
    while cell != GOAL:
        nearer = [a for a in range(len(MOVES)) if distances()[step(cell, a)] < distances()[cell]]
        actions.append(nearer[0])
        cell = step(cell, nearer[0])
    return actions


def _example(start: int, actions: Sequence[int], told: int) -> Example:
    cell, targets = start, []
    for action in actions:
        cell = step(cell, action)
        targets += [ACTION + action, cell]
    return {"inputs": ([RETURN + told, start],), "targets": (targets,)}


def trajectories(blind: bool) -> dict[str, list[Example]]:
    """The walks, and the questions of every free cell."""
    return {"train": [_example(start, actions, 0 if blind else len(actions))
                      for start, actions in random_walks()],
            "validation": [_example(start, shortest(start), 0 if blind else distances()[start])
                           for start in FREE]}


def walks(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Per cent of predicted walks that arrive at the goal, and that do so by a shortest path."""
    arrived = best = 0
    for start, text in zip(FREE, predictions, strict=True):
        actions = [int(code) - ACTION for code in text.split() if ACTION <= int(code) < RETURN]
        count = arrives(start, actions)
        arrived += count is not None
        best += count == distances()[start]
    return {"arrives": 100 * arrived / len(FREE), "shortest": 100 * best / len(FREE)}


for _name, _blind in (("gridworld", False), ("gridworld_blind", True)):
    arrays.register(_name, functools.partial(trajectories, _blind), f"codes:{CODES}",
                    features=("inputs", "targets"), ends=True, metric_fns=[walks])
