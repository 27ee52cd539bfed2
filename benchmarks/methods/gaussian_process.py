"""GaussianProcess: the model with which Draft & Verify and SWIFT propose skip sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

NOISE = 1e-2
"""Variance of the noise, as a share of the variance of the values."""
KAPPA = 2.5
"""Weight of the uncertainty in the upper bound."""
LENGTHS = (0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
"""Length scales to choose from, in units of the distance between skip sets that differ in one sub-layer."""


@dataclass(frozen=True, eq=False)
class GaussianProcess:
    """A Gaussian process with a Matérn 5/2 kernel over points `n d`; values are standardised.

    Both papers use a Gaussian process with an upper confidence bound and state no more. Noise, bound and kernel are the
    usual defaults; the length scale is the likeliest of `LENGTHS`.
    """

    points: Floats  # n d
    length: float
    factor: Floats  # n n, lower Cholesky factor
    weights: Floats  # n
    mean: float
    scale: float

    @classmethod
    def fit(cls, points: Floats, values: Floats) -> GaussianProcess:
        """The process of the likeliest length scale; `ValueError` without points."""
        if not len(points):
            raise ValueError("a Gaussian process needs at least one point")
        mean, scale = float(values.mean()), float(values.std()) or 1.0
        standard = (values - mean) / scale
        best: tuple[float, float, Floats, Floats] | None = None
        for length in LENGTHS:
            factor = np.linalg.cholesky(_kernel(points, points, length) + NOISE * np.eye(len(points)))
            weights = np.linalg.solve(factor.T, np.linalg.solve(factor, standard))
            likelihood = float(-standard @ weights / 2 - np.log(np.diag(factor)).sum())
            if best is None or likelihood > best[0]:
                best = likelihood, length, factor, weights
        assert best is not None
        return cls(points, best[1], best[2], best[3], mean, scale)

    def predict(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation at `m d` points, `m` each."""
        across = _kernel(points, self.points, self.length)  # m n
        solved = np.linalg.solve(self.factor, across.T)  # n m
        deviation = np.sqrt(np.maximum(1 - (solved**2).sum(axis=0), 0.0))
        return self.mean + self.scale * (across @ self.weights), self.scale * deviation

    def most_promising(self, points: Floats) -> int:
        """The index of the point with the largest upper confidence bound."""
        mean, deviation = self.predict(points)
        return int(np.argmax(mean + KAPPA * deviation))


def _kernel(one: Floats, other: Floats, length: float) -> Floats:
    squared = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1) - 2 * one @ other.T
    scaled = np.sqrt(5 * np.maximum(squared, 0.0)) / length
    kernel: Floats = (1 + scaled + scaled**2 / 3) * np.exp(-scaled)
    return kernel
