"""Minimises many small problems at once: BFGS over a stack of parameter vectors, in numpy.

Starts of a fit and resamples of a bootstrap are such stacks: [S, P] with few parameters, so that
one pass over the runs serves all of them.
"""

from collections.abc import Callable

import numpy as np

Objective = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

_ARMIJO = 1e-4
_HALVINGS = 30


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def minimise(objective: Objective, theta: np.ndarray, low: np.ndarray, high: np.ndarray, *,
             iterations: int = 400, tolerance: float = 1e-13) -> tuple[np.ndarray, np.ndarray]:
    """theta [S, P] -> (best parameters [S, P], objective there [S]).

    Args:
        objective: (theta [S', P], which of the S problems [S']) -> (values [S'], slopes [S', P]).
        low, high: bounds [P]; steps are cut off at them.
        tolerance: a problem rests once a step lowers it by less than this share, twice in a row.
    """
    theta = np.clip(theta, low, high)
    every = np.arange(len(theta))
    value, slope = objective(theta, every)
    inverse = _fresh(slope)
    idle = np.where(np.isfinite(value), 0, 2)
    for _ in range(iterations):
        live = np.flatnonzero(idle < 2)
        if not live.size:
            break
        free = _free(theta[live], slope[live], low, high)
        step, reset = _direction(inverse[live], np.where(free, slope[live], 0))
        inverse[live[reset]] = _fresh(slope[live[reset]])
        moved, new_value, new_slope = _search(objective, theta[live], value[live], slope[live],
                                              step, live, low, high)
        gain = value[live] - new_value
        done = gain <= tolerance * np.abs(value[live])
        idle[live] = np.where(done, idle[live] + 1, 0)
        inverse[live] = _update(inverse[live], moved - theta[live], new_slope - slope[live])
        # A problem that rests is tried once more along its steepest slope.
        inverse[live[done]] = _fresh(new_slope[done])
        theta[live], value[live], slope[live] = moved, new_value, new_slope
    return theta, value


def _fresh(slope: np.ndarray) -> np.ndarray:
    """[S, P, P]: steps of length 0.1 along the slope."""
    size = np.linalg.norm(slope, axis=1, keepdims=True)[..., None]
    return np.eye(slope.shape[1]) * 0.1 / np.maximum(size, 1e-300)


def _free(theta: np.ndarray, slope: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[S, P]: not held by a bound that the slope pushes against."""
    return ~((theta <= low) & (slope > 0) | (theta >= high) & (slope < 0))


def _direction(inverse: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps [S, P], whether one had to fall back on the slope [S])."""
    step = -np.einsum("spq,sq->sp", inverse, slope)
    step = np.where(slope == 0, 0, step)
    uphill = ~((step * slope).sum(1) < 0) | ~np.isfinite(step).all(1)
    plain = -np.einsum("spq,sq->sp", _fresh(slope), slope)
    return np.where(uphill[:, None], plain, step), uphill


def _search(objective, theta, value, slope, step, which, low, high):
    """Halves each step until it lowers its objective enough; (theta, values, slopes) there."""
    size = np.ones(len(theta))
    best, best_value, best_slope = theta.copy(), value.copy(), slope.copy()
    open_ = np.arange(len(theta))
    for _ in range(_HALVINGS):
        trial = np.clip(theta[open_] + size[open_, None] * step[open_], low, high)
        found, found_slope = objective(trial, which[open_])
        expected = (slope[open_] * (trial - theta[open_])).sum(1)
        good = found <= value[open_] + _ARMIJO * np.minimum(expected, 0)
        taken = open_[good]
        best[taken], best_value[taken] = trial[good], found[good]
        best_slope[taken] = found_slope[good]
        open_ = open_[~good]
        if not open_.size:
            break
        size[open_] *= 0.4
    return best, best_value, best_slope


def _update(inverse: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
    """BFGS's update where the curvature is positive; unchanged elsewhere."""
    curvature = (step * change).sum(1)
    fit = curvature > 1e-14 * np.linalg.norm(step, axis=1) * np.linalg.norm(change, axis=1)
    rho = np.where(fit, 1 / np.where(fit, curvature, 1), 0)
    eye = np.eye(step.shape[1])
    left = eye - rho[:, None, None] * step[:, :, None] * change[:, None, :]
    new = left @ inverse @ left.transpose(0, 2, 1)
    return new + rho[:, None, None] * step[:, :, None] * step[:, None, :]
