"""SWIFT (Xia et al., ICLR 2025, arXiv:2410.06916): random search with regular Bayesian proposals.

Context-based layer set optimisation: skip sets of a fixed ratio are drawn at random; a Gaussian process proposes every
25th. The score of a skip set is the draft's agreement with the target's text, in one pass over a window of 32 tokens.
The best skip set wins. The first and the last layer are never skipped.

The paper searches during decoding, on the current text. Here the windows of several texts give the score, with less
noise, and only the clock ends the search. The process chooses among random skip sets of the ratio and those one
exchange away from the best. All ratios get equal shares of the budget.
"""

from __future__ import annotations

import numpy as np
from selfspec_search.space import Sublayer, skip_set_of, sublayers

from methods.context import RATIOS, Candidate, Context, Selection, Stopwatch
from methods.fixed import evenly
from methods.gaussian_process import Floats, GaussianProcess
from methods.windows import Windows
from selfspec.models.draft_view import draft_view
from selfspec.plan.sublayers import SkipSet

BAYES_EVERY = 25
MOST_SETS = 1000
"""Skip sets: the most that are tried for one ratio."""
TEXTS = 16
"""Windows that give the score of a skip set."""
PROPOSALS = 1000


def swift(context: Context, budget: float, seed: int) -> Selection:
    """The best skip set of each ratio."""
    windows = Windows.of(context.model, evenly(context.texts, TEXTS))
    candidates, tried = [], 0
    for turn, ratio in enumerate(RATIOS):
        search = _Search(context, windows, ratio, np.random.default_rng([seed, turn]))
        candidates.append(Candidate(skip_set=search.run(budget / len(RATIOS)), ratio=ratio))
        tried += len(search.tried)
    return Selection(offered=candidates, tried=tried)


class _Search:
    """The search at one ratio. A skip set is a row of zeros and ones over the sub-layers that may be skipped."""

    def __init__(self, context: Context, windows: Windows, ratio: float, random: np.random.Generator) -> None:
        self.choices: list[Sublayer] = [
            sublayer for sublayer in sublayers(context.num_layers) if 0 < sublayer[1] < context.num_layers - 1
        ]
        self.size = max(1, int(ratio * len(self.choices)))
        self.windows, self.random = windows, random
        self.view = draft_view(context.model, SkipSet())
        self.tried: list[Floats] = []
        self.scores: list[float] = []

    def run(self, budget: float) -> SkipSet:
        watch = Stopwatch(budget)
        while True:
            row = self._next()
            self.tried.append(row)
            self.scores.append(self.windows.agreement(self.view, self._skip_set(row)))
            if len(self.tried) >= MOST_SETS or not watch.allows_another():
                return self._skip_set(self.tried[int(np.argmax(self.scores))])

    def _next(self) -> Floats:
        if (len(self.tried) + 1) % BAYES_EVERY:
            return self._drawn()
        rows = np.stack([*(self._drawn() for _ in range(PROPOSALS)), *self._exchanges()])
        process = GaussianProcess.fit(np.stack(self.tried), np.array(self.scores))
        row: Floats = rows[process.most_promising(rows)]
        return row

    def _drawn(self) -> Floats:
        row = np.zeros(len(self.choices))
        row[self.random.choice(len(row), self.size, replace=False)] = 1
        return row

    def _exchanges(self) -> list[Floats]:
        best = self.tried[int(np.argmax(self.scores))]
        rows = []
        for one in np.flatnonzero(best):
            for other in np.flatnonzero(best == 0):
                row = best.copy()
                row[one], row[other] = 0, 1
                rows.append(row)
        return rows

    def _skip_set(self, row: Floats) -> SkipSet:
        return skip_set_of([self.choices[index] for index in np.flatnonzero(row)])
