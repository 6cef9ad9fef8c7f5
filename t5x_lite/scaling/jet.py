"""Exact first derivatives beside values: the chain rule in numpy, so that a law is written once.

A Jet holds a value [..., R] and its derivatives [..., P, R] by the P parameters of a law at R runs.
"""

from typing import Union

import numpy as np

Operand = Union["Jet", float, np.ndarray]


class Jet:
    """A value and its derivatives; arithmetic with other Jets, arrays and numbers."""

    __array_ufunc__ = None      # array / Jet asks the Jet, not each element of the array

    def __init__(self, value: np.ndarray, slope: np.ndarray):
        self.value = value
        self.slope = slope

    def _chain(self, value: np.ndarray, derivative: np.ndarray) -> "Jet":
        return Jet(value, self.slope * derivative[..., None, :])

    def __add__(self, other: Operand) -> "Jet":
        if isinstance(other, Jet):
            return Jet(self.value + other.value, self.slope + other.slope)
        return Jet(self.value + other, self.slope)

    def __mul__(self, other: Operand) -> "Jet":
        if isinstance(other, Jet):
            return Jet(self.value * other.value, self.slope * other.value[..., None, :]
                       + other.slope * self.value[..., None, :])
        factor = np.broadcast_to(other, self.value.shape)
        return Jet(self.value * factor, self.slope * factor[..., None, :])

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> "Jet":
        return self * -1.0

    def __sub__(self, other: Operand) -> "Jet":
        return self + (-other)

    def __rsub__(self, other: Operand) -> "Jet":
        return -self + other

    def inverse(self) -> "Jet":
        """1/x."""
        return self._chain(1 / self.value, -1 / self.value**2)

    def __truediv__(self, other: Operand) -> "Jet":
        return self * (other.inverse() if isinstance(other, Jet) else 1 / np.asarray(other))

    def __rtruediv__(self, other: Operand) -> "Jet":
        return self.inverse() * other

    def exp(self) -> "Jet":
        """e^x, held at e^700 above it."""
        value = np.exp(np.minimum(self.value, 700))
        return self._chain(value, value)

    def log(self) -> "Jet":
        """Natural logarithm; what is not positive counts as the smallest number."""
        safe = np.maximum(self.value, 1e-300)
        return self._chain(np.log(safe), 1 / safe)

    def __pow__(self, power: Operand) -> "Jet":
        return (self.log() * power).exp()

    def log1p_exp(self) -> "Jet":
        """log(1 + e^x)."""
        return self._chain(np.logaddexp(0, self.value), 0.5 * (1 + np.tanh(self.value / 2)))

    def minimum(self, bound: Operand) -> "Jet":
        """The lesser of both, with the lesser's derivative."""
        limit = bound if isinstance(bound, Jet) else self * 0 + bound
        mine = self.value <= limit.value
        return Jet(np.where(mine, self.value, limit.value),
                   np.where(mine[..., None, :], self.slope, limit.slope))


def parameters(theta: np.ndarray, num_runs: int) -> list[Jet]:
    """The P parameters of theta [..., P] as Jets over R runs, each with slope 1 by itself."""
    size = theta.shape[-1]
    shape = (*theta.shape[:-1], num_runs)
    unit = np.broadcast_to(np.eye(size)[:, :, None], (*theta.shape[:-1], size, size, num_runs))
    return [Jet(np.broadcast_to(theta[..., i, None], shape), unit[..., i, :, :])
            for i in range(size)]
