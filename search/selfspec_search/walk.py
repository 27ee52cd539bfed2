"""Walk: the rounds that decoding would have gone through, for many drafts lengths and thresholds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfspec_search.table import Table


@dataclass(frozen=True)
class Drafting:
    """How long to draft: at most `gamma` tokens, fewer where the confidence falls below `threshold`."""

    gamma: int
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class Walk:
    """Rounds of `c` ways of drafting over a table's texts (`c b s`; only those `visited` are rounds).

    `accepted` is exact. `drafted` and `steps` (passes of the draft: one more than drafted where the confidence stopped
    it) are exact without a threshold; with one, what a draft does behind its first wrong token is an expectation.
    """

    visited: NDArray[np.bool_]
    accepted: NDArray[np.int64]
    drafted: NDArray[np.float64]
    steps: NDArray[np.float64]

    def rounds(self, way: int) -> list[list[tuple[float, int]]]:
        """(drafted, accepted) of each round of each text, as `Stats.history` has them."""
        return [
            list(zip(self.drafted[way, text, at].tolist(), self.accepted[way, text, at].tolist(), strict=True))
            for text, at in ((text, self.visited[way, text]) for text in range(self.visited.shape[1]))
        ]


def walk(table: Table, ways: Sequence[Drafting]) -> Walk:
    """Go through every text's rounds in each of these ways."""
    starts = np.arange(table.runs.shape[1])
    left = table.allowed[:, None] - starts - 1  # b s, what a round may draft at most
    gammas = np.array([way.gamma for way in ways])[:, None, None]
    limits = np.clip(left, 0, gammas)  # c b s
    thresholds = {way.threshold for way in ways}
    stops_at = {threshold: table.stops(threshold) for threshold in thresholds}
    stops = np.stack([stops_at[way.threshold] for way in ways])
    accepted = np.minimum(np.minimum(table.runs, stops), limits)
    survival = np.array([1 - table.hazard(way.threshold) for way in ways])[:, None, None]
    drafted, steps = _drafted(table.runs, stops, limits, survival)
    return Walk(_visit(accepted, table.written), accepted, drafted, steps)


def _drafted(
    runs: NDArray[np.int64], stops: NDArray[np.int64], limits: NDArray[np.int64], survival: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Drafted tokens and passes of the draft at every start, `c b s`.

    A draft that went wrong at depth `run` goes on along a path of its own, for up to `limit - run - 1` steps; each
    ends it with the same probability as a step on the path.
    """
    stopped = (stops < limits) & (stops <= runs)
    wrong = (runs < limits) & ~stopped
    further = np.where(wrong, limits - runs - 1, 0)
    # sum of survival^k over k < further, and over 1 <= k <= further
    whole = survival >= 1
    extra_steps = np.where(whole, further, (1 - survival**further) / np.where(whole, 1, 1 - survival))
    extra_drafted = extra_steps * survival
    drafted = np.where(stopped, stops, np.where(wrong, runs + 1 + extra_drafted, limits))
    steps = np.where(stopped, stops + 1, np.where(wrong, runs + 1 + extra_steps, limits))
    return drafted.astype(float), steps.astype(float)


def _visit(accepted: NDArray[np.int64], written: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which starts are a round's: the first one, and behind each round the one that its tokens lead to."""
    c, b, s = accepted.shape
    visited = np.zeros((c * b, s + 1), dtype=np.bool_)
    advance = np.ones((c * b, s + 1), dtype=np.int64)
    advance[:, :s] += accepted.reshape(c * b, s)
    ends = np.tile(written, c)
    visited[:, 0] = True
    for start in range(s):
        here = np.flatnonzero(visited[:, start] & (start < ends))
        visited[here, np.minimum(start + advance[here, start], s)] = True
    visited &= np.arange(s + 1) < ends[:, None]
    return visited[:, :s].reshape(c, b, s)
