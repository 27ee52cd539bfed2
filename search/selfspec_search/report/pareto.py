"""Pareto: which trials no other one beats in both draft cost and agreement."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, float]
"""(cost, agreement): the less of the first and the more of the second, the better. Both finite."""


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, by rising cost.

    One point dominates another if it costs no more, agrees no less, and is not equal to it; so of equal points on the
    front, all are on it, in the order given.

    >>> pareto_front([(0.5, 0.9), (0.4, 0.7), (0.6, 0.8)])
    [1, 0]
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
