"""Objective: predicted tokens per second, from a replay table and a profile, at the best gamma and exit threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfspec.plan import Figures
from selfspec.skip_set import SkipSet
from selfspec_search.profile import Profile
from selfspec_search.table import Table
from selfspec_search.walk import Drafting, walk

THRESHOLDS = 6
"""Exit thresholds tried with every draft length."""
INDIFFERENCE = 0.002
"""Speedups that differ by less, relatively, count as equal: then the simpler way of drafting is taken."""
NEAR = 0.02
"""Estimates from the first depth alone are about this far off."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One skip set with one way of drafting, and what it is predicted to bring on the texts of a table."""

    skip_set: SkipSet
    drafting: Drafting
    figures: Figures

    @property
    def speedup(self) -> float:
        return self.figures.speedup

    def to_dict(self) -> dict[str, Any]:
        """All but the skip set, ready for JSON."""
        return {"gamma": self.drafting.gamma, "threshold": self.drafting.threshold, **self.figures.model_dump()}

    @classmethod
    def from_dict(cls, skip_set: SkipSet, data: Mapping[str, Any]) -> Prediction:
        """The inverse of `to_dict`."""
        figures = {name: data[name] for name in Figures.model_fields}
        drafting = Drafting(data["gamma"], data["threshold"])
        return cls(skip_set=skip_set, drafting=drafting, figures=Figures(**figures))


def ways_to_draft(table: Table, profile: Profile) -> list[Drafting]:
    """Every draft length, without a threshold and with each worth trying. Plain decoding is speedup 1."""
    thresholds: list[float | None] = [None, *table.thresholds(THRESHOLDS)]
    lengths = range(1, min(table.depths, len(profile.rounds) - 1) + 1)
    return [Drafting(gamma, threshold) for threshold in thresholds for gamma in lengths]


def best(table: Table, profile: Profile, skip_set: SkipSet) -> Prediction:
    """The fastest way of drafting without `skip_set`; where it is below 1, plain decoding is faster."""
    predictions = predict(table, profile, skip_set, ways_to_draft(table, profile))
    fastest = max(prediction.speedup for prediction in predictions)
    # Ways come shortest first, thresholds last: the first one that is as good as the fastest is the simplest.
    return next(p for p in predictions if p.speedup >= fastest * (1 - INDIFFERENCE))


def depths_worth_replaying(estimates: Sequence[Prediction]) -> int:
    """One more than the longest draft that may turn out the best way, judging by estimates of every way.

    Of each threshold that comes near the best, the shortest draft counts that is as good as longer ones.
    """
    fastest = max(estimate.speedup for estimate in estimates)
    by_threshold: dict[float | None, list[Prediction]] = {}
    for estimate in estimates:
        by_threshold.setdefault(estimate.drafting.threshold, []).append(estimate)
    deepest = 1
    for ways in by_threshold.values():
        fastest_here = max(way.speedup for way in ways)
        if fastest_here >= fastest * (1 - NEAR):
            shortest = min(w.drafting.gamma for w in ways if w.speedup >= fastest_here * (1 - INDIFFERENCE))
            deepest = max(deepest, shortest)
    return deepest + 1


def predict(table: Table, profile: Profile, skip_set: SkipSet, ways: Sequence[Drafting]) -> list[Prediction]:
    """Figures for each of these ways of drafting without `skip_set`."""
    walked = walk(table, ways)
    rounds = walked.visited.sum(axis=(1, 2))
    accepted = np.where(walked.visited, walked.accepted, 0).sum(axis=(1, 2))
    drafted = np.where(walked.visited, walked.drafted, 0).sum(axis=(1, 2))
    tokens = int(table.written.sum())
    plain = tokens * profile.rounds[0] + table.texts * profile.prefill
    predictions = []
    for index, way in enumerate(ways):
        step = profile.draft_step(skip_set, threshold=way.threshold is not None)
        visited = walked.visited[index]
        seconds = float(
            step * walked.steps[index][visited].sum()
            + profile.round(walked.drafted[index][visited], way.gamma).sum()
            + table.texts * profile.prefill
        )
        figures = Figures(
            tokens_per_round=tokens / int(rounds[index]),
            acceptance_rate=float(accepted[index] / drafted[index]) if drafted[index] else 0.0,
            tokens_per_second=tokens / seconds,
            speedup=plain / seconds,
            texts=table.texts,
        )
        predictions.append(Prediction(skip_set=skip_set, drafting=way, figures=figures))
    return predictions
